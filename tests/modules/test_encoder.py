"""`BertEncoder` by itself: what a training script that swaps the encoder relies on."""

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert.modules.sequences import Rows
from fastbert.rng import for_batch

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]]).bool()


@pytest.fixture
def encoders():
    config = transformers.BertConfig(**SHAPE, attn_implementation="eager")
    torch.manual_seed(0)
    theirs = transformers.models.bert.modeling_bert.BertEncoder(config).eval()
    ours = fastbert.BertEncoder(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_training_step_compiles_to_one_graph(p):
    """Also on Python 3.11, whose cached properties take locks."""
    options = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p, "num_hidden_layers": 1}
    encoder = fastbert.BertEncoder(fastbert.BertConfig(**SHAPE | options)).train()
    torch.compiler.reset()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    x, cu_seqlens = torch.randn(9, 24), torch.tensor([0, 4, 9], dtype=torch.int32)
    compiled(x, cu_seqlens=cu_seqlens, max_seqlen=5).last_hidden_state.sum().backward()


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None]


@pytest.mark.parametrize("form", ["2-D", "4-D", "additive", "none"])
def test_gives_hugging_faces_hidden_states(encoders, form):
    ours, theirs = encoders
    x = torch.randn(4, 5, 24)
    mask = {"2-D": MASK, "4-D": MASK[:, None, None], "additive": additive(MASK), "none": None}[form]
    expected = theirs(x, attention_mask=None if form == "none" else additive(MASK))
    output = ours(x, attention_mask=mask).last_hidden_state
    real = torch.ones_like(MASK) if form == "none" else MASK
    torch.testing.assert_close(output[real], expected.last_hidden_state[real])
    assert not output[~real].any()


def test_packed_and_padded_input_agree(encoders):
    encoder, _ = encoders
    x = torch.randn(4, 5, 24)
    padded = encoder(x, MASK, output_hidden_states=True)
    cu_seqlens = torch.tensor([0, *MASK.sum(1)]).cumsum(0).int()
    packed = encoder(x[MASK], cu_seqlens=cu_seqlens, max_seqlen=5, output_hidden_states=True)
    torch.testing.assert_close(packed.last_hidden_state, padded.last_hidden_state[MASK])
    assert len(packed.hidden_states) == 3
    for a, b in zip(packed.hidden_states, padded.hidden_states, strict=True):
        torch.testing.assert_close(a, b[MASK])


def test_a_fully_masked_row_is_zero_with_finite_gradients(encoders):
    encoder, _ = encoders
    x = torch.randn(2, 5, 24, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5])
    output = encoder(x, mask).last_hidden_state
    output.sum().backward()
    assert not output[1].any()
    assert not x.grad[1].any()
    assert x.grad.isfinite().all()
    nothing = encoder(x, torch.zeros(2, 5, dtype=torch.bool)).last_hidden_state
    assert not nothing.any()


@pytest.mark.parametrize("model", ["BertModel", "BertForPreTraining"])
def test_autocast_gives_hugging_faces_dtypes(model):
    config = transformers.BertConfig(**SHAPE)
    batch = {"input_ids": torch.randint(1, 30, (4, 5)), "attention_mask": MASK.long()}
    theirs = getattr(transformers, model)(config).eval()
    ours = getattr(fastbert, model)(config).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(**batch, output_hidden_states=True)
        output = ours(**batch, output_hidden_states=True)
    assert output.keys() == expected.keys()
    for name in output.keys() - {"hidden_states"}:
        assert output[name].dtype == expected[name].dtype, name
    real = MASK if model == "BertModel" else slice(None)
    if model == "BertModel":
        states = [s.dtype for s in output.hidden_states]
        assert states == [s.dtype for s in expected.hidden_states]
        a, b = output.last_hidden_state[real], expected.last_hidden_state[real]
        torch.testing.assert_close(a, b, rtol=0, atol=0.1)


def test_a_layer_with_a_hook_or_of_another_class_is_called(encoders):
    encoder, theirs = encoders
    x = torch.randn(4, 5, 24)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    seen = []
    query = encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    for model in (encoder, theirs):
        value = model.layer[1].attention.self.value
        doubled = Doubled(24, 24)
        doubled.load_state_dict(value.state_dict())
        model.layer[1].attention.self.value = doubled
    output = encoder(x).last_hidden_state
    assert seen == [(20, 24)]
    torch.testing.assert_close(output, theirs(x).last_hidden_state)


def test_opacus_is_refused(encoders):
    """Its hooks would take packed tokens for samples, and clip each by itself."""

    def capture(module, args, output):
        pass

    capture.__module__ = "opacus.grad_sample.grad_sample_module"
    x, (ours, theirs) = torch.randn(4, 5, 24), encoders
    for encoder in encoders:
        encoder.layer[1].output.LayerNorm.register_forward_hook(capture)
    assert theirs(x).last_hidden_state.shape == x.shape
    with pytest.raises(ValueError, match="Opacus: expected a Hugging Face model"):
        ours(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(6, 24),), "BertEncoder: expected hidden_states"),
        ((torch.ones(2, 5, 24), torch.ones(2, 4).bool()), r"attention_mask: expected shape \(2, 5"),
        ((torch.ones(2, 5, 24), None, torch.ones(2, 3, 24)), "got encoder_hidden_states"),
    ],
    ids=["packed without boundaries", "mask of another length", "cross attention"],
)
def test_what_it_cannot_do_is_refused(encoders, arguments, message):
    with pytest.raises(ValueError, match=message):
        encoders[0](*arguments)


@pytest.mark.parametrize("shape", [(3, 1, 5, 5), (2, 1, 5, 4), (1, 2, 1, 5, 5)], ids=str)
def test_a_general_mask_of_packed_tokens_fits_them(encoders, shape):
    cu_seqlens = torch.tensor([0, 5, 9], dtype=torch.int32)
    packed = {"cu_seqlens": cu_seqlens, "max_seqlen": 5}
    with pytest.raises(ValueError, match=r"a mask .* broadcasting to \(2, 'heads', 5, 5\), got"):
        encoders[0](torch.ones(9, 24), **packed, mask=torch.ones(shape).bool())


def test_a_model_refuses_what_it_cannot_do():
    model = fastbert.BertModel(fastbert.BertConfig(**SHAPE))
    ids = torch.ones(2, 5, dtype=torch.long)
    for arguments, message in (
        ({"input_ids": ids, "output_attentions": True}, "output_attentions: expected False"),
        ({"input_ids": ids, "inputs_embeds": torch.ones(2, 5, 24)}, "exactly one of input_ids"),
        ({}, "exactly one of input_ids"),
        ({"input_ids": ids[0]}, r"input_ids \(batch, seqlen\)"),
        ({"input_ids": ids.expand(2, 5).repeat(1, 5)}, "max_position_embeddings = 20 tokens"),
        ({"input_ids": ids, "token_type_ids": ids[:, :3]}, r"token_type_ids of shape \(2, 5\)"),
        (
            {"input_ids": ids, "output_scores": True},
            r"an encoder .* got output_scores",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)


@pytest.mark.parametrize("kind", ["causal", "bias"])
def test_a_general_mask_gives_hugging_faces_hidden_states(encoders, kind):
    ours, theirs = encoders
    x = torch.randn(4, 5, 24)
    causal = torch.ones(5, 5).tril().bool().expand(4, 1, 5, 5)
    bias = torch.randn(4, 3, 5, 5)
    added = bias if kind == "bias" else torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    expected = theirs(x, attention_mask=added).last_hidden_state
    mask = bias if kind == "bias" else causal
    torch.testing.assert_close(ours(x, attention_mask=mask).last_hidden_state, expected)


def test_documents_in_one_row_do_not_see_each_other(encoders):
    encoder, theirs = encoders
    x = torch.randn(1, 7, 24)
    expected = torch.cat([theirs(part).last_hidden_state for part in x.split([3, 4], 1)], 1)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    for said in ({"cu_seq_lens_q": cu_seqlens, "max_length_q": 4}, {"position_ids": positions}):
        torch.testing.assert_close(encoder(x, **said).last_hidden_state, expected)


def test_only_some_rows_of_the_last_layer(encoders):
    encoder, _ = encoders
    encoder.train()
    x = torch.randn(16, 24, requires_grad=True)
    cu_seqlens = torch.tensor([0, 7, 7, 16], dtype=torch.int32)
    wanted = torch.rand(16) < 0.4
    rows = Rows.where(wanted, cu_seqlens, 9, capacity=12)
    rng, weights = for_batch(cu_seqlens, 16), torch.randn(int(wanted.sum()), 24)
    outputs = []
    for subset in (None, rows):
        y = encoder(x, cu_seqlens=cu_seqlens, max_seqlen=9, rng=rng, rows=subset).last_hidden_state
        y = y[wanted] if subset is None else y[: int(wanted.sum())]
        outputs.append((y, *torch.autograd.grad((y * weights).sum(), [x, *encoder.parameters()])))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_backend_gives_the_same(encoders):
    from fastbert import backend

    encoder, _ = encoders
    x = torch.randn(4, 5, 24)
    expected = encoder(x, MASK).last_hidden_state
    with backend.use("reference"):
        assert torch.equal(encoder(x, MASK).last_hidden_state, expected)
