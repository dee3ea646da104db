"""What users hang on the modules of a patched model in less usual ways, and gradients of states."""

import pytest
import torch
from torch import nn

import fastbert
from tests.hf.changes import layer
from tests.hf.promises_case import FAMILIES, MASK, REAL, ids, pair, states
from tests.versions import IS_V4

LINEARS = {"Bert": "intermediate.dense", "Roberta": "intermediate.dense", "DistilBert": "ffn.lin1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_all_modules_see_and_change_what_they_do_without_patch(family):
    theirs, ours = pair(family)
    found = []
    for model in (theirs, ours):
        seen = []

        def hook(module, args, output, seen=seen):
            if isinstance(output, torch.Tensor):
                seen.append((type(module).__name__, tuple(output.shape)))
            return output * 1.1 if isinstance(module, nn.Linear) else None

        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            with torch.no_grad():
                found.append((states(model), seen))
        finally:
            handle.remove()
    (expected, theirs_seen), (actual, ours_seen) = found
    assert ours_seen == theirs_seen
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_kwargs", [False, True])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_a_hook_before_a_layer_sees_and_changes_all_of_its_arguments(family, with_kwargs):
    theirs, ours = pair(family)
    found = []
    for model in (theirs, ours):
        shapes = []

        def hook(module, args, kwargs=None, shapes=shapes):
            shapes.append([getattr(one, "shape", None) for one in args])
            changed = (args[0], torch.zeros_like(args[1]), *args[2:])
            return changed if kwargs is None else (changed, kwargs)

        layer(model).register_forward_pre_hook(hook, with_kwargs=with_kwargs)
        model.config._attn_implementation = "eager"  # whose mask is an addend
        with torch.no_grad():
            found.append((states(model), shapes))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    told = fastbert.explain(ours, ids(), attention_mask=MASK, show=False)
    assert any("a hook that sees the arguments" in route.reason for route in told.routes)


@pytest.mark.parametrize("is_held", [False, True], ids=["given", "given, then hooked"])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_a_forward_that_a_layer_is_given_gets_all_arguments(family, is_held):
    theirs, ours = pair(family)
    found = []
    for model in (theirs, ours):
        seen, own = [], layer(model).forward

        def forward(states, mask, *args, own=own, seen=seen, **options):
            seen.append((states.shape, mask.shape, options.keys()))
            return own(states, torch.zeros_like(mask), *args, **options)

        layer(model).forward = forward
        if is_held:
            accelerate = pytest.importorskip("accelerate", reason="whose hooks keep a forward")
            accelerate.hooks.add_hook_to_module(layer(model), accelerate.hooks.ModelHook())
        model.config._attn_implementation = "eager"  # whose mask is an addend
        with torch.no_grad():
            found.append((states(model), seen))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("removed", [False, True], ids=["hooked", "hooked before"])
@pytest.mark.parametrize("family", FAMILIES)
def test_accelerates_hooks_call_what_patching_and_unpatching_leave(family, removed):
    hooks = pytest.importorskip("accelerate", reason="which keeps forwards").hooks
    theirs, _ = pair(family, "ForSequenceClassification")
    batch = {"input_ids": ids(), "attention_mask": MASK}
    with torch.no_grad():
        expected = theirs(**batch).logits
        hooks.add_hook_to_module(theirs, hooks.ModelHook())
        hooks.add_hook_to_module(layer(theirs), hooks.ModelHook())
        if removed:
            hooks.remove_hook_from_module(theirs, recurse=True)
        ours = fastbert.patch(theirs)
        told = fastbert.explain(ours, **batch, show=False)
        assert any(row.operator == "attention_qkvpacked" for row in told.rows), told
        torch.testing.assert_close(ours(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        labels = torch.tensor([0, 1, 0])
        assert fastbert.unpatch(ours)(**batch, labels=labels).loss.isfinite()
        torch.testing.assert_close(ours(**batch).logits, expected)


def hook_the_next(model):
    layer(model, 2).register_forward_hook(lambda *_: None)
    layer(model, 3).register_forward_hook(lambda module, args, output: output * 1.5)


def replace_a_linear_of_the_next(model):
    linear = nn.Linear(64, 128)
    with torch.no_grad():
        linear.weight.fill_(0.01)
    inner, name = LINEARS[type(model).__name__.removesuffix("Model")].rpartition(".")[::2]
    setattr(layer(model, 2).get_submodule(inner), name, linear)


@pytest.mark.skipif(IS_V4, reason="4.57's layers return tuples")
@pytest.mark.parametrize("change", [hook_the_next, replace_a_linear_of_the_next, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_may_change_the_layers_behind_its_own(family, change):
    layers = "n_layers" if family == "DistilBert" else "num_hidden_layers"
    theirs, ours = pair(family, **{layers: 5})
    for model in (theirs, ours):
        calls = []

        def hook(module, args, output, model=model, calls=calls):
            if change is not None and not calls:
                torch.manual_seed(4)
                change(model)
            calls.append(output.shape)

        layer(model, 1).register_forward_hook(hook)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(states(ours), states(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("family", [*FAMILIES, "own"])
def test_gradients_reach_the_states_that_a_model_returns(family, padded):
    """Of a loss, of the pooler's output and of later states, in states that are also the last."""
    theirs, ours = pair("Bert" if family == "own" else family, "ForSequenceClassification")
    if family == "own":
        ours = fastbert.BertForSequenceClassification(theirs.config).eval()
        ours.load_state_dict(theirs.state_dict())
    found = []
    for model in (theirs, ours):
        mask = {"attention_mask": MASK} if padded else {}
        output = model(ids(), **mask, labels=torch.tensor([0, 1, 1]), output_hidden_states=True)
        of_loss = torch.autograd.grad(output.loss, output.hidden_states, retain_graph=True)
        bare = model.base_model(ids(), **mask, output_hidden_states=True)
        pooled = getattr(bare, "pooler_output", None)
        target = bare.last_hidden_state[REAL] if pooled is None else pooled
        of_states = torch.autograd.grad(target.sin().sum(), bare.hidden_states[:-1])
        found.append([one[REAL] for one in (*of_loss, *of_states)])
        if family != "own":
            assert bare.hidden_states[-1] is bare.last_hidden_state
        if pooled is not None:
            output = model.base_model(ids(), **mask)
            (slope,) = torch.autograd.grad(output.pooler_output.sum(), output.last_hidden_state)
            found[-1].append(slope[REAL])
    for actual, expected in zip(*found[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_a_hook_on_electras_projection_sees_padded_sequences():
    shapes = []
    theirs, ours = pair("Electra", embedding_size=16)
    found = []
    for model in (theirs, ours):
        model.embeddings_project.register_forward_hook(
            lambda module, args, output: (
                shapes.append(output.shape) or output + output.mean(1)[:, None]
            )
        )
        with torch.no_grad():
            found.append(states(model))
    assert [tuple(shape[:2]) for shape in shapes] == [tuple(MASK.shape)] * 2
    # the mean over the padding, which is zeros in one of them, is another: see the whole sequences
    full = torch.ones_like(MASK)
    with torch.no_grad():
        found = [model(ids(), attention_mask=full).last_hidden_state for model in (theirs, ours)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
