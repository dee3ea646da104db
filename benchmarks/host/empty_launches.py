"""Host time of layers and operators, measured without a GPU: kernel launches do nothing.

Tensors are on the CPU. Operators run their launchers as on a GPU, up to the call of Triton's
compiled launcher, which returns at once; the real launcher and the driver are not counted. PyTorch
runs its own operators on the CPU, so CUDA's dispatch, allocator and launches are not counted
either. A layer's four matrix products do run; their time is also measured alone. Outputs of kernels
are uninitialised memory.

The parts are "host_layers", with the small models of `benchmarks.host.host`, and "host_operators".
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import launches
from benchmarks.host import calls
from benchmarks.host.calls import INFERENCE, SMALL, STEP, TOKENS, Case, Work
from benchmarks.results import FASTBERT, PATCHED, Options, Results
from benchmarks.timing import interleaved, summarize
from fastbert.ops.attention import attention_qkvpacked
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.embedding import embedding_layer_norm
from fastbert.ops.layer_norm import dropout_add_layer_norm, layer_norm

DEPTHS = 2, 12  # a layer's time: the difference of both models' times / that of their depths
CALLS = 50  # calls of an operator that are timed together
MODES = "without gradients", "with gradients", "forward and backward"


def run(options: Options, results: Results) -> None:
    with in_place():
        time_layers(options, 5 if options.quick else 200, results)
        time_operators(5 if options.quick else 40, results)


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """In the block, operators on CPU tensors use a GPU's backends, and no Triton kernel runs."""
    with launches.given_to(lambda *arguments: launch(*arguments)):
        # uninitialised memory often holds denormal numbers, with which a CPU is slow
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)


def launch(*arguments: Any) -> None:
    """Replaces the launch of a kernel, and does nothing."""


def time_layers(options: Options, rounds: int, results: Results) -> None:
    """Times a layer's forward in inference, and its forward and backward in training."""
    names = [FASTBERT, PATCHED]
    for of, make in ((INFERENCE, calls.forward_pass), (STEP, calls.training_step)):
        works: dict[str, Work] = {"products": products(is_step=of == STEP)}
        for depth in DEPTHS:
            case, shape = Case(of), {**SMALL, "num_hidden_layers": depth}
            batch = calls.batch_of(case, options.device, shape)
            for name, model in calls.models(case, shape, names, options.device).items():
                works[f"{name}, {depth}"] = make(name, model, batch, options)
        seconds = interleaved(works, rounds)
        timings = {}
        for name in names:
            pairs = zip(*(seconds[f"{name}, {depth}"] for depth in DEPTHS), strict=True)
            added = DEPTHS[1] - DEPTHS[0]
            timings[name] = summarize([(deep - shallow) / added for shallow, deep in pairs])
        each = [time / CALLS for time in seconds["products"]]
        results.add("host_layers", {"of": of}, timings, products=summarize(each))


def products(is_step: bool) -> Work:
    """A layer's four matrix products in PyTorch, `CALLS` times; in a step with gradients."""
    hidden, wide = SMALL["hidden_size"], SMALL["intermediate_size"]
    calls = []
    for n, m in ((hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden)):
        tensors = torch.randn(TOKENS, n), torch.randn(m, n), torch.randn(m)
        calls.append(in_modes(F.linear, tensors)[MODES[2 if is_step else 0]])
    return functools.partial(repeat, lambda: [call() for call in calls])


def repeat(work: Work) -> None:
    for _ in range(CALLS):
        work()


class Operator(NamedTuple):
    name: str
    call: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]


def operators() -> list[Operator]:
    """The operators of a layer and of the embeddings, with tensors of the small models' sizes."""
    heads, hidden, wide = (
        SMALL[name] for name in ("num_attention_heads", "hidden_size", "intermediate_size")
    )
    cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32)
    x, residual = torch.randn(TOKENS, hidden), torch.randn(TOKENS, hidden)
    x_bias, weight, bias = torch.randn(3, hidden).unbind()
    ids, tables = torch.arange(TOKENS), torch.randn(3, TOKENS, hidden).unbind()

    def attention(qkv: Tensor) -> Tensor:
        return attention_qkvpacked(qkv, cu_seqlens, TOKENS)

    def add_norm(x: Tensor, x_bias: Tensor, *others: Tensor) -> Tensor:
        return dropout_add_layer_norm(x, *others, x_bias=x_bias)

    qkv = torch.randn(TOKENS, 3, heads, hidden // heads)
    wide_x, wide_bias = torch.randn(TOKENS, wide), torch.randn(wide)
    embedding = (ids, ids, ids % 2, *tables, weight, bias)
    return [
        Operator("attention_qkvpacked", attention, (qkv,)),
        Operator("dropout_add_layer_norm", add_norm, (x, x_bias, residual, weight, bias)),
        Operator("layer_norm", layer_norm, (x, weight, bias)),
        Operator("bias_gelu", bias_gelu, (wide_x, wide_bias)),
        Operator("embedding_layer_norm", embedding_layer_norm, embedding),
    ]


def time_operators(rounds: int, results: Results) -> None:
    for name, call, tensors in operators():
        works = in_modes(call, tensors)
        times = interleaved({m: functools.partial(repeat, w) for m, w in works.items()}, rounds)
        timings = {mode: summarize([t / CALLS for t in each]) for mode, each in times.items()}
        results.add("host_operators", {"operator": name}, timings)


def in_modes(call: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> dict[str, Work]:
    """The call in each of MODES, without dropout, so that only the mode differs."""
    leaves = [x if x is None else x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    forward = functools.partial(call, *leaves)
    gradient = torch.ones_like(forward())
    works = (
        torch.inference_mode()(functools.partial(call, *tensors)),
        forward,
        lambda: torch.autograd.grad(forward(), wanted, gradient),
    )
    return dict(zip(MODES, works, strict=True))
