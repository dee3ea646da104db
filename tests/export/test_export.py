"""`fastbert export`: every head as a file that onnxruntime and torch.export run."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers

import fastbert
from fastbert import cli, models
from fastbert.check import InputError
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.embedding.array import embed
from fastbert.export import check, command, formats, plain

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is needed")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # so that scores differ by far more than the tolerance
}
MASKED = ("BertForMaskedLM", {"tie_word_embeddings": False, "hidden_act": "swish"})
CHOICES = ("BertForMultipleChoice", {"type_vocab_size": 1, "hidden_act": "gelu_new"})
# The others differ in their last products alone. Below, question answering is exported in fp16, and
# BertModel with embeddings of sentences.
OTHERS = [
    ("BertModel", {}),
    ("BertForPreTraining", {"hidden_act": "swish"}),
    MASKED,
    ("BertForQuestionAnswering", {}),
    ("BertForNextSentencePrediction", {"hidden_act": "gelu_new"}),
    (
        "BertForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    ("BertForTokenClassification", {"num_labels": 5, "type_vocab_size": 1}),
    ("BertForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}),
]


@pytest.fixture
def saved(tmp_path):
    """Writes a model of a class, as drawn, and its tokenizer; returns the directory."""

    def save(name: str, **options):
        torch.manual_seed(0)
        directory = tmp_path / name
        config = fastbert.BertConfig(**SIZES | options)
        getattr(models, name)(config).save_pretrained(directory)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26))]
        words += [f"##{chr(97 + i)}" for i in range(26)]
        (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
        save_tokenizer(load_tokenizer(directory), directory)
        return directory

    return save


def padded(side: str, *lead: int, length: int = 13, types: int = 2) -> dict[str, torch.Tensor]:
    """Batches of which no row is whole, of a size that is neither traced nor checked."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, length, lead, generator=generator)
    column = torch.arange(length)
    column = column if side == "right" else column.flip(0)
    shape = (*lead, length)
    return {
        "input_ids": torch.randint(60, shape, generator=generator),
        "attention_mask": (column < lengths[..., None]).long(),
        "token_type_ids": torch.randint(types, shape, generator=generator),
    }


def in_onnxruntime(path, batch) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path))
    found = session.run(None, {name: x.numpy() for name, x in batch.items()})
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "options"),
    [CHOICES, *(pytest.param(*other, marks=pytest.mark.exhaustive) for other in OTHERS)],
)
def test_an_onnx_file_answers_as_the_model_and_as_hugging_face(saved, tmp_path, head, options):
    directory = saved(head, **options)
    path, difference = command.export(directory, tmp_path / "out")
    assert path == tmp_path / "out" / "model.onnx"
    assert difference.found <= difference.allowed == 1e-4
    assert_answers(directory, head, lambda batch: in_onnxruntime(path, batch))


@pytest.mark.parametrize(("head", "options"), OTHERS)
def test_what_is_traced_answers_as_the_model_and_as_hugging_face(saved, head, options):
    directory = saved(head, **options)
    config = fastbert.BertConfig.from_pretrained(directory)
    _, traced = command.load(directory, config)
    assert_answers(directory, head, lambda batch: traced(**batch))


def assert_answers(directory, head, answer):
    own = getattr(models, head).from_pretrained(directory)
    theirs = getattr(transformers, head).from_pretrained(directory).eval()
    lead = (3, 2) if head == "BertForMultipleChoice" else (4,)
    for side in ("left", "right"):
        batch = padded(side, *lead, types=own.config.type_vocab_size)
        got = answer(batch)
        with torch.no_grad():
            wanted, hugging_face = own(**batch), theirs(**batch)
        assert got.keys() == wanted.keys()
        for name, tensor in got.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, wanted[name], atol=1e-4, rtol=0)
            by_token = tensor.shape[:2] == batch["input_ids"].shape
            if by_token or side == "right":  # its pooler reads padding on the left
                real = batch["attention_mask"].bool() if by_token else slice(None)
                torch.testing.assert_close(
                    tensor[real], hugging_face[name][real], atol=1e-4, rtol=0
                )


@pytest.mark.parametrize(
    ("head", "options"), [CHOICES, pytest.param(*MASKED, marks=pytest.mark.exhaustive)]
)
def test_a_torch_program_answers_as_the_model(saved, tmp_path, head, options):
    directory = saved(head, **options)
    path, _ = command.export(directory, tmp_path / "deep" / "a.pt2", to="torch")
    program = torch.export.load(path).module()
    own = getattr(models, head).from_pretrained(directory)
    lead = (3, 2) if head == "BertForMultipleChoice" else (4,)
    for side in ("left", "right"):
        batch = padded(side, *lead, types=own.config.type_vocab_size)
        with torch.no_grad():
            got, wanted = program(**batch), own(**batch)
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, wanted[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("to", ["onnx", pytest.param("torch", marks=pytest.mark.exhaustive)])
def test_fp16_halves_the_file_and_stays_within_its_rounding(saved, tmp_path, to):
    directory = saved("BertForQuestionAnswering", vocab_size=32000)  # much more than the program
    half, difference = command.export(directory, tmp_path / "half", to=to, precision="fp16")
    whole = (directory / "model.safetensors").stat().st_size
    assert 0.4 < half.stat().st_size / whole < 0.6
    assert 1e-5 < difference.found <= difference.allowed < 0.05
    own = models.BertForQuestionAnswering.from_pretrained(directory)
    batch = padded("left", 4)
    with torch.no_grad():
        wanted = own(**batch)
    got = formats.FORMATS[to].run(half)(batch)
    real = batch["attention_mask"].bool()
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor[~real], wanted[name][~real])
        torch.testing.assert_close(tensor[real], wanted[name][real], atol=0.02, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", pytest.param("cls", marks=pytest.mark.exhaustive)])
def test_sentence_embeddings_are_those_of_embed(saved, tmp_path, pooling):
    directory = saved("BertForPreTraining")
    to = "onnx" if pooling == "mean" else "torch"
    path, _ = command.export(directory, tmp_path / "out", to=to, pooling=pooling)
    texts = ["a bc def", "x", "hello world"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=True)
    got = formats.FORMATS[to].run(path)(dict(batch))
    assert list(got) == ["last_hidden_state", "sentence_embedding"]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n")
    wanted = embed(directory, file, pooling=pooling, precision="fp32")
    np.testing.assert_allclose(got["sentence_embedding"].numpy(), wanted, atol=1e-5)


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
    assert "answers as the model does: the largest difference is" in said.out
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
        ({"to": "tflite"}, "--to: one of onnx, torch, got 'tflite'"),
        ({"precision": "bf16"}, "--precision: one of fp32, fp16"),
        ({"head": "BertForNothing"}, "--head: one of BertModel, "),
        ({"pooling": "max"}, "--pooling: one of mean, cls"),
        ({"out": "model.bin"}, r"expected a name that ends in \.onnx, or a directory"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(saved, tmp_path, options, message):
    directory = saved("BertModel")
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(InputError, match=message):
        command.export(directory, out, **options)
    assert not out.exists()


def test_a_checkpoint_that_names_no_head(saved, tmp_path):
    directory = saved("BertModel")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["Mine"]}))
    with pytest.raises(InputError, match=r"names Mine, which is no head known here; give --head"):
        command.export(directory, tmp_path / "out", to="torch")


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
    with pytest.raises(InputError, match=r"config\.json is that of another model"):
        command.export(directory, out, to="torch")
    assert [path.name for path in out.iterdir()] == ["config.json"]
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


def test_the_check_finds_what_is_wrong():
    config = fastbert.BertConfig(**SIZES)
    batches = list(check.batches(config, has_choices=False))
    assert {tuple(b["input_ids"].shape) for b in batches} == {(1, 1), (1, 16), (5, 33), (3, 40)}
    masks = [row.tolist() for b in batches for row in b["attention_mask"]]
    assert any(row[0] < row[-1] for row in masks)
    assert any(row[0] > row[-1] for row in masks)
    assert all(any(row) for row in masks)
    lowest = torch.finfo(torch.float32).min
    answer = {"logits": torch.tensor([1.0, lowest])}
    wrong = (
        ({"scores": answer["logits"]}, "has outputs scores, not logits"),
        ({"logits": torch.ones(1, 2)}, "has shape"),
        ({"logits": torch.tensor([1.001, lowest])}, "differs"),
        ({"logits": torch.tensor([torch.nan, lowest])}, "differs"),
        ({"logits": torch.tensor([1.0, 0.0])}, "differs"),
    )
    for got, message in wrong:
        with pytest.raises(InputError, match=message):
            check.compare("file", lambda _, got=got: got, lambda _: answer, batches[0])
    right = check.compare("file", lambda _: answer, lambda _: answer, batches[0])
    assert right.found == 0


def test_the_largest_weights_that_onnx_holds(saved, tmp_path, monkeypatch):
    directory = saved("BertModel")
    monkeypatch.setattr(formats, "_LARGEST", 1000)
    with pytest.raises(InputError, match=r"an ONNX file holds 2 GB"):
        command.export(directory, tmp_path / "out")


def test_every_model_has_a_plain_one():
    assert plain.HEADS.keys() == set(models.__all__)
    assert all(callable(kind) for kind in plain.EMBEDDINGS.values())


def test_a_run_is_exported_with_its_settings(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved("BertForSequenceClassification"), run / "latest")
    (run / "latest" / "finetune.json").write_text("{}")
    command.export(run, tmp_path / "out", to="torch")
    assert (tmp_path / "out" / "finetune.json").read_text() == "{}"
