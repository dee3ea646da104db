"""Patched against unpatched on drawn configurations; FASTBERT_FUZZ=2000 draws that many."""

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastbert.modules import request, sequences
from tests.hf.cases import BERT_KINDS, FAMILIES, KINDS, MASKS, Case, is_comparable
from tests.hf.changes import CHANGES, OF_LAYERS
from tests.hf.compare import compare, compare_inference
from tests.modules.graphs.case import Repeats, use

CASES = st.builds(
    Case,
    family=st.sampled_from(FAMILIES),
    kind=st.sampled_from(BERT_KINDS),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 12),
    layers=st.integers(0, 3),
    hidden_act=st.sampled_from(["gelu", "gelu_new", "gelu_fast", "gelu_python", "relu", "silu"]),
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=5).map(tuple),
    side=st.sampled_from(["right", "left"]),
    mask=st.sampled_from(MASKS),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    training=st.booleans(),
    checkpointing=st.booleans(),
    attention=st.sampled_from(["sdpa", "eager"]),
    from_embeddings=st.booleans(),
    token_types=st.booleans(),
    positions=st.booleans(),
    states=st.booleans(),
    return_dict=st.sampled_from([True, True, True, False]),
    problem=st.sampled_from([None, None, "regression", "multi_label_classification"]),
    change=st.sampled_from([None, *CHANGES]),
    padding=st.sampled_from(["skip", "skip", "compute"]),
    positional=st.integers(0, 3),
    leftover=st.booleans(),
    seed=st.integers(0, 2**16),
)


DRAWN = settings(
    max_examples=int(os.environ.get("FASTBERT_FUZZ", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@DRAWN
@given(CASES)
def test_a_patched_model_gives_what_the_unpatched_gives(case):
    assume(is_sensible(case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "LABELLED_ALONE", {"cpu": float("inf") if case.seed % 2 else 0})
        compare(case)


@DRAWN
@given(CASES)
def test_a_patched_model_that_replays_graphs_gives_what_the_unpatched_gives(case):
    """Inference by a stand-in for CUDA graphs, which begin with the batch or with the layers."""
    case = dataclasses.replace(case, training=False, checkpointing=False)
    assume(is_sensible(case))
    with pytest.MonkeyPatch.context() as patch:
        use(Repeats(), patch)
        patch.setattr(sequences, "FIRST_ALONE", {"cpu": float("inf") if case.seed % 2 else 0})
        patch.setattr(sequences, "LEAST_COUNTED", 2**30 if case.seed % 3 else 0)
        compare_inference(case)


@DRAWN
@given(CASES)
def test_a_patched_model_whose_tokens_are_not_counted_gives_what_the_unpatched_gives(case):
    """As on a GPU, whose host does not wait for the number of a small batch's tokens."""
    case = dataclasses.replace(case, training=False, checkpointing=False)
    assume(is_sensible(case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "_waits", lambda *_: False)
        patch.setattr(sequences, "FIRST_ALONE", {"cpu": float("inf") if case.seed % 2 else 0})
        compare_inference(case)


def is_sensible(case):
    is_known = case.family == "Bert" or case.kind in KINDS
    is_problem = case.problem is None or case.kind == "ForSequenceClassification"
    # the norm of one number is rounding alone, a million times as large; of a few mostly in float32
    is_exact = case.heads * case.head_dim >= (2 if case.dtype == torch.float64 else 8)
    has_layers = case.layers > 0 or case.change not in {change.__name__ for change in OF_LAYERS}
    return is_known and is_problem and is_exact and has_layers and is_comparable(case)
