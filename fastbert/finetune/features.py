"""Texts as the token sequences that a model reads, long ones in windows."""

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
    """A text has more tokens than a sequence."""


class Window(NamedTuple):
    """One sequence, [CLS] A [SEP] or [CLS] A [SEP] B [SEP].

    Its tokens `prefix`, `prefix + 1`, ... are the last text's tokens from `begin` to before `end`.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    prefix: int
    begin: int
    end: int


class Feature(NamedTuple):
    """What is scored together: one sequence, or the choices of a question.

    example: its number in the list of examples; target: what the task learns from it, None unless
    labelled.
    """

    example: int
    windows: tuple[Window, ...]
    target: Any

    @property
    def num_tokens(self) -> int:
        return sum(len(window.input_ids) for window in self.windows)


class WindowEncoder:
    """Makes sequences of at most `max_seq_len` tokens.

    stride: how many tokens the windows of a longer text share, None to refuse such texts;
    truncate: cuts the longer of two texts until they fit; advice: what helps where they do not;
    max_windows: of a text, None for any number.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_seq_len: int,
        stride: int | None,
        truncate: bool,
        advice: str = "read it in windows with --stride",
        max_windows: int | None = None,
    ) -> None:
        self.advice, self.max_windows = advice, max_windows
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.stride, self.truncate = stride, truncate
        self.specials = special_tokens(tokenizer)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, as Hugging Face's BertTokenizer gives them."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def windows(
        self, where: str, first: Sequence[int], second: Sequence[int] | None = None
    ) -> list[Window]:
        """The sequences of one text or of two, of which the last is the one read in windows.

        `TooLong`, beginning with `where`, if they are.
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
                f"{self.stride}; lower --stride or shorten what stands before the text"
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
    """Windows of `room` places over `length`, neighbours sharing `shared`; one if all fits."""
    if length <= room:
        return [(0, length)]
    return [(b, min(b + room, length)) for b in range(0, length - shared, room - shared)]


def best_window(place: int, windows: Sequence[Window]) -> int:
    """The number of the window in which a place of the text has most text on its poorer side.

    windows: in the order of the text; those that do not have the place are not looked at.
    """
    last = bisect.bisect_right(windows, place, key=lambda window: window.begin)
    first = last - 1
    while first and windows[first - 1].end > place:
        first -= 1
    some = windows[first:last]
    return first + int(np.argmax([min(place - w.begin, w.end - 1 - place) for w in some]))


def collate(features: Sequence[Feature], numbers: Sequence[int] | None = None) -> PackedBatch:
    """The features' sequences end to end.

    numbers: of the features among all, from which dropout draws its masks, so that these do not
    depend on the batch.
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
    """Consecutive numbers in groups whose sizes sum to at most `limit`, or that have one member."""
    groups, begin, used = [], 0, 0
    for number, size in enumerate(sizes):
        if number > begin and used + size > limit:
            groups.append(range(begin, number))
            begin, used = number, 0
        used += size
    if len(sizes) > begin:
        groups.append(range(begin, len(sizes)))
    return groups
