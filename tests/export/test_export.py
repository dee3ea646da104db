"""`fastbert export`: every head as a file that onnxruntime and torch.export run."""

import numpy as np
import pytest
import torch
import transformers

import fastbert
from fastbert import models
from fastbert.check import InputError
from fastbert.embedding.array import embed
from fastbert.export import check, command, formats, plain
from tests.export.case import SIZES, padded

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is needed")
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


@pytest.mark.slow
def test_onnxruntime_quantises_the_file(saved, tmp_path):
    """As in docs/export.md."""
    from onnxruntime.quantization import quantize_dynamic

    directory = saved("BertModel", hidden_size=64, initializer_range=0.1)
    path, _ = command.export(directory, tmp_path / "out", pooling="mean")
    quantize_dynamic(str(path), str(tmp_path / "int8.onnx"), per_channel=True)
    batch = padded("right", 4)
    whole, int8 = (
        in_onnxruntime(file, batch)["sentence_embedding"] for file in (path, tmp_path / "int8.onnx")
    )
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * path.stat().st_size
    cosine = torch.nn.functional.cosine_similarity(whole, int8)
    assert 0.99 < cosine.min() < cosine.max() < 1


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


def test_the_checks_batches_are_padded_on_each_side_and_have_all_types():
    *_, batch, _ = check.batches(fastbert.BertConfig(**SIZES), has_choices=False)
    padding = [(0, 0), (8, 0), (0, 16), (4, 8), (0, 0)]
    expected = [[0] * left + [1] * (33 - left - right) + [0] * right for left, right in padding]
    assert batch["attention_mask"].tolist() == expected
    assert batch["token_type_ids"].unique().tolist() == [0, 1]


@pytest.mark.parametrize(("wanted", "error"), [(5.0, 8e-4), (0.1, 2e-4)])
def test_an_error_is_relative_to_a_large_number_and_absolute_beside_a_small_one(wanted, error):
    batch = {"input_ids": torch.zeros(1, 1)}
    answer = {"logits": torch.tensor([wanted])}
    check.compare(
        "file", lambda _: {"logits": answer["logits"] + error / 4}, lambda _: answer, batch
    )
    with pytest.raises(InputError, match="differs"):
        check.compare(
            "file", lambda _: {"logits": answer["logits"] + error}, lambda _: answer, batch
        )


def test_in_fp16_the_output_nearest_to_its_own_tolerance_is_told():
    """The tolerance is in units of an output's root mean square, of 1 for smaller ones."""
    allowed = check.fp16_tolerance(1)
    answer = {"a": torch.full((4,), 10.0), "b": torch.full((4,), 0.01)}
    errors = {"a": 5 * allowed, "b": 0.9 * allowed}
    got = {name: x + errors[name] for name, x in answer.items()}
    batch = {"input_ids": torch.zeros(1, 1)}
    worst = check.compare("file", lambda _: got, lambda _: answer, batch, fp16_layers=1)
    assert worst.allowed == allowed
    assert worst.found == pytest.approx(0.9 * allowed, rel=1e-3)
    assert check.fp16_tolerance(12) == pytest.approx(0.036, rel=0.01)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooled_models_answer_alike(saved, pooling):
    directory = saved("BertModel")
    config = fastbert.BertConfig.from_pretrained(directory)
    own, traced = command.load(directory, config, pooling=pooling)
    wanted = command._answers(own, traced.outputs, pooling)
    check.compare("plain", lambda x: traced(**x), wanted, *check.batches(config, False))


def test_a_mean_of_fp16_does_not_overflow_and_that_of_no_token_is_zero():
    hidden = torch.full((2, 1000, 3), 100.0).half()
    is_real = torch.ones(2, 1000, dtype=torch.bool)
    is_real[1], hidden[1] = False, 0
    _, mean = plain.MeanEmbedding.read(None, (hidden, is_real))
    assert mean.tolist() == [[100.0] * 3, [0.0] * 3]


def test_every_model_has_a_plain_one():
    assert plain.HEADS.keys() == set(models.__all__)
    assert all(callable(kind) for kind in plain.EMBEDDINGS.values())
