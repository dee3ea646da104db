"""A call of a patched model's layers: whether the packed path computes it, and how."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from fastbert import events
from fastbert.backend import is_transformed
from fastbert.hf.families import (
    Family,
    Forward,
    Unsupported,
    keeps_padding,
    patched_base,
    runs_patched,
)
from fastbert.hf.hooks import FAMILY, has_their, is_observed, see_arguments
from fastbert.hf.replaced import replaced_function
from fastbert.modules.graphs.buckets import may_compute, read_layers
from fastbert.modules.layer import LayerParts, Stream, run_layer
from fastbert.modules.plan import Planner, Reading, is_plain_list
from fastbert.modules.request import (
    DOCUMENTS,
    call_or_config,
    numbers_layers,
    read_layout,
    unknown_argument,
)
from fastbert.modules.sequences import Rows, Sequences
from fastbert.modules.stack import run_stack, share_padded
from fastbert.ops.attention import attention_qkvpacked
from fastbert.ops.fused import is_one_graph
from fastbert.ops.unpad import Unpadding
from fastbert.rng import DropoutState, for_batch

Embed = Callable[[Unpadding, DropoutState | None], Tensor]  # makes the residual stream (T, H)
States = tuple[Tensor | None, ...] | None
_LAYOUT = "attention_mask", "position_ids", *DOCUMENTS


class PackedCall(NamedTuple):
    """A call of a model or an encoder that the packed path supports, before its mask is read.

    given: ids or embeddings (B, S, ...); layout: `read_layout`'s other arguments; wanted: as in
    `wanted_states`, from `first_state` on; dtype: that of Hugging Face's hidden states
    """

    module: Any
    reading: Reading
    given: Tensor
    layout: dict[str, Any]
    embed: Embed
    wanted: Any
    first_state: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        module: Any,
        layers: nn.ModuleList,
        given: Tensor,
        arguments: dict[str, Any],
        embed: Embed,
        own: torch.dtype,
    ) -> "PackedCall":
        """Reads the arguments besides the tokens; raises Unsupported, as `run` may.

        own: the dtype of the residual stream without autocast
        """
        layout = {name: arguments.pop(name, None) for name in _LAYOUT}
        mask, config = layout["attention_mask"], module.config
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise Unsupported(f"a {type(mask).__name__} as attention_mask")
            if is_transformed() and torch._C._functorch.is_functorch_wrapped_tensor(mask):
                raise Unsupported("a mask inside torch.func, whose values may not be read")
        _require_supported(module, layers, arguments)
        reading = read_layers(_PLANNER, layers, given.device, trains=module.training)
        told = [name for name in _LAYOUT[:3] if layout[name] is not None]
        if len(given) == 1 and told == ["position_ids"] and is_one_graph():
            raise Unsupported("position_ids that may separate documents, with fullgraph=True")
        if given.is_meta or isinstance(given, FakeTensor):
            raise Unsupported("a tensor without values, as on the meta device: packing needs them")
        require_kernels(given.device)
        is_projected = hasattr(module, "embeddings_project")  # ELECTRA's small models
        dtype = boundary_dtype(own, given.device, is_projected=is_projected)
        wanted = call_or_config(config, arguments, "output_hidden_states")
        first = 0 if layers else 1  # without layers no state is collected
        if numbers_layers():
            if not returns_tuples() and isinstance(wanted, (list, tuple, set)):
                wanted, first = {number + 1 for number in wanted if number >= 0}, 1  # layers
            else:
                wanted, first = bool(wanted), 0
        return cls(module, reading, given, layout, embed, wanted, first, dtype)

    def read(self) -> tuple[Unpadding, Tensor | None]:
        """How the batch is packed, and a further mask for `attention`, from `read_layout`."""
        return read_layout(
            self.given,
            **self.layout,
            hidden_size=self.module.config.hidden_size if may_compute(self.reading) else None,
            keeps_padding=keeps_padding(self.module),
        )

    def run(
        self, padding: Unpadding, mask: Tensor | None, rows: Rows | None = None
    ) -> tuple[Tensor, States]:
        """Embeds and runs the layers: (T, H), or (M, H) for `rows` alone, and states (B, S, H).

        padding, mask: from `read`; rows: must be None if hidden states are wanted. Layers with
        hooks see (B, S, H).
        """
        layers, dtype = self.reading.layers, self.dtype
        drops = self.reading.drops()
        rng = for_batch(padding.cu_seqlens, padding.num_tokens) if drops else None
        x = self.embed(padding, rng)
        sequences = Sequences(padding.cu_seqlens, padding.max_seqlen, mask, rng)
        self._tell(x, padding, mask, rows)

        def call(number: int, x: Tensor, sequences: Sequences) -> Tensor:
            layer = layers[number]
            if not is_observed(layer):
                return layer(x, sequences=sequences)
            padded = padding.pad(x.to(dtype))
            # hooks must see every row
            output = layer(padded, sequences=sequences.only(None), padding=padding, dtype=x.dtype)
            y = padding.pack(output[0] if isinstance(output, tuple) else output).to(x.dtype)
            return y if sequences.rows is None else sequences.rows.of(y)

        share = share_padded(padding, dtype)
        x, states = run_stack(self.reading, x, sequences, self.wanted, rows, call, share)
        return x, states and states[self.first_state :]

    def last(self, x: Tensor, padding: Unpadding, states: States) -> Tensor:
        """The last hidden state (B, S, H), from what `run` returned."""
        last = states[-1] if states else None
        return padding.pad(x.to(self.dtype)) if last is None else last

    def _tell(self, x: Tensor, padding: Unpadding, mask: Tensor | None, rows: Rows | None) -> None:
        if not events.is_listening():
            return
        notes = []
        if keeps_padding(self.module):
            notes.append('rows of padding are computed (padding="compute")')
        elif mask is not None:
            notes.append("a general mask, so padding stays")
        if rows is not None:
            notes.append(f"the last layer computes {len(rows.index)} tokens")
        observed = sum(map(is_observed, self.reading.layers))
        if observed:
            notes.append(f"{observed} layers have hooks and see (batch, seqlen, hidden)")
        places = padding.batch_shape[0] * padding.batch_shape[1]
        if padding.has_filler:
            notes.append("as many tokens as places: so few are not counted")
        if padding.slots is not None:
            notes.append("rows of padding are zeros")
        documents = len(padding.cu_seqlens) - 1
        if documents != padding.batch_shape[0]:
            notes.append(f"{documents} documents in a row")
        events.packed(self.module, x, places, "; ".join(notes))


def _require_supported(module: Any, layers: nn.ModuleList, arguments: dict[str, Any]) -> None:
    """Raises Unsupported if the packed path does not support the call.

    The layers themselves are checked when their parts are read.
    """
    config = module.config
    if getattr(config, "is_decoder", False) or getattr(config, "is_causal", None):
        raise Unsupported("a decoder: it attends to earlier tokens only")
    if _has_any_global_hook():
        raise Unsupported("hooks of all modules")
    if see_arguments(layers):
        raise Unsupported("a hook that sees the arguments of a layer, or a forward given to one")
    if call_or_config(config, arguments, "output_attentions"):
        raise Unsupported("output_attentions: the fused attention never forms the probabilities")
    name = unknown_argument(arguments)
    if name is not None:
        raise Unsupported(f"the argument {name}")
    require_usual_functions(module)
    if makes_a_file():
        raise Unsupported("tracing or export, which would fix the lengths of this batch")


def require_usual_functions(module: Any) -> None:
    """Raises Unsupported if Hugging Face's forward would call a function of the user's own."""
    attention = getattr(module.config, "_attn_implementation", None) or "eager"
    name = replaced_function(patched_base(module), attention)
    if name is not None:
        raise Unsupported(f"{name} is the user's own")


def layers_inside(stack: Any) -> nn.ModuleList:
    """The layers of an encoder; raises Unsupported if a call might visit others."""
    layers: nn.ModuleList = stack.layer
    if not is_plain_list(layers):
        raise Unsupported(f"layers in a {type(layers).__name__}, which may leave some out")
    return layers


def makes_a_file() -> bool:
    """Whether the call is traced or exported, not run."""
    # `is_exporting()` is also True while torch.compile of torch 2.11 traces
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def require_kernels(device: torch.device) -> None:
    """Raises Unsupported on an accelerator without kernels, where plain PyTorch would be slow."""
    choice = attention_qkvpacked.chosen(device.type)
    if device.type != "cpu" and choice.kernels is None and not choice.forced:
        raise Unsupported(f"no kernels for {device.type}: {choice.reason}")


def parts_of(layer: Any) -> LayerParts:
    """The parts of a patched layer; raises Unsupported where they cannot be read."""
    if not (runs_patched(layer) and has_their(layer, "forward")):
        raise Unsupported(f"a {type(layer).__name__} that is not patched, or of the user's own")
    return family_of_module(layer).parts(layer)


_PLANNER = Planner(parts_of)


def family_of_module(module: nn.Module) -> Family:
    """The family of a patched module."""
    family: Family = getattr(type(module), FAMILY)
    return family


def run_one_layer(
    layer: Any,
    original: Forward,
    hidden_states: Tensor,
    *args: Any,
    sequences: Sequences | None = None,
    padding: Unpadding | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """The patched forward of a layer: Hugging Face's, unless the packed path passes `sequences`.

    hidden_states: (T, H), or with `padding` (B, S, H), which hooks of the layer expect; the layer
    then computes in `dtype`, the residual stream's.
    """
    if sequences is None:
        return original(hidden_states, *args, **kwargs)
    parts: LayerParts = _PLANNER.parts(layer)[0]  # a hook may have changed the layer by now
    if padding is None:
        return run_layer(parts, Stream(hidden_states, hidden_states), sequences).residual
    x = padding.pack(hidden_states).to(dtype)
    y = run_layer(parts, Stream(x, x), sequences).residual
    x = padding.pad(y.to(hidden_states.dtype))
    return (x,) if returns_tuples() else x


def boundary_dtype(own: torch.dtype, device: torch.device, *, is_projected: bool) -> torch.dtype:
    """The dtype of Hugging Face's hidden states; own: the dtype of the model's LayerNorms.

    Autocast runs LayerNorm in float32, but on a CPU in the dtype of its input: a sum with the
    embeddings, which are in low precision if a linear layer projects them. Float64 stays.
    """
    if own == torch.float64 or not torch.is_autocast_enabled(device.type):
        return own
    if device.type != "cpu":
        return torch.promote_types(own, torch.float32)
    return torch.get_autocast_dtype("cpu") if is_projected else own


def returns_tuples() -> bool:
    """Whether layers and encoders of this transformers may return tuples, as 4.57's do."""
    return int(sys.modules["transformers"].__version__.partition(".")[0]) < 5


def of_transformers(module: str) -> Any:
    """A module of transformers that its models have imported.

    torch.compile of torch 2.11 does not trace an import from transformers.
    """
    return sys.modules[f"transformers.{module}"]
