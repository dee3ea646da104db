"""`python -m benchmarks floor`: the least time of a pre-training step, operator by operator.

A step runs over fake tensors, which have shapes but no data, and counts for each operator the bytes
of its inputs and outputs and the FLOPs of its matrix products. An operator's floor is the longer of
the two times at the rates of a large copy and of a large product. This needs neither a GPU nor
memory, and shows what a step reads and writes more often than it must. The kernels are a GPU's.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.reporting.cells import seconds
from benchmarks.results import FASTBERT, Options
from benchmarks.steps import footprint
from benchmarks.steps.steps import make_model, training_step
from benchmarks.workloads import MAX_SEQLEN, Batch, pretraining_batch, sequence_lengths
from fastbert import backend
from fastbert.config.bert import BertConfig
from fastbert.config.presets import PRESETS
from fastbert.kernels import fp8_linear
from fastbert.modules.products import fp8, weight_copies

# Measured on an H200: FLOP/s of a product of 8192 x 8192 bf16 matrices, and B/s of a copy, with
# reads and writes. The fastest FP8 product of a layer's size reached 1274 TFLOP/s.
PRODUCT, COPY = 790e12, 4.3e12
FP8, FP8_RATIO = "_scaled_mm", 1274 / 790
NAMED = "wikipedia, full, uniform, serving"
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class Kind(NamedTuple):
    """Calls of one operator with inputs of the same sizes."""

    operator: str
    sizes: str


@dataclasses.dataclass
class Work:
    """The number of calls of one kind, the bytes that they move, and their FLOPs."""

    calls: int = 0
    bytes: float = 0.0
    flops: float = 0.0

    def floor(self, product: float = PRODUCT, copy: float = COPY) -> float:
        """Seconds at these rates (FLOP/s, B/s); all calls of a kind have the same bound."""
        return max(self.flops / product, self.bytes / copy)


class Counter(TorchDispatchMode):
    """Counts the Work of each Kind; attention_flops: those of one layer's forward, all rows."""

    def __init__(self, batch: Batch, hidden: int) -> None:
        super().__init__()
        self.work: dict[Kind, Work] = collections.defaultdict(Work)
        self.tokens = sum(batch.lengths)
        self.attention_flops = 4.0 * hidden * sum(n**2 for n in batch.lengths)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.namespace != "prim" and not _is_view(func) and name not in ALLOCATIONS:
            self._add(func, name, args, kwargs, result)
        return result

    def _add(self, func, name, args, kwargs, result) -> None:
        inputs = _tensors((args, kwargs))
        written = _tensors(result) or _tensors(_written(func, args))
        work = self.work[Kind(name, _sizes(inputs))]
        work.calls += 1
        work.bytes += sum(map(_bytes, inputs + written))
        if func._overloadpacket in flop_registry:
            work.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        elif name.startswith(("attention_fwd", "attention_bwd")):
            rows = inputs[0].shape[0] / self.tokens  # the last layer computes fewer rows
            passes = 2.5 if "bwd" in name else 1.0  # it has 5 products, the forward 2
            work.flops += passes * rows * self.attention_flops


class Kept(saved_tensors_hooks):
    """Counts the bytes that the forward keeps for the backward, except the tensors in `anyway`."""

    def __init__(self, anyway: Iterable[Tensor]) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        self.anyway = {tensor.untyped_storage()._cdata for tensor in anyway}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.anyway:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class Count(NamedTuple):
    """A step's work by kind of operator, and the bytes that its forward keeps for its backward."""

    work: dict[Kind, Work]
    kept_bytes: int


def count(
    preset: str,
    lengths: list[int],
    residual_in_fp32: bool | None = None,
    *,
    in_fp8: bool = False,
) -> Count:
    """Counts a step of BERT in bf16 with dropout: forward, backward, clipping and AdamW.

    lengths: of the batch's sequences, in tokens; in_fp8: whether the encoder multiplies in FP8
    """
    batch = pretraining_batch(lengths)
    kernels = ("triton", "ext", "reference")
    with (
        mock.patch.dict(backend.PREFERENCE, cpu=kernels),
        mock.patch.object(backend, "INTERPRETED", True),  # fake tensors launch no kernel
        mock.patch.object(weight_copies, "product", _wide_product),
        mock.patch.object(fp8, "multiplies_fp8", return_value=True),
        mock.patch.object(fp8_linear, "product", _fp8_product),
        backend.use(None),  # forgets the bodies chosen before
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
    ):
        fields = vars(batch.packed).items()
        tensors = {k: fake.from_tensor(v) for k, v in fields if isinstance(v, Tensor)}
        batch = batch._replace(packed=dataclasses.replace(batch.packed, **tensors))
        model = make_model(FASTBERT, preset, residual_in_fp32=residual_in_fp32)
        if in_fp8:
            fp8.enable(model)
        step = training_step(FASTBERT, model, batch, Options(torch.device("cpu"), "bf16"))
        step()  # allocates the optimizer's moments
        kept = Kept([*model.parameters(), *tensors.values()])
        with kept, Counter(batch, PRESETS[preset].shape["hidden_size"]) as counter:
            step()
        return Count(counter.work, kept.bytes)


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A product as on a GPU, which writes float32 without a cast."""
    return torch.mm(a, b, out_dtype=dtype)


def _fp8_product(
    a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(a, b.t(), scale_a=of_a, scale_b=of_b, bias=bias, out_dtype=dtype)


def _is_view(func) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _written(func, args) -> list[Any]:
    declared = (argument.alias_info for argument in func._schema.arguments)
    pairs = zip(declared, args, strict=False)
    return [given for alias, given in pairs if alias is not None and alias.is_write]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of the tensor; of an expanded one, only those in memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _sizes(tensors: list[Tensor]) -> str:
    if len(tensors) > 40:
        return f"{len(tensors)} tensors"
    shapes = (
        f"{'x'.join(map(str, t.shape))} {_short(t.dtype)}" for t in tensors if t.numel() > 1e5
    )
    return ", ".join(itertools.islice(shapes, 2))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def _rate(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"a finite number above 0, got {value:g}")
    return value


def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "large",
    lengths: Annotated[str, typer.Option(help=f"Of sequences: {NAMED} or a number.")] = "wikipedia",
    sequences: Annotated[int, typer.Option(help="Sequences in the batch.", min=1)] = 96,
    product: Annotated[float, typer.Option(help="TFLOP/s of a large product.", callback=_rate)] = (
        PRODUCT / 1e12
    ),
    copy: Annotated[float, typer.Option(help="TB/s of a large copy.", callback=_rate)] = (
        COPY / 1e12
    ),
    rows: Annotated[int, typer.Option(help="Operators to show.", min=1)] = 40,
    residual_in_fp32: Annotated[bool, typer.Option(help="Use a float32 residual stream.")] = False,
    in_fp8: Annotated[bool, typer.Option("--fp8", help="Multiply in FP8 in the encoder.")] = False,
) -> None:
    """Print the floor of a pre-training step, costliest operators first."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"preset: one of {', '.join(PRESETS)}, got {preset!r}")
    try:
        found = sequence_lengths(lengths, sequences)
    except (KeyError, ValueError):
        found = [0]
    longest = min(BertConfig(**PRESETS[preset].shape).max_position_embeddings, MAX_SEQLEN)
    if not 1 <= max(found) <= longest:
        expected = f"{NAMED} or a number from 1 to {longest}"
        raise typer.BadParameter(f"lengths: {expected}, got {lengths!r}")
    work, kept_bytes = count(preset, found, residual_in_fp32, in_fp8=in_fp8)
    floors = {
        kind: one.floor(product * 1e12 * (FP8_RATIO if kind.operator == FP8 else 1), copy * 1e12)
        for kind, one in work.items()
    }
    costliest = sorted(work.items(), key=lambda item: floors[item[0]], reverse=True)
    table = Table("operator", "sizes", "calls", "GB", "TFLOP", "floor")
    for kind, one in costliest[:rows]:
        figures = (f"{one.bytes / 1e9:.2f}", f"{one.flops / 1e12:.2f}", seconds(floors[kind]))
        table.add_row(kind.operator, kind.sizes, str(one.calls), *figures)
    calls = sum(one.calls for one in work.values())
    rest, total = dict(costliest[rows:]), sum(floors.values())
    table.add_row("all others", "", str(sum(one.calls for one in rest.values())), "", "",
                  seconds(sum(floors[kind] for kind in rest)))  # fmt: skip
    console = Console(highlight=False, width=130)
    console.print(table)
    batch = pretraining_batch(found)
    needed = footprint.model_flops(preset, batch, training=True) / product / 1e12
    console.print(
        f"{preset}, {sum(found):,} real tokens: floor {seconds(total)}, "
        f"{sum(found) / total:,.0f} tokens/s; {calls:,} operators\n"
        f"the matrix products alone, in bf16, {seconds(needed)}; "
        f"kept for the backward {kept_bytes / 1e9:.2f} GB"
    )
