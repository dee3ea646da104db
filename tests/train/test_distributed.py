"""Two processes under torchrun's agent, with gloo on the CPU, train as one process does.

One start of it makes all that two processes make here: see `distributed_case`.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastbert.check import InputError
from fastbert.modules.products import fp8
from fastbert.system.console import console
from fastbert.train import distributed
from fastbert.train.distributed import Ranks
from tests import processes
from tests.command_line import call
from tests.train import distributed_case
from tests.train.distributed_case import BAD_STEP, KILLED, RUNS, STEPS, back_to_step

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
pytest.importorskip("torch.distributed.run", reason="this torch has no torchrun")

pytestmark = pytest.mark.timeout(1800)

RUN = ["--preset", "tiny", "--vocab-size", "400", "--batch-tokens", "512", "--max-seq-len", "64"]
RUN += ["--eval-batches", "3", "--dropout", "0.1", "--accumulation", "2", "--precision", "fp32"]
RUN += ["--steps", "9", "--save-every", "3", "--eval-every", "3", "--log-every", "1"]


def pretrain(*arguments) -> str:
    """By this process: what it says."""
    status, said, error = call("pretrain", *arguments)
    assert status == 0, error
    return said


def kill_a_rank(torchrun) -> None:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(request, corpus, tmp_path_factory):
    """A directory with a run of one process, `one`, and the runs by two that the tests ask for.

    In `said` is what was printed. One of the two processes of each of the runs KILLED is killed
    once, in its fifth step.
    """
    root = tmp_path_factory.mktemp("runs")
    options = ["--corpus", str(corpus), *RUN]
    pretrain("--out", root / "one", *options)
    tests = [item for item in request.session.items if hasattr(item, "callspec")]
    wanted = {item.callspec.params.get("name") for item in tests}
    names = [name for name in RUNS if name in distributed.KINDS or name in wanted]
    killed = wanted & KILLED.keys()
    (root / "options.json").write_text(json.dumps(options))
    (root / "runs.json").write_text(json.dumps(names))
    work = (processes.torchrun, len(killed), distributed_case.main, root)
    with processes.started(*work, OMP_NUM_THREADS="1") as (process, lines):
        said, name, alive = [], "", killed
        for line in lines:
            said.append(line)
            if line.startswith("run "):
                name = line.removeprefix("run ").strip()
            if line.startswith("step 5/9") and name in alive:
                alive.remove(name)
                kill_a_rank(process)
        process.join()
    assert process.exitcode == 0, "".join(said)[-4000:]
    assert not alive
    (root / "said").write_text("".join(said))
    return root


@pytest.fixture
def store(monkeypatch):
    """Of two processes, as which this one joins, one after the other, without a group."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed, "_store", lambda: store)
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(console, "quiet", False)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    return store


def test_after_an_error_of_one_process_the_others_leave_without_a_traceback(store):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RuntimeError, match="closed by peer"), distributed.joined():
        raise lost  # as after a kill, of which nobody tells
    with pytest.raises(InputError, match="taken"), distributed.joined():
        raise InputError("taken")
    with pytest.raises(SystemExit) as end, distributed.joined():
        raise lost
    assert end.value.code == 2


def test_a_number_of_processes_without_torchruns_other_variables_is_refused(store, monkeypatch):
    monkeypatch.delenv("RANK")
    with pytest.raises(InputError, match=r"WORLD_SIZE=2: RANK not set; .* torchrun"):
        distributed.joined().__enter__()


@pytest.fixture(scope="module")
def report(runs):
    return torch.load(runs / "report.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone():
    ranks = Ranks(torch.device("cpu"))
    distilled = distributed_case.train(ranks, "ddp", distributed_case.distillation())
    return {"": distributed_case.train(ranks, "ddp"), "distil ": distilled}


@pytest.mark.parametrize("objective", ["", "distil "], ids=["pre-training", "distillation"])
@pytest.mark.parametrize("kind", distributed.KINDS)
def test_steps_of_two_ranks_are_those_of_one(report, alone, kind, objective):
    """Sums of the metrics, then weights, under SGD: gradients are neither halved nor doubled."""
    alone, two = alone[objective], report[objective + kind]
    torch.testing.assert_close(two["rows"], alone["rows"], rtol=1e-6, atol=1e-6)
    assert two["weights"].keys() == alone["weights"].keys()
    for name, expected in alone["weights"].items():
        actual = two["weights"][name]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_shards_train_in_fp8_as_whole_weights_do(report):
    """Except for rounding: a layer with FSDP's hooks runs module by module."""
    whole, shards = report["fp8 ddp"], report["fp8 fsdp"]
    losses = [0, 3]
    expected = whole["rows"][:, losses]
    torch.testing.assert_close(shards["rows"][:, losses], expected, rtol=5e-3, atol=0)
    largest, of_shards = (found["scales"][0]["history"][:, 1] for found in (whole, shards))
    torch.testing.assert_close(of_shards, largest, rtol=1e-2, atol=0)
    assert (largest[:, 0] != fp8.ASSUMED[1]).any()


@pytest.mark.parametrize("kind", distributed.KINDS)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(report, kind):
    skipped = [float(step == BAD_STEP) for step in range(STEPS)]
    assert report[kind]["rows"][:, -1].tolist() == skipped
    assert not report[kind]["rows"][BAD_STEP, :-1].any()


def test_gradients_are_exchanged_once_a_step(report):
    """Not once for each of the parts that a batch is run in."""
    buckets = report["ddp"]["exchanged"]
    assert buckets.count(0) == STEPS
    shards = 3  # two layers and the rest
    assert report["fsdp"]["exchanged"] == [shards] * STEPS


@pytest.mark.parametrize("variant", ["paper", "nvidia"])
def test_lamb_on_shards_has_the_norms_of_whole_tensors(report, variant):
    whole = distributed_case.lamb(variant, sharded=False)
    for actual, expected in zip(report[variant], whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def history(out: Path) -> list[dict[str, float]]:
    rows = torch.load(out / "latest" / "training_state.pt")["state"]["history"]
    return [{k: v for k, v in row.items() if k != "real_tokens_per_second"} for row in rows]


def assert_same_curve(out: Path, other: Path) -> None:
    rows, expected = history(out), history(other)
    assert len(rows) == len(expected) == 12
    for row, truth in zip(rows, expected, strict=True):
        assert row == pytest.approx(truth, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", distributed.KINDS)
def test_two_processes_have_the_loss_curve_of_one(runs, kind):
    assert_same_curve(runs / kind, runs / "one")
    assert len({row["loss"] for row in history(runs / "one") if "loss" in row}) == 9
    summary = json.loads((runs / kind / "summary.json").read_text())
    assert summary["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", distributed.KINDS)
def test_the_checkpoint_of_two_processes_is_hugging_faces(runs, kind):
    directory = runs / kind / "latest"
    _, report = transformers.BertForPreTraining.from_pretrained(directory, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    transformers.AutoTokenizer.from_pretrained(directory)
    one, two = (load_file(runs / r / "latest" / "model.safetensors") for r in ("one", kind))
    assert one.keys() == two.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", distributed.KINDS)
def test_one_process_goes_on_from_two(runs, kind, tmp_path):
    out = back_to_step(6, runs / kind, tmp_path / "run")
    assert "at step 6 of 9" in pretrain("--out", out, "--resume")
    assert_same_curve(out, runs / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["one to ddp", "ddp to fsdp", pytest.param("one to fsdp", marks=pytest.mark.exhaustive)]
)
def test_two_processes_go_on_from_another_kind(runs, name):
    assert f"resuming {runs / name} at step 6 of 9" in (runs / "said").read_text()
    assert_same_curve(runs / name, runs / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.exhaustive] * (kind == "ddp"))
        for name, kind in KILLED.items()
    ],
)
def test_torchrun_restarts_a_killed_rank_to_the_same_curve(runs, name, kind):
    said = (runs / "said").read_text()
    assert f"resuming {runs / name} at step 3 of 9" in said
    assert history(runs / name) == history(runs / kind)
