"""Dropout by counter: whether an element is dropped is a function of its coordinates alone.

The coordinates are (seed, step, site, sequence, row, column, head); the site numbers the dropouts
of a model. Their random bits are Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"). So no mask has to be stored, and a sequence gets the same masks whether it is
padded, packed, reordered, or recomputed under activation checkpointing, in plain PyTorch and in a
kernel. Probabilities are multiples of 1/4096, and kept elements are scaled by the exact inverse of
the probability of being kept.

This file is the definition; `kernels/philox.py` gives the same bits on a GPU.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

RESOLUTION = 4096
ROUNDS = 7
GROUP = 8  # neighbouring columns that share one call of Philox, 16 bits each
CALLS_PER_WORD = 3  # Philox calls for 32 dropout bits of attention: 12 words, 4 from each call

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class DropoutState:
    """The coordinates of one forward pass's dropout: seed and step, tokens, and site.

    state: (2,) int64, seed and step, on the device so that they can change between replays of a
    CUDA graph; token_key: (T,) int64, sequence << 32 | position of each token, position below
    65536; site: the number of the dropout within the model, 16 bits.
    """

    state: Tensor
    token_key: Tensor
    site: int = 0

    def at(self, site: int) -> "DropoutState":
        """The same state at another site."""
        return DropoutState(self.state, self.token_key, site)

    def rows(self, index: Tensor) -> "DropoutState":
        """The state of the tokens at `index` (M,); each keeps the masks it has in the batch."""
        return DropoutState(self.state, self.token_key[index.long()], self.site)


def new_state(device: torch.device) -> Tensor:
    """A fresh seed and step, (2,) int64, from torch's generator of the device."""
    return torch.randint(2**62, (2,), device=device)


def for_batch(
    cu_seqlens: Tensor,
    num_tokens: int,
    *,
    sequence_ids: Tensor | None = None,
    state: Tensor | None = None,
) -> DropoutState:
    """The dropout state of one forward pass over packed sequences; see `token_keys`.

    state: (2,) int64, seed and step; a fresh one from torch's generator if None.
    """
    keys = token_keys(cu_seqlens, num_tokens, sequence_ids)
    return DropoutState(new_state(cu_seqlens.device) if state is None else state, keys)


def opaque(fake: Callable[..., Tensor]) -> Callable[[Function], Function]:
    """Decorates a function into which torch.compile must not trace.

    A traced call becomes a call of a custom operator; `fake` makes its outputs without values. An
    eager call runs the function itself: the operator would take tens of microseconds more.
    """

    def decorate(function: Function) -> Function:
        name = f"fastbert_plain::{function.__name__.strip('_')}"
        operator = torch.library.custom_op(name, function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return (operator if torch.compiler.is_compiling() else function)(*arguments)

        return cast(Function, call)

    return decorate


def _fake_keys(like: Tensor, num_tokens: int, *_: Any) -> Tensor:
    return like.new_empty((num_tokens,), dtype=torch.int64)


# The keys are opaque like the masks of `fastbert.ops.dropout`: inductor may narrow 64-bit integers,
# and a narrowed key changes the mask.
@opaque(_fake_keys)
def token_keys(cu_seqlens: Tensor, num_tokens: int, sequence_ids: Tensor | None = None) -> Tensor:
    """The dropout keys (T,) int64 of packed tokens: sequence << 32 | position.

    cu_seqlens: (B + 1,) int32; sequence_ids: (B,) int64, from 0 to 2^31 - 1; None numbers the
    sequences of this batch.
    """
    places = torch.arange(num_tokens, device=cu_seqlens.device)
    # filler tokens after the last sequence of a fixed-size batch count as one more sequence
    numbers = torch.searchsorted(cu_seqlens[1:], places, right=True)
    positions = places - cu_seqlens.take(numbers)
    if sequence_ids is not None:
        spare = sequence_ids.new_full((1,), 2**31 - 1)
        numbers = torch.cat([sequence_ids, spare]).take(numbers)
    return torch.add(positions, numbers, alpha=2**32)


@opaque(_fake_keys)
def row_keys(state: Tensor, num_rows: int) -> Tensor:
    """Dropout keys (T,) int64 of rows without sequences: the row numbers, on state's device."""
    rows = torch.arange(num_rows, device=state.device)
    return rows >> 16 << 32 | rows & 0xFFFF


def fresh(num_rows: int, device: torch.device) -> DropoutState:
    """A fresh state for one call of an operator whose caller passed none."""
    state = new_state(device)
    return DropoutState(state, row_keys(state, num_rows))


def threshold(dropout_p: float) -> int:
    """An element is dropped if its 12 random bits are below this number; 0 drops none."""
    return round(dropout_p * RESOLUTION)


def keeps_some(dropout_p: float) -> bool:
    """Whether a dropout of this probability, rounded to a multiple of 1/4096, keeps anything."""
    return 0 <= dropout_p < 1 and threshold(dropout_p) < RESOLUTION  # infinity has no threshold


def keep_scale(dropout_p: float) -> float:
    """The factor that scales kept elements: the exact inverse of the probability of keeping."""
    return RESOLUTION / (RESOLUTION - threshold(dropout_p))


def philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-7: four 32-bit words, in int64, for each counter of four such words."""
    x0, x1, x2, x3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(ROUNDS):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]  # modulo 2^64, as int64 wraps
        x0, x1 = p1 >> 32 & _WORD ^ x1 ^ k0, p1 & _WORD
        x2, x3 = p0 >> 32 & _WORD ^ x3 ^ k1, p0 & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return x0, x1, x2, x3


def hidden_keep_mask(rng: DropoutState, num_cols: int, dropout_p: float) -> Tensor:
    """(T, num_cols) bool, True where an element of the residual stream is kept."""
    seed, step = rng.state
    groups = torch.arange(-(-num_cols // GROUP), device=rng.token_key.device)
    sequence, position = _row_counter(rng.token_key)
    words = philox(
        (sequence, position | groups, seed.new_full((), rng.site << 16), step & _WORD), seed
    )
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    return (halves.flatten(1)[:, :num_cols] >> 4) >= threshold(dropout_p)


def attention_drop_words(
    rng: DropoutState, num_heads: int, num_words: int, dropout_p: float
) -> Tensor:
    """(N, T, num_words) int32: bit j of word w is set where a query drops key 32 * w + j.

    The 32 bits of a word are drawn together: 12 random words hold the inverted binary digits,
    lowest first, of 32 numbers. One bitwise operation per digit compares all 32 numbers with the
    threshold.
    """
    seed, step = rng.state
    device = rng.token_key.device
    sequence, position = _row_counter(rng.token_key)
    places = torch.arange(num_words, device=device) << 2
    heads = torch.arange(num_heads, device=device)[:, None, None] | rng.site << 16
    below = torch.zeros((), dtype=torch.int64, device=device)
    for call in range(CALLS_PER_WORD):
        digits = philox((sequence, position | places | call, heads, step & _WORD), seed)
        for place, digit in enumerate(digits, start=4 * call):
            is_set = threshold(dropout_p) >> place & 1
            below = digit | below if is_set else digit & below
    return torch.where(below >= 2**31, below - 2**32, below).int()


def attention_keep_mask(
    rng: DropoutState, num_heads: int, num_keys: int, dropout_p: float
) -> Tensor:
    """(N, T, num_keys) bool, True where a query's attention probability for a key is kept."""
    words = attention_drop_words(rng, num_heads, -(-num_keys // 32), dropout_p)
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(2)[..., :num_keys] == 0


def _row_counter(token_key: Tensor) -> tuple[Tensor, Tensor]:
    """(T, 1) each: the sequence, and the position in the upper half of its counter word."""
    return token_key[:, None] >> 32 & _WORD, (token_key[:, None] & 0xFFFF) << 16
