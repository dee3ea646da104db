"""The options of a distillation, and what follows from a teacher."""

import dataclasses

import pytest

from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.config.distill import DistillConfig

BASE = BertConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "--teacher: missing"),
        ({"preset": "huge"}, "--preset: expected one of tiny"),
        ({"preset": "mini", "layers": 2}, "--layers: not with --preset.*; omit one"),
        ({"layers": 0}, "--layers: expected at least 1, got 0"),
        ({"init": "warm"}, "--init: expected one of teacher, random, got 'warm'"),
        ({"temperature": 0.0}, "--temperature: expected above 0, got 0"),
        ({"temperature": float("nan")}, "--temperature: expected above 0, got nan"),
        ({"mlm_weight": -1.0}, "--mlm-weight: expected at least 0, got -1"),
        ({"soft_weight": 0.0, "mlm_weight": 0.0, "cosine_weight": 0.0}, "--soft-weight: all three"),
        ({"lowercase": True}, "--lowercase: .*; omit the option"),
        ({"nsp_weight": 1.0}, "--nsp-weight: .*; omit the option"),
        ({"steps": 0}, "--steps: expected at least 1"),
        ({"dropout": 1.0}, "--dropout: expected at least 0 and below 1"),
        ({"max_seq_len": 7}, "--max-seq-len: expected at least 8"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        DistillConfig(**{"teacher": "t", **options})


@pytest.mark.parametrize(("depth", "layers"), [(12, 6), (24, 12), (5, 3), (2, 1), (1, 1)], ids=str)
def test_the_default_student_has_half_the_layers(depth, layers):
    teacher = dataclasses.replace(BASE, num_hidden_layers=depth)
    config = DistillConfig(teacher="t").fitted_to(teacher)
    assert (config.layers, config.init, config.cosine_weight) == (layers, "teacher", 1.0)
    student = config.student(teacher)
    assert dataclasses.replace(student, num_hidden_layers=depth) == teacher
    assert (config.temperature, config.soft_weight, config.mlm_weight) == (2.0, 5.0, 2.0)


def test_a_student_of_another_width_begins_at_random_without_the_cosine():
    config = DistillConfig(teacher="t", preset="mini").fitted_to(BASE)
    assert (config.init, config.cosine_weight, config.layers) == ("random", 0.0, None)
    assert (config.learning_rate, config.dropout, config.max_seq_len) == (1e-3, 0.0, 32)
    student = config.student(BASE)
    assert (student.hidden_size, student.num_hidden_layers) == (256, 4)
    assert student.vocab_size == BASE.vocab_size
    assert student.hidden_dropout_prob == student.attention_probs_dropout_prob == 0.0


def test_other_heads_are_not_copied_but_compared():
    teacher = dataclasses.replace(BASE, num_attention_heads=8)
    config = DistillConfig(teacher="t", preset="base").fitted_to(teacher)
    assert (config.init, config.cosine_weight) == ("random", 1.0)


def test_training_is_that_of_the_preset_nearest_in_width():
    config = DistillConfig(teacher="t").fitted_to(BASE)
    assert (config.learning_rate, config.dropout, config.max_seq_len) == (1e-4, 0.1, 128)
    config = DistillConfig(teacher="t", dropout=0.2).fitted_to(
        dataclasses.replace(BASE, hidden_size=240, max_position_embeddings=20)
    )
    assert (config.learning_rate, config.dropout, config.max_seq_len) == (1e-3, 0.2, 20)


@pytest.mark.parametrize("options", [{}, {"preset": "mini"}, {"layers": 3, "init": "random"}])
def test_fitted_options_stay_as_they_are(options):
    """So that a resumed run has the options of its run.json."""
    fitted = DistillConfig(teacher="t", **options).fitted_to(BASE)
    assert fitted.fitted_to(BASE) == fitted
    assert DistillConfig.from_json(fitted.to_json()) == fitted
    assert fitted.same_run(log_every=5).log_every == 5
