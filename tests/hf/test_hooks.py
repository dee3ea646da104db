"""What users hang on the modules of a patched model is called, and counts."""

import copy
from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune

import fastbert
from tests.hf.cases import Case, build
from tests.hf.cases import inputs as inputs_of
from tests.hf.training_case import LENGTHS, assert_same_gradients, gradients, make_batch, make_pair
from tests.versions import IS_V4

SIZE = (len(LENGTHS), max(LENGTHS), 32)


def inputs():
    return {name: value for name, value in make_batch().items() if name != "labels"}


def real_places():
    return make_batch()["attention_mask"].bool()


def assert_same_training(ours, theirs, tolerance=1e-5):
    """Loss and gradients of the masked-LM loss."""
    losses = [model(**make_batch()).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(ours), gradients(theirs), tolerance)


@pytest.mark.parametrize("number", [0, 1], ids=["first layer", "last layer"])
def test_a_hook_on_a_layer_sees_padded_states_and_may_change_them(number):
    pair = make_pair()
    seen = []
    for model in pair:
        states = []

        def hook(module, args, output, states=states):
            state, *rest = output if IS_V4 else (output,)
            states.append((args[0], state))
            return (2 * state, *rest) if IS_V4 else 2 * state

        model.bert.encoder.layer[number].register_forward_hook(hook)
        seen.append(states)
    assert_same_training(*pair)
    (ours,), (theirs,) = seen
    real = real_places()
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape == SIZE
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)
        assert not a[~real].any()


def test_a_pre_hook_may_change_a_layers_input():
    pair = make_pair()
    for model in pair:
        model.bert.encoder.layer[1].register_forward_pre_hook(
            lambda module, args: (args[0] * 2, *args[1:])
        )
    assert_same_training(*pair)


def test_a_hook_on_the_pooler_of_pre_training_sees_all_tokens():
    pairs, shapes = torch.tensor([0, 1] * (len(LENGTHS) // 2)), []
    for model in make_pair(transformers.BertForPreTraining):
        pooler = model.bert.pooler
        pooler.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
        model(**make_batch(), next_sentence_label=pairs)
    assert shapes == [SIZE, SIZE]


def test_a_hook_behind_a_layer_sees_the_arguments_that_it_asks_for():
    seen = []
    for model in make_pair():

        def hook(module, args, kwargs, output, model=model):
            seen.append((len(args), sorted(kwargs)))

        model.bert.encoder.layer[0].register_forward_hook(hook, with_kwargs=True)
        model(**inputs())
    assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_a_backward_hook_inside_a_layer_is_called(kind):
    shapes = []
    for model in make_pair():
        dense = model.bert.encoder.layer[0].intermediate.dense
        register = getattr(dense, f"register_{kind}")
        register(lambda module, *gradients: shapes.append(gradients[-1][0].shape))
        model(**make_batch()).loss.backward()
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]


def test_a_backward_hook_sees_padded_gradients():
    pair = make_pair()
    seen = []
    for model in pair:
        model.bert.encoder.layer[0].register_full_backward_hook(
            lambda module, grad_input, grad_output: seen.append(grad_output[0])
        )
    assert_same_training(*pair)
    ours, theirs = seen
    real = real_places()
    assert ours.shape == SIZE
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_a_hook_that_changes_an_output_counts_wherever_it_hangs(family):
    case = Case(family, "ForMaskedLM", training=False)
    theirs, ours = build(case)
    arguments, real = inputs_of(case, theirs)

    def run(model, name):
        calls = []

        def hook(module, args, output):
            calls.append(name)
            if isinstance(output, torch.Tensor):
                return output * 1.5
            return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output

        handle = model.get_submodule(name).register_forward_hook(hook)
        with torch.no_grad():
            logits = model.eval()(**arguments).logits[real]
            loss = model.train()(**arguments).loss
        handle.remove()
        return logits, loss, len(calls)

    different = []
    for name, _ in theirs.named_modules():
        (a, b, count), (c, d, expected) = run(ours, name), run(theirs, name)
        if not (torch.allclose(a, c) and torch.allclose(b, d) and count == expected):
            different.append((name, count, expected))
    assert not different


@pytest.mark.parametrize("wanted", [True, [1], [0, 1]], ids=str)
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_hidden_states(wanted, hooked):
    """Of all, or of the layers that a list names, and as hooks have changed them."""
    ours, theirs = make_pair(transformers.BertModel)
    if hooked:
        for model in (ours, theirs):
            # 4.57's layers return tuples
            model.encoder.layer[0].register_forward_hook(
                lambda module, args, output: (output[0] + 1,) if IS_V4 else output + 1
            )
    found = ours(**inputs(), output_hidden_states=wanted).hidden_states
    expected = theirs(**inputs(), output_hidden_states=wanted).hidden_states
    real = real_places()
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)


def test_input_gradients_are_asked_for_by_a_hook_on_the_embeddings():
    pair = make_pair()
    for model in pair:
        model.bert.embeddings.requires_grad_(False)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_same_training(*pair)


@pytest.mark.parametrize("where", ["query", "attention.output.dense", "intermediate.dense"])
def test_a_pruned_weight_stays_pruned(where):
    pair = make_pair()
    prefix = "attention.self." if where == "query" else ""
    for model in pair:
        torch.manual_seed(3)
        linear = model.bert.encoder.layer[0].get_submodule(prefix + where)
        prune.random_unstructured(linear, "weight", amount=0.5)
    assert_same_training(*pair)


def test_a_parametrized_weight_is_computed_anew():
    pair = make_pair()
    for model in pair:
        value = model.bert.encoder.layer[1].attention.self.value
        torch.nn.utils.parametrizations.weight_norm(value)
    assert_same_training(*pair)


def test_a_layer_put_in_after_patching_runs_as_it_is():
    ours, theirs = make_pair()
    layer = copy.deepcopy(theirs.bert.encoder.layer[0])
    for model in (ours, theirs):
        model.bert.encoder.layer[1] = copy.deepcopy(layer)
    assert_same_training(ours, theirs)


def test_a_layer_of_the_users_own_class_runs_its_forward():
    ours, theirs = make_pair()
    for model in (ours, theirs):
        layer = model.bert.encoder.layer[1]
        base = type(layer)

        class Doubled(base):
            def forward(self, *args, base=base, **kwargs):
                return 2 * base.forward(self, *args, **kwargs)

        layer.__class__ = Doubled
    assert_same_training(ours, theirs)


def test_a_loss_of_the_users_own_is_computed():
    case = Case("DistilBert", "ForMaskedLM")
    theirs, ours = build(case)
    arguments, _ = inputs_of(case, theirs)
    for model in (theirs, ours):
        model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.3)
    torch.testing.assert_close(ours(**arguments).loss, theirs(**arguments).loss)


def test_a_head_of_the_users_own_is_called():
    ours, theirs = make_pair()
    torch.manual_seed(5)
    head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 64))
    for model in (ours, theirs):
        model.cls = copy.deepcopy(head)
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("dispatch", ["cpu_offload", "dispatch_model"])
def test_accelerates_hooks_replace_the_forward_of_an_instance(dispatch, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    ours, theirs = make_pair()
    if dispatch == "cpu_offload":
        ours = accelerate.cpu_offload(ours, execution_device="cpu")
        assert ours.bert.encoder.layer[0].attention.self.query.weight.is_meta
    else:
        places = dict.fromkeys(("bert.embeddings", "bert.encoder.layer.0", "cls"), "cpu")
        places["bert.encoder.layer.1"] = "disk"
        accelerate.dispatch_model(
            ours, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )
        assert ours.bert.encoder.layer[1].attention.self.query.weight.is_meta
    real = real_places()
    with torch.no_grad():
        logits = [model.eval()(**inputs()).logits[real] for model in (ours, theirs)]
        losses = [model.train()(**make_batch()).loss for model in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


class Retriever(nn.Module):
    """As sentence-transformers nests a model: mean pooling over a bare one, patched within."""

    def __init__(self, bert, patched: bool):
        super().__init__()
        self.towers = nn.ModuleList([nn.Sequential(bert), nn.Sequential(copy.deepcopy(bert))])
        if patched:
            fastbert.patch(self)

    def forward(self, **batch):
        mask = batch["attention_mask"][..., None]
        states = [tower[0](**batch).last_hidden_state for tower in self.towers]
        return [(x * mask).sum(1) / mask.sum(1) for x in states]


def test_a_model_patched_inside_a_users_constructor():
    _, bert = make_pair(transformers.BertModel, add_pooling_layer=False)
    ours, theirs = (Retriever(copy.deepcopy(bert), patched) for patched in (True, False))
    assert fastbert.is_patched(ours)
    for a, b in zip(ours(**inputs()), theirs(**inputs()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(IS_V4, reason="4.57 captures no outputs by hooks")
@torch.no_grad()
def test_a_model_around_that_captures_outputs_captures_none_of_a_model_inside():
    from transformers.utils.output_capturing import capture_outputs

    class Outer(transformers.BertPreTrainedModel):
        _can_record_outputs: ClassVar = {"hidden_states": nn.Tanh}

        def __init__(self, config):
            super().__init__(config)
            self.bert, self.last = transformers.BertModel(config), nn.Tanh()
            self.post_init()

        @capture_outputs
        def forward(self, input_ids, **kwargs):
            state = self.last(self.bert(input_ids).last_hidden_state)
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=state)

    _, ours = make_pair()
    ours.config._attn_implementation = "eager"
    outer = Outer(ours.config).eval()
    fastbert.patch(outer.bert)
    ids = make_batch()["input_ids"]
    outer.bert(ids, output_attentions=True)  # hooks stay on its layers
    assert len(outer(ids, output_hidden_states=True).hidden_states) == 2
    routes = fastbert.explain(outer, ids, output_hidden_states=True, show=False).routes
    assert [route.layout.partition(",")[0] for route in routes] == ["packed"]
