import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbert import backend
from fastbert.ops.compact import Compaction, compact

DTYPES = [
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
]
CHUNK = 16384  # of the CPU kernel; the CUDA kernel's tiles of 256 divide it


def expected(values, ignore_index, capacity):
    """The definition, in plain Python."""
    flat = values.flatten().tolist()
    kept = [i for i, value in enumerate(flat) if value != ignore_index]
    room = len(kept) if capacity is None else capacity
    spare = [None] * max(0, room - len(kept))
    placed = [*kept[:room], *spare]
    slots = [-1] * len(flat)
    for slot, position in enumerate(kept[:room]):
        slots[position] = slot
    per_row = [sum(value != ignore_index for value in row) for row in values.tolist()]
    offsets = [sum(per_row[:row]) for row in range(len(per_row) + 1)]
    return (
        [ignore_index if i is None else flat[i] for i in placed],
        [-1 if i is None else i for i in placed],
        slots,
        offsets,
    )


def check(values, ignore_index, capacity):
    result = compact(values, ignore_index, capacity)
    assert result.kept.dtype == values.dtype
    assert all(x.dtype == torch.int32 and x.device == values.device for x in result[1:])
    assert tuple(x.tolist() for x in result) == expected(values, ignore_index, capacity)


@given(data=st.data())
def test_compact_follows_its_definition(implementation, device, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 70)))
    seed = data.draw(st.integers(0, 2**16))
    share = data.draw(st.sampled_from([0.0, 0.15, 0.5, 1.0]))
    capacity = data.draw(st.none() | st.integers(0, 400))
    torch.manual_seed(seed)
    ignore_index = (
        0 if dtype in (torch.bool, torch.uint8) else data.draw(st.sampled_from([0, -100]))
    )
    something = torch.randint(1, 2 if dtype == torch.bool else 100, shape)
    values = torch.where(torch.rand(shape) < share, something, ignore_index)
    check(values.to(device, dtype), ignore_index, capacity)


@pytest.mark.parametrize(
    ("shape", "capacity"),
    [
        *itertools.product([(1, CHUNK + 1), (2, 2 * CHUNK)], [None, 0, 100, 20000]),
        ((1, CHUNK), None),
        ((3, CHUNK // 2 + 7), 100),
        ((CHUNK + 5, 3), 100),
        ((1, 5 * CHUNK + 1), 10000),
        # a thousand of a GPU's tiles
        *(pytest.param((1, 300001), some, marks=pytest.mark.gpu) for some in (None, 0, 100, 20000)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_compact_agrees_across_chunks(implementation, device, shape, capacity):
    torch.manual_seed(0)
    values = torch.where(torch.rand(shape) < 0.15, torch.randint(30522, shape), -100)
    check(values.to(device), -100, capacity)


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_capacity_beside_the_count(implementation, device, difference):
    values = torch.tensor([[5, 0, 6], [0, 0, 0], [7, 8, 0]], device=device)
    kept, positions, slots, offsets = compact(values, 0, 4 + difference)
    assert kept.tolist() == [5, 6, 7, 8, 0][: 4 + difference]
    assert positions.tolist() == [0, 2, 6, 7, -1][: 4 + difference]
    assert slots.tolist() == [0, -1, 1, -1, -1, -1, 2, 3 if difference >= 0 else -1, -1]
    assert offsets.tolist() == [0, 2, 2, 4]  # the true count, also over capacity


@pytest.mark.parametrize(
    "view",
    [torch.t, lambda x: x[:, ::2], lambda x: x[1:, 3:], lambda x: x[:1].expand(4, -1)],
    ids=["transposed", "strided", "offset", "expanded"],
)
def test_compact_of_a_view(implementation, device, view):
    torch.manual_seed(0)
    check(view(torch.randint(3, (6, 11), device=device)), 0, None)


@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, -1])
def test_ignore_index_at_the_ends_of_int64(implementation, device, value):
    check(torch.tensor([[value, 0, value, 1]], device=device), value, 3)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_compact_of_unsigned_types(implementation, device, dtype):
    values = torch.tensor([[1, 0, 3], [0, 0, 9]]).to(device, dtype)
    check(values, 0, 4)
    largest = min(torch.iinfo(dtype).max, 2**63 - 1)  # that an operator's schema can say
    values = torch.tensor([[1, largest, 3], [largest, largest - 1, 9]], dtype=dtype).to(device)
    check(values, largest, 5)


@pytest.mark.parametrize(
    ("values", "ignore_index", "capacity", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 0, None, r"values of shape \(batch, seqlen\), got .*4"),
        (torch.zeros(1, 4), 0, None, "values of an integer dtype or bool, got .*[Ff]loat"),
        (torch.zeros(1, 4).cfloat(), 0, None, "values of an integer dtype or bool, got .*omplex"),
        (torch.zeros(1, 4, dtype=torch.bool), -100, None, "an ignore_index that .* can hold"),
        (torch.zeros(1, 4, dtype=torch.bool), 2, None, "an ignore_index that .* can hold, got 2"),
        (torch.zeros(1, 4, dtype=torch.uint8), 256, None, "an ignore_index that .* can hold"),
        (
            torch.zeros(1, 4, dtype=torch.uint8),
            -1,
            None,
            "an ignore_index that .* can hold, got -1",
        ),
        (torch.zeros(1, 4, dtype=torch.int8), -129, None, "ignore_index .* can hold, got -129"),
        (torch.zeros(1, 1, dtype=torch.int8).expand(2, 2**30), 0, None, r"2\^31 - 1 values, got"),
        (torch.zeros(1, 4, dtype=torch.int64), 0, -1, "a capacity of at least 0, got -1"),
    ],
    ids=[
        "1-D",
        "float",
        "complex",
        "bool",
        "bool of 2",
        "uint8",
        "negative uint8",
        "int8",
        "too many",
        "negative capacity",
    ],
)
def test_compact_refuses(implementation, device, values, ignore_index, capacity, message):
    with pytest.raises(ValueError, match=f"compact: expected .*{message}"):
        compact(values.to(device), ignore_index, capacity)


def test_the_extension_takes_no_other_shape_even_without_the_check(device):
    if not backend.is_loaded("ext", "compact", device):
        pytest.skip("the extension is not built for this device")
    with (
        backend.use("ext"),
        pytest.raises(ValueError, match=r"\(batch, seqlen\), got \[1, 2"),
    ):
        compact.run(Compaction(torch.ones(1, 2, 2, dtype=torch.bool, device=device), 0))


def test_a_forced_extension_never_falls_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastbert._C", None)
    with (
        backend.use("ext"),
        pytest.raises(backend.BackendUnavailable, match=r"extension is not built$"),
    ):
        compact(torch.tensor([[1, 0]]), 0)


def test_an_extension_of_another_torch_is_said_to_be_there(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: at::of_another_release")

    monkeypatch.setattr(backend.importlib, "import_module", fail)
    refusal = r"extension cannot be loaded \(undefined symbol: at::of_another_release\)"
    with backend.use("ext"), pytest.raises(backend.BackendUnavailable, match=refusal):
        compact(torch.tensor([[1, 0]]), 0)


@pytest.mark.parametrize("implementation", ["ext"], indirect=True)
@pytest.mark.parametrize("capacity", [None, 3], ids=["exact", "capacity"])
def test_compact_is_a_well_formed_operator(implementation, device, capacity):
    values = torch.tensor([[5, 0, 6], [7, 8, 0]], device=device)
    torch.library.opcheck(torch.ops.fastbert.compact, (values, 0, capacity))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_compact_with_a_capacity_never_makes_the_host_wait(implementation, device):
    values = torch.randint(3, (8, 512), device=device)
    compact(values, 0, 4096)  # warm up: the first call may load a module, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        compact(values, 0, 4096)
        with pytest.raises(RuntimeError, match="synchroniz"):
            compact(values, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
