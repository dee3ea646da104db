import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.launches import recorded
from benchmarks.operators import candidates, kernels, tune
from benchmarks.operators.workloads import workloads
from fastbert import backend
from fastbert.check import InputError

pytestmark = pytest.mark.skipif(not backend.INTERPRETED, reason="on a GPU, tune itself is run")
FLUSH = torch.empty(0, dtype=torch.uint8)
# Attention's and the cross-entropy's sweeps take minutes in the interpreter.
SLOW = ("attention", "attention_qkvpacked", "linear_cross_entropy")
QUICK = [
    (op, table) for op, tables in candidates.TABLES.items() if op not in SLOW for table in tables
]
CASES = [(op, table) for op, table in QUICK if table.name != "STAGES"]
STAGES = [(op, table) for op, table in QUICK if table.name == "STAGES"]


def workload_of(op, table, tokens=8):
    for workload in workloads("tiny", tokens, "cpu", torch.float32):
        if workload.operator.name == op and table.where in workload.label:
            return workload
    raise AssertionError(f"no workload of {op} reads {table.unit}.{table.name}")


def test_every_operator_with_kernels_is_tuned():
    assert set(candidates.TABLES) == {
        op.name for op in backend.OPS.values() if "triton" in op.backends
    }


def test_rows_are_written_into_a_directory_that_is_new(tmp_path):
    out = tmp_path / "two" / "tune.jsonl"
    for number in range(2):
        tune._append(out, {"number": number})
    assert out.read_text() == '{"number": 0}\n{"number": 1}\n'


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    ("op", "table"), CASES, ids=[f"{op}-{table.unit}.{table.name}" for op, table in CASES]
)
def test_a_table_is_what_the_kernels_are_launched_with(op, table, monkeypatch):
    """An entry that no launcher could read is refused, so the sweep does reach it."""
    workload = workload_of(op, table)
    candidate = list(table.candidates(tune.columns_of(workload)))[-1]
    monkeypatch.setattr(kernels, "SETS", 1)
    right, refused = tune.sweep(workload, table, [candidate, object()], 2, FLUSH)
    assert right["median_s"] > 0
    assert "median_s" not in refused
    assert refused["refused"] != "wrong result"


@pytest.mark.parametrize(("op", "table"), STAGES, ids=[op for op, _ in STAGES])
def test_stages_are_what_the_kernels_are_launched_with(op, table):
    """The interpreter reads none, so it refuses no entry."""
    workload = workload_of(op, table)
    with tune.forced(table, 3), recorded(90) as launches:
        y = workload.fused(*(x.requires_grad_(x.is_floating_point()) for x in workload.make()))
        y.sum().backward()
    assert 3 in [launch.values.get("STAGES") for launch in launches]


def test_a_block_that_gives_a_wrong_result_is_not_timed():
    """Half of each row."""
    table = candidates.LAYER_NORM[0]
    workload = workload_of("layer_norm", table)
    columns = tune.columns_of(workload)
    rows = list(tune.sweep(workload, table, [None, (1, columns // 2, 1)], 2, FLUSH))
    assert "median_s" in rows[0]
    assert rows[1]["refused"] == "wrong result"
    assert "1 of 2 entries" in list(tune.describe(rows))[-1]


def test_the_table_is_put_back():
    for tables in candidates.TABLES.values():
        for table in tables:
            module = importlib.import_module(f"fastbert.kernels.{table.unit}")
            before = getattr(module, table.name)
            with tune.forced(table, (1, 2, 3)):
                inside = getattr(module, table.name)
                assert (inside() if callable(before) else inside) == (1, 2, 3)
            assert getattr(module, table.name) is before


def test_a_sweep_of_everything_reaches_every_table():
    sizes = tune.Sizes("tiny", 64, "cpu", torch.float32)
    found = {
        (workload.operator.name, table) for _, workload, _, table in tune.chosen(sizes, "", ())
    }
    assert found == {(op, table) for op, tables in candidates.TABLES.items() for table in tables}
    names = "bias_gelu.backward_block", "layer_norm.STAGES"
    found = {(one.operator.name, table.name) for _, one, _, table in tune.chosen(sizes, "", names)}
    assert found == {
        ("bias_gelu", "backward_block"),
        ("layer_norm", "STAGES"),
        ("dropout_add_layer_norm", "STAGES"),
    }
    (one,) = {table.name for *_, table in tune.chosen(sizes, "bias_gelu", names)}
    assert one == "backward_block"


def test_attention_is_swept_around_the_entries_of_its_tables():
    from fastbert.kernels.attention import dkdv_tile, dq_tile, fwd_tile

    entries = set(candidates.tiles(64))
    for dropout in (False, True):
        assert fwd_tile(90, 2, 64, dropout=dropout, mask=False) in entries
        assert dq_tile(90, 2, 64, dropout=dropout, mask=False) in set(candidates.dq_tiles(64))
    assert dkdv_tile(90, 2, 64, mask=False) in entries
    assert {tile.num_stages for tile in entries} == {1, 2, 3, 4, 5}


def test_every_candidate_is_compiled_ahead(monkeypatch):
    """Run once, on a small batch, whatever becomes of it."""
    entries = [(2, 128, 2), (4, 128, 4), object()]
    table = candidates.Table("bias_gelu", "FWD_BLOCK", False, lambda columns: entries)
    monkeypatch.setitem(candidates.TABLES, "bias_gelu", (candidates.ADD_PARTIALS, table))
    seen = []

    def passes(check):
        seen.append((bias_gelu.FWD_BLOCK, check.workload.label))
        if seen[-1][0] is entries[2]:
            raise RuntimeError("does not fit")

    bias_gelu = importlib.import_module("fastbert.kernels.bias_gelu")
    monkeypatch.setattr(tune.Check, "passes", passes)
    monkeypatch.setattr(tune, "AHEAD_TOKENS", 16)
    sizes = tune.Sizes("tiny", 64, "cpu", torch.float32)
    number = next(n for n, workload, *_ in tune.chosen(sizes, "bias_gelu", ()))
    with ThreadPoolExecutor(1) as pool:
        tune.compile_ahead(pool, sizes, number, 1, len(entries))
    assert [entry for entry, _ in seen] == entries
    assert all("16 x" in label for _, label in seen)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "huge"}, "--preset: one of tiny,"),
        ({"table": ["a.B"]}, "--table: one of .*'a.B'"),
    ],
)
def test_a_name_that_there_is_not_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        tune.main(op="bias_gelu", **given)
