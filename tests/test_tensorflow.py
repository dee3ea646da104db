"""Checkpoints of google-research/bert load under Hugging Face's names."""

import pytest
import torch
import transformers

import fastbert
from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.tensorflow import from_tensorflow
from tests.checkpoint.case import IDS, SHAPE


def tensorflow_name(name: str) -> tuple[str, bool]:
    """google-research/bert's name of a weight, and whether it is stored transposed; by hand."""
    heads = {
        "cls.predictions.bias": "cls/predictions/output_bias",
        "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
        "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
        "classifier.weight": "output_weights",
        "classifier.bias": "output_bias",
        "qa_outputs.weight": "cls/squad/output_weights",
        "qa_outputs.bias": "cls/squad/output_bias",
    }
    if name in heads:
        return heads[name], False
    *path, module, kind = name.split(".")
    if module.endswith("_embeddings"):
        return "/".join([*path, module]), False
    if module == "LayerNorm":
        kind = {"weight": "gamma", "bias": "beta"}[kind]
    transposed = kind == "weight"
    kind = "kernel" if transposed else kind
    return "/".join([*path, module, kind]).replace("layer/", "layer_"), transposed


@pytest.mark.parametrize("form", ["numpy", "torch"])
@pytest.mark.parametrize("head", ["PreTraining", "SequenceClassification", "QuestionAnswering"])
def test_tensorflow_checkpoints_become_hugging_faces(head, form):
    theirs = getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**SHAPE)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = {"global_step": torch.tensor(7)}
    for name, tensor in theirs.named_parameters():
        other, transposed = tensorflow_name(name)
        tensors[other] = tensor.detach().T if transposed else tensor.detach()
        tensors[f"{other}/adam_m"] = tensors[f"{other}/adam_v"] = tensors[other]
    assert "bert/encoder/layer_0/attention/self/query/kernel" in tensors
    assert "bert/embeddings/LayerNorm/gamma" in tensors
    if form == "numpy":
        tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
    weights = from_tensorflow(tensors)
    expected = dict(theirs.named_parameters())
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
    ours = getattr(fastbert, f"BertFor{head}")(fastbert.BertConfig(**SHAPE)).eval()
    assert checkpoint.load_weights(ours, weights, "bert_model.ckpt") == []
    torch.testing.assert_close(ours(IDS)[0], theirs(IDS)[0])
    with pytest.raises(InputError, match=r"unknown bert\.encoder\.gate"):
        checkpoint.load_weights(ours, weights | {"bert.encoder.gate": IDS}, "bert_model.ckpt")


def test_the_official_names_of_a_tensorflow_checkpoint():
    """As `tf.train.list_variables` gives them for uncased_L-12_H-768_A-12, and its fine-tunings."""
    kernel = torch.arange(6.0).view(2, 3)
    names = {
        "bert/embeddings/word_embeddings": "bert.embeddings.word_embeddings.weight",
        "bert/embeddings/LayerNorm/beta": "bert.embeddings.LayerNorm.bias",
        "bert/encoder/layer_11/attention/output/LayerNorm/gamma": (
            "bert.encoder.layer.11.attention.output.LayerNorm.weight"
        ),
        "bert/encoder/layer_0/intermediate/dense/kernel": (
            "bert.encoder.layer.0.intermediate.dense.weight"
        ),
        "bert/pooler/dense/bias": "bert.pooler.dense.bias",
        "cls/predictions/transform/dense/kernel:0": "cls.predictions.transform.dense.weight",
        "cls/predictions/output_bias": "cls.predictions.bias",
        "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
        "cls/squad/output_bias": "qa_outputs.bias",
        "output_weights": "classifier.weight",
    }
    slots = ["global_step", "bert/pooler/dense/kernel/adam_v", "beta1_power", "loss_scale:0"]
    slots.append("bert/pooler/dense/kernel/AdamWeightDecayOptimizer_1")
    weights = from_tensorflow(dict.fromkeys([*names, *slots], kernel))
    assert list(weights) == list(names.values())
    for name, tensor in zip(names, weights.values(), strict=True):
        assert torch.equal(tensor, kernel.T if "kernel" in name else kernel), name
