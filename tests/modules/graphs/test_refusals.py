"""What no graph does runs as it is, and what a recording must not read."""

import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import backend
from fastbert.hf import stack
from fastbert.modules.graphs import replays
from fastbert.modules.graphs.call import Precision
from fastbert.modules.request import CAPTURING
from tests.modules.graphs.case import batch, layers_of, logits, models, step
from tests.versions import IS_V4


def test_a_recording_neither_reads_nor_keeps_the_copies_that_autocast_makes():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        with Precision.of(torch.ones(1)).restored():
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled()


REFUSALS = {
    "a general mask": lambda model, inputs: (
        model(inputs["input_ids"], attention_mask=torch.ones(2, 1, 7, 7).tril().bool()).logits
    ),
    "a forced backend": lambda model, inputs: _forced(model, inputs),
    "a dispatch mode": lambda model, inputs: _counted(model, inputs),
    "a dispatch mode without hooks": lambda model, inputs: _dispatched(model, inputs),
    "anomaly mode": lambda model, inputs: _watched(model, inputs),
    "a replica": lambda model, inputs: _replicated(model, inputs),
    "parameters of several models": lambda model, inputs: _together(model, inputs),
}


def _forced(model, inputs):
    with backend.use("reference"):
        return model(**inputs).logits


def _counted(model, inputs):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return model(**inputs).logits


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _dispatched(model, inputs):
    with Watch():
        return model(**inputs).logits


def _together(model, inputs):
    several = {name: torch.stack([p, p]) for name, p in model.named_parameters()}
    inputs = {"input_ids": inputs["input_ids"]}  # the values of a mask may not be read there

    def logits_of(parameters):
        return torch.func.functional_call(model, parameters, (), inputs).logits

    with torch.no_grad():
        return torch.func.vmap(logits_of)(several)


def _watched(model, inputs):
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        return model(**inputs).logits


def _replicated(model, inputs):
    """As DataParallel marks the modules of a replica."""
    vars(layers_of(model))["_is_replica"] = True
    return model(**inputs).logits


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_what_no_graph_does_runs_as_it_is(kind, name, recorder):
    plain, recorded = (model.eval() for model in models(kind))
    inputs = batch([7, 3])
    actual, expected = (REFUSALS[name](model, inputs) for model in (recorded, plain))
    torch.testing.assert_close(actual, expected)
    assert recorder.recorded == 0


def test_layers_that_are_read_in_each_call_have_no_graph(recorder):
    """Those with a hook inside, though attention reads only the probability of its dropout."""
    plain, recorded = (model.eval() for model in models("own"))
    inputs = batch([7, 3])
    for model in (plain, recorded):
        dropout = layers_of(model)[0].attention.self.dropout
        dropout.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == 0
    routes = fastbert.explain(recorded, **inputs, show=False).routes
    (reason,) = {route.reason for route in routes if route.module == "CUDA graph"}
    assert reason == "a hook inside the layers"


@pytest.mark.skipif(IS_V4, reason="transformers 4.57 captures without hooks that stay")
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_hooks_that_transformers_left_to_capture_outputs_cost_nothing(kind, recorder, monkeypatch):
    """One call with output_attentions hangs them on layers and attentions, where they sleep."""
    model = models(kind)[1].eval()
    model.set_attn_implementation("eager")
    inputs, layers = batch([7, 3]), layers_of(model)
    expected = logits(model, inputs)
    with torch.no_grad():
        model(**inputs, output_attentions=True)
    assert all(layer._forward_hooks for layer in layers)
    torch.testing.assert_close(logits(model, inputs), expected)
    replayed = recorder.replayed
    read = []
    with monkeypatch.context() as patched:
        patched.setattr(stack._PLANNER, "parts_of", read.append)
        torch.testing.assert_close(logits(model, inputs), expected)
    assert recorder.replayed == replayed + 1
    assert read == []

    # a model around an encoder wakes them
    base, capturing = model.base_model, sys.modules[CAPTURING]
    encoder = base.transformer if kind == "DistilBert" else base.encoder
    with torch.no_grad():
        x = base.embeddings(inputs["input_ids"])
        # with hooks of the user's own each layer is read alone, too
        hooks = [layer.register_forward_hook(lambda *_: None) for layer in layers]
        last = encoder(x)[0]
        for hook in hooks:
            hook.remove()
        token = capturing._active_collector.set(collected := {"attentions": []})
        try:
            torch.testing.assert_close(encoder(x)[0], last)
        finally:
            capturing._active_collector.reset(token)
        assert len(collected["attentions"]) == len(layers)
        torch.testing.assert_close(encoder(x)[0], last)
        assert len(collected["attentions"]) == len(layers)


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_forward_mode_differentiation_has_no_graph(kind, recorder):
    """One that was recorded before knows no tangents."""
    embeds, direction = torch.randn(2, 2, 7, 32, generator=torch.Generator().manual_seed(3))
    tangents = []
    for model in models(kind):
        with torch.no_grad():
            model.eval()(inputs_embeds=embeds)
            with forward_ad.dual_level():
                output = model(inputs_embeds=forward_ad.make_dual(embeds, direction)).logits
                tangents.append(forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(*tangents)
    assert recorder.replayed == 1


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_a_recording_reads_aliases_of_the_parameters(kind, recorder, monkeypatch):
    """A parameter's gradient node may be of a stream that must not wait for the recording, and is
    for as long as an output of an earlier forward lives: test_backward_on_a_gpu.py has the rest."""
    _, recorded = models(kind)
    own = {p.data_ptr(): p for p in layers_of(recorded).parameters()}
    plain, met = replays._gradients, []

    def gradients_of(outputs, inputs, *others, **options):
        met.extend(inputs)
        return plain(outputs, inputs, *others, **options)

    monkeypatch.setattr(replays, "_gradients", gradients_of)
    step(recorded.train(), batch([7, 3]))
    assert recorder.recorded == 2
    aliases = [one for one in met if one.data_ptr() in own]
    assert {one.data_ptr() for one in aliases} == set(own)
    assert not any(one is own[one.data_ptr()] for one in aliases)


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_tensors_in_the_place_of_parameters_have_no_graph(kind, recorder):
    """FSDP1 sets others in each forward, of which a recording would know nothing."""
    plain, recorded = (model.eval() for model in models(kind))
    inputs = batch([7, 3])
    for _ in range(2):
        for model in (plain, recorded):
            for module in layers_of(model).modules():
                for name in [*module._parameters] or [
                    n for n in ("weight", "bias") if n in vars(module)
                ]:
                    value = getattr(module, name).detach() * 1.1
                    module._parameters.pop(name, None)
                    setattr(module, name, value)
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == 0
