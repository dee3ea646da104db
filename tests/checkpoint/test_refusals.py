"""What is no checkpoint, or a damaged one, is named and nothing of it is run."""

import json
import os

import pytest
import torch

import fastbert
from fastbert import checkpoint
from fastbert.check import InputError
from tests.checkpoint.case import IDS, QUERY, rewrite


def test_a_decoder_that_is_not_the_embeddings_is_not_dropped(saved):
    """transformers 5 computes with it, 4 with the embeddings."""
    _, directory = saved
    other = torch.randn(50, 16)
    rewrite(directory, lambda weights: weights.update({"cls.predictions.decoder.weight": other}))
    kind = fastbert.BertForMaskedLM
    with pytest.raises(InputError, match=r"decoder\.weight is not bert\..*; set tie_word_emb"):
        kind.from_pretrained(directory)
    ours = kind.from_pretrained(directory, tie_word_embeddings=False)
    assert torch.equal(ours.get_output_embeddings().weight, other)
    fastbert.BertModel.from_pretrained(directory)


def test_weights_without_a_configuration_are_told(saved):
    model, directory = saved
    (directory / "config.json").unlink()  # as Trainer saves a model that is not transformers' own
    with pytest.raises(InputError, match=r"; model\.config\.save_pretrained writes it"):
        fastbert.BertForPreTraining.from_pretrained(directory)
    model.config.save_pretrained(directory)
    fastbert.BertForPreTraining.from_pretrained(directory)


def test_a_pickle_that_runs_code_is_refused(saved):
    class Malicious:
        def __reduce__(self):
            return os.system, ("touch /tmp/fastbert-was-here",)

    _, directory = saved
    (directory / checkpoint.WEIGHTS).unlink()
    torch.save({"a": Malicious()}, directory / checkpoint.LEGACY_WEIGHTS)
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        fastbert.BertModel.from_pretrained(directory)


@pytest.mark.parametrize("found", [[1, 2], {1: IDS}, {"bert.pooler.dense.bias": 3}])
def test_a_pickle_of_something_else_is_named(saved, found):
    _, directory = saved
    (directory / checkpoint.WEIGHTS).unlink()
    torch.save(found, directory / checkpoint.LEGACY_WEIGHTS)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: .* not a dictionary of tensors"):
        fastbert.BertModel.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(QUERY), f"lacks {QUERY}"),
        (lambda w: w.update({"bert.encoder.gate": torch.ones(1)}), "unknown bert.encoder.gate"),
        (lambda w: w.update({QUERY: torch.ones(3, 3)}), rf"{QUERY} has shape \(3, 3\)"),
    ],
    ids=["missing", "unknown", "reshaped"],
)
def test_weights_that_do_not_fit_are_refused(saved, change, message):
    _, directory = saved
    rewrite(directory, change)
    with pytest.raises(InputError, match=message):
        fastbert.BertForPreTraining.from_pretrained(directory)


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_a_truncated_file_is_named(saved, size):
    _, directory = saved
    path = directory / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated or corrupt"):
        fastbert.BertForPreTraining.from_pretrained(directory)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        fastbert.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no-such/model", "no name!"])  # the hub refuses the second
def test_a_hub_name_that_cannot_be_had_is_one_line(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"{name}: neither a directory nor") as raised:
        fastbert.BertModel.from_pretrained(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(text, saved):
    _, directory = saved
    (directory / checkpoint.WEIGHTS).unlink()
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: not an index"):
        fastbert.BertModel.from_pretrained(directory)


def test_an_index_reads_no_file_outside_its_directory(saved, tmp_path):
    _, directory = saved
    inner = directory / "inner"
    inner.mkdir()
    (directory / "config.json").rename(inner / "config.json")
    index = {"weight_map": {"a": f"../{checkpoint.WEIGHTS}"}}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"inner/model\.safetensors: missing"):
        fastbert.BertModel.from_pretrained(inner)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PermissionError(13, "Permission denied"), InputError, r"cannot be read \(Permission de"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError, "^DefaultCPU"),
        (EOFError(), InputError, r"truncated or corrupt \(EOFError\)"),
    ],
)
def test_what_a_file_suffers_from_is_told(saved, monkeypatch, error, kind, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "load_file", fail)
    with pytest.raises(kind, match=message):
        checkpoint.read_weights(saved[1])
