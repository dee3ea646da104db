"""`fastbert.patch`: the same outputs, losses and gradients, whatever the model and the call."""

import dataclasses
import functools
import pickle
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert.hf import stack
from fastbert.hf.families import Unsupported, activation_of
from fastbert.modules import sequences
from fastbert.modules.sequences import Rows
from tests.hf.cases import BERT_KINDS, FAMILIES, KINDS, MASKS, Case, build, inputs, is_comparable
from tests.hf.compare import compare

CASES = [
    *(Case("Bert", kind) for kind in BERT_KINDS),
    *(Case(family, kind, seed=1) for family in FAMILIES[1:] for kind in ("Model", "ForMaskedLM")),
    *(Case(family, kind, training=False) for family in FAMILIES for kind in KINDS[1:]),
    *(Case(family, "ForQuestionAnswering", mask="none") for family in FAMILIES),
    *(Case(family, side="left", mask=mask) for family in FAMILIES[::4] for mask in MASKS),
    *(Case(mask=mask, attention="eager") for mask in MASKS),
    Case(checkpointing=True),
    Case("Roberta", "ForMaskedLM", checkpointing=True),
    Case(from_embeddings=True, positions=True, states=True),
    Case("Roberta", from_embeddings=True),
    Case(return_dict=False, states=True, training=False),
    Case(layers=0),
    Case(lengths=(1,)),
    Case(dtype=torch.float32, hidden_act="gelu_new", head_dim=5),
    Case(hidden_act="relu"),
    *(
        Case("Bert", "ForSequenceClassification", problem=problem)
        for problem in ("regression", "multi_label_classification")
    ),
]


def readable(case: Case) -> str:
    default = Case()
    changed = {
        f.name: getattr(case, f.name)
        for f in dataclasses.fields(case)
        if getattr(case, f.name) != getattr(default, f.name)
    }
    return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"


@pytest.mark.parametrize("case", list(filter(is_comparable, CASES)), ids=readable)
def test_a_patched_model_gives_what_the_unpatched_gives(case):
    compare(case)


@pytest.mark.parametrize("mask", ["int", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_batch_whose_last_layer_computes_all_rows_gives_the_same(family, mask, monkeypatch):
    monkeypatch.setattr(sequences, "LABELLED_ALONE", {"cpu": float("inf")})
    monkeypatch.setattr(Rows, "read_by_losses", None)
    kinds = ["ForMaskedLM", "ForPreTraining"] if family == "Bert" else ["ForMaskedLM"]
    for kind in kinds:
        compare(Case(family, kind, mask=mask))


def test_hidden_states_of_a_masked_lm_in_training_take_one_run_of_the_layers():
    case = Case("Bert", "ForMaskedLM", states=True)
    compare(case)
    _, ours = build(case)
    with mock.patch.object(stack, "run_stack", wraps=stack.run_stack) as layers:
        ours(**inputs(case, ours)[0])
    assert layers.call_count == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_changes_classes_and_nothing_else(family):
    model, _ = build(Case(family, "ForMaskedLM"))
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert fastbert.patch(model) is model
    assert fastbert.is_patched(model)
    for name, module in model.named_modules():
        cls, identity = before[name]
        assert id(module) == identity
        assert isinstance(module, cls)
        assert str(type(module)) == str(cls)
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == tensors
    patched = {name: type(module) for name, module in model.named_modules()}
    fastbert.patch(model)
    assert {name: type(module) for name, module in model.named_modules()} == patched
    assert fastbert.unpatch(model) is model
    assert not fastbert.is_patched(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: c for n, (c, _) in before.items()}


def test_a_patched_class_makes_patched_models(tmp_path):
    _, patched = build(Case("Bert", "ForSequenceClassification", training=False))
    again = type(patched)(patched.config).to(torch.float64).eval()
    again.load_state_dict(patched.state_dict())
    patched.save_pretrained(tmp_path)
    loaded = type(patched).from_pretrained(tmp_path, dtype=torch.float64)
    chosen = fastbert.patched_class(transformers.BertForSequenceClassification)
    assert chosen is type(patched)
    arguments, _ = inputs(Case("Bert", "ForSequenceClassification"), patched)
    expected = patched(**arguments).logits
    for other in (again, loaded, pickle.loads(pickle.dumps(patched))):
        assert fastbert.is_patched(other)
        assert type(other) is type(patched)
        assert torch.equal(other(**arguments).logits, expected)


def test_a_model_without_such_an_encoder_is_refused_by_name():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)
    other = transformers.GPT2Model(config)
    with pytest.raises(TypeError, match=r"patch: expected a transformers model .*GPT2Model, which"):
        fastbert.patch(other)
    with pytest.raises(TypeError, match=r"linear\.Linear, which has none"):
        fastbert.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="patch: expected a model, got str"):
        fastbert.patch("bert-base-uncased")


def test_a_decoder_runs_as_before():
    config = transformers.BertConfig(
        vocab_size=37,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        is_decoder=True,
    )
    model = transformers.BertLMHeadModel(config).eval()
    ids = torch.randint(0, 37, (2, 5))
    expected = model(ids).logits
    fastbert.patch(model)
    assert torch.equal(model(ids).logits, expected)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 8)


def test_a_loss_with_a_weight_of_each_class_stays_the_models_own():
    config = transformers.DistilBertConfig(
        vocab_size=37, dim=16, n_layers=1, n_heads=2, hidden_dim=20, dropout=0, attention_dropout=0
    )
    model = transformers.DistilBertForMaskedLM(config).train()
    model.mlm_loss_fct = nn.CrossEntropyLoss(weight=torch.linspace(0.1, 3, 37))
    ids = torch.randint(1, 37, (2, 5))
    expected = model(ids, labels=ids).loss
    fastbert.patch(model)
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


def test_a_decoder_gives_logits_beside_its_loss():
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    model = transformers.BertForMaskedLM(config).train()
    fastbert.patch(model)
    ids = torch.randint(1, 37, (2, 5))
    assert model(ids, labels=ids).logits.shape == (2, 5, 37)


def test_one_layer_of_a_decoders_kind_runs_as_before():
    _, model = build(Case(training=False))
    model.encoder.layer[1].is_decoder = True
    told = fastbert.explain(model, torch.randint(1, 37, (2, 5)), show=False).routes
    assert told[0].reason == "a decoder's layer"


@pytest.mark.parametrize("problem", ["regression", None])
def test_whole_numbers_of_a_regression_all_count(problem):
    theirs, ours = build(Case(kind="ForSequenceClassification", problem=problem, training=False))
    labels = torch.full((2, theirs.config.num_labels), -100)
    labels = labels if problem else labels[:, 0]
    ids = torch.randint(5, 37, (2, 4))
    with torch.no_grad():
        expected = theirs(ids, labels=labels).loss
        loss = ours(ids, labels=labels).loss
        shared = ours(ids, labels=labels, num_items_in_batch=4 * labels.numel()).loss
    torch.testing.assert_close(loss, expected if problem else torch.zeros_like(loss))
    torch.testing.assert_close(shared, loss / 4)


@functools.wraps(nn.functional.silu)
def along_the_sequence(x):
    return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize("function", [nn.PReLU(2), nn.Softmax(-1), along_the_sequence])
def test_an_activation_that_may_tell_places_apart_is_not_packed(function):
    with pytest.raises(Unsupported):
        activation_of(function)
    assert activation_of(nn.functional.silu) is nn.functional.silu
    assert isinstance(activation_of(nn.PReLU()), nn.PReLU)
