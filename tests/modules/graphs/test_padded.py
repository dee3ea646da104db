"""In inference a graph begins with a model's ids and mask, where it can pack them."""

import pytest
import torch

import fastbert
from fastbert.hf.stack import returns_tuples
from fastbert.modules import sequences
from fastbert.modules.graphs import call
from tests.modules.graphs.case import MASKS, SHAPE, batch, logits, models, step
from tests.modules.graphs.padded_case import INPUTS, NARROW, pair

KINDS = ("own", "Bert", "Roberta", "DistilBert", "Electra")
BOTH = pytest.mark.parametrize("kind", KINDS[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_embeds_without_python(kind, recorder, embedded):
    plain, recorded = pair(kind, **NARROW if kind == "Electra" else {})
    embedded.clear()
    for seed in (1, 2):
        inputs = batch([6, 4, 5], seed)
        actual = logits(recorded, inputs)
        assert not embedded
        torch.testing.assert_close(actual, logits(plain, inputs))
        embedded.clear()
    assert recorder.recorded == 1


@BOTH
@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_ids_that_are_given_are_copied_in(kind, name, recorder, embedded):
    plain, recorded = pair(kind)
    ids = torch.randint(2, INPUTS["input_ids"].shape)
    given = {**INPUTS, name: ids}
    for _ in range(2):
        torch.testing.assert_close(logits(recorded, given), logits(plain, given))
    assert recorder.recorded == 2  # the defaults have no tensor to copy, so they have another graph


@BOTH
def test_states_and_training_have_the_embeddings_outside(kind, recorder, embedded):
    plain, recorded = pair(kind)
    for _ in range(2):
        embedded.clear()
        with torch.no_grad():
            states = recorded(**INPUTS, output_hidden_states=True).hidden_states
        assert embedded
    with torch.no_grad():
        expected = plain(**INPUTS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, expected)
    plain.train()
    recorded.train()
    for a, e in zip(step(recorded, INPUTS), step(plain, INPUTS), strict=True):
        torch.testing.assert_close(a, e)


@BOTH
def test_embeddings_that_are_given_have_a_graph_of_their_own(kind, recorder):
    plain, recorded = pair(kind)
    embeds = {"inputs_embeds": torch.randn(3, 7, SHAPE["hidden_size"])}
    given = {**embeds, "attention_mask": INPUTS["attention_mask"]}
    for inputs in (given, INPUTS, given):
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == 2


@pytest.mark.parametrize("counts", [False, True], ids=["", "counted"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_gives_what_the_packed_path_gives(
    kind, mask, dtype, counts, recorder, monkeypatch
):
    monkeypatch.setattr(sequences, "LEAST_COUNTED", 0 if counts else 2**30)
    options = NARROW if kind == "Electra" else {}
    plain, recorded = (model.eval() for model in models(kind, "Model", **options))
    given = {"input_ids": torch.randint(3, 61, (3, 7))}
    if MASKS[mask] is not None:
        given["attention_mask"] = torch.tensor(MASKS[mask], dtype=dtype)
    for _ in range(2):
        with torch.no_grad():
            actual, expected = recorded(**given), plain(**given)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor)
            assert actual[name].is_contiguous()
    # without any token nothing is recorded where tokens are counted, as all is known to be zeros
    assert recorder.recorded == (mask != "all padding" or not counts)


@BOTH
@pytest.mark.parametrize("counts", [False, True], ids=["", "counted"])
def test_sequences_one_by_one_have_few_graphs(kind, counts, recorder, monkeypatch):
    monkeypatch.setattr(sequences, "LEAST_COUNTED", 0 if counts else 2**30)
    _, recorded = (model.eval() for model in models(kind, max_position_embeddings=512))
    for length in range(1, 513, 15):
        logits(recorded, batch([length]))
    assert recorder.recorded == 8


@BOTH
def test_the_host_waits_for_no_small_batch(kind, recorder, monkeypatch):
    plain, recorded = pair(kind)
    expected = logits(plain, INPUTS)

    def waits(*_):
        raise AssertionError("the host reads a tensor")

    for name in ("tolist", "item", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    actual = logits(recorded, INPUTS)
    monkeypatch.undo()
    torch.testing.assert_close(actual, expected)
    assert recorder.replayed == 2


@BOTH
def test_a_large_batch_has_no_more_tokens_computed_than_are_real(kind, recorder, monkeypatch):
    monkeypatch.setattr(sequences, "LEAST_COUNTED", 0)
    _, recorded = (model.eval() for model in models(kind))
    counted = []
    run = call.run_layers
    monkeypatch.setattr(
        call,
        "run_layers",
        lambda numbers, x, *more: (counted.append(len(x)), run(numbers, x, *more))[1],
    )
    logits(recorded, batch([60, 3, 1]))
    assert set(counted) == {64}


@BOTH
def test_sizes_of_a_bucket_share_a_graph_and_no_padding_leaks_in(kind, recorder):
    plain, recorded = (model.eval() for model in models(kind))
    for number, lengths in enumerate([[12, 12, 12], [16, 16], [9, 1, 4, 3], [12, 12, 12]]):
        inputs = batch(lengths, number)
        if number == 1:  # of no mask
            del inputs["attention_mask"]
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == 2  # of 3 or 4 sequences, and of 2
    assert recorder.replayed == 4


@pytest.mark.parametrize("kind", KINDS[:3])
def test_more_places_than_positions_are_an_error_with_a_graph_as_without(kind, recorder):
    _, recorded = pair(kind)
    longest = SHAPE["max_position_embeddings"] - (2 if kind == "Roberta" else 0)
    ids = torch.full((1, longest + 1), 5)
    for _ in range(2):
        logits(recorded, {"input_ids": ids[:, 1:], "attention_mask": torch.ones_like(ids[:, 1:])})
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match=f"at most .*{longest} tokens"):
            logits(recorded, given)


def test_padding_that_is_to_be_computed_is(recorder):
    plain, recorded = models("Bert", "Model")
    for model in (plain.eval(), recorded.eval()):
        fastbert.patch(model, padding="compute", graphs="auto" if model is recorded else False)
    for _ in range(2):
        with torch.no_grad():
            actual, expected = (model(**INPUTS).last_hidden_state for model in (recorded, plain))
        torch.testing.assert_close(actual, expected)
        assert actual[1, 3:].abs().min() > 0


@BOTH
@pytest.mark.parametrize("by", ["positions", "boundaries"])
def test_documents_in_a_row_are_told_apart(kind, by, recorder):
    plain, recorded = pair(kind)
    given = {"input_ids": torch.randint(3, 61, (1, 7))}
    if by == "positions":
        given["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    elif kind != "own" and returns_tuples():
        pytest.skip("models of transformers 4.57 take no boundaries")
    else:
        given["cu_seq_lens_q"] = torch.tensor([0, 3, 7], dtype=torch.int32)
    for _ in range(2):
        torch.testing.assert_close(logits(recorded, given), logits(plain, given))


@BOTH
def test_a_mask_of_other_numbers_is_refused_with_a_graph_as_without(kind, recorder):
    _, recorded = pair(kind)
    mask = INPUTS["attention_mask"].float()
    for _ in range(2):
        logits(recorded, {**INPUTS, "attention_mask": mask})
        with pytest.raises(ValueError, match="zeros and ones"):
            logits(recorded, {**INPUTS, "attention_mask": (1 - mask) * -1e4})


def test_outputs_are_copies():
    """A replay in another thread may come before the pooler reads the first tokens."""
    ids = INPUTS["input_ids"]
    one = call.PaddedBatch(ids, *[None] * 3, ids.numel(), 160, None, None, torch.float32)
    states = torch.randn(*ids.shape, 8), torch.randn(len(ids), 8)
    for copied, state in zip(one.copied(list(states)), states, strict=True):
        assert torch.equal(copied, state)
        assert copied.data_ptr() != state.data_ptr()


@BOTH
def test_explain_tells_of_the_graph(kind, recorder):
    _, recorded = pair(kind)
    report = str(fastbert.explain(recorded, **INPUTS))
    assert report.count("CUDA graph") == 1
    assert "of 64 tokens, 4 sequences of up to 64" in report
