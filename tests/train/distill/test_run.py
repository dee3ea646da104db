"""Distillation from text, in this process: a run, its model, resumption, and what it refuses."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert
from fastbert import cli
from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.config.distill import DistillConfig
from fastbert.config.finetune import FinetuneConfig
from fastbert.config.pretrain import PretrainConfig
from fastbert.finetune.train import finetune
from fastbert.train.distill.run import distill
from fastbert.train.pretrain import pretrain

SMALL = {"batch_tokens": 512, "max_seq_len": 64, "eval_batches": 2, "dropout": 0.1}
OFTEN = {"save_every": 3, "eval_every": 3, "log_every": 1}


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """A run of pre-training."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    config = PretrainConfig(preset="tiny", vocab_size=400, corpus=(corpus,), steps=4, **SMALL)
    pretrain(config, out)
    return out


@pytest.fixture(scope="module")
def config(corpus, teacher):
    return DistillConfig(teacher=str(teacher), corpus=(corpus,), steps=6, **SMALL, **OFTEN)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "run"
    return out, distill(config, out)


@pytest.fixture
def halfway(finished, tmp_path):
    """The run as a kill after step 3 leaves it."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out, symlinks=True)
    (out / "latest").unlink()
    (out / "latest").symlink_to("checkpoint-3")
    shutil.rmtree(out / "checkpoint-6")
    return out


def history(out):
    rows = torch.load(out / "latest" / "training_state.pt")["state"]["history"]
    return [{k: v for k, v in row.items() if k != "real_tokens_per_second"} for row in rows]


def test_a_run_leaves_what_it_promises(finished, teacher, capsys):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    train = [row for row in history(out) if "loss" in row]
    assert len(train) == 6
    for row in train:
        parts = 5 * row["soft_loss"] + 2 * row["mlm_loss"] + row["cosine_loss"]
        assert row["loss"] == pytest.approx(parts)
        # half of the teacher's layers say about what it says of words that are hard to tell
        assert 0 < row["cosine_loss"] < 1
        assert 0 < row["soft_loss"] < 1 < row["mlm_loss"]
    theirs = fastbert.BertForMaskedLM.from_pretrained(teacher)
    own = fastbert.BertForMaskedLM.from_pretrained(out)
    assert (len(theirs.bert.encoder.layer), len(own.bert.encoder.layer)) == (2, 1)
    assert summary["student_parameters"] == sum(p.numel() for p in own.parameters())
    assert summary["teacher_parameters"] == sum(p.numel() for p in theirs.parameters())
    share = summary["mlm_accuracy"] / summary["teacher_mlm_accuracy"]
    assert summary["share_of_teacher_accuracy"] == pytest.approx(share)
    assert 0 < summary["teacher_heldout_mlm_loss"] < 6
    assert summary["heldout_mlm_loss"] == history(out)[-1]["heldout_mlm_loss"]
    assert summary["heldout_mlm_loss"] != summary["teacher_heldout_mlm_loss"]


def test_the_shown_lines_have_the_parts_of_the_loss(config, halfway, capsys):
    distill(config, halfway, resume=True)
    said = capsys.readouterr().out
    assert "student of depth 1, width 128" in said
    assert "resuming" in said
    assert "step 4/6  loss " in said
    line = next(line for line in said.splitlines() if line.startswith("step 4/6"))
    assert all(f"  {name} " in line for name in ("soft", "cosine", "mlm"))
    assert "of the teacher's accuracy" in said


def test_the_checkpoint_is_hugging_faces(finished):
    directory = finished[0] / "latest"
    theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert type(theirs).__name__ == "BertForMaskedLM"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = dict(tokenizer(["A class is an object."], return_tensors="pt"))
    ours = fastbert.BertForMaskedLM.from_pretrained(directory)
    torch.testing.assert_close(ours(**batch).logits, theirs.eval()(**batch).logits)


def test_the_student_can_be_fine_tuned(finished, tmp_path):
    rows = [{"text": f"the {word} of a list", "label": word} for word in ("end", "name")] * 4
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = FinetuneConfig(
        task="classification", train=path, dev=path, model=str(finished[0]), epochs=1
    )
    assert 0 <= finetune(task, tmp_path / "run")["accuracy"] <= 1


def test_a_resumed_run_is_the_uninterrupted_one(finished, config, halfway):
    distill(config, halfway, resume=True)
    assert history(halfway) == history(finished[0])
    assert len(history(halfway)) == 8
    weights = [load_file(run / "latest" / "model.safetensors") for run in (finished[0], halfway)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_another_teacher_is_no_resumption(config, teacher, halfway, tmp_path):
    changed = tmp_path / "teacher"
    shutil.copytree(teacher, changed, symlinks=True)
    path = changed / "latest" / "model.safetensors"
    weights = load_file(path)
    weights["bert.encoder.layer.1.output.dense.bias"] += 1e-6
    save_file(weights, path.resolve(), metadata={"format": "pt"})
    run = json.loads((halfway / "run.json").read_text())
    (halfway / "run.json").write_text(json.dumps(run | {"teacher": str(changed)}))
    config = dataclasses.replace(config, teacher=str(changed))
    with pytest.raises(InputError, match="the teacher has changed since the run began"):
        distill(config, halfway, resume=True)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "mini"},  # wider than this teacher
        {"init": "random", "soft_weight": 0.0},
        {"layers": 2, "cosine_weight": 0.0, "accumulation": 2},
    ],
    ids=["another width", "random", "as deep"],
)
def test_other_students_train(options, config, tmp_path):
    config = dataclasses.replace(config, **options, steps=2, eval_batches=1)
    summary = distill(config, tmp_path / "run")
    rows = [row for row in history(tmp_path / "run") if "loss" in row]
    assert all(("cosine_loss" in row) == (options.get("init") == "random") for row in rows)
    assert summary["heldout_mlm_loss"] > 0
    shape = BertConfig.from_pretrained(tmp_path / "run" / "latest")
    assert shape.hidden_size == (256 if "preset" in options else 128)
    assert shape.vocab_size == 400


def test_a_student_begins_as_its_teacher(config, teacher, tmp_path):
    """All layers and no rate: the same held-out loss on the same batches, in the same precision."""
    whole = dataclasses.replace(config, layers=2, steps=1, learning_rate=0.0)
    summary = distill(whole, tmp_path / "run")
    assert summary["heldout_mlm_loss"] == summary["teacher_heldout_mlm_loss"]
    assert summary["share_of_teacher_accuracy"] == 1


def test_the_teacher_is_measured_in_the_precision_of_a_resumed_run(config, tmp_path, monkeypatch):
    """Though "auto" would mean another one on this hardware."""
    whole = dataclasses.replace(config, layers=2, steps=1, learning_rate=0.0, precision="fp32")
    distill(whole, tmp_path / "run")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    auto = dataclasses.replace(whole, precision="auto")
    summary = distill(auto, tmp_path / "run", resume=True)
    assert summary["heldout_mlm_loss"] == summary["teacher_heldout_mlm_loss"]


def run_cli(*arguments):
    cli.app(list(map(str, arguments)), standalone_mode=False)


def test_the_command_line_resumes_with_the_runs_own_options(halfway, finished, capsys):
    run_cli("distill", "--out", halfway, "--resume", "--log-every", 1)
    assert history(halfway) == history(finished[0])
    with pytest.raises(InputError, match=r"--temperature 3\.0: the run was started with 2\.0"):
        run_cli("distill", "--out", halfway, "--resume", "--temperature", 3)
    with pytest.raises(InputError, match="holds a run already; --resume continues it"):
        run_cli("distill", "--out", halfway, "--teacher", finished[0])
    with pytest.raises(InputError, match="not a run's options"):
        run_cli("pretrain", "--out", halfway, "--resume")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "t.json"], "--tokenizer: the student uses the teacher's"),
        (["--vocab-size", 500], "--vocab-size: the student has the teacher's vocabulary"),
        (["--objective", "mlm+nsp"], "--objective: distillation has no next-sentence loss"),
        (["--preset", "mini", "--init", "teacher"], "--init teacher: .* teacher's width, 128,"),
        (["--preset", "mini", "--cosine-weight", 1], "--cosine-weight 1: .* 256, the teacher's 12"),
        (["--layers", 3], "--layers 3: more than the teacher's 2"),
        (["--max-seq-len", 600], "--max-seq-len 600: the model reads at most 512 tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_options_that_do_not_suit_the_teacher_are_named(options, message, teacher, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=message) as raised:
        run_cli("distill", "--teacher", teacher, "--out", out, *options)
    assert "\n" not in str(raised.value)
    assert not out.exists()


def test_a_teacher_without_scores_is_refused(teacher, tmp_path):
    shutil.copytree((teacher / "latest").resolve(), tmp_path / "bare")
    fastbert.BertModel.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"no cls.*, which BertForMaskedLM needs"):
        distill(DistillConfig(teacher=str(tmp_path / "bare")), tmp_path / "run")
    with pytest.raises(InputError, match=r"no config\.json there"):
        distill(DistillConfig(teacher=str(tmp_path)), tmp_path / "run")
