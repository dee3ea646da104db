"""The residual stream of patched models under autocast, beside Hugging Face's; docs/numerics.md."""

import copy

import pytest
import torch
import transformers

import fastbert
from fastbert.hf.stack import boundary_dtype
from tests.precision import LENGTHS, padded_batch, root_mean_square_error
from tests.versions import IS_V4

FAMILIES = ("Bert", "Roberta", "Electra", "DistilBert")
# each family in bf16, one in fp16: of what rounds, only the dtype differs
FAMILIES_AND_DTYPES = pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in FAMILIES),
        ("Bert", torch.float16),
        *(pytest.param(f, torch.float16, marks=pytest.mark.exhaustive) for f in FAMILIES[1:]),
    ],
)


def models(family, device):
    """As Hugging Face initialises them: unpatched, patched, and a function to their states."""
    large = device == "cuda"
    options = {"hidden_size": 768 if large else 192, "num_attention_heads": 12 if large else 3}
    options |= {"num_hidden_layers": 12 if large else 4, "vocab_size": 301}
    if family == "DistilBert":
        names = {"hidden_size": "dim", "num_attention_heads": "n_heads"}
        names["num_hidden_layers"] = "n_layers"
        options = {names.get(name, name): value for name, value in options.items()}
    elif family == "Electra":
        options["embedding_size"] = 64
    torch.manual_seed(0)
    options["attn_implementation"] = "eager" if IS_V4 and family == "Electra" else "sdpa"
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}Model")(config).to(device).eval()
    batch = padded_batch(LENGTHS, 301, device, config.pad_token_id or 0)
    real = batch["attention_mask"].bool()

    @torch.no_grad()
    def states(one):
        return [one(**batch).last_hidden_state[real]]

    return model, fastbert.patch(copy.deepcopy(model)), states


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("family", [*FAMILIES, "own"])
def test_autocast_leaves_float64_as_it_is(family, training):
    torch.manual_seed(0)
    options = {"vocab_size": 61, "attention_dropout": 0.0, "dropout": 0.0}
    options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "Electra":
        options["embedding_size"] = 64
    name = "Bert" if family == "own" else family
    config = getattr(transformers, f"{name}Config")(**options, num_hidden_layers=1, n_layers=1)
    theirs = getattr(transformers, f"{name}Model")(config).double().train(training)
    if family == "own":
        ours = fastbert.BertModel(config).double().train(training)
        ours.load_state_dict(theirs.state_dict())
    else:
        ours = fastbert.patch(copy.deepcopy(theirs))
    batch = padded_batch(LENGTHS, 61, "cpu", config.pad_token_id)
    real = batch["attention_mask"].bool()
    found = []
    for model in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            states = model(**batch).last_hidden_state[real]
            (states**2).mean().backward()
        found.append([states, *(one.grad for one in model.parameters() if one.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@FAMILIES_AND_DTYPES
def test_in_eval_mode_it_is_as_near_the_truth_as_hugging_faces(family, dtype, device):
    """Both keep it in float32."""
    model, patched, states = models(family, device)
    truth = states(copy.deepcopy(model).double())
    theirs = root_mean_square_error(model, states, truth, autocast=dtype)
    ours = root_mean_square_error(patched, states, truth, autocast=dtype)
    assert ours <= 1.2 * theirs


@FAMILIES_AND_DTYPES
def test_in_low_precision_it_is_as_near_as_a_model_in_that_precision(family, dtype, device):
    model, patched, states = models(family, device)
    truth = states(copy.deepcopy(model).double())
    theirs = root_mean_square_error(model, states, truth, dtype=dtype)
    assert root_mean_square_error(patched, states, truth, dtype=dtype) <= 1.1 * theirs
    patched.config.residual_in_fp32 = False
    ours = root_mean_square_error(patched, states, truth, autocast=dtype)
    assert ours <= 1.1 * theirs
    if family != "Electra":  # whose projection before the first layer rounds the stream anyway
        near = root_mean_square_error(model, states, truth, autocast=dtype)
        assert ours > 1.2 * near  # so that the test above could fail


@pytest.mark.parametrize("kind", ["patched", "encoder", "own"])
def test_the_option_and_the_mode_choose_its_dtype(kind):
    """Low in training, float32 in eval mode; the option decides for both."""
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertModel(config)
    if kind == "own":
        model = fastbert.BertModel(config)
    elif kind == "encoder":
        model.encoder = fastbert.BertEncoder(config)
    else:
        fastbert.patch(model)
    ids = torch.randint(5, 99, (2, 7))

    def dtype():
        with torch.autocast("cpu", torch.bfloat16):
            told = fastbert.explain(model, ids, show=False).routes
        (layout,) = {route.layout for route in told}
        return layout.rpartition(" ")[2]

    for option in (None, True, False):
        config.residual_in_fp32 = option
        for training in (False, True):
            in_fp32 = not training if option is None else option
            model.train(training)
            assert dtype() == ("float32" if in_fp32 else "bfloat16")
    assert "stream" not in str(fastbert.explain(model, ids, show=False))


def test_a_hooked_layer_does_not_change_it():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48
    )
    model = fastbert.patch(transformers.BertModel(config).eval())
    ids = torch.randint(5, 99, (2, 7))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for option in (None, False):
            config.residual_in_fp32 = option
            expected = model(ids).last_hidden_state
            with_hook = model.encoder.layer[1].register_forward_hook(lambda *_: None)
            assert torch.equal(model(ids).last_hidden_state, expected)
            with_hook.remove()


@pytest.mark.parametrize("enabled", [True, False], ids=["autocast", ""])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_have_hugging_faces_dtype(family, own, enabled, device):
    """A CPU's autocast, unlike a GPU's, leaves LayerNorm in the dtype of what it reads."""
    *both, _ = models(family, device)
    ids, found = torch.randint(5, 99, (2, 7), device=device), []
    for model in both:
        model.to(own)
        with torch.autocast(device, torch.bfloat16, enabled=enabled), torch.no_grad():
            output = model(ids, output_hidden_states=True)
        found.append([x.dtype for x in (output.last_hidden_state, *output.hidden_states)])
    assert found[0] == found[1]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hooked_layer_sees_hugging_faces_dtype(family, own, training, device):
    """In training the residual stream, which it does not see, has another one."""
    *both, _ = models(family, device)
    ids, found = torch.randint(5, 99, (2, 7), device=device), []
    for model in both:
        layers = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
        layers[1].register_forward_hook(
            lambda _, given, output: found.append(
                (given[0].dtype, (output[0] if isinstance(output, tuple) else output).dtype)
            )
        )
        model.to(own).train(training)
        with torch.autocast(device, torch.bfloat16):
            model(ids)
    assert found[0] == found[1]


@pytest.mark.parametrize("is_projected", [True, False])
def test_on_a_gpu_states_are_in_float32(is_projected, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    for own in (torch.float16, torch.bfloat16, torch.float32):
        found = boundary_dtype(own, torch.device("cuda"), is_projected=is_projected)
        assert found == torch.float32


def test_a_patched_encoder_that_is_called_alone_and_a_projection_keep_the_streams_dtype():
    config = transformers.ElectraConfig(
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
    )
    model = fastbert.patch(transformers.ElectraModel(config)).eval()
    calls = (
        (model, torch.randint(5, 99, (2, 7))),
        (model.encoder, torch.randn(2, 7, 32).bfloat16()),
    )
    for one, given in calls:
        with torch.autocast("cpu", torch.bfloat16):
            told = fastbert.explain(one, given, show=False).routes
        assert {route.layout.rpartition(" ")[2] for route in told} == {"float32"}
