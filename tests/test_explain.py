"""What `fastbert.explain` tells is what runs."""

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert import backend

SHAPE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
IDS = torch.randint(5, 37, (3, 6))
MASK = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])


@pytest.fixture
def patched():
    return fastbert.patch(transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE)))


def rows(explanation, operator):
    return [row for row in explanation.rows if row.operator == operator]


def test_operators_with_backend_shape_dtype_and_dropout(patched, capsys):
    explanation = fastbert.explain(patched, input_ids=IDS, attention_mask=MASK, labels=IDS)
    [norm] = rows(explanation, "dropout_add_layer_norm")
    assert (norm.calls, norm.backend, norm.shape) == (6, "reference", "11x16")
    assert (norm.dtype, norm.dropout) == ("float32", "0.1")
    assert norm.note == "its only implementation for this device"
    assert sum(row.calls for row in rows(explanation, "attention_qkvpacked")) == 2
    assert sum(row.calls for row in rows(explanation, "attention")) == 1  # the last layer
    told = {module: (runs, why) for module, runs, why in explanation.routes}
    runs, why = told["BertModel"]
    assert runs == "packed, 11 tokens of 18 places"
    assert why == "the last layer computes 11 tokens; rows of padding are zeros"
    printed = capsys.readouterr().out
    assert "dropout_add_layer_norm" in printed
    assert "11 tokens of 18 places" in printed
    assert "dropout ┃" in printed
    fastbert.explain(patched.eval(), input_ids=IDS)
    assert "dropout ┃" not in capsys.readouterr().out  # no column without an entry


def test_where_the_fast_path_is_not_taken_it_says_why(patched):
    patched.eval()
    batch = {"input_ids": IDS, "attention_mask": MASK, "show": False}
    explanation = fastbert.explain(patched, **batch, output_attentions=True)
    assert {runs for _, runs, _ in explanation.routes} == {"Hugging Face's own"}
    assert {why.partition(":")[0] for _, _, why in explanation.routes} == {"output_attentions"}
    batch["attention_mask"] = torch.randn(3, 2, 6, 6)
    explanation = fastbert.explain(patched, **batch)
    assert "general mask" in explanation.routes[0][2]
    assert rows(explanation, "attention_qkvpacked")[0].kernel == "general mask"
    assert "hook" not in explanation.routes[0][2]  # transformers' capture, installed above, sleeps
    patched.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
    assert "1 layers have hooks" in fastbert.explain(patched, **batch).routes[0][2]
    batch["attention_mask"] = MASK  # the other one Hugging Face's own forward may refuse
    patched.bert.encoder.layer[1].attention.register_forward_hook(lambda *_: None)
    assert "a hook on a BertAttention" in fastbert.explain(patched, **batch).routes[0][2]


def test_kernels_are_named_and_what_they_refuse(monkeypatch):
    model = fastbert.BertModel(fastbert.BertConfig(**SHAPE))
    batch = fastbert.PackedBatch.from_sequences([[5, 6, 7], [8, 9]])
    with backend.use("triton"):
        explanation = fastbert.explain(model, batch, show=False)
        [attention] = rows(explanation, "attention_qkvpacked")
        assert attention.backend == "triton"
        assert attention.kernel.startswith("forward ")
        assert attention.dropout == "0.1 in the kernel"
    assert explanation.routes == [("BertEncoder", "packed, 5 tokens", "")]
    original = backend.load
    monkeypatch.setitem(backend.PREFERENCE, "cpu", ("triton", "reference"))
    monkeypatch.setattr(backend, "load", original)
    with backend.use(None):
        explanation = fastbert.explain(model.double(), batch, show=False)
    [norm] = rows(explanation, "dropout_add_layer_norm")
    assert norm.backend == "reference"
    assert norm.note == "triton does not support torch.float64"


def test_it_changes_nothing(patched):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fastbert.explain(patched, input_ids=IDS, show=False)
    assert torch.equal(torch.rand(2), expected)
    assert patched.training


def test_a_model_with_nothing_of_fastbert_is_refused():
    with pytest.raises(ValueError, match=r"explain: expected a fastbert model .* got Linear"):
        fastbert.explain(nn.Linear(2, 2), torch.ones(1, 2))
