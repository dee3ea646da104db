"""The main job, run as a user runs it: by the command line.

A whole run and those that are killed are processes, forked from one: `pretrain_processes`.
What else is said of a run needs none of its own, and is called in this one.
"""

import contextlib
import gzip
import json
import re
import resource
import shutil
import subprocess

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastbert
from tests import processes
from tests.command_line import call
from tests.train import pretrain_processes

SMALL = ["--preset", "tiny", "--vocab-size", "400", "--batch-tokens", "512"]
SMALL += ["--max-seq-len", "64", "--eval-batches", "2", "--dropout", "0.1"]
RUN = [*SMALL, "--steps", "9", "--save-every", "3", "--eval-every", "3", "--log-every", "1"]


def fastbert_cli(*arguments) -> subprocess.CompletedProcess:
    """In this process."""
    return subprocess.CompletedProcess(arguments, *call(*arguments))


def assert_one_clear_line(done: subprocess.CompletedProcess, pattern: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("fastbert: error: ")
    assert done.stderr.count("\n") == 1
    assert re.search(pattern, done.stderr), done.stderr


@pytest.fixture(scope="module")
def root(corpus, tmp_path_factory):
    """A directory with the runs of `pretrain_processes`."""
    root = tmp_path_factory.mktemp("run")
    status, said = processes.run(pretrain_processes.main, corpus, root, RUN)
    assert status == 0, said
    return root


@pytest.fixture(scope="module")
def finished(root):
    """An uninterrupted run, and what it printed."""
    return root / "whole", (root / "said").read_text()


def test_a_run_leaves_what_it_promises(finished):
    out, said = finished
    summary = json.loads((out / "summary.json").read_text())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").iterdir())
    wanted = "heldout_mlm_loss unigram_baseline mlm_accuracy nsp_accuracy real_tokens_per_second"
    assert {*wanted.split(), "steps", "seconds", "torch", "device", "commit"} <= summary.keys()
    assert summary["steps"] == 9
    assert "held-out MLM loss" in said
    assert re.search(r"step 5/9  loss \d+\.\d+  mlm .*nsp .*tokens/s.*left", said)
    names = sorted(path.name for path in out.iterdir() if path.name.startswith("checkpoint"))
    assert names == ["checkpoint-6", "checkpoint-9"]  # the newest two
    assert (out / "latest").resolve() == out / "checkpoint-9"


def test_hugging_face_loads_the_checkpoint_and_gives_the_same_loss(finished):
    directory = finished[0] / "latest"
    theirs, report = transformers.BertForPreTraining.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.model_max_length == theirs.config.max_position_embeddings
    batch = dict(
        tokenizer(
            ["A class is an object.", "The statement is executed once more."],
            ["It may be called.", "x"],
            padding=True,
            return_tensors="pt",
        )
    )
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    batch["next_sentence_label"] = torch.tensor([0, 1])
    ours = fastbert.BertForPreTraining.from_pretrained(directory)
    torch.testing.assert_close(ours(**batch).loss, theirs.eval()(**batch).loss)


def test_a_run_killed_at_any_moment_resumes_to_the_same_losses(root):
    whole, out = root / "whole", root / "killed"
    shutil.copytree(out / "checkpoint-3", out / ".checkpoint-6.half-written")
    done = fastbert_cli("pretrain", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "at step 3 of 9" in done.stdout
    assert not list(out.glob(".checkpoint*"))

    states = [torch.load(run / "latest" / "training_state.pt") for run in (whole, out)]
    histories = [
        [
            {k: v for k, v in row.items() if k != "real_tokens_per_second"}
            for row in s["state"]["history"]
        ]
        for s in states
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 12
    weights = [load_file(run / "latest" / "model.safetensors") for run in (whole, out)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("masking", ["whole-word", "span", "blank", "unigram", "bigram-kn"])
def test_every_masking_trains(masking, corpus, tmp_path):
    arguments = ("--corpus", corpus, "--out", tmp_path / "run", *SMALL, "--masking", masking)
    done = fastbert_cli("pretrain", *arguments, "--steps", "2", "--log-every", "1")
    assert done.returncode == 0, done.stderr
    other = fastbert_cli("pretrain", "--out", tmp_path / "run", "--resume", "--masking", "bert")
    assert_one_clear_line(other, f"--masking bert: the run was started with {masking}")


def test_without_pairs_a_run_leaves_a_masked_lm(corpus, tmp_path):
    out = tmp_path / "run"
    arguments = ("--corpus", corpus, "--out", out, *SMALL, "--objective", "mlm")
    done = fastbert_cli("pretrain", *arguments, "--steps", "4", "--log-every", "1")
    assert done.returncode == 0, done.stderr
    assert "nsp" not in done.stdout
    assert (out / "loss.png").is_file()
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(out / "latest")
    assert type(theirs).__name__ == "BertForMaskedLM"
    state = load_file(out / "latest" / "model.safetensors")
    assert not any("pooler" in name or "seq_relationship" in name for name in state)
    words = fastbert_cli("fill-mask", "--model", out, "the [MASK] of a list")
    assert words.returncode == 0, words.stderr


def test_a_finished_run_has_nothing_left_to_do(finished):
    out, _ = finished
    before = (out / "latest" / "model.safetensors").stat().st_mtime_ns
    done = fastbert_cli("pretrain", "--out", out, "--resume", "--log-every", "2")
    assert done.returncode == 0, done.stderr
    assert (out / "latest" / "model.safetensors").stat().st_mtime_ns == before


def test_profiles_a_few_steps(corpus, tmp_path):
    out = tmp_path / "run"
    steps = ["--steps", "12", "--log-every", "12"]
    done = fastbert_cli("pretrain", "--corpus", corpus, "--out", out, *SMALL, *steps, "--profile")
    assert done.returncode == 0, done.stderr
    trace = json.loads(gzip.decompress((out / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("ProfilerStep") for name in names) == 3
    assert "aten::addmm" in names
    assert "Self CPU" in done.stdout
    assert f"trace of 3 steps: {out}/profile/trace.json.gz" in done.stdout


def test_a_run_too_short_to_profile_says_so(corpus, tmp_path):
    out = tmp_path / "run"
    arguments = ["--corpus", corpus, "--out", out, *SMALL, "--steps", "2", "--profile"]
    done = fastbert_cli("pretrain", *arguments)
    assert done.returncode == 0, done.stderr
    assert "--profile: needs 10 steps, but 2 are left; no trace is written" in done.stdout
    assert not (out / "profile").exists()


@pytest.mark.parametrize("every", [5, 30])
def test_a_run_that_diverges_stops_in_one_clear_line(every, corpus, tmp_path):
    """Also where the steps between two reports were not all skipped."""
    options = ["--steps", "60", "--log-every", every, "--learning-rate", "1e30", *SMALL]
    done = fastbert_cli("pretrain", "--corpus", corpus, "--out", tmp_path / "run", *options)
    assert_one_clear_line(done, r"gradients of 2\d steps in a row before step \d+ were not finite")
    assert ("5 step(s) skipped" in done.stdout) == (every == 5)


def test_fill_mask_prints_five_words_with_probabilities(finished):
    done = fastbert_cli("fill-mask", "--model", finished[0], "A [MASK] is an object.")
    assert done.returncode == 0, done.stderr
    probabilities = [float(p) for p in re.findall(r"0\.\d{3}", done.stdout)]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)


def test_info_names_every_operator():
    done = fastbert_cli("info")
    assert done.returncode == 0, done.stderr
    assert " 1 threads" not in done.stdout
    for word in ("torch", "gather_rows", "layer_norm", "attention_qkvpacked", "reference"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--corpus", "no/such/file"], "no/such/file: no such file"),
        (["--steps", "0"], "--steps: expected at least 1"),
        (["--preset", "huge"], "--preset: expected one of tiny"),
        (["--batch-tokens", "16"], "--batch-tokens"),
        (["--accumulation", "100"], "--batch-tokens.*100 micro-batch"),
        (["--parallel", "tensor"], "--parallel: expected one of ddp, fsdp, got 'tensor'"),
        (["--tokenizer", "no/vocab.txt", "--vocab-size", "8192"], "no/vocab.txt"),
        (["--out", "/dev/null/run"], "/dev/null/run"),
    ],
    ids=["corpus", "steps", "preset", "budget", "parts", "parallel", "tokenizer", "out"],
)
def test_bad_options_are_one_clear_line(options, pattern, corpus, tmp_path):
    given = ["--corpus", corpus, "--out", tmp_path / "run", *SMALL, *options]
    assert_one_clear_line(fastbert_cli("pretrain", *given), pattern)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "no text"),
        (b"caf\xe9 noir\n", "not UTF-8"),
        (b"One document.\nIt has two sentences.\n", "random next sentence.*blank line"),
    ],
    ids=["empty", "latin-1", "one document"],
)
def test_a_bad_corpus_is_one_clear_line(content, pattern, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    done = fastbert_cli("pretrain", "--corpus", path, "--out", tmp_path / "run", *SMALL)
    assert_one_clear_line(done, pattern)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@contextlib.contextmanager
def small_files(limit: int):
    """A limit on the size of files fails a write as a full disk does, without needing one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_previous_checkpoint(copied):
    shutil.rmtree(copied / "checkpoint-9")
    (copied / "latest").unlink()
    (copied / "latest").symlink_to("checkpoint-6")
    size = (copied / "latest" / "model.safetensors").stat().st_size
    for limit in (size // 2, size * 3 // 2):  # fails while writing the model, then the optimizer
        with small_files(limit):
            done = fastbert_cli("pretrain", "--out", copied, "--resume")
        assert_one_clear_line(done, r"checkpoint-9: cannot be written \(.*File too large")
        assert (copied / "latest").resolve().name == "checkpoint-6"
        assert not [path for path in copied.iterdir() if "checkpoint-9" in path.name]
    fastbert.BertForPreTraining.from_pretrained(copied)
    assert fastbert_cli("pretrain", "--out", copied, "--resume").returncode == 0


def test_a_run_is_not_overwritten_nor_resumed_with_other_options(copied):
    assert_one_clear_line(fastbert_cli("pretrain", "--out", copied), "--resume continues it")
    done = fastbert_cli("pretrain", "--out", copied, "--resume", "--steps", "20")
    assert_one_clear_line(done, "--steps 20: the run was started with 9")


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
def test_a_truncated_checkpoint_is_one_clear_line(name, copied):
    path = (copied / "latest" / name).resolve()
    path.write_bytes(path.read_bytes()[:500])
    assert_one_clear_line(
        fastbert_cli("pretrain", "--out", copied, "--resume"), f"{name}: truncated or corrupt"
    )


def test_a_vocabulary_of_another_checkpoint_is_one_clear_line(copied):
    vocabulary = json.loads((copied / "latest" / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    vocabulary["model"]["vocab"] = dict(list(words.items())[:-70])
    (copied / "latest" / "tokenizer.json").write_text(json.dumps(vocabulary))
    done = fastbert_cli("fill-mask", "--model", copied, "a [MASK]")
    assert_one_clear_line(done, r"vocabulary has \d+ entries, but the checkpoint has \d+")


def test_fill_mask_without_a_mask_is_one_clear_line(finished):
    done = fastbert_cli("fill-mask", "--model", finished[0], "a text")
    assert_one_clear_line(done, "no .MASK.")


def test_a_lost_checkpoint_is_no_new_run(copied):
    shutil.rmtree((copied / "latest").resolve())
    done = fastbert_cli("pretrain", "--out", copied, "--resume")
    assert_one_clear_line(done, r"latest: points to .* gone; point the link to another checkpoint")
