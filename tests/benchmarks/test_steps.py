"""What the whole-step benchmarks compare is the same step, and each trick is really off."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import suite
from benchmarks.results import FASTBERT, Options, Results
from benchmarks.steps import ablation, footprint, steps
from benchmarks.workloads import pretraining_batch, sequence_lengths
from fastbert import events

QUICK = Options(torch.device("cpu"), "fp32", quick=True)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    return pretraining_batch([100, 37])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = steps.make_model(FASTBERT, "tiny").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def losses(monkeypatch):
    """Of the steps that run, which then change no weight."""
    seen = []
    monkeypatch.setattr(
        ablation,
        "optimizer_step",
        lambda model, loss_of, options, **_: lambda: seen.append(loss_of()),
    )
    return seen


class Counting(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "without", [(), *((name,) for name in ablation.TRICKS), (*ablation.TRICKS,)]
)
def test_without_a_trick_the_loss_is_the_same(model, batch, losses, without):
    ablation.ablated(model, batch, without, QUICK)()
    torch.testing.assert_close(losses[0], model(batch.packed).loss)


@pytest.mark.parametrize("name", ["unpadding", "masked-only head", "last-layer subset"])
def test_without_a_trick_of_the_data_there_is_more_to_compute(model, batch, losses, name):
    flops = []
    for without in ((), (name,)):
        with FlopCounterMode(display=False) as counter:
            ablation.ablated(model, batch, without, QUICK)()
        flops.append(counter.get_total_flops())
    assert flops[1] > flops[0]


def test_without_fused_qkv_there_are_more_products(model, batch, losses):
    products = []
    for without in ((), ("fused QKV",)):
        with Counting() as counter:
            ablation.ablated(model, batch, without, QUICK)()
        products.append(counter.products)
    assert products[1] == products[0] + 2 + 1  # q, k, v in the first layer, k, v in the last


@pytest.mark.parametrize(
    ("name", "operator"),
    [("fused norm", "dropout_add_layer_norm"), ("fused GELU", "bias_gelu")],
)
def test_without_a_fused_operator_it_does_not_run(model, batch, losses, name, operator):
    def runs(without):
        # in float32 a model on a CPU has no use for bias_gelu
        with events.listen() as heard, torch.autocast("cpu", torch.bfloat16):
            ablation.ablated(model, batch, without, QUICK)()
        names = [event.operator for event in heard if isinstance(event, events.OperatorRun)]
        return names.count(operator)

    in_head = 1 if operator == "bias_gelu" else 0
    assert runs(()) >= 2 + in_head
    assert runs((name,)) <= in_head


def test_the_step_of_a_graph_is_the_same_step(model, batch, monkeypatch):
    monkeypatch.setattr(steps, "recorded", lambda work: (work, None))
    monkeypatch.setattr(
        steps, "optimizer_step", lambda model, loss_of, options, **_: lambda: loss_of()
    )
    work, reason = steps.graphed_step(model, batch, QUICK)
    assert reason is None
    torch.testing.assert_close(work(), model(batch.packed).loss)


def test_counts_the_operations_of_a_step():
    """The parts that the brief's table of BERT-large has: GEMMs, attention, MLM head."""
    batch = pretraining_batch(sequence_lengths("wikipedia", 96))
    per_token = footprint.model_flops("large", batch, training=True) / sum(batch.lengths)
    assert per_token == pytest.approx(1.812e9 + 0.107e9 + 0.029e9, rel=0.01)


@pytest.mark.parametrize("quick", [True, False])
def test_a_gpu_measures_both_sizes_of_bert(quick):
    options = Options(torch.device("cuda"), "bf16", quick)
    for cases in (steps.step_cases(options), steps.inference_cases(options)):
        assert {case.preset for case in cases} == {"base", "large"}


def test_hugging_face_also_runs_with_weights_in_low_precision():
    options = Options(torch.device("cpu"), "bf16", quick=True)
    batch = pretraining_batch([10, 7], 16)
    model = steps.make_model(steps.LOW, "tiny")
    pooled = steps.forward_pass(steps.LOW, model, batch, options)()
    assert {parameter.dtype for parameter in model.bert.parameters()} == {torch.bfloat16}
    low = steps.forward_pass(steps.SDPA, model, batch, options)()
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, low, rtol=0.02, atol=0.02)


def test_lengths_fill_what_they_should_of_a_batch():
    fills = {"wikipedia": 0.49, "uniform": 0.5, "serving": 0.6, "full": 1.0, "128": 0.25}
    for distribution, fill in fills.items():
        lengths = sequence_lengths(distribution, 96)
        assert sum(lengths) / 96 / 512 == pytest.approx(fill, abs=0.01)
        assert lengths == sorted(lengths, reverse=distribution != "serving")


def test_compares_the_candidates_and_records_what_cannot_run(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "sequence_lengths", lambda *_: [30, 50])

    def make_model(name, preset):
        if name == steps.EAGER:
            raise RuntimeError("out of memory\nand a stack")
        return original(name, preset)

    original = steps.make_model
    monkeypatch.setattr(steps, "make_model", make_model)
    results = Results(QUICK, tmp_path / "results.jsonl")
    # a step is padded to 512 tokens, as in MLPerf, and a forward pass no wider than it must be
    for part, fill in (("steps", 80 / 1024), ("inference", 80 / 100)):
        case = steps.Case("tiny", "wikipedia", 2, 2, (steps.EAGER,))
        row = steps.compare(part, case, QUICK, results)
        assert row["refused"] == {steps.EAGER: "out of memory"}
        assert set(row["timings"]) == {FASTBERT, steps.SDPA}
        ours = row["timings"][FASTBERT]
        assert ours["real_tokens_per_second"] == pytest.approx(80 / ours["median_s"])
        assert ours["rounds"] == 2
        assert row["fill"] == pytest.approx(fill)
        ceiling = results.of("ceilings")[0]["rate"]
        assert ours["utilisation"] * ceiling == pytest.approx(row["flops"] / ours["median_s"])
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["part"] for row in written] == [
        "environment",
        "ceilings",
        "ceilings",
        "steps",
        "inference",
    ]


def test_a_failing_part_stops_no_other(monkeypatch, tmp_path):
    def run(options, results):
        if not results.rows[1:]:
            raise RuntimeError("broken")
        results.add("ablation", {"n": 1})

    for name in ("steps", "ablation"):
        monkeypatch.setattr(f"benchmarks.steps.{name}.run", run)
    out = tmp_path / "results.jsonl"
    arguments = ["--quick", "--only", "steps", "--only", "ablation", "--out", str(out)]
    assert CliRunner().invoke(suite.app, arguments).exit_code == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["environment", "failure", "ablation"]
    assert rows[1]["case"] == {"of": "steps"}
