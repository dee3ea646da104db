"""The floor of a step counts what its operators read, write and multiply."""

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.steps import floor, footprint
from benchmarks.steps.floor import Work
from benchmarks.workloads import pretraining_batch, sequence_lengths
from fastbert.config.presets import PRESETS

LENGTHS = sequence_lengths("wikipedia", 8)
TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module")
def narrow():
    return floor.count("base", LENGTHS)


@pytest.fixture(scope="module")
def work(narrow):
    return narrow.work


def test_a_residual_stream_in_fp32_is_read_written_and_kept_at_twice_the_width(narrow):
    """A layer keeps two sums before its LayerNorms; the products keep what they had, which the
    LayerNorms write too: x, residual; z, y, and y again in x's dtype."""
    layers = PRESETS["base"].shape["num_hidden_layers"] - 1  # of the last few rows are computed
    wide = floor.count("base", LENGTHS, True)
    more = wide.kept_bytes - narrow.kept_bytes
    assert more == pytest.approx(layers * 2 * 2 * TOKENS * 768, rel=0.15)
    forward = max(of(wide.work, "layer_norm_fwd"), key=lambda one: one.bytes)
    assert forward.bytes == pytest.approx(forward.calls * (2 * 2 + 3 * 4) * TOKENS * 768, rel=0.01)
    before = max(of(narrow.work, "layer_norm_fwd"), key=lambda one: one.bytes)
    assert before.bytes == pytest.approx(before.calls * 4 * 2 * TOKENS * 768, rel=0.01)


def of(work, operator):
    return [one for kind, one in work.items() if kind.operator == operator]


def test_the_arithmetic_is_what_the_result_needs(work):
    """Less what the last layer leaves out, more the rows of padding in the vocabulary."""
    needed = footprint.model_flops("base", pretraining_batch(LENGTHS), training=True)
    assert 0.9 * needed < sum(one.flops for one in work.values()) < 1.01 * needed


def test_bytes_are_those_of_inputs_and_results(work):
    """bfloat16 tokens, float32 biases; a layer each, but for the last one's wanted rows."""
    layers, inner = PRESETS["base"].shape["num_hidden_layers"] - 1, 4 * 768
    whole = max(of(work, "bias_gelu_fwd"), key=lambda one: one.bytes)
    assert whole.calls == layers
    assert whole.bytes == layers * (2 * 2 * TOKENS * inner + 4 * inner)
    whole = max(of(work, "bias_gelu_bwd"), key=lambda one: one.bytes)
    assert whole.bytes == layers * (3 * 2 * TOKENS * inner + 2 * 4 * inner)


def test_attention_is_counted_by_the_sequences(work):
    forward = of(work, "attention_fwd")
    backward = of(work, "attention_bwd")
    per_layer = 4 * 768 * sum(n**2 for n in LENGTHS)
    whole = max(forward, key=lambda one: one.flops)
    assert whole.flops == 11 * per_layer
    (last,) = (one for one in forward if one is not whole)
    assert 0.1 * per_layer < last.flops < 0.25 * per_layer  # the queries of wanted rows alone
    total = sum(one.flops for one in backward)
    assert total == pytest.approx(2.5 * sum(one.flops for one in forward))


def test_what_moves_nothing_is_not_counted(work):
    names = {kind.operator for kind in work}
    assert not names & {"view", "t", "transpose", "unbind", "slice", "detach", "empty", "device"}
    assert names >= {"mm", "addmm", "attention_fwd", "cat"}


def test_the_optimizer_reads_four_tensors_and_writes_them(work):
    (adamw,) = of(work, "_fused_adamw_")
    assert adamw.bytes == pytest.approx(2 * 4 * 4 * 110e6, rel=0.02)


def test_in_fp8_each_product_of_the_encoder_is_of_casts(work):
    found = floor.count("base", LENGTHS, in_fp8=True).work
    flops = sum(one.flops for one in found.values())
    assert flops == pytest.approx(sum(one.flops for one in work.values()), rel=0.01)
    products = of(found, floor.FP8)
    layers = PRESETS["base"].shape["num_hidden_layers"]
    # four linear layers, of which the queries are one more in the last layer, by three products
    assert sum(one.calls for one in products) == 3 * (4 * layers + 1)
    assert sum(one.flops for one in products) > 0.8 * flops
    # the scales are three divisions of a number, and their inverses one for all layers
    assert sum(one.calls for one in of(found, "reciprocal")) == 3 + 1


def test_the_longer_of_two_times_is_the_floor():
    assert Work(1, bytes=10, flops=30).floor(product=10, copy=5) == 3
    assert Work(1, bytes=20, flops=30).floor(product=10, copy=5) == 4


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("preset", "nothing", "mini"),
        *(("lengths", value, "serving or a number from 1 to 512") for value in ("nothing", "²")),
        *(("lengths", value, "serving or a number from 1 to 512") for value in ("0", "513")),
        *(("product", value, "a finite number above 0") for value in ("0", "nan")),
        *(("copy", value, "a finite number above 0") for value in ("0", "-1", "inf")),
    ],
)
def test_a_wrong_value_is_an_error_that_says_what_is_taken(option, value, said):
    app = typer.Typer()
    app.command()(floor.main)
    outcome = CliRunner().invoke(app, [f"--{option}", value], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert said in outcome.output
    assert f"got {value}" in outcome.output.replace("'", "")
