"""What `fastbert export` writes beside a model, says, and refuses."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fastbert import BertConfig, cli
from fastbert.check import InputError
from fastbert.export import command, formats
from tests import processes
from tests.export.case import export_to_a_full_disk, padded

pytest.importorskip("onnxruntime", reason="the extra [export] is needed")


def test_the_command_says_how_near_it_is(saved, tmp_path, monkeypatch, capsys):
    directory = saved("BertForSequenceClassification", num_labels=3)
    out = tmp_path / "model.pt2"
    (directory / "added_tokens.json").write_text("{}")
    options = ["--model", directory, "--to", "torch", "--out", out]
    monkeypatch.setattr(sys, "argv", ["fastbert", "export", *map(str, options)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    said = capsys.readouterr()
    assert "agrees with the model: the largest difference is" in said.out
    assert said.err == ""
    for name in ("config.json", "tokenizer.json", "vocab.txt", "added_tokens.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_another_head_than_the_checkpoints(saved, tmp_path):
    directory = saved("BertForTokenClassification")  # which has no pooler
    path, _ = command.export(directory, tmp_path / "out", to="torch", head="BertModel")
    got = torch.export.load(path).module()(**padded("right", 2))
    assert list(got) == ["last_hidden_state"]
    with pytest.raises(InputError, match=r"has no cls\.predictions.* BertForMaskedLM needs"):
        command.export(directory, tmp_path / "other", to="torch", head="BertForMaskedLM")
    with pytest.raises(InputError, match="--pooling: only for the bare BertModel"):
        command.export(directory, tmp_path / "o", head="BertForMaskedLM", pooling="cls")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tflite"}, "--to: expected one of onnx, torch, got 'tflite'"),
        ({"precision": "bf16"}, "--precision: expected one of fp32, fp16"),
        ({"head": "BertForNothing"}, "--head: expected one of BertModel, "),
        ({"pooling": "max"}, "--pooling: expected one of mean, cls"),
        ({"out": "model.bin"}, r"expected a name that ends in \.onnx, or a directory"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(saved, tmp_path, options, message):
    directory = saved("BertModel")
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(InputError, match=message):
        command.export(directory, out, **options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("names", "told"), [(["Mine"], "Mine"), (["BertModel", "Mine"], "BertModel"), ([], "no archi")]
)
def test_a_checkpoint_that_names_no_head(saved, tmp_path, names, told):
    directory = saved("BertModel")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": names}))
    with pytest.raises(InputError, match=rf"names {told}.*, which is not a known head; give --h"):
        command.export(directory, tmp_path / "out", to="torch")


def test_what_cannot_be_written_is_refused(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is not a directory"):
        command.export(saved("BertModel"), tmp_path / "file" / "a.pt2", to="torch")


def test_a_full_disk_is_told_and_ends_no_process(saved, tmp_path):
    status, said = processes.run(export_to_a_full_disk, saved("BertModel"), tmp_path / "out")
    said = "\n".join(line for line in said.splitlines() if "warn" not in line.lower())
    assert (status, said) == (0, f"{tmp_path}/out/model.pt2: cannot be written (File too large)")
    assert not list((tmp_path / "out").iterdir())


def test_a_stream_is_refused(saved):
    with pytest.raises(InputError, match="--out /dev/stdout: is a stream"):
        command.export(saved("BertModel"), Path("/dev/stdout"))


@pytest.mark.parametrize("name", ["a.onnx", "a.v2", "a"])
def test_a_directory_may_have_any_name(tmp_path, name):
    (tmp_path / name).mkdir()
    assert command._file(tmp_path / name, ".onnx") == tmp_path / name / "model.onnx"


@pytest.mark.parametrize("name", ["run.json", "latest"])
def test_a_runs_directory_gets_no_files_beside_its_own(saved, tmp_path, name):
    """They would make it look like a model."""
    directory = saved("BertModel")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(directory) if name == "latest" else (run / name).write_text("{}")
    for out in (run, run / "model.onnx"):
        with pytest.raises(InputError, match=r"run: is the directory of a run; name another one"):
            command.export(directory, out)
    assert [file.name for file in run.iterdir()] == [name]


def test_files_of_another_model_are_left_alone(saved, tmp_path):
    directory, out = saved("BertModel"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json belongs to another model"):
        command.export(directory, out, to="torch")
    assert [path.name for path in out.iterdir()] == ["config.json"]
    (out / "config.json").unlink()
    (out / "finetune.json").write_text("{}")  # which this model does not have
    with pytest.raises(InputError, match=r"finetune\.json belongs to another model"):
        command.export(directory, out, to="torch")
    command.export(directory, directory, to="torch")  # its own directory is as good as any
    assert (directory / "model.pt2").is_file()


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"onnxscript: pip install 'fastbert\[export\]'"):
        formats.format_of("onnx")
    assert formats.format_of("torch").suffix == ".pt2"


def test_a_file_that_answers_wrongly_is_not_kept(saved, tmp_path, monkeypatch):
    """The writer forgets the mask: the file must not appear, nor what would lie beside it."""
    directory, out = saved("BertModel"), tmp_path / "out"

    class Forgetful(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.has_choices = model, False

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(input_ids, attention_mask * 0 + 1, token_type_ids)

    trace = command.trace
    monkeypatch.setattr(command, "trace", lambda model, longest: trace(Forgetful(model), longest))
    with pytest.raises(InputError, match="last_hidden_state differs from the model's by"):
        command.export(directory, out, to="torch")
    assert not list(out.iterdir())


def test_the_largest_weights_that_onnx_holds(saved, tmp_path, monkeypatch):
    directory = saved("BertModel")
    monkeypatch.setattr(formats, "_LARGEST", 1000)
    with pytest.raises(InputError, match=r"an ONNX file holds 2 GB"):
        command.export(directory, tmp_path / "out")


def test_halves_of_weights_count_half(saved, tmp_path, monkeypatch):
    directory = saved("BertModel")
    _, traced = command.load(directory, BertConfig.from_pretrained(directory))
    half = 2 * sum(x.numel() for x in traced.state_dict().values())
    monkeypatch.setattr(formats, "_LARGEST", half)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: 1 / 0)  # behind the check
    with pytest.raises(ZeroDivisionError):
        formats.write_onnx(None, traced.half(), tmp_path / "half.onnx")


def test_only_an_export_is_quiet():
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    with formats._quietly():
        assert logger.level == logging.ERROR
    assert logger.level == before != logging.ERROR


def test_a_run_is_exported_with_its_settings(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved("BertForSequenceClassification"), run / "latest")
    (run / "latest" / "finetune.json").write_text("{}")
    command.export(run, tmp_path / "out", to="torch")
    assert (tmp_path / "out" / "finetune.json").read_text() == "{}"
