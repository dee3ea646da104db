"""Checkpoints go both ways between fastbert and Hugging Face, and none is lost by a save."""

import json
import resource
import signal

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert
from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.system import files
from tests import processes
from tests.checkpoint.case import IDS, SHAPE, rewrite


def test_a_run_with_other_files_in_it_is_still_a_run(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    for place in (tmp_path, tmp_path / "checkpoint-1"):
        (place / "config.json").write_text("{}")
    (tmp_path / "latest").symlink_to("checkpoint-1")
    assert checkpoint.resolve(tmp_path) == tmp_path / "checkpoint-1"


def test_hugging_face_loads_it_with_no_missing_or_unexpected_key(saved):
    model, directory = saved
    theirs, report = transformers.BertForPreTraining.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    output, expected = model(IDS), theirs.eval()(IDS)
    torch.testing.assert_close(output.prediction_logits, expected.prediction_logits)
    assert json.loads((directory / "config.json").read_text())["architectures"] == [
        "BertForPreTraining"
    ]


def test_loads_what_hugging_face_saves(tmp_path):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path)
    ours = fastbert.BertForPreTraining.from_pretrained(tmp_path)
    assert not ours.training
    torch.testing.assert_close(ours(IDS).prediction_logits, theirs(IDS).prediction_logits)


def test_weights_are_read_back_in_the_dtype_that_they_were_written_in(tmp_path):
    """transformers 5 reads it from config.json, where the checkpoint's own was."""
    theirs = transformers.BertModel(transformers.BertConfig(**SHAPE)).half()
    theirs.save_pretrained(tmp_path / "half")
    ours = fastbert.BertModel.from_pretrained(tmp_path / "half")
    ours.save_pretrained(tmp_path / "whole")
    again = transformers.BertModel.from_pretrained(tmp_path / "whole", dtype="auto")
    assert again.dtype == ours.dtype == torch.float32
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"


def test_a_tied_parameter_is_written_once_and_stays_tied(saved):
    _, directory = saved
    names = load_file(directory / checkpoint.WEIGHTS).keys()
    assert "cls.predictions.decoder.weight" not in names
    assert "cls.predictions.decoder.bias" not in names
    again = fastbert.BertForPreTraining.from_pretrained(directory)
    embeddings = again.bert.embeddings.word_embeddings.weight
    assert again.cls.predictions.decoder.weight is embeddings
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias


def test_of_a_tied_parameters_names_the_first_counts(saved):
    _, directory = saved
    name, alias = "cls.predictions.bias", "cls.predictions.decoder.bias"
    bias = torch.arange(50.0)

    def loaded_bias(weights):
        save_file({**load_file(directory / checkpoint.WEIGHTS), **weights}, directory / "x")
        (directory / "x").replace(directory / checkpoint.WEIGHTS)
        return fastbert.BertForPreTraining.from_pretrained(directory).cls.predictions.bias

    assert torch.equal(loaded_bias({name: bias, alias: torch.ones(50)}), bias)
    rewrite(directory, lambda weights: weights.pop(name))
    assert torch.equal(loaded_bias({alias: bias}), bias)


def test_first_releases_names_and_pickles(saved):
    model, directory = saved
    weights = load_file(directory / checkpoint.WEIGHTS)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in weights.items()
    }
    (directory / checkpoint.WEIGHTS).unlink()
    torch.save(old, directory / checkpoint.LEGACY_WEIGHTS)
    again = fastbert.BertForPreTraining.from_pretrained(directory)
    assert torch.equal(again(IDS).prediction_logits, model(IDS).prediction_logits)


def test_new_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with files.new_directory(target) as writing:
        (writing / "a").write_text("first")
        assert not target.exists()

    def stop_while_writing():
        with files.new_directory(target) as writing:
            (writing / "a").write_text("second")
            raise KeyError

    with pytest.raises(KeyError):
        stop_while_writing()
    assert (target / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def fill_the_disk(directory):
    """Saves a model, and fails to twice more; says how often it is told why."""
    model = fastbert.BertModel(fastbert.BertConfig(**SHAPE))
    with files.new_directory(directory) as writing:
        model.save_pretrained(writing)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    for save in (model.save_pretrained, lambda d: torch.save(model.state_dict(), d / "x.pt")):
        try:
            with files.new_directory(directory) as writing:
                save(writing)
        except InputError as error:
            print(str(error).count("cannot be written"))


def test_a_full_disk_leaves_the_previous_checkpoint_loadable(tmp_path):
    """The file-size limit of a process fails writes as a full disk does, without needing one."""
    _, said = processes.run(fill_the_disk, tmp_path / "model")
    assert said.split() == ["1", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    fastbert.BertModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_checkpoints_are_read_and_a_missing_shard_is_named(kind, tmp_path):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    if kind == "bin":  # which transformers no longer writes
        text = (tmp_path / "model.safetensors.index.json").read_text()
        for shard in shards:
            bin_name = shard.name.replace("model", "pytorch_model").replace("safetensors", "bin")
            text = text.replace(shard.name, bin_name)
            torch.save(load_file(shard), tmp_path / bin_name)
            shard.unlink()
        (tmp_path / "model.safetensors.index.json").unlink()
        (tmp_path / "pytorch_model.bin.index.json").write_text(text)
        shards = sorted(tmp_path.glob("pytorch_model-*.bin"))
    ours = fastbert.BertForPreTraining.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(IDS).prediction_logits, theirs(IDS).prediction_logits)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"{shards[1].name}: missing, but .*index.json lists it"):
        fastbert.BertForPreTraining.from_pretrained(tmp_path)


def test_downloads_include_shards_and_their_index(monkeypatch):
    from fnmatch import fnmatch

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.setdefault(
            name, allow_patterns
        ) and "there"
    )  # fmt: skip
    checkpoint.resolve("some/model")
    for name in (
        *("config.json", "vocab.txt", "model.safetensors", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"),
    ):
        assert any(fnmatch(name, pattern) for pattern in asked["some/model"]), name


def test_an_interrupted_save_leaves_the_previous_files(saved, monkeypatch):
    model, directory = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def stop(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", stop)
    model.cls.predictions.bias.data += 1
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_transposed_parameter_is_written(tmp_path):
    """Which safetensors refuses."""
    model = fastbert.BertModel(fastbert.BertConfig(**SHAPE))
    weight = model.pooler.dense.weight
    weight.data = weight.data.T.contiguous().T
    model.save_pretrained(tmp_path)
    assert torch.equal(fastbert.BertModel.from_pretrained(tmp_path).pooler.dense.weight, weight)
