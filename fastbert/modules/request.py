"""Reads the arguments of a call, for models, encoders and patched modules alike.

The layout of a batch comes from its attention mask, or from boundaries of packed documents.
"""

import contextlib
import itertools
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastbert.backend import is_transformed
from fastbert.check import require
from fastbert.modules.masks import read_mask
from fastbert.modules.sequences import pays_to_count
from fastbert.ops.fused import is_one_graph, on_host
from fastbert.ops.unpad import Unpadding, unpad

# Hugging Face's arguments for the boundaries of documents packed into one row.
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

CAPTURING = "transformers.utils.output_capturing"  # collects hidden states; 4.57 lacks it

# Accepted without effect on a bidirectional encoder; those of the last line come from tokenizers.
# The first two do have an effect, but callers read or refuse them separately.
_IGNORED = {
    *("output_hidden_states", "output_attentions"),
    *("num_items_in_batch", "seq_idx", "cache_position", "use_cache", "return_dict"),
    *("special_tokens_mask", "length", "offset_mapping", "overflow_to_sample_mapping"),
}


def read_layout(
    given: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    hidden_size: int | None,
    keeps_padding: bool = False,
    **documents: Any,
) -> tuple[Unpadding, Tensor | None]:
    """How `given` (B, S, ...), ids or embeddings, is packed, and a further mask for `attention`.

    attention_mask: see `read_mask`; position_ids, documents: see `document_boundaries`;
    hidden_size: of the model if its layers may replay a CUDA graph, else None; keeps_padding:
    whether padded tokens are computed too, though no token attends to them. With a mask the host
    waits for a GPU to count the real tokens, unless a graph, CUDA's or torch.compile's, computes
    all places. Raises ValueError for arguments that do not fit together.
    """
    batch, seqlen = given.shape[:2]
    if attention_mask is not None:
        require_values("attention_mask", attention_mask)
    boundaries = document_boundaries(
        batch, seqlen, attention_mask, position_ids=position_ids, device=given.device, **documents
    )
    if boundaries is not None:
        return Unpadding(None, None, *boundaries, (1, seqlen)), None
    padding, general = read_mask(attention_mask, batch, seqlen)
    if padding is None:
        return Unpadding.dense(batch, seqlen, given.device), general
    padding = padding.to(given.device)
    if keeps_padding:
        is_full = not is_one_graph() and bool(padding.all())
        mask = None if is_full else padding[:, None, None]
        return Unpadding.dense(batch, seqlen, given.device), mask
    waits = _waits(given.device, batch * seqlen, hidden_size)
    return unpad(padding, None if waits else batch * seqlen), None


def _waits(device: torch.device, num_places: int, hidden_size: int | None) -> bool:
    """Whether the host waits to learn how many tokens are real."""
    if torch.compiler.is_compiling():
        return not is_one_graph()
    if device.type == "cpu" or torch.is_grad_enabled():
        return True
    if hidden_size is None:  # without a graph the GPU waits for the host anyway
        return True
    return not num_places or pays_to_count(num_places, hidden_size)


def require_values(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor whose values Python cannot read."""
    if torch.compiler.is_compiling():
        return
    is_without = tensor.is_meta or isinstance(tensor, FakeTensor) or torch.jit.is_tracing()
    while is_transformed() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        is_without |= torch._C._functorch.is_batchedtensor(tensor)
        tensor = torch._C._functorch.get_unwrapped(tensor)
    expected, got = "values, which tell how to pack", "a tensor of a trace, vmap or meta"
    remedy = "leave it out, or use a model patched by fastbert.patch"
    require(not is_without, name, expected, got, remedy)


def document_boundaries(
    batch_size: int,
    seqlen: int,
    attention_mask: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, int] | None:
    """(cu_seqlens (n + 1,) int32, max_seqlen) of documents packed into one row; None if not packed.

    The boundaries come from Hugging Face's cu_seq_lens_q and max_length_q, or from position_ids
    (1, S) that restart at 0 at each document; they are moved to `device`, that of the tokens.
    position_ids are read, for which the host waits for a GPU, as it does for a missing
    max_length_q. Hugging Face's own sdpa and eager attention would attend across documents. Raises
    ValueError for boundaries with several rows or an attention_mask, for others than integers
    (n + 1,) that rise from 0 to seqlen, for a max_length_q below a document's length, for a
    cu_seq_lens_k that differs from cu_seq_lens_q (values that differ on a GPU fail a device
    assertion instead), and for position_ids in one graph of torch.compile, which can read no
    values: a missing max_length_q is then taken as seqlen. Values that no host has read are not
    checked: those of a compiled call, and of a GPU's boundaries with a max_length_q.
    """
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        if batch_size != 1 or attention_mask is not None or position_ids is None:
            return None
        expected = "cu_seq_lens_q in place of position_ids under torch.compile(fullgraph=True)"
        require(not is_one_graph(), "position_ids", expected, "a batch of 1 without a mask")
        return _restarts(position_ids.expand(1, seqlen)[0])
    require(
        cu_seq_lens_q is not None and batch_size == 1 and attention_mask is None,
        "cu_seq_lens_q",
        "a batch of 1, cu_seq_lens_q, and no attention_mask, for packed documents",
        f"a batch of {batch_size}"
        + (", no cu_seq_lens_q" if cu_seq_lens_q is None else "")
        + (", an attention_mask" if attention_mask is not None else ""),
    )
    assert cu_seq_lens_q is not None
    for name, bounds in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if bounds is not None:
            _require_integers(name, bounds)
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q:
        _require_same(cu_seq_lens_q, cu_seq_lens_k.to(cu_seq_lens_q))
    lengths = [int(length) for length in (max_length_q, max_length_k) if length is not None]
    if torch.compiler.is_compiling():  # one graph cannot read the lengths: it takes an upper bound
        if not lengths:
            lengths = [seqlen if is_one_graph() else on_host(cu_seq_lens_q.diff().max())]
    elif cu_seq_lens_q.is_cpu or not lengths:
        lengths = [_longest(cu_seq_lens_q.tolist(), seqlen, lengths)]
    return cu_seq_lens_q.to(device, torch.int32).contiguous(), max(lengths)


def _require_integers(name: str, bounds: Any) -> None:
    is_tensor = isinstance(bounds, Tensor)
    fits = is_tensor and bounds.ndim == 1 and bounds.dtype in (torch.int32, torch.int64)
    got = f"{bounds.dtype} {tuple(bounds.shape)}" if is_tensor else type(bounds).__name__
    require(fits and len(bounds) > 0, name, "a tensor (documents + 1,) int32 or int64", got)
    require_values(name, bounds)


def _longest(bounds: list[int], seqlen: int, lengths: list[int]) -> int:
    """The greatest of `lengths`, or without any the longest document's length."""
    found = [end - begin for begin, end in itertools.pairwise(bounds)]
    fits = bounds[0] == 0 and bounds[-1] == seqlen and min(found, default=0) >= 0
    require(fits, "cu_seq_lens_q", f"boundaries that rise from 0 to the {seqlen} tokens", bounds)
    longest = max(found, default=0)
    most = max(lengths, default=longest)
    require(most >= longest, "max_length_q", f"at least {longest}, the longest document", most)
    return most


def _require_same(queries: Tensor, keys: Tensor) -> None:
    if keys.is_cuda and keys.shape == queries.shape:
        torch._assert_async((keys == queries).all())  # checked on the device: no host wait
        return
    require(
        torch.equal(keys, queries),
        "cu_seq_lens_k",
        "the boundaries of cu_seq_lens_q: each token is a query and a key",
        "others",
    )


def _restarts(position_ids: Tensor) -> tuple[Tensor, int] | None:
    starts = position_ids == 0
    counts_up = position_ids.diff() == 1
    # documents only if the positions count up by one from each 0; others are the user's own
    is_packed = starts[:1].all() & starts[1:].any() & (starts[1:] | counts_up).all()
    if not (is_packed & counts_up.any()):
        return None
    ends = starts.nonzero().flatten()[1:]
    length = position_ids.shape[0]
    cu_seqlens = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), length)]).int()
    return cu_seqlens, on_host(cu_seqlens.diff().max())


def call_or_config(config: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """The argument `name` of a call; if it is None, the configuration's value."""
    value = arguments.get(name)
    return getattr(config, name) if value is None else value


def wanted_states(wanted: Any, num_layers: int) -> Collection[int] | None:
    """The indices of the wanted ones among `num_layers` + 1 hidden states, the embeddings' first.

    wanted: output_hidden_states, which is True for all, or an index or several: negative ones count
    from the end, those out of range are left out. Anything false gives None.
    """
    if not wanted:
        return None
    count = num_layers + 1
    if wanted is True:
        return range(count)
    places = [wanted] if isinstance(wanted, int) else wanted
    return {place % count for place in places if -count <= place < count}


def captured_around() -> dict[str, Any]:
    """The lists in which a Hugging Face model around this call collects outputs now; often empty.

    transformers 5 fills them by hooks on its own layers.
    """
    capturing = sys.modules.get(CAPTURING)
    if capturing is None:
        return {}
    variable = capturing._active_collector
    # one graph cannot read a context variable; a model that is traced with this call sets a plain
    # attribute of it instead
    if is_one_graph() and not getattr(variable, "compiling", False):
        return {}
    return variable.get() or {}


@contextlib.contextmanager
def capturing_nothing() -> Iterator[None]:
    """A context in which no Hugging Face model collects outputs, as inside another model's call.

    transformers does the same in each model, with the lists of that one. Its hooks then sleep,
    which torch.compile can tell here, but cannot read of the context variable around.
    """
    capturing = sys.modules.get(CAPTURING)
    if capturing is None:
        yield
        return
    token = capturing._active_collector.set({})
    try:
        yield
    finally:
        capturing._active_collector.reset(token)


def numbers_layers() -> bool:
    """Whether transformers' lists of wanted states number layers, as they did before 5.23."""
    return not hasattr(sys.modules.get(CAPTURING), "resolve_hidden_states_indices")


def unknown_argument(arguments: dict[str, Any]) -> str | None:
    """The name of the first argument that has a value and is not ignored; None if none has."""
    for name, value in arguments.items():
        # transformers 4.57 turns a head_mask of None into a list of None
        are_none = isinstance(value, (list, tuple)) and all(one is None for one in value)
        if not (value is None or value is False or are_none or name in _IGNORED):
            return name
    return None


def refuse_unknown(who: str, arguments: dict[str, Any]) -> None:
    """Raises ValueError for output_attentions and for arguments that an encoder does not use."""
    refuse_attentions(arguments.get("output_attentions"))
    name = unknown_argument(arguments)
    require(
        name is None,
        who,
        "only arguments that an encoder uses",
        name,
        "leave it out, or use a model patched by fastbert.patch",
    )


def refuse_attentions(output_attentions: bool | None) -> None:
    """Raises ValueError if attention probabilities are wanted."""
    require(
        not output_attentions,
        "output_attentions",
        "False",
        True,
        "the fused attention never forms the probabilities; a model patched by fastbert.patch "
        "takes Hugging Face's path for such a call",
    )
