"""Patched against unpatched on drawn configurations; FASTBERT_FUZZ=2000 draws that many."""

import os

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.hf.cases import BERT_KINDS, FAMILIES, KINDS, MASKS, Case, compare, is_comparable
from tests.hf.changes import CHANGES, OF_LAYERS

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


@settings(
    max_examples=int(os.environ.get("FASTBERT_FUZZ", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(CASES)
def test_a_patched_model_gives_what_the_unpatched_gives(case):
    assume(case.family == "Bert" or case.kind in KINDS)
    assume(case.problem is None or case.kind == "ForSequenceClassification")
    # the norm of a few numbers in float32 is mostly rounding
    assume(case.dtype == torch.float64 or case.heads * case.head_dim >= 8)
    assume(case.layers > 0 or case.change not in {change.__name__ for change in OF_LAYERS})
    assume(is_comparable(case))
    compare(case)
