"""A layer of plain modules as one operator: its products and kernels by hand, and their gradients.

Operator by operator, PyTorch's dispatcher, autocast and autograd take the host longer than a small
batch takes the GPU. Here autograd sees one node for a layer, one launch casts all its weights, and
what the operators would check each is checked once. The operators' own Functions do the work, each
with a `_Saved` in the place of autograd's context.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import events
from fastbert.backend import DTYPES, device_type, is_transformed
from fastbert.modules.activations import approximation
from fastbert.modules.linear import PRODUCTS
from fastbert.modules.sequences import Sequences
from fastbert.ops.attention import (
    MAX_HEAD_DIM,
    MAX_SEQUENCES,
    AttentionFunction,
    attention_qkvpacked,
)
from fastbert.ops.bias_gelu import BiasGeluFunction, bias_gelu
from fastbert.ops.dropout import drawn
from fastbert.ops.fused import once, product, result_dtype
from fastbert.ops.layer_norm import MAX_COLS, LayerNormFunction, dropout_add_layer_norm

_OPERATORS = attention_qkvpacked, dropout_add_layer_norm, bias_gelu
_PLAIN = frozenset((Tensor, nn.Parameter))


class WholeLayer:
    """A layer whose linear layers and norms are plain, and its activation GELU.

    parts: the `LayerParts`; approximate: the formula of GELU, as `bias_gelu` names it
    """

    def __init__(self, parts: Any, approximate: str) -> None:
        ends = parts.attention_end, parts.output
        self.parts, self.approximate = parts, approximate
        self.linears = (
            *(parts.query, parts.key, parts.value),
            *(ends[0].dense, parts.intermediate, ends[1].dense),
        )
        norms = [end.norm for end in ends]
        # in the order of `_Layer.forward`
        of_linears = [leaf.parameters for leaf in self.linears]
        of_norms = [norm.parameters for norm in norms for _ in ("weight", "bias")]
        self.tables = [*of_linears, *of_linears, *of_norms]
        self.names = ["weight"] * 6 + ["bias"] * 6 + ["weight", "bias"] * 2

    @classmethod
    def of(cls, parts: Any) -> "WholeLayer | None":
        """None for a layer with other modules, or without a bias."""
        approximate = approximation(parts.activation)
        if approximate is None or not all(leaf.is_plain for leaf in parts.leaves):
            return None
        whole = cls(parts, approximate)
        return None if any(one is None for one in whole.parameters()) else whole

    def parameters(self) -> list[Any]:
        """The layer's 16 parameters as they are now."""
        return [*map(dict.get, self.tables, self.names)]

    def run(self, x: Tensor, residual: Tensor, sequences: Sequences) -> tuple[Any, ...] | None:
        """The layer's output (T, H) twice, for x and residual (T, H), as in `Stream`.

        None where it must run operator by operator.
        """
        kind = device_type(x)
        kernels = [operator.chosen(kind).kernels for operator in _OPERATORS]
        if None in kernels or sequences.mask is not None or sequences.rows is not None:
            return None
        if events.is_listening() or is_transformed():
            return None
        for leaf in self.linears:
            if leaf.given is not None or PRODUCTS in leaf.module.__dict__:
                return None
        parameters = self.parameters()
        dtype = result_dtype(x)
        if not self._fits(x, residual, sequences, parameters, dtype):
            return None
        arguments = self, kernels, sequences, dtype, x, residual, *parameters
        if torch.is_grad_enabled():
            for tensor in arguments[4:]:
                if tensor.requires_grad:
                    return _Layer.apply(*arguments)  # type: ignore[no-untyped-call]
        y = _Layer.forward(None, *arguments)
        return y, y

    def _fits(
        self, x: Tensor, residual: Tensor, sequences: Sequences, parameters: list[Any],
        dtype: torch.dtype,
    ) -> bool:  # fmt: skip
        """Whether the kernels can take these tensors."""
        if not _PLAIN.issuperset(map(type, (x, residual, *parameters))):
            return False
        own, shape, device = parameters[0].dtype, x.shape[1:], x.get_device()
        (rows, _), *others = [weight.shape for weight in parameters[:6]]
        head_dim, rest = divmod(rows, self.parts.num_heads)
        # both ends, whose biases and norms the kernels read by the stream's width
        ends = parameters[9], parameters[11], *parameters[12:]
        return bool(
            own in DTYPES
            and dtype in DTYPES
            and (dtype == own or torch.is_autocast_enabled(device_type(x)))
            and x.dtype == residual.dtype
            and x.dtype in DTYPES
            and x.numel()
            and x.shape == residual.shape
            and x.is_contiguous()
            and residual.is_contiguous()
            and sequences.cu_seqlens.get_device() == device
            and sequences.cu_seqlens.shape[0] - 1 <= MAX_SEQUENCES
            and 0 < head_dim <= MAX_HEAD_DIM
            and not rest
            and rows == others[0][0] == others[1][0]
            and others[3][:1] == parameters[10].shape
            and others[2][0] == others[4][0] == shape[0] <= MAX_COLS
            and all(vector.shape == shape for vector in ends)
            and {*map(Tensor.get_device, parameters)} == {device}
            and {parameter.dtype for parameter in parameters} == {own}
            and all(map(Tensor.is_contiguous, parameters))
        )


class _Saved:
    """The context of an operator's Function inside the layer's node."""

    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def taken(self) -> tuple[Tensor | None, ...]:
        """The saved tensors, which are then kept elsewhere."""
        tensors = self.saved_tensors
        del self.saved_tensors
        self.count = len(tensors)
        return tensors

    def with_tensors(self, kept: Iterator[Any]) -> "_Saved":
        """The context with the tensors of `taken`, the next of `kept`; this one stays without."""
        found = _Saved()
        vars(found).update(vars(self))
        found.saved_tensors = tuple(islice(kept, self.count))
        return found


class _Layer(torch.autograd.Function):
    """The layer over (T, H); weights and biases are in the order of `WholeLayer.linears`."""

    @staticmethod
    def forward(
        ctx: Any, layer: WholeLayer, kernels: list[Any], sequences: Sequences, dtype: torch.dtype,
        x: Tensor, residual: Tensor, *parameters: Tensor,
    ) -> Any:  # fmt: skip
        """dtype: of the products. Without a context nothing is saved, and y returned once."""
        parts, count, device = layer.parts, x.shape[0], x.device
        of_attention, of_norm, of_gelu = kernels
        first, second = parts.attention_end, parts.output
        *_, b_out, b_up, b_down, g1, b1, g2, b2 = parameters
        w_qkv, b_qkv, w_out, w_up, w_down = _weights(parameters, dtype, are_cast=ctx is not None)
        saved: list[Any] = [None if ctx is None else _Saved() for _ in range(4)]
        attention, norm1, gelu, norm2 = saved

        def rng_of(dropout_p: float, site: int) -> Any:
            return (
                drawn(count, device, dropout_p, sequences.wanted_rng(site)) if dropout_p else None
            )

        low = _in(x, dtype)
        qkv = F.linear(low, w_qkv, b_qkv).view(count, 3, parts.num_heads, -1)
        boundaries, longest = sequences.cu_seqlens, sequences.max_seqlen
        p = parts.attention_dropout
        options = qkv.shape[-1] ** -0.5, p, rng_of(p, 0), None
        context = AttentionFunction.forward(
            attention, of_attention, qkv, None, None, parameters[6],
            (boundaries, boundaries, longest, longest, *options),
        ).view(count, -1)  # fmt: skip
        p = first.dropout
        mid = LayerNormFunction.forward(
            norm1, of_norm, F.linear(context, w_out), residual, g1, b1, first.norm.module.eps,
            b_out, p, rng_of(p, 1), first.save, False,
        )  # fmt: skip
        low_mid = _in(mid, dtype)
        up = F.linear(low_mid, w_up)
        active = BiasGeluFunction.forward(gelu, of_gelu, up, b_up, layer.approximate)
        p = second.dropout
        y = LayerNormFunction.forward(
            norm2, of_norm, F.linear(active, w_down), mid, g2, b2, second.norm.module.eps,
            b_down, p, rng_of(p, 2), second.save, False,
        )  # fmt: skip
        if ctx is None:
            return y
        kept = [low, context, low_mid, active, w_qkv, w_out, w_up, w_down]
        for one in saved:
            kept += one.taken()
        ctx.save_for_backward(*kept)
        ctx.saved, ctx.dtypes = saved, (x.dtype, mid.dtype, parameters[0].dtype)
        ctx.set_materialize_grads(False)  # a branch that nothing uses has no gradient
        return y, y.detach()

    @staticmethod
    @once("a layer")
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = iter(ctx.saved_tensors)
        low, context, low_mid, active, w_qkv, w_out, w_up, w_down = islice(kept, 8)
        attention, norm1, gelu, norm2 = [one.with_tensors(kept) for one in ctx.saved]
        x_dtype, mid_dtype, weight_dtype = ctx.dtypes
        wants_x, _, *wanted = ctx.needs_input_grad[4:]

        def of_weight(number: int, dy: Tensor, x: Tensor, count: int = 1) -> Any:
            is_wanted = any(wanted[number : number + count])
            return product(dy.t(), x, weight_dtype) if is_wanted else None

        _, dy, dmid, dg2, db2, _, db_down, *_ = LayerNormFunction.backward(norm2, *gradients)
        dw_down = of_weight(5, dy, active)
        _, dy, db_up, _ = BiasGeluFunction.backward(gelu, dy @ w_down)
        dw_up = of_weight(4, dy, low_mid)
        dmid = _in(dy @ w_up, mid_dtype), dmid
        _, dy, dresidual, dg1, db1, _, db_out, *_ = LayerNormFunction.backward(norm1, *dmid)
        dw_out = of_weight(3, dy, context)
        dcontext = (dy @ w_out).view(attention.saved_tensors[0].shape)
        _, dqkv, _, _, db_qkv, _ = AttentionFunction.backward(attention, dcontext)
        dqkv = dqkv.view(low.shape[0], -1)
        dx = _in(dqkv @ w_qkv, x_dtype) if wants_x else None
        dw_qkv = of_weight(0, dqkv, low, 3)
        return (
            *(None, None, None, None, dx, dresidual),
            *((None,) * 3 if dw_qkv is None else dw_qkv.chunk(3)),
            *(dw_out, dw_up, dw_down, *db_qkv.chunk(3), db_out, db_up, db_down),
            *(dg1, db1, dg2, db2),
        )


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _weights(parameters: tuple[Tensor, ...], dtype: torch.dtype, *, are_cast: bool) -> list[Tensor]:
    """The weights and the bias of the joined product, and the other weights, as `F.linear` takes.

    are_cast: to `dtype`; without, autocast does it, which then keeps the copies for later calls.
    """
    found = [torch.cat(parameters[:3]), torch.cat(parameters[6:9]), *parameters[3:6]]
    return [_in(one, dtype) for one in found] if are_cast else found
