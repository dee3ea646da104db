"""Padded batches in inference whose tokens nobody counts: as many are computed as places are there.

So it is on a GPU for small batches, whose host does not wait; here the CPU is taken for one.
"""

import pytest
import torch
import transformers

import fastbert
from fastbert.modules import request
from fastbert.modules.encoder import BertEncoder
from fastbert.modules.graphs import buckets
from tests.host_waits import NoHostWaits, tensors_of
from tests.models.pretraining_case import SHAPE
from tests.modules.graphs.case import MASKS, Repeats, use

IDS = torch.randint(1, 61, (3, 7), generator=torch.Generator().manual_seed(0))
PADDED = {name: torch.tensor(mask) for name, mask in MASKS.items() if mask is not None}
WORDS = torch.where(IDS % 3 == 0, IDS % 2, -100)
ONES = torch.ones(3, dtype=torch.int64)
LABELS = {
    "MaskedLM": {"labels": WORDS},
    "PreTraining": {"labels": WORDS, "next_sentence_label": ONES},
    "TokenClassification": {"labels": WORDS},
    "SequenceClassification": {"labels": ONES},
    "NextSentencePrediction": {"labels": ONES},
    "MultipleChoice": {"labels": ONES[:1]},
    "QuestionAnswering": {"start_positions": 0 * ONES, "end_positions": ONES},
}


def make(name, **changes):
    torch.manual_seed(0)
    return getattr(fastbert, name)(fastbert.BertConfig(**SHAPE | changes)).eval()


def both(monkeypatch, call):
    """What the call gives where tokens are not counted, and where they are."""
    found, unpad = [], request.unpad
    monkeypatch.setattr(
        request, "unpad", lambda *given: (found.append(unpad(*given)), found[-1])[1]
    )
    with torch.no_grad():
        expected = call()
        monkeypatch.setattr(request, "_waits", lambda *_: False)
        actual = call()
    counted, uncounted = found
    assert not counted.has_filler
    assert uncounted.has_filler
    assert uncounted.num_tokens == IDS.numel()
    return actual, expected


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("mask", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
@pytest.mark.parametrize("head", LABELS)
def test_every_head_gives_the_same(head, labelled, states, mask, monkeypatch):
    model, given = make(f"BertFor{head}"), {"input_ids": IDS, "attention_mask": mask}
    if head == "MultipleChoice":
        given = {name: x[None] for name, x in given.items()}
    given |= {"output_hidden_states": states, **(LABELS[head] if labelled else {})}
    assert_same(*both(monkeypatch, lambda: model(**given)))


@pytest.mark.parametrize("kind", ["own", "patched"])
@pytest.mark.parametrize("head", ["MaskedLM", "PreTraining"])
def test_a_loss_without_logits_is_the_same(head, kind, monkeypatch):
    model, given = make(f"BertFor{head}"), {"input_ids": IDS, "attention_mask": PADDED["holes"]}
    if kind == "patched":
        config = transformers.BertConfig(**SHAPE)
        model = fastbert.patch(getattr(transformers, f"BertFor{head}")(config)).eval()
    given |= LABELS[head] | {"skip_logits": True}
    assert_same(*both(monkeypatch, lambda: model(**given)))


@pytest.mark.parametrize("mask", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("by", ["ids", "embeddings", "types and positions"])
def test_the_bare_model_gives_the_same(by, mask, monkeypatch):
    model, given = make("BertModel"), {"input_ids": IDS, "attention_mask": mask}
    if by == "embeddings":
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    if by == "types and positions":
        given |= {"token_type_ids": IDS % 2, "position_ids": IDS % 9}
    assert_same(*both(monkeypatch, lambda: model(**given)))


@pytest.mark.parametrize("mask", PADDED.values(), ids=PADDED)
def test_dropout_without_gradients_has_the_same_masks(mask, monkeypatch):
    model = make("BertForTokenClassification", hidden_dropout_prob=0.5).train()
    model.dropout.p = 0.0  # of the head, whose mask is no longer that of a token

    def call():
        torch.manual_seed(3)
        return model(IDS, mask)

    assert_same(*both(monkeypatch, call))


@pytest.mark.parametrize("mask", PADDED.values(), ids=PADDED)
def test_the_encoder_alone_gives_the_same(mask, monkeypatch):
    encoder, x = BertEncoder(make("BertModel").config).eval(), torch.randn(3, 7, 32)
    assert_same(*both(monkeypatch, lambda: encoder(x, mask, output_hidden_states=True)))


def test_the_host_waits_for_nothing(monkeypatch):
    from fastbert.ops import attention_plain

    monkeypatch.setattr(attention_plain, "reads_lengths", lambda call: False)  # as on a GPU
    monkeypatch.setattr(request, "_waits", lambda *_: False)
    model, mask = make("BertForTokenClassification"), PADDED["left"]
    with torch.no_grad(), NoHostWaits(tensors_of(model, [IDS, mask])) as waits:
        model(IDS, mask)
    assert waits.seen == []


@pytest.mark.parametrize(
    ("device", "places", "hidden_size", "grad", "waits"),
    [
        ("cuda", 128, 768, False, False),
        ("cuda", 128, 768, True, True),  # dropout and losses need the number
        ("cuda", 4096, 768, False, True),
        ("cuda", 4096, 128, False, False),
        ("cuda", 0, 768, False, True),
        ("cpu", 128, 768, False, True),
        ("cuda", 128, None, False, True),  # without graphs the GPU waits for the host
    ],
)
def test_it_waits_where_that_pays(device, places, hidden_size, grad, waits):
    with torch.set_grad_enabled(grad):
        assert request._waits(torch.device(device), places, hidden_size) == waits


@pytest.mark.parametrize("off", ["", "model", "environment"])
def test_models_ask_whether_their_layers_may_replay_a_graph(off, monkeypatch):
    model, sizes = make("BertForMaskedLM"), []
    monkeypatch.setattr(request, "_waits", lambda *given: sizes.append(given[2]) or True)
    monkeypatch.setenv("FASTBERT_GRAPHS", "0" if off == "environment" else "auto")
    buckets.allow(model, False if off == "model" else "auto")
    with torch.no_grad():
        model(IDS, PADDED["left"])
        model.bert.encoder(torch.randn(3, 7, 32), PADDED["left"])
    assert sizes == [None if off else 32] * 2


@pytest.mark.parametrize("off", ["", "graphs", "hook", "dropout"])
def test_patched_models_ask_whether_their_layers_may_replay_a_graph(off, monkeypatch):
    use(Repeats(), monkeypatch)
    sizes, model = [], transformers.BertModel(transformers.BertConfig(**SHAPE))
    fastbert.patch(model, graphs=False if off == "graphs" else "auto").train(off == "dropout")
    if off == "hook":
        model.encoder.layer[1].register_forward_hook(lambda *_: None)
    monkeypatch.setattr(request, "_waits", lambda *given: sizes.append(given[2]) or True)
    with torch.no_grad():
        model(IDS, PADDED["left"], output_hidden_states=True)
    assert sizes == [None if off else 32]


def test_a_batch_of_padding_alone_has_zeros(monkeypatch):
    monkeypatch.setattr(request, "_waits", lambda *_: False)
    with torch.no_grad():
        output = fastbert.BertModel(make("BertModel").config).eval()(IDS, 0 * IDS)
    assert output.last_hidden_state.abs().max() == 0
