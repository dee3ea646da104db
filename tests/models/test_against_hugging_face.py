"""The reference model against transformers, the packed model against both, on the same weights."""

import pytest
import torch
import transformers

import fastbert
from fastbert.reference import ReferenceBert
from tests.models.parity import (
    LENGTHS,
    SHAPE,
    TOLERANCE,
    assert_same,
    assert_same_gradients,
    hugging_face,
    make_batch,
)


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
