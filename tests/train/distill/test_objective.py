"""The loss of distillation, against Hugging Face's models and torch's losses on padded batches."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers

import fastbert
from fastbert.packing import Bucket
from fastbert.train.distill.objective import (
    DistillationMetrics,
    DistillationObjective,
    Teacher,
    Weights,
)
from fastbert.train.distill.run import copy_layers, layers_to_copy
from fastbert.train.objective import Metrics, PretrainingObjective
from tests.models.pretraining_case import SHAPE, make_batch

LENGTHS = (9, 3, 14, 5, 1, 16)
WEIGHTS = Weights(soft=5.0, mlm=2.0, cosine=1.0)


def make_model(layers=2, seed=0, dropout=0.0) -> fastbert.BertForMaskedLM:
    torch.manual_seed(seed)
    shape = SHAPE | {"num_hidden_layers": layers}
    model = fastbert.BertForMaskedLM(
        fastbert.BertConfig(
            **shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
    )
    for parameter in model.parameters():  # so that scores are far from uniform, biases not zero
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double().train()


def make_objective(weights=WEIGHTS, temperature=2.0, **student) -> DistillationObjective:
    teacher = Teacher(make_model(layers=4, seed=1, dropout=0.5))
    return DistillationObjective(make_model(**student), teacher, weights, temperature).train()


def batch_of(lengths, ids=None):
    return dataclasses.replace(make_batch(lengths, ids=ids), next_sentence_label=None)


def counts_of(batch):
    return batch.num_labels, 0, batch.num_tokens


def hugging_face(model) -> transformers.BertForMaskedLM:
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(**model.config.to_dict(), attn_implementation="eager")
    )
    missing, unexpected = theirs.double().load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not [name for name in missing if "position_ids" not in name]
    return theirs


def padded(batch):
    """(B, S) tensors, each sequence in a row of its own."""
    lengths = batch.cu_seqlens.diff().tolist()
    names = {"input_ids": 0, "token_type_ids": 0, "labels": -100}
    rows = {
        name: torch.nn.utils.rnn.pad_sequence(
            getattr(batch, name).split(lengths), batch_first=True, padding_value=value
        )
        for name, value in names.items()
    }
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return rows, mask


def distilbert_loss(student, teacher, batch, weights, temperature):
    """As Hugging Face's script for DistilBERT has it, over all positions of padded sequences."""
    rows, mask = padded(batch)
    labels = rows.pop("labels")
    inputs = {**rows, "attention_mask": mask.long(), "output_hidden_states": True}
    own = student(**inputs)
    with torch.no_grad():
        taught = teacher.eval()(**inputs)
    chosen = labels != -100
    soft = torch.nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(own.logits[chosen] / temperature, dim=-1),
        F.softmax(taught.logits[chosen] / temperature, dim=-1),
    )
    states = [output.hidden_states[-1][mask] for output in (own, taught)]
    cosine = torch.nn.CosineEmbeddingLoss()(*states, torch.ones(len(states[0])))
    mlm = torch.nn.CrossEntropyLoss()(own.logits.flatten(0, 1), labels.flatten())
    loss = weights.soft * soft * temperature**2 + weights.mlm * mlm + weights.cosine * cosine
    return loss, soft * temperature**2, mlm, cosine


@pytest.mark.parametrize(
    ("weights", "temperature"),
    [
        (WEIGHTS, 2.0),
        (Weights(0.7, 0.0, 3.0), 1.0),
        (Weights(1.0, 0.3, 0.0), 5.0),
    ],
    ids=["DistilBERT's", "no mlm", "no cosine"],
)
def test_it_is_the_loss_of_hugging_faces_script(weights, temperature):
    objective = make_objective(weights, temperature)
    batch = batch_of(LENGTHS)
    student = hugging_face(objective.model)
    expected, soft, mlm, cosine = distilbert_loss(
        student, hugging_face(objective.teacher.model), batch, weights, temperature
    )
    result = objective(batch, *counts_of(batch))
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-9)

    expected.backward()
    result.loss.backward()
    theirs = dict(student.named_parameters())
    for name, parameter in objective.model.named_parameters():
        gradient = theirs[name].grad
        assert gradient is not None, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9, msg=name)

    metrics = DistillationMetrics(*result.sums.tolist())
    assert metrics.soft_loss == pytest.approx(soft.item(), rel=1e-5)
    assert metrics.mlm_loss == pytest.approx(mlm.item(), rel=1e-5)
    assert metrics.cosine_loss == pytest.approx(cosine.item() if weights.cosine else 0, rel=1e-5)
    assert metrics.num_targets == batch.num_labels


def test_shares_add_up_to_the_batch():
    objective = make_objective()
    whole = batch_of(LENGTHS)
    expected = objective(whole, *counts_of(whole))
    expected.loss.backward()
    gradients = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    ids = list(range(len(LENGTHS)))
    parts = [batch_of([LENGTHS[i] for i in mine], mine) for mine in (ids[:1], ids[1:4], ids[4:])]
    results = [objective(part, *counts_of(whole)) for part in parts]
    sum(result.loss for result in results).backward()
    torch.testing.assert_close(sum(r.loss for r in results), expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(r.sums for r in results), expected.sums)
    for parameter, gradient in zip(objective.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cosine", [1.0, 0.0])
def test_what_pads_a_batch_for_a_cuda_graph_counts_for_nothing(cosine):
    objective = make_objective(Weights(5.0, 2.0, cosine))
    batch = batch_of(LENGTHS)
    spare = batch.padded_to(Bucket(80, 12, 40, 16))
    counts = tuple(map(torch.tensor, counts_of(batch)))
    expected, actual = (objective(one, *counts) for one in (batch, spare))
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.sums, expected.sums)


def test_the_teacher_is_asked_and_not_trained():
    objective = make_objective(dropout=0.2)
    teacher, batch = objective.teacher.model, batch_of(LENGTHS)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    objective.train()
    objective(batch, *counts_of(batch)).loss.backward()
    assert objective.model.training
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in objective.model.parameters())
    own = {id(p) for p in objective.model.parameters()}
    assert {id(p) for p in objective.parameters()} == own
    assert objective.state_dict().keys() == {f"model.{n}" for n in objective.model.state_dict()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_it():
    teacher = make_model(layers=3)
    student = make_model(layers=3, seed=5)
    copy_layers(teacher, student)
    objective = DistillationObjective(student, Teacher(teacher), WEIGHTS, 2.0).train()
    batch = batch_of(LENGTHS)
    result = objective(batch, *counts_of(batch))
    metrics = DistillationMetrics(*result.sums.tolist())
    assert metrics.soft_loss == pytest.approx(0, abs=1e-12)
    assert metrics.cosine_loss == pytest.approx(0, abs=1e-12)
    assert result.loss.item() == pytest.approx(2 * metrics.mlm_loss, rel=1e-6)


def test_held_out_it_is_the_masked_lm_loss():
    objective, batch = make_objective().eval(), batch_of(LENGTHS)
    expected = PretrainingObjective(objective.model)(batch, *counts_of(batch))
    actual = objective(batch, *counts_of(batch))
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.sums, expected.sums)
    assert Metrics(*actual.sums.tolist()).num_pairs == 0


def test_a_batch_with_nothing_to_predict_has_a_finite_loss():
    objective, batch = make_objective(Weights(5.0, 2.0, 0.0)), batch_of((4, 3))
    nothing = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100), num_labels=0)
    loss = objective(nothing, 0, 0, batch.num_tokens).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())


def test_layers_to_copy_are_distilberts_and_evenly_spaced():
    assert layers_to_copy(12, 6) == [0, 2, 4, 7, 9, 11]
    assert layers_to_copy(24, 12) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    assert layers_to_copy(4, 2) == [0, 3]
    assert layers_to_copy(7, 1) == [0]
    for depth in range(1, 13):
        assert layers_to_copy(depth, depth) == list(range(depth))
        for layers in range(2, depth + 1):
            chosen = layers_to_copy(depth, layers)
            assert chosen == sorted(set(chosen))
            assert (len(chosen), chosen[0], chosen[-1]) == (layers, 0, depth - 1)


def test_layers_are_copied_exactly():
    teacher, student = make_model(layers=5), make_model(layers=3, seed=7)
    copy_layers(teacher, student)
    theirs, own = teacher.state_dict(), student.state_dict()
    for name, tensor in own.items():
        parts = name.split(".")
        if parts[:3] == ["bert", "encoder", "layer"]:
            parts[3] = {"0": "0", "1": "2", "2": "4"}[parts[3]]
        assert torch.equal(tensor, theirs[".".join(parts)]), name
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight
    with torch.no_grad():  # copies, not the teacher's own
        student.bert.encoder.layer[0].output.dense.weight.zero_()
    assert teacher.bert.encoder.layer[0].output.dense.weight.any()
