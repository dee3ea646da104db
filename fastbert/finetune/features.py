"""Turns texts into token sequences for a model; a long text becomes several windows."""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from fastbert.check import InputError
from fastbert.data import special_tokens
from fastbert.packing import PackedBatch


class TooLong(InputError):
    """A text has more tokens than a sequence may have."""


class Window(NamedTuple):
    """One sequence, [CLS] A [SEP] or [CLS] A [SEP] B [SEP].

    From position `prefix` on it has the tokens `begin` to `end`, exclusive, of its last text: B if
    there are two texts, else A.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    prefix: int
    begin: int
    end: int


class Feature(NamedTuple):
    """What the model scores together: one sequence, or all choices of a question.

    example: index of its example in the task's list; windows: its sequences, more than one only in
    multiple choice; target: labels or positions in the text, in a form that the task chooses
    """

    example: int
    windows: tuple[Window, ...]
    target: Any

    @property
    def num_tokens(self) -> int:
        return sum(len(window.input_ids) for window in self.windows)


class WindowEncoder:
    """Encodes texts as sequences of at most `max_seq_len` tokens, special tokens included.

    stride: how many tokens neighbouring windows of a long text share, None to refuse long texts;
    truncate: cuts tokens off the end of the longer of two texts until both fit; advice: the remedy
    at the end of the error message; advice_on_stride: the same for windows that have no room for
    the tokens to share; max_windows: the most windows of a text, None for no limit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_seq_len: int,
        stride: int | None,
        truncate: bool,
        advice: str = "read it in windows with --stride",
        max_windows: int | None = None,
        advice_on_stride: str = "lower --stride or shorten what stands before the text",
    ) -> None:
        self.advice, self.advice_on_stride, self.max_windows = advice, advice_on_stride, max_windows
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.stride, self.truncate = stride, truncate
        self.specials = special_tokens(tokenizer)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens, equal to those of HF's BertTokenizer."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def windows(
        self, where: str, first: Sequence[int], second: Sequence[int] | None = None
    ) -> list[Window]:
        """The sequences of one text, or of two texts; the last one is read in windows.

        first, second: token ids; where: begins the error message. Raises `TooLong` if the texts do
        not fit and neither stride nor truncate is set, if the windows would have no room for more
        than `stride` tokens, and if there would be more than `max_windows` windows.
        """
        lead = [] if second is None else list(first)
        last = list(first if second is None else second)
        special = 2 if second is None else 3
        excess = special + len(lead) + len(last) - self.max_seq_len
        if excess > 0 and self.truncate:
            for _ in range(excess):
                (lead if len(lead) > len(last) else last).pop()
        elif excess > 0 and self.stride is None:
            raise TooLong(
                f"{where}: {self.max_seq_len + excess} tokens, more than the {self.max_seq_len} of "
                f"a sequence; {self.advice}"
            )
        room = self.max_seq_len - special - len(lead)
        if excess > 0 and not self.truncate and room <= (self.stride or 0):
            raise TooLong(
                f"{where}: windows of {max(room, 0)} tokens of the text cannot share "
                f"{self.stride}; {self.advice_on_stride}"
            )
        places = cut(len(last), room, self.stride or 0)
        if self.max_windows is not None and len(places) > self.max_windows:
            raise TooLong(f"{where}: {len(places)} windows, more than {self.max_windows}")
        return [
            self._window(lead if second is not None else None, last, begin, end)
            for begin, end in places
        ]

    def _window(self, lead: list[int] | None, last: list[int], begin: int, end: int) -> Window:
        head = [self.specials.cls] + ([] if lead is None else [*lead, self.specials.sep])
        body = [*last[begin:end], self.specials.sep]
        types = [0] * len(head) + [0 if lead is None else 1] * len(body)
        return Window(head + body, types, len(head), begin, end)


def cut(length: int, room: int, shared: int) -> list[tuple[int, int]]:
    """(begin, end) of windows of `room` tokens over `length` tokens; neighbours share `shared`."""
    if length <= room:
        return [(0, length)]
    return [(b, min(b + room, length)) for b in range(0, length - shared, room - shared)]


def best_window(place: int, windows: Sequence[Window]) -> int:
    """Index of the window with the most context around the token at `place` in the text.

    The side with less context counts: the "max context" rule of BERT's run_squad.py, without its
    term for the window's length. windows: all windows of one text, in order.
    """
    last = bisect.bisect_right(windows, place, key=lambda window: window.begin)
    first = last - 1
    while first and windows[first - 1].end > place:
        first -= 1
    some = windows[first:last]
    return first + int(np.argmax([min(place - w.begin, w.end - 1 - place) for w in some]))


def collate(features: Sequence[Feature], numbers: Sequence[int] | None = None) -> PackedBatch:
    """Packs the features' sequences end to end into one batch, on the CPU.

    numbers: index of each feature among all training features. Dropout draws its masks with these,
    so the masks depend on the example, not on how a step is split. None numbers the sequences of
    this batch instead.
    """
    windows = [window for feature in features for window in feature.windows]
    packed = PackedBatch.from_sequences([window.input_ids for window in windows])
    types = [kind for window in windows for kind in window.token_type_ids]
    ids = None
    if numbers is not None:
        width = max(len(feature.windows) for feature in features)
        pairs = zip(features, numbers, strict=True)
        ids = torch.tensor([n * width + i for f, n in pairs for i in range(len(f.windows))])
    return PackedBatch(
        input_ids=packed.input_ids,
        cu_seqlens=packed.cu_seqlens,
        max_seqlen=packed.max_seqlen,
        position_ids=packed.position_ids,
        token_type_ids=torch.tensor(types, dtype=torch.int64),
        sequence_ids=ids,
    )


def parts(sizes: Sequence[int], limit: int) -> list[range]:
    """Ranges of consecutive indices whose sizes sum to at most `limit`, or with one index only."""
    groups, begin, used = [], 0, 0
    for number, size in enumerate(sizes):
        if number > begin and used + size > limit:
            groups.append(range(begin, number))
            begin, used = number, 0
        used += size
    if len(sizes) > begin:
        groups.append(range(begin, len(sizes)))
    return groups
