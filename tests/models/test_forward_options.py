"""The keyword arguments of every forward, and what is done to models between two of them."""

import copy
import pickle

import pytest
import torch
import transformers

import fastbert
from fastbert.modules.encoder import BertLayer
from tests.models.pretraining_case import SHAPE, loss_and_gradients, make_batch, make_model

HEADS = (
    *("MaskedLM", "MultipleChoice", "NextSentencePrediction", "PreTraining"),
    *("QuestionAnswering", "SequenceClassification", "TokenClassification"),
)
IDS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def make(name, **changes):
    torch.manual_seed(0)
    return getattr(fastbert, name)(fastbert.BertConfig(**SHAPE | changes)).eval()


def ids_for(name):
    return IDS[:, None].expand(2, 3, 9) if name == "BertForMultipleChoice" else IDS


@pytest.mark.parametrize("head", HEADS)
def test_hidden_states_tuples_and_unknown_arguments(head):
    name = f"BertFor{head}"
    model, ids = make(name), ids_for(name)
    output = model(ids, output_hidden_states=True, num_items_in_batch=None, seq_idx=torch.ones(1))
    assert [tuple(state.shape[1:]) for state in output.hidden_states] == [(9, 32)] * 3
    for asked, places in (([1], {1}), (1, {1}), ([0, -1], {0, 2}), ((5, -2), {1}), ({2}, {2})):
        some = model(ids, output_hidden_states=asked).hidden_states
        for place, (one, state) in enumerate(zip(some, output.hidden_states, strict=True)):
            assert (one is None) == (place not in places)
            torch.testing.assert_close(one, None if one is None else state)
    for asked in (0, [], None, False):
        assert model(ids, output_hidden_states=asked).hidden_states is None
    assert type(model(ids, return_dict=False)) is tuple
    for argument in ("head_mask", "labelz", "encoder_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=argument) as raised:
            model(ids, **{argument: torch.ones(1)} if "output" not in argument else {argument: 1})
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["ours", "Hugging Face's"])
def test_the_configurations_defaults_count_and_arguments_win(kind):
    make_config = fastbert.BertConfig if kind == "ours" else transformers.BertConfig
    changes = {"output_hidden_states": True, "return_dict": False}
    model = fastbert.BertForTokenClassification(make_config(**SHAPE, **changes)).eval()
    logits, states = model(IDS)
    assert len(states) == 3
    output = model(IDS, return_dict=True, output_hidden_states=False)
    assert list(output.keys()) == ["logits"]
    torch.testing.assert_close(output.logits, logits)


def test_skip_logits_and_return_logits():
    for name in ("BertForMaskedLM", "BertForPreTraining"):
        model = make(name)
        labels = {"labels": IDS.where(IDS < 20, -100)}
        if name == "BertForPreTraining":
            labels["next_sentence_label"] = torch.tensor([0, 1])

        def has_logits(model=model, labels=labels, **options):
            output = model(IDS, **labels, **options)
            return "logits" in output or "prediction_logits" in output

        assert has_logits()
        for off in ({"skip_logits": True}, {"return_logits": False}):
            assert not has_logits(**off)
        model.train()
        assert not has_logits()
        for on in ({"skip_logits": False}, {"return_logits": True}):
            assert has_logits(**on)
        with pytest.raises(ValueError, match="return_logits and skip_logits that agree"):
            has_logits(skip_logits=True, return_logits=True)


PARTS = (5, 1, 12)


@pytest.mark.parametrize("said_by", ["position_ids", "cu_seq_lens", "both"])
def test_documents_in_one_row_are_as_alone(said_by):
    ids = torch.randint(1, 61, (1, sum(PARTS)))
    options = {}
    if said_by != "cu_seq_lens":
        options["position_ids"] = torch.cat([torch.arange(n) for n in PARTS])[None]
    if said_by != "position_ids":
        cu_seqlens = torch.tensor([0, *PARTS]).cumsum(0).int()
        options |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        options |= {"max_length_q": 12, "max_length_k": 12}
    base = make("BertModel")
    alone = [base(part) for part in ids.split(PARTS, 1)]
    together = base(ids, **options)
    torch.testing.assert_close(
        together.last_hidden_state, torch.cat([one.last_hidden_state for one in alone], 1)
    )
    torch.testing.assert_close(
        together.pooler_output, torch.cat([one.pooler_output for one in alone])
    )
    classifier = make("BertForSequenceClassification")
    labels = torch.tensor([1, 0, 1])
    alone = [classifier(part).logits for part in ids.split(PARTS, 1)]
    output = classifier(ids, labels=labels, **options)
    torch.testing.assert_close(output.logits, torch.cat(alone))
    spans = make("BertForQuestionAnswering")
    starts, ends = torch.tensor([2, 0, 11]), torch.tensor([4, 0, 12])  # the last lies beyond
    output = spans(ids, start_positions=starts, end_positions=ends, **options)
    alone = [spans(part) for part in ids.split(PARTS, 1)]
    torch.testing.assert_close(
        output.start_logits, torch.cat([one.start_logits for one in alone], 1)
    )

    def nll(one, end, place):
        return -one[f"{end}_logits"][0].log_softmax(0)[place]

    of_starts = [nll(one, "start", place) for one, place in zip(alone, starts, strict=True)]
    of_ends = [nll(one, "end", place) for one, place in zip(alone[:2], ends[:2], strict=True)]
    expected = (sum(of_starts) / 3 + sum(of_ends) / 2) / 2
    torch.testing.assert_close(output.loss, expected)


def test_boundaries_that_do_not_fit_the_row_are_refused_by_name():
    ids, bounds = torch.randint(1, 61, (1, 12)), torch.tensor([1, 5, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected boundaries that rise from 0 to "):
        make("BertModel")(ids, cu_seq_lens_q=bounds, max_length_q=12)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_recomputes_layers_and_replays_their_masks(reentrant, monkeypatch):
    model, batch = make_model(), make_batch([9, 1, 30, 4])
    expected = loss_and_gradients(model, batch)
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(kwargs)
    assert model.is_gradient_checkpointing
    calls = []
    original = BertLayer.forward
    monkeypatch.setattr(
        BertLayer, "forward", lambda self, *args: calls.append(self) or original(self, *args)
    )
    torch.manual_seed(99)  # the masks do not come from the generator's state
    loss = model(batch).loss
    assert len(calls) == 2
    loss.backward()
    assert calls == [*model.bert.encoder.layer, *reversed(model.bert.encoder.layer)]
    actual = [loss.detach(), *(p.grad for p in model.parameters())]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)

    calls.clear()
    model.eval()(batch)
    pickle.dumps(model)
    model.train().gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model(batch).loss.backward()
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForTokenClassification"])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_their_rows_their_tie_and_the_config(name, tied):
    model = make(name, tie_word_embeddings=tied, pad_token_id=0)
    config, before = model.config, copy.deepcopy(model)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.config is config
    table = model.resize_token_embeddings(65, pad_to_multiple_of=8)
    assert table is model.get_input_embeddings()
    assert (table.num_embeddings, tuple(table.weight.shape)) == (72, (72, 32))
    assert torch.equal(table.weight[:61], before.get_input_embeddings().weight)
    drawn = table.weight[61:] - before.get_input_embeddings().weight.mean(0)
    spread = drawn / before.get_input_embeddings().weight.std(0)
    assert spread.std().item() == pytest.approx(3e-5, rel=0.2)
    assert (config.vocab_size, model.config.vocab_size) == (61, 72)
    assert model.bert.config is model.config is model.bert.encoder.config
    output, expected = model(IDS), before(IDS)
    if name == "BertForPreTraining":
        decoder = model.get_output_embeddings()
        assert (decoder.weight is table.weight) == tied
        assert decoder.bias is model.cls.predictions.bias
        assert (decoder.out_features, output.prediction_logits.shape[-1]) == (72, 72)
        logits = output.prediction_logits[..., :61]
        torch.testing.assert_close(logits, expected.prediction_logits)
    else:
        torch.testing.assert_close(output.logits, expected.logits)
    assert model.resize_token_embeddings(50, mean_resizing=False).num_embeddings == 50
    assert model(IDS.clamp(max=49))[0].isfinite().all()


def test_a_vocabulary_without_the_padding_token_has_none():
    model = make("BertForPreTraining", pad_token_id=60)
    model.resize_token_embeddings(50)
    assert model.config.pad_token_id is model.get_input_embeddings().padding_idx is None
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_resizing_writes_into_hugging_faces_own_config():
    config = transformers.BertConfig(**SHAPE)
    model = fastbert.BertForMaskedLM(config)
    model.get_input_embeddings().weight.requires_grad = False
    model.cls.predictions.bias.data.normal_()
    table = model.resize_token_embeddings(170, mean_resizing=False)
    assert model.config is config
    assert config.vocab_size == 170
    assert table.weight[61:].std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.cls.predictions.bias[61:].any()
    assert not table.weight.requires_grad  # as before


def same(a, b):
    torch.testing.assert_close(a(IDS)[0], b(IDS)[0])
    return True


@pytest.mark.parametrize("head", ["PreTraining", "SequenceClassification"])
def test_copies_pickles_and_moves(head, tmp_path):
    model = make(f"BertFor{head}")
    torch.save(model, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert same(other, model)
        assert len(list(other.parameters())) == len(list(model.parameters()))  # the ties
        other.get_input_embeddings().weight.data.zero_()
        assert model.get_input_embeddings().weight.any()
    moved = copy.deepcopy(model).to(torch.float64)
    assert moved(IDS)[0].dtype == torch.float64
    assert len(list(moved.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("head", HEADS)
def test_a_model_made_on_the_meta_device_takes_its_weights_by_assignment(head):
    model = make(f"BertFor{head}")
    with torch.device("meta"):
        other = type(model)(model.config).eval()
    assert all(parameter.is_meta for parameter in other.parameters())
    other.load_state_dict(model.state_dict(), assign=True)
    assert len(list(other.parameters())) == len(list(model.parameters()))
    ids = ids_for(f"BertFor{head}")
    torch.testing.assert_close(other(ids)[0], model(ids)[0])
    if head in ("MaskedLM", "PreTraining"):
        head = other.cls.predictions
        assert head.decoder.weight is other.bert.embeddings.word_embeddings.weight
        assert head.decoder.bias is head.bias


@pytest.mark.parametrize("head", ["MaskedLM", "TokenClassification"])
def test_labels_of_an_unsigned_byte_are_labels(head):
    """Hugging Face's loss takes them, too; they cannot hold the -100 that padding gets."""
    model, mask = make(f"BertFor{head}"), torch.ones_like(IDS)
    mask[1, 4:] = 0
    labels = (IDS % 2).byte()
    losses = [model(IDS, attention_mask=mask, labels=x).loss for x in (labels, labels.long())]
    assert torch.equal(*losses)
