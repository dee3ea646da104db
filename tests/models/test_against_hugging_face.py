"""The reference model against transformers, the packed model against both, on the same weights."""

import pytest
import torch
import transformers

import fastbert
from fastbert.reference import ReferenceBert

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
LENGTHS = (13, 1, 29, 7)
# relative to the largest entry of the tensor compared
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make_batch(side: str = "right", seqlen: int = 29) -> dict[str, torch.Tensor]:
    size = (len(LENGTHS), seqlen)
    mask = torch.arange(seqlen) < torch.tensor(LENGTHS)[:, None]
    if side == "left":
        mask = mask.flip(1)
    labels = torch.randint(0, 99, size)
    masked = mask & (torch.rand(size) < 0.3)
    masked[2] |= mask[2]  # the loss must not be empty
    return {
        "input_ids": torch.randint(1, 99, size) * mask,
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(0, 2, size),
        "labels": labels.where(masked, -100),
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }


def hugging_face(dtype: torch.dtype, **changes) -> transformers.BertForPreTraining:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE, **changes, attn_implementation="eager")
    model = transformers.BertForPreTraining(config).to(dtype)
    for parameter in model.parameters():  # biases and LayerNorm too, so that none can be dropped
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def assert_same(ours, theirs, dtype: torch.dtype, name: str, scale=0.0) -> None:
    error, scale = (ours - theirs).abs().max(), max(theirs.abs().max(), scale)
    assert error <= TOLERANCE[dtype] * scale, f"{name}: off by {error:.3g} of {scale:.3g}"


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, dtype) -> None:
    expected = gradients(theirs)
    for name, gradient in gradients(ours).items():
        # softmax ignores what all keys share, so the gradient of a key bias is 0 but for rounding
        scale = expected[name.replace("key.bias", "key.weight")].abs().max()
        assert_same(gradient, expected[name], dtype, name, scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_reference_gives_hugging_faces_outputs_and_gradients(dtype, hidden_act):
    theirs = hugging_face(dtype, hidden_act=hidden_act)
    ours = ReferenceBert(theirs.config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    batch = make_batch()
    expected = theirs(**batch)
    expected.loss.backward()
    loss, words, pairs = ours(**batch)
    loss.backward()

    real = batch["attention_mask"].bool()
    assert_same(loss, expected.loss, dtype, "loss")
    assert_same(words[real], expected.prediction_logits[real], dtype, "prediction_logits")
    assert_same(pairs, expected.seq_relationship_logits, dtype, "seq_relationship_logits")
    assert_same_gradients(ours, theirs, dtype)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_the_packed_model_gives_the_references_outputs_and_gradients(form, dtype, side):
    reference = ReferenceBert(transformers.BertConfig(**SHAPE)).to(dtype).eval()
    reference.load_state_dict(hugging_face(dtype).state_dict())
    model = fastbert.BertForPreTraining(fastbert.BertConfig(**SHAPE)).to(dtype).eval()
    model.load_state_dict(reference.state_dict())
    torch.manual_seed(1)
    batch = make_batch(side)
    real = batch["attention_mask"].bool()
    loss, words, pairs = reference(**batch)
    loss.backward()

    if form == "padded":
        output = model(**batch)
        assert not output.prediction_logits[~real].any()
        logits = output.prediction_logits[real]
    else:
        positions = torch.arange(29).expand_as(real)[real]
        output = model(
            fastbert.PackedBatch(
                input_ids=batch["input_ids"][real],
                token_type_ids=batch["token_type_ids"][real],
                position_ids=positions,
                cu_seqlens=torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).int(),
                max_seqlen=29,
                labels=batch["labels"][real],
                num_labels=int((batch["labels"] != -100).sum()),
                next_sentence_label=batch["next_sentence_label"],
            )
        )
        logits = output.prediction_logits
    output.loss.backward()

    assert_same(output.loss, loss, dtype, "loss")
    assert_same(logits, words[real], dtype, "prediction_logits")
    assert_same(output.seq_relationship_logits, pairs, dtype, "seq_relationship_logits")
    assert_same_gradients(model, reference, dtype)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("explicit_positions", [False, True])
def test_masked_lm_gives_hugging_faces_hidden_states(side, explicit_positions):
    source = hugging_face(torch.float64)
    theirs = transformers.BertForMaskedLM(source.config).double().eval()
    theirs.load_state_dict(source.state_dict(), strict=False)
    ours = fastbert.BertForMaskedLM(theirs.config).double().eval()
    ours.load_state_dict(theirs.state_dict())
    batch = make_batch(side)
    del batch["next_sentence_label"]
    if explicit_positions:
        batch["position_ids"] = torch.randint(0, 40, batch["input_ids"].shape)
    expected = theirs(**batch, output_hidden_states=True)
    output = ours(**batch, output_hidden_states=True)

    real = batch["attention_mask"].bool()
    assert list(output.keys()) == list(expected.keys())
    assert_same(output.loss, expected.loss, torch.float64, "loss")
    assert_same(output.logits[real], expected.logits[real], torch.float64, "logits")
    assert len(output.hidden_states) == len(expected.hidden_states)
    for layer, (a, b) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        assert_same(a[real], b[real], torch.float64, f"hidden state {layer}")
        assert not a[~real].any()


def test_inputs_embeds_stand_for_ids():
    model = fastbert.BertModel(fastbert.BertConfig(**SHAPE)).double().eval()
    batch = {k: v for k, v in make_batch().items() if "label" not in k}
    expected = model(**batch)
    embeds = model.embeddings.word_embeddings(batch.pop("input_ids"))
    output = model(inputs_embeds=embeds, **batch)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)


def test_state_dict_names_are_hugging_faces():
    for name in ("BertModel", "BertForPreTraining", "BertForMaskedLM"):
        theirs = getattr(transformers, name)(transformers.BertConfig(**SHAPE))
        ours = getattr(fastbert, name)(fastbert.BertConfig(**SHAPE))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert [m for m, _ in ours.named_modules() if "attention" in m] == [
            m for m, _ in theirs.named_modules() if "attention" in m
        ]
