"""Launches by handle pass what Triton's own path passes, and no kernel made for other arguments.

Kernels are compiled for a GPU that is not here, and a stand-in takes the place of its driver.
"""

import contextlib
import gc

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastbert import backend
from fastbert.kernels import runtime
from fastbert.kernels.runtime import HANDLES, Handle, Kernel
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.layer_norm import dropout_add_layer_norm

TARGET = GPUTarget("cuda", 90, 32)
LAUNCH = [1, 1, 1, 7]  # the grid and the stream


class Driver:
    """A GPU's, whose launcher keeps what it gets."""

    def __init__(self):
        self.launched = []

    def get_current_device(self):
        return -1  # a CPU tensor's

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return TARGET

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launched.append(arguments)

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 2**17}

        @staticmethod
        def load_binary(name, *_):
            return "module", f"function {name}", 32, 0, 1024

        @staticmethod
        def unload_module(module):
            assert module == "module"


def scale(x_ptr, y_ptr, stride, n, factor, COLS: tl.constexpr, TWICE: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    x = tl.load(x_ptr + cols * stride, mask=cols < n, other=0.0)
    if y_ptr is not None:
        x *= factor
    tl.store(x_ptr + cols * stride, x * 2 if TWICE else x, mask=cols < n)


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    yield driver
    gc.collect()  # kernels, which Triton unloads by the driver


@pytest.fixture
def kernel(driver, monkeypatch):
    """`scale` as on a GPU, where Triton compiles in place of interpreting."""
    made = Kernel(scale, ["n", "factor"])
    made.jit = JITFunction(scale, do_not_specialize=["n", "factor"])
    monkeypatch.setattr(runtime, "IS_INTERPRETED", False)
    monkeypatch.setattr(runtime, "current_device", lambda: -1)
    monkeypatch.setattr(runtime, "current_stream", lambda device: 7)
    monkeypatch.setattr(runtime, "HANDLES", {})
    yield made
    runtime.HANDLES.clear()
    made.jit.device_caches.clear()


def plain(arguments):
    """As the launcher in C reads them: tensors by address, and None as 0."""
    return [
        a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in arguments
    ]


MEMORY = torch.zeros(64, dtype=torch.int64)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.float8_e4m3fn])
# memory whose address is or is not a multiple of 16
TENSORS = st.builds(lambda dtype, start: MEMORY.view(dtype)[start:], DTYPES, st.integers(0, 9))
INTEGERS = st.sampled_from(
    [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, -(2**31) - 1, 2**32]
) | st.integers(-(2**40), 2**40)
ARGUMENTS = {
    "x_ptr": TENSORS,
    "y_ptr": st.none() | TENSORS,
    "stride": INTEGERS,
    "n": INTEGERS,
    "factor": st.floats(width=32, allow_nan=False) | INTEGERS | st.booleans(),
    "COLS": st.sampled_from([16, 32]),
    "TWICE": st.booleans(),
    "num_warps": st.sampled_from([1, 4]),
}


@st.composite
def calls(draw):
    """A call's arguments, and calls that differ from it in one of them."""
    first = {name: draw(values) for name, values in ARGUMENTS.items()}
    return [first, *({**first, name: draw(values)} for name, values in ARGUMENTS.items())]


@given(calls=calls())
def test_a_handle_is_used_only_where_triton_would_compile_the_same(calls, kernel, monkeypatch):
    backend = make_backend(TARGET)
    bind = create_function_from_signature(kernel.jit.signature, kernel.jit.params, backend)
    used = []

    def compiled(self, grid, arguments, constants):
        _, specialization, options = bind(*arguments, **constants)
        return Handle(lambda *a: used.append(a[4]), (specialization, options), None, ())

    monkeypatch.setattr(Kernel, "compiled", compiled)
    runtime.HANDLES.clear()
    for values in calls:
        arguments = [values[name] for name in kernel.names]
        constants = {name: values[name] for name in values if name not in kernel.names}
        kernel((1,), *arguments, **constants)
        _, specialization, options = bind(*arguments, **constants)
        assert used.pop() == (specialization, options)


@pytest.mark.skipif(not runtime.IS_INTERPRETED, reason="kernels are compiled here")
def test_an_interpreted_launch_leaves_the_language_as_it_was():
    """Else a kernel compiled afterwards, as below, would have the interpreter's parts."""
    places = (tl, tl.core, tl.core.tensor, tl.core.dtype, tl.math)
    x, weight = torch.randn(4, 16), torch.ones(16)
    with backend.use("triton"):
        dropout_add_layer_norm(x, x, weight, weight)  # the first leaves inherited names
        before = [dict(vars(place)) for place in places]
        dropout_add_layer_norm(x, x, weight, weight)
    assert [dict(vars(place)) for place in places] == before


def copy(x_ptr, y_ptr, x_stride, y_stride):
    program = tl.program_id(0)
    tl.store(y_ptr + program * y_stride, tl.load(x_ptr + program * x_stride))


@pytest.mark.skipif(not runtime.IS_INTERPRETED, reason="kernels are compiled here")
@pytest.mark.parametrize(
    ("x_stride", "y_stride", "in_place", "message"),
    [
        (2, 1, False, r"\(2, 0, 0\) loads outside"),
        (1, -1, False, r"\(1, 0, 0\) stores outside"),
        (1, 0, False, r"\(1, 0, 0\) stores what another one stores"),
        (0, 1, True, r"\(1, 0, 0\) loads what another one stores"),
    ],
)
def test_the_interpreter_refuses_what_a_gpu_may_let_pass(x_stride, y_stride, in_place, message):
    launch = Kernel(copy, [])
    x, y = torch.arange(12.0)[4:8], torch.zeros(12)[4:8]
    launch((4,), x, y, 1, 1)
    launch((4,), x, x, 1, 1)
    assert torch.equal(x, y)
    with pytest.raises(InterpreterError, match=message):
        launch((4,), x, x if in_place else y, x_stride, y_stride)


def test_a_launch_passes_what_tritons_own_passes(kernel, driver, monkeypatch):
    x, y = torch.zeros(4, 16), torch.zeros(16)
    calls = [
        ((x, None, 16, 5, 0.5), {"COLS": 16, "TWICE": False, "num_warps": 1}),
        ((x, y, 1, 5, 0.5), {"COLS": 16, "TWICE": True, "num_warps": 1}),
        ((x[:, 1:], y, 3, 2**31, 0.25), {"TWICE": False, "COLS": 32, "num_warps": 2}),
    ]
    for is_known in (False, True, True):
        monkeypatch.setattr(runtime, "_IS_KNOWN", is_known)
        for arguments, constants in calls:
            kernel((3, 2), *arguments, **constants)
    tritons, first, again = (driver.launched[i : i + 3] for i in (0, 3, 6))
    for own, other, hit in zip(tritons, first, again, strict=True):
        grid_and_stream, (function, metadata, _, *_), arguments = own[:4], own[4:9], own[9:]
        assert grid_and_stream == (3, 2, 1, 7)
        assert function == "function scale"
        expected = (*grid_and_stream, function, metadata, None, None, None, *plain(arguments))
        assert plain(other) == plain(expected)
        assert hit == other
    assert len(runtime.HANDLES) == 3


@pytest.mark.parametrize(("hook", "place"), [("launch_enter_hook", -9), ("launch_exit_hook", -8)])
def test_a_profiler_sees_launches_with_their_names(hook, place, kernel, driver):
    seen = []
    arguments, constants = (torch.zeros(16), None, 1, 5, 0.5), {"COLS": 16, "TWICE": False}
    kernel((1,), *arguments, **constants)
    hooks = getattr(triton.knobs.runtime, hook)
    hooks.add(seen.append)
    try:
        kernel((1,), *arguments, **constants)
    finally:
        hooks.remove(seen.append)
    kernel((1,), *arguments, **constants)
    before, during, after = driver.launched
    assert before == after
    assert during[-10].get()["name"] == "scale"
    assert during[place] is hooks


def test_a_kernel_runs_on_the_device_of_its_tensors(kernel, monkeypatch):
    current, launched = [0], []

    @contextlib.contextmanager
    def device(number):
        before, current[0] = current[0], number
        yield
        current[0] = before

    handle = Handle(lambda *arguments: launched.append(current[0]), None, None, ())
    monkeypatch.setattr(Kernel, "compiled", lambda *_: handle)
    monkeypatch.setattr(runtime, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel((1,), torch.zeros(1), None, 1, 1, 1.0, COLS=16, TWICE=False)
    assert launched == [-1]
    assert current == [0]


def test_each_device_has_its_own_kernel(kernel, monkeypatch):
    class On(torch.Tensor):
        def get_device(self):
            return runtime.current_device()

    made = []
    monkeypatch.setattr(
        Kernel, "compiled", lambda *_: made.append(1) or Handle(lambda *a: None, None, None, ())
    )
    for device in (0, 1, 0):
        monkeypatch.setattr(runtime, "current_device", lambda device=device: device)
        kernel((1,), torch.zeros(1).as_subclass(On), None, 1, 1, 1.0, COLS=16, TWICE=False)
    assert len(made) == len(runtime.HANDLES) == 2


def test_equal_values_of_other_constants_have_a_kernel_of_their_own(kernel, monkeypatch):
    monkeypatch.setattr(Kernel, "compiled", lambda *_: Handle(lambda *a: None, None, None, ()))
    for name in ("num_warps", "num_stages"):
        options = {"COLS": 16, "TWICE": False, name: 2}
        kernel((1,), torch.zeros(1), None, 1, 1, 1.0, **options)
    assert len(runtime.HANDLES) == 2


def test_handles_are_bounded(kernel, monkeypatch):
    monkeypatch.setattr(runtime, "MAX_HANDLES", 3)
    monkeypatch.setattr(Kernel, "compiled", lambda *_: Handle(lambda *a: None, None, None, ()))
    for stride in range(20):
        kernel((1,), torch.zeros(1), None, stride, 1, 1.0, COLS=16, TWICE=False)
        assert 0 < len(runtime.HANDLES) <= 3


def test_the_parameters_must_be_pointers_numbers_and_constants():
    def mixed(n, x_ptr, COLS: tl.constexpr):
        pass

    def out_of_order(x_ptr, n, stride, COLS: tl.constexpr):
        pass

    for function, unspecialized in ((mixed, []), (out_of_order, ["n"]), (scale, ["m"])):
        with pytest.raises(TypeError, match=f"{function.__name__}: expected pointers, then numb"):
            Kernel(function, unspecialized)


@pytest.mark.gpu
def test_tensors_of_another_alignment_get_their_own_kernel():
    x, bias = torch.randn(7, 256, device="cuda"), torch.randn(257, device="cuda")
    before = len(HANDLES)
    results = [bias_gelu(x, bias[start:][:256]) for start in (0, 1, 0)]
    assert len(HANDLES) == before + 2
    for start, y in zip((0, 1, 0), results, strict=True):
        expected = torch.nn.functional.gelu((x + bias[start:][:256]).double())
        torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-5)
