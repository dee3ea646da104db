"""A layer of plain modules as one operator, whose forward and backward are written out here.

Operator by operator, PyTorch's dispatcher, autocast and autograd take the host longer than a small
batch takes the GPU. Here autograd sees one node for a layer, and what all operators would check is
checked once. The operators' own Functions do the work, each with a `_Saved` in place of autograd's
context. T packed tokens, H hidden, N heads, D head size.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import events
from fastbert.backend import DTYPES, device_type, is_transformed
from fastbert.modules.activations import approximation
from fastbert.modules.linear import fused_linear
from fastbert.modules.products import PRODUCTS
from fastbert.modules.sequences import Sequences
from fastbert.ops.attention import (
    MAX_HEAD_DIM,
    MAX_SEQUENCES,
    AttentionFunction,
    attention_qkvpacked,
)
from fastbert.ops.bias_gelu import BiasGeluFunction, bias_gelu
from fastbert.ops.dropout import drawn
from fastbert.ops.fused import applied, once, product, result_dtype
from fastbert.ops.layer_norm import MAX_COLS, LayerNormFunction, dropout_add_layer_norm

_OPERATORS = attention_qkvpacked, dropout_add_layer_norm, bias_gelu
_PLAIN = frozenset((Tensor, nn.Parameter))


class WholeLayer:
    """A layer whose linear layers and norms are plain, and whose activation is GELU.

    The projections to queries, keys and values may be other modules, such as LoRA's: these run
    first, and the operator begins at their result. parts: the `LayerParts`, which are not kept,
    because they refer to this object, and a cycle would keep models that are no longer used;
    approximate: the formula of GELU, as `bias_gelu` names it
    """

    def __init__(self, parts: Any, approximate: str) -> None:
        self.ends = ends = parts.attention_end, parts.output
        self.head_dim, self.attention_dropout = parts.head_dim, parts.attention_dropout
        self.approximate = approximate
        self.projections = parts.projections
        self.projects = all(leaf.is_plain for leaf in self.projections)
        own = ends[0].dense, parts.intermediate, ends[1].dense
        norms = [end.norm.parameters for end in ends]
        self.linears = (*self.projections, *own) if self.projects else own
        # in the order of `_Layer.forward`
        of_own = [leaf.parameters for leaf in own]
        self.tables = [*of_own, *of_own, norms[0], norms[0], norms[1], norms[1]]
        self.names = ["weight"] * 3 + ["bias"] * 3 + ["weight", "bias"] * 2
        if self.projects:
            self.tables += 2 * [leaf.parameters for leaf in self.projections]
            self.names += ["weight"] * 3 + ["bias"] * 3

    @classmethod
    def of(cls, parts: Any) -> "WholeLayer | None":
        """The layer as one operator; None if it has other modules or lacks a bias."""
        approximate = approximation(parts.activation)
        others = [leaf for leaf in parts.leaves if not leaf.is_plain]
        if approximate is None or not all(leaf in parts.projections for leaf in others):
            return None
        whole = cls(parts, approximate)
        return None if any(one is None for one in whole.parameters()) else whole

    def parameters(self) -> list[Any]:
        """The operator's present parameters: 16, or 10 if the projections run before it."""
        return [*map(dict.get, self.tables, self.names)]

    def run(self, x: Tensor, residual: Tensor, sequences: Sequences) -> tuple[Any, ...] | None:
        """The layer's output for x and residual (T, H), input and output as in `Stream`.

        None if the layer must run operator by operator.
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
        parameters, dtype = self.parameters(), result_dtype(x)
        if not self._fits(x, residual, sequences, parameters, dtype):
            return None
        if not self.projects:
            reads = x if all(leaf.is_read for leaf in self.projections) else residual
            x, _ = fused_linear(reads, self.projections, None, sequences.rng)
            x = _in(x, dtype)
        arguments = self, kernels, sequences, dtype, x, residual, *parameters
        if torch.is_grad_enabled():
            for tensor in arguments[4:]:
                if tensor.requires_grad:
                    return applied(_Layer, *arguments)
        return _Layer.forward(None, *arguments)

    def _fits(
        self, x: Tensor, residual: Tensor, sequences: Sequences, parameters: list[Any],
        dtype: torch.dtype,
    ) -> bool:  # fmt: skip
        """Whether the kernels can take these tensors."""
        if not _PLAIN.issuperset(map(type, (x, residual, *parameters))):
            return False
        w_out, w_up, w_down, b_out, b_up, b_down, *norms_and_projections = parameters
        own, shape, device = w_out.dtype, x.shape[1:], x.get_device()
        size = w_out.shape[1]  # the width of queries, keys and values each
        head_dim, rest = self.head_dim, size % self.head_dim
        # the kernels take these vectors to be as wide as the stream
        vectors = b_out, b_down, *norms_and_projections[:4]
        return bool(
            own in DTYPES
            and dtype in DTYPES
            and (dtype == own or torch.is_autocast_enabled(device_type(x)))
            and x.dtype in (dtype, residual.dtype)
            and residual.dtype in DTYPES
            and x.numel()
            and x.shape == residual.shape
            and x.is_contiguous()
            and residual.is_contiguous()
            and sequences.cu_seqlens.get_device() == device
            and sequences.cu_seqlens.shape[0] - 1 <= MAX_SEQUENCES
            and 0 < head_dim <= MAX_HEAD_DIM
            and not rest
            and all(weight.shape[0] == size for weight in norms_and_projections[4:7])
            and b_up.shape == w_up.shape[:1]
            and w_out.shape[0] == w_down.shape[0] == shape[0] <= MAX_COLS
            and all(vector.shape == shape for vector in vectors)
            and {*map(Tensor.get_device, parameters)} == {device}
            and {parameter.dtype for parameter in parameters} == {own}
            and all(map(Tensor.is_contiguous, parameters))
        )


class _Saved:
    """What an operator's Function gets as autograd's context inside the layer's node.

    kept: what all Functions of a layer save; trains: whether the operator's parameters are trained
    """

    def __init__(self, kept: list[Any], *, trains: bool) -> None:
        self.kept, self.trains = kept, trains

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """The same for every input; none of the Functions has more than 16."""
        return (self.trains,) * 16

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        start = len(self.kept)
        self.kept += tensors
        self.place = slice(start, len(self.kept))

    @property
    def saved_tensors(self) -> list[Any]:
        return self.kept[self.place]

    def set_materialize_grads(self, value: bool) -> None:
        """Does nothing, because the layer's node decides on that."""

    def reading(self, kept: list[Any]) -> "_Saved":
        """A copy for the backward that has the saved tensors `kept`; this object keeps none."""
        found = copy.copy(self)
        found.kept = kept
        return found


class _Layer(torch.autograd.Function):
    """The layer over x (T, H), or over its projections' result (T, 3 N D) if they run before it."""

    @staticmethod
    def forward(
        ctx: Any, layer: WholeLayer, kernels: list[Any], sequences: Sequences, dtype: torch.dtype,
        x: Tensor, residual: Tensor, *parameters: Tensor,
    ) -> Any:  # fmt: skip
        """dtype: of the products; ctx: None for a call without gradients, which saves nothing."""
        count, device = x.shape[0], x.device
        of_attention, of_norm, of_gelu = kernels
        first, second = layer.ends
        *weights, b_out, b_up, b_down, g1, b1, g2, b2 = parameters[:10]
        projections = parameters[10:]
        kept: list[Any] = []
        saved: list[Any] = [None] * 4
        if ctx is not None:
            needs = ctx.needs_input_grad[6:]
            sums = needs[13:], (needs[3], *needs[6:8]), needs[4:5], (needs[5], *needs[8:10])
            saved = [_Saved(kept, trains=any(some)) for some in sums]
        attention, norm1, gelu, norm2 = saved

        def low(tensor: Tensor) -> Tensor:
            # without gradients autocast casts the weights, and caches the copies for later calls
            return tensor if ctx is None else _in(tensor, dtype)

        def rng_of(p: float, site: int) -> Any:
            return drawn(count, device, p, sequences.wanted_rng(site)) if p else None

        w_out, w_up, w_down = map(low, weights)
        qkv, low_x, w_qkv, b_key = x, None, None, None
        if projections:
            low_x = _in(x, dtype)
            b_key = projections[4] if ctx is not None and attention.trains else None
            w_qkv, b_qkv = low(torch.cat(projections[:3])), low(torch.cat(projections[3:]))
            qkv = F.linear(low_x, w_qkv, b_qkv)
        qkv = qkv.view(count, 3, -1, layer.head_dim)
        boundaries, longest = sequences.cu_seqlens, sequences.max_seqlen
        p = layer.attention_dropout
        options = qkv.shape[-1] ** -0.5, p, rng_of(p, 0), None
        context = AttentionFunction.forward(
            attention, of_attention, qkv, None, None, b_key,
            (boundaries, boundaries, longest, longest, *options),
        ).view(count, -1)  # fmt: skip
        p = first.dropout
        low_mid, mid = LayerNormFunction.forward(
            norm1, of_norm, F.linear(context, w_out), residual, g1, b1, first.norm.module.eps,
            b_out, p, rng_of(p, 1), first.save, True,
        )  # fmt: skip
        up = F.linear(low_mid, w_up)
        active = BiasGeluFunction.forward(gelu, of_gelu, up, b_up, layer.approximate)
        p = second.dropout
        outputs = LayerNormFunction.forward(
            norm2, of_norm, F.linear(active, w_down), mid, g2, b2, second.norm.module.eps,
            b_down, p, rng_of(p, 2), second.save, True,
        )  # fmt: skip
        if ctx is None:
            return outputs
        # a product's input is only saved if the gradient of its weight is wanted
        wanted = ctx.needs_input_grad[6:]
        inputs = [low_x, context, low_mid, active]
        are_wanted = any(wanted[10:13]), *wanted[:3]
        read = [
            one if is_wanted else None for one, is_wanted in zip(inputs, are_wanted, strict=True)
        ]
        ctx.save_for_backward(*read, w_qkv, w_out, w_up, w_down, *kept)
        kept.clear()  # autograd keeps them, and frees them after the backward
        ctx.saved, ctx.dtypes = saved, (x.dtype, weights[0].dtype)
        ctx.set_materialize_grads(False)  # a branch that nothing uses has no gradient
        return outputs

    @staticmethod
    @once("a layer")
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        low_x, context, low_mid, active, w_qkv, w_out, w_up, w_down, *kept = ctx.saved_tensors
        attention, norm1, gelu, norm2 = [one.reading(kept) for one in ctx.saved]
        x_dtype, weight_dtype = ctx.dtypes

        def of_weight(dy: Tensor, x: Tensor | None) -> Any:
            return None if x is None else product(dy.t(), x, weight_dtype)

        with norm2.kernels.together():  # one launch for the sums of all operators
            _, dy, dmid, dg2, db2, _, db_down, *_ = LayerNormFunction.backward(norm2, *gradients)
            dw_down = of_weight(dy, active)
            _, dy, db_up, _ = BiasGeluFunction.backward(gelu, dy @ w_down)
            dw_up = of_weight(dy, low_mid)
            _, dy, dresidual, dg1, db1, _, db_out, *_ = LayerNormFunction.backward(
                norm1, dy @ w_up, dmid
            )
            dw_out = of_weight(dy, context)
            dcontext = (dy @ w_out).view(attention.saved_tensors[0].shape)
            _, dqkv, _, _, db_qkv, _ = AttentionFunction.backward(attention, dcontext)
        dx, of_projections = dqkv.view(dqkv.shape[0], -1), ()
        if w_qkv is not None:
            dw_qkv = of_weight(dx, low_x)
            dw_qkv = (None,) * 3 if dw_qkv is None else dw_qkv.chunk(3)
            of_biases = (None,) * 3 if db_qkv is None else db_qkv.chunk(3)
            of_projections = *dw_qkv, *of_biases
            dx = _in(dx @ w_qkv, x_dtype) if ctx.needs_input_grad[4] else None
        return (
            *(None, None, None, None, dx, dresidual, dw_out, dw_up, dw_down),
            *(db_out, db_up, db_down, dg1, db1, dg2, db2, *of_projections),
        )


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)
