import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbert.ops.gather_rows import gather_rows
from tests.oracle import gradients

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.complex64, torch.complex128]


def indices(source_rows, rows, named, device="cpu"):
    """An index (rows,) that names `named` different source rows, -1 elsewhere; and its inverse."""
    index = torch.full((rows,), -1, dtype=torch.int32)
    inverse = torch.full((source_rows,), -1, dtype=torch.int32)
    targets, sources = torch.randperm(rows)[:named], torch.randperm(source_rows)[:named]
    index[targets] = sources.int()
    inverse[sources] = targets.int()
    return index.to(device), inverse.to(device)


def content(shape, dtype):
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)


def expected(src, index):
    """The definition, one row at a time."""
    rows = [src[i] if i >= 0 else torch.zeros_like(src[0]) for i in index.tolist()]
    return torch.stack(rows) if rows else src.new_zeros((0, src.shape[1]))


def check(src, index, inverse):
    """Forward, and backward for an upstream gradient, which reads the same rows the other way."""
    out = gather_rows(src, index, inverse)
    assert out.dtype == src.dtype
    assert out.is_contiguous()
    assert torch.equal(out, expected(src, index))
    if src.dtype.is_floating_point:
        dy = torch.randn(out.shape, device=src.device).to(src.dtype)
        leaf = src.detach().requires_grad_()
        (grad,) = torch.autograd.grad(gather_rows(leaf, index, inverse), leaf, dy)
        assert grad.dtype == src.dtype
        assert torch.equal(grad, expected(dy, inverse) if len(dy) else torch.zeros_like(src))


@given(data=st.data())
def test_gather_follows_its_definition(implementation, device, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    source_rows, rows = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 40))
    width = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12, 31, 64, 100, 257]))
    named = data.draw(st.integers(0, min(rows, source_rows)))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    index, inverse = indices(source_rows, rows, named, device)
    check(content((source_rows, width), dtype).to(device), index, inverse)


@pytest.mark.parametrize("width", [1, 3, 767, 768, 1024, 5000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gather_of_many_rows(implementation, device, dtype, width):
    torch.manual_seed(0)
    index, inverse = indices(700, 333, 300, device)
    check(content((700, width), dtype).to(device), index, inverse)


def test_gather_of_a_dtype_that_pytorch_does_little_with(implementation, device):
    dtype = torch.float8_e4m3fn  # with torch 2.13, not with 2.11, unsigned integers too
    src = torch.arange(12, device=device).view(4, 3).to(dtype)
    index, inverse = indices(4, 5, 3, device)
    found = gather_rows(src, index, inverse)
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected(src.float(), index))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:-2],  # rows at odd addresses
        lambda x: x[:, :8],  # in float16, 16 bytes at addresses that are 40 apart
        lambda x: x[::2],
        lambda x: x[:, ::2],
        lambda x: x[:, :1],
        lambda x: x[:1].expand(9, -1),
        torch.t,
    ],
    ids=["unaligned", "rows apart", "every other row", "strided", "column", "expanded", "t"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_gather_of_a_view(implementation, device, dtype, view):
    torch.manual_seed(0)
    src = view(torch.randn(18, 20).to(device, dtype))
    index, inverse = indices(len(src), 11, 5, device)
    check(src, index, inverse)
    strided = torch.stack([index, index], 1)[:, 0]
    check(src, strided, inverse)


@pytest.mark.parametrize(
    ("source_rows", "rows", "width"), [(0, 0, 4), (0, 3, 4), (3, 0, 4), (3, 2, 0), (0, 0, 0)]
)
def test_gather_of_nothing(implementation, device, source_rows, rows, width):
    index, inverse = indices(source_rows, rows, 0, device)
    src, dy = torch.zeros(source_rows, width), torch.ones(rows, width)
    out, grad = gradients(
        lambda x: gather_rows(x, index, inverse), src.to(device), dy=dy.to(device)
    )
    assert out.is_contiguous()
    assert torch.equal(out.cpu(), torch.zeros(rows, width))
    assert torch.equal(grad.cpu(), torch.zeros(source_rows, width))


def test_spare_rows_are_zero_though_a_row_is_not_finite(implementation, device):
    src = torch.full((2, 3), float("nan"), device=device)
    index, inverse = indices(2, 2, 0, device)
    assert torch.equal(gather_rows(src, index, inverse), torch.zeros(2, 3, device=device))


def test_gradients_of_first_and_second_order(implementation, device):
    torch.manual_seed(0)
    index, inverse = indices(6, 5, 3, device)
    src = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)

    def squared(x):
        return gather_rows(x, index, inverse).square()

    assert torch.autograd.gradcheck(squared, src)
    assert torch.autograd.gradgradcheck(squared, src)


def test_autocast_leaves_the_dtype(implementation, device):
    index, inverse = indices(3, 2, 2, device)
    src = torch.randn(3, 4, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = gather_rows(src, index, inverse)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert src.grad is not None
    assert src.grad.dtype == torch.float32


INDEX, INVERSE = torch.tensor([0, -1]).int(), torch.tensor([0, -1, -1]).int()


@pytest.mark.parametrize(
    ("src", "index", "inverse", "message"),
    [
        (torch.zeros(3), INDEX, INVERSE, r"src of shape \(rows, hidden\), got .*3"),
        (
            torch.zeros(3, 4),
            INDEX.long(),
            INVERSE,
            "index of .* dtype int32, got .*([Ll]ong|int64)",
        ),
        (torch.zeros(3, 4), INDEX[None], INVERSE, r"index of shape \(M,\)"),
        (torch.zeros(3, 4), INDEX, INVERSE[:2], r"inverse of shape \(rows,\) = \(3,\)"),
        (torch.zeros(3, 4), INDEX, INVERSE.long(), "inverse of .* dtype int32"),
    ],
    ids=["1-D", "int64 index", "2-D index", "short inverse", "int64 inverse"],
)
def test_gather_refuses(implementation, device, src, index, inverse, message):
    with pytest.raises(ValueError, match=f"gather_rows: expected {message}"):
        gather_rows(src.to(device), index.to(device), inverse.to(device))


@pytest.mark.parametrize("implementation", ["triton", "reference"], indirect=True)
@pytest.mark.parametrize("place", [0, 1], ids=["index", "inverse"])
def test_a_tensor_on_another_device_is_refused(implementation, device, place):
    others = [INDEX.to(device), INVERSE.to(device)]
    others[place] = others[place].to("meta")
    with pytest.raises(
        ValueError, match=r"gather_rows: expected index and inverse on .*, got .*meta"
    ):
        gather_rows(torch.zeros(3, 4, device=device), *others)


@pytest.mark.parametrize("entry", [-2, 3, 2**31 - 1])
@pytest.mark.parametrize("implementation", ["ext", "reference"], indirect=True)
@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # on a GPU an assertion ends the process
def test_an_index_outside_the_rows_is_refused(implementation, device, entry):
    with pytest.raises(IndexError, match=r"out of range|in \[-1, 3\)"):
        gather_rows(torch.zeros(3, 4), torch.tensor([0, entry]).int(), INVERSE)


@pytest.mark.parametrize("entry", [-2, 0, 2**31 - 1])
@pytest.mark.parametrize("implementation", ["ext", "reference"], indirect=True)
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_an_index_into_no_rows_is_refused(implementation, device, entry):
    with pytest.raises(IndexError, match=r"out of range|in \[-1, 0\)"):
        gather_rows(torch.zeros(0, 4), torch.tensor([-1, entry]).int(), INVERSE[:0])


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", [-2, 3, 2**31 - 1])
def test_an_index_outside_the_rows_gives_no_number(implementation, device, entry, dtype):
    index = torch.tensor([0, entry, -1]).int().to(device)
    rows = gather_rows(content((3, 4), dtype).to(device), index, INVERSE.to(device))
    row = rows[1].isnan() if dtype.is_floating_point else rows[1].view(torch.int8) == -1
    assert row.all()
    assert not rows[2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_two_devices_are_refused(implementation, device):
    with pytest.raises(ValueError, match="index and inverse on cuda:0, got cpu and cpu"):
        gather_rows(torch.zeros(3, 4, device=device), INDEX, INVERSE)


@pytest.mark.parametrize("implementation", ["ext"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_gather_is_a_well_formed_operator(implementation, device, dtype):
    index, inverse = indices(6, 5, 3, device)
    src = content((6, 4), dtype).to(device).requires_grad_(dtype.is_floating_point)
    torch.library.opcheck(torch.ops.fastbert.gather_rows, (src, index, inverse))


@pytest.mark.parametrize("implementation", ["ext"], indirect=True)
def test_compiled_autograd_gives_the_gradient(implementation, device):
    index, inverse = indices(6, 5, 3, device)
    src = torch.randn(6, 4, device=device, requires_grad=True)
    dy = torch.randn(5, 4, device=device)

    def step():
        (gather_rows(src, index, inverse) * dy).sum().backward()

    captures = torch._dynamo.utils.counters["compiled_autograd"]["captures"]
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="eager")()
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == captures + 1
    assert torch.equal(src.grad, expected(dy, inverse))
