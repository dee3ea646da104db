"""What the host-time benchmark times is the same work for all, and launches that do nothing."""

import collections
import os
import subprocess
import sys
import types

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

from benchmarks.host import calls, empty_launches, host, trainer
from benchmarks.host.calls import (
    CLASSIFIER,
    CONTRASTIVE,
    ENCODER,
    INFERENCE,
    SMALL,
    STATES,
    STEP,
    Case,
)
from benchmarks.reporting import report
from benchmarks.reporting.tables import PARTS
from benchmarks.reporting.targets import CPU
from benchmarks.results import (
    FASTBERT,
    PATCHED,
    PATCHED_GRAPHS,
    REDUCED,
    SDPA,
    Options,
    Results,
    read,
)
from fastbert import backend
from fastbert.kernels.runtime import HANDLES, Kernel
from fastbert.modules.graphs import buckets
from fastbert.ops.bias_gelu import bias_gelu

# Of a tensor, and of its memory; they cost a tenth of what an operator costs.
ATTRIBUTES = {"__get__", "stride", "data_ptr", "numel", "get_device", "is_contiguous", "contiguous"}

QUICK = Options(torch.device("cpu"), "fp32", quick=True)
NAMES = [FASTBERT, PATCHED, SDPA]
SHAPE = {
    **SMALL,
    "num_hidden_layers": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.mark.parametrize("has_mask", [True, False])
def test_all_models_compute_the_same(has_mask):
    case = Case(INFERENCE, sequences=5, length=16, is_full=not has_mask, has_mask=has_mask)
    batch = calls.batch_of(case, QUICK.device, SHAPE)
    models = calls.models(case, SHAPE, NAMES, QUICK.device)
    works = [calls.forward_pass(*model, batch, QUICK) for model in models.items()]
    ours, patched, theirs = (work().logits for work in works)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patched, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("of", "model"), [(STEP, CLASSIFIER), (CONTRASTIVE, ENCODER)])
def test_a_step_has_the_same_gradients_for_all(of, model):
    case = Case(of, model, sequences=4, length=16, is_full=False)
    batch = calls.batch_of(case, QUICK.device, SHAPE)
    found = {}
    for name, model in calls.models(case, SHAPE, NAMES, QUICK.device).items():
        seen = found[name] = {}
        for where, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, where=where, seen=seen: seen.__setitem__(where, p.grad.clone())
            )
        calls.MAKERS[of](name, model, batch, QUICK)()
        assert all(parameter.grad is None for parameter in model.parameters())
        are_used = {n for n, _ in model.named_parameters() if of == STEP or "pooler" not in n}
        assert seen.keys() == are_used
    for name in (FASTBERT, PATCHED):
        torch.testing.assert_close(found[name], found[SDPA], rtol=1e-3, atol=1e-5)


def test_hidden_states_are_those_of_all_layers():
    case = Case(STATES, ENCODER, sequences=3, is_full=False)
    batch = calls.batch_of(case, QUICK.device, SHAPE)
    models = calls.models(case, SHAPE, NAMES, QUICK.device).items()
    ours, patched, theirs = (
        calls.MAKERS[STATES](*one, batch, QUICK)().hidden_states for one in models
    )
    assert len(theirs) == 1 + SHAPE["num_hidden_layers"]
    real = batch["attention_mask"].bool()
    for a, b, expected in zip(ours, patched, theirs, strict=True):
        torch.testing.assert_close(a[real], expected[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_trainers_steps_are_timed_behind_a_warm_up(monkeypatch):
    monkeypatch.setattr(trainer, "STEPS", 4)
    monkeypatch.setattr(trainer, "WARM_UP", 2)
    trained, results, now = [], Results(QUICK), [0.0]
    run, step = transformers.Trainer.train, transformers.Trainer.training_step

    def tick(*args, **kwargs):  # a step takes a second, and the first two take a hundred
        now[0] += 100 if args[0].state.global_step < 2 else 1
        return step(*args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", tick)
    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(
        transformers.Trainer, "train", lambda self: (trained.append(self), run(self))
    )
    trainer.compare(trainer.SMALL_CASE, "2 x 32", SHAPE, QUICK, results, 2)
    (row,) = results.rows[-1:]
    assert len(trained) == 6  # two models in a run that is not timed and in two that are
    assert all(one.state.global_step == 4 for one in trained)
    assert row["timings"].keys() == {PATCHED, SDPA}
    assert all((one["median_s"], one["rounds"]) == (1, 2) for one in row["timings"].values())
    (line, *_) = PARTS["host"]([row]).lines
    assert line[1] == trainer.TRAINER


def test_batches_are_as_wide_as_they_say_and_filled_so():
    for is_full, fill in ((False, 0.5), (True, 1.0)):
        case = Case(INFERENCE, sequences=32, length=128, is_full=is_full)
        mask = calls.batch_of(case, QUICK.device, SMALL)["attention_mask"]
        assert mask.shape == (32, 128)
        assert mask.sum(1).max() == 128
        assert mask.float().mean() == pytest.approx(fill, abs=0.02)


def test_graphs_run_under_their_own_name_alone():
    names = [FASTBERT, PATCHED, PATCHED_GRAPHS]
    found = calls.models(Case(INFERENCE), SHAPE, names, QUICK.device)
    layers = {name: next(iter(model.children())).encoder.layer for name, model in found.items()}
    assert [buckets.off_by(layers[name]) == "" for name in names] == [False, False, True]


def test_a_compiled_model_replays_graphs(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    case = Case(INFERENCE, ENCODER)
    batch = calls.batch_of(case, QUICK.device, SHAPE)
    model = calls.models(case, SHAPE, [SDPA], QUICK.device)[SDPA]
    work = calls.forward_pass(REDUCED, model, batch, QUICK)
    torch.testing.assert_close(work()[0], model(**batch)[0])
    assert modes == ["reduce-overhead"]


def test_launches_do_nothing_and_are_given_back(monkeypatch):
    x, bias = torch.randn(3, 8), torch.randn(8)
    expected, launched = bias_gelu(x, bias), []
    before = dict(backend.PREFERENCE), backend.INTERPRETED, dict(HANDLES), Kernel.compiled
    monkeypatch.setattr(empty_launches, "launch", lambda *a: launched.append(a))
    with empty_launches.in_place():
        assert bias_gelu.chosen("cpu").backend == "triton"
        y = bias_gelu(x, bias)
        assert y.shape == x.shape
        launch = 1, 1, 1, 0, *[None] * 5
        pointers = x.data_ptr(), bias.data_ptr(), y.data_ptr()  # the output, as it was
        assert launched == [(*launch, *pointers, 8, 8, 3)]
    with pytest.raises(RuntimeError, match="in here"), empty_launches.in_place():
        raise RuntimeError("in here")
    after = dict(backend.PREFERENCE), backend.INTERPRETED, dict(HANDLES), Kernel.compiled
    assert after == before
    torch.testing.assert_close(bias_gelu(x, bias), expected)
    assert len(launched) == 1
    assert torch.tensor(1e-40) * 1 != 0  # denormal numbers are numbers again


@pytest.mark.parametrize("operator", empty_launches.operators(), ids=lambda one: one.name)
def test_an_operator_is_timed_with_and_without_gradients(operator, monkeypatch):
    launches = []
    monkeypatch.setattr(empty_launches, "launch", lambda *a: launches.append(a))
    with empty_launches.in_place():
        works = empty_launches.in_modes(operator.call, operator.tensors)
        launches.clear()
        without, with_gradients, backward = (work() for work in works.values())
    assert launches
    assert not without.requires_grad
    assert with_gradients.requires_grad
    assert without.shape == with_gradients.shape
    assert [g.shape for g in backward] == [
        x.shape for x in operator.tensors if x.is_floating_point()
    ]


def test_one_thread_is_for_its_block_alone():
    before = torch.get_num_threads()
    with host.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_who_cannot_run_stops_no_other(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("out of memory")

    def make(name, *rest):
        return fails if name == PATCHED else calls.forward_pass(name, *rest)

    monkeypatch.setitem(host.MAKERS, INFERENCE, make)
    results = Results(QUICK)
    host.compare(Case(INFERENCE), "12 x 32", SHAPE, QUICK, results, rounds=2)
    (row,) = results.of("host")
    assert row["timings"].keys() == {FASTBERT, SDPA}
    assert PATCHED in row["refused"]


@pytest.mark.slow
def test_a_quick_run_without_the_interpreter_has_what_tables_and_targets_need(tmp_path):
    out = tmp_path / "host.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "--only", "host", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=report.HERE.parent, env=environment, check=True)
    rows = read(out)
    assert not any(row.get("refused") for row in rows)
    assert [row["part"] for row in rows].count("failure") == 0
    calls = [row for row in rows if row["part"] == "host" and row["case"]["device"] == "cpu"]
    *calls, by_trainer = calls
    assert len(calls) == len(host.CPU_CASES)
    assert all(list(row["timings"]) == NAMES for row in calls)
    assert by_trainer["timings"].keys() == {PATCHED, SDPA}
    assert all(len(line) == 8 for line in PARTS["host"](calls).lines)
    layers = [row for row in rows if row["part"] == "host_layers"]
    assert [row["case"]["of"] for row in layers] == [INFERENCE, STEP]
    for row in layers:
        assert row["timings"].keys() == {FASTBERT, PATCHED}
        assert row["products"]["median_s"] > 0
    operators = [row for row in rows if row["part"] == "host_operators"]
    assert len(operators) == len(empty_launches.operators())
    assert PARTS["host_operators"](operators).header[1:] == empty_launches.MODES
    about_host = [target for target in CPU if target.value(rows) is not None]
    assert len(about_host) == 5
    assert "## host_layers" in report.markdown(rows)


def test_calls_are_those_of_the_results_before():
    """So that the figures of `drop_in` can be measured again."""
    cases = {
        (case.of, case.sequences, case.length) for case in host.COMPILED_CASES + host.OTHER_CASES
    }
    before = read(report.RESULTS / "h200" / "drop_in.jsonl")[1:]
    assert {
        (INFERENCE if row["case"]["of"].startswith("inference") else STEP,
         row["case"]["sequences"], row["case"]["length"])
        for row in before
    } <= cases  # fmt: skip


class Asked(TorchFunctionMode):
    """Counts what Python asks of PyTorch."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.counts[getattr(function, "__name__", str(function))] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [FASTBERT, PATCHED])
def test_a_layer_asks_pytorch_for_this_and_no_more(name):
    """Each call takes the host microseconds; comparing a tensor with None once took a hundred."""
    asked = []
    with empty_launches.in_place(), torch.inference_mode():
        for depth in (2, 3):
            case = Case(INFERENCE, ENCODER)
            batch = calls.batch_of(case, QUICK.device, SHAPE)
            shape = {**SHAPE, "num_hidden_layers": depth}
            model = calls.models(case, shape, [name], QUICK.device)[name].eval()
            model(**batch)  # reads the layers
            with Asked() as mode:
                model(**batch)
            asked.append(mode.counts)
    products = {"linear": 4, "cat": 2, "view": 2}
    outputs = {"empty_like": 4, "unbind": 1}
    added = {name: n for name, n in (asked[1] - asked[0]).items() if name not in ATTRIBUTES}
    assert added == {**products, **outputs}
