"""What a model can be asked for: texts to sequences, sequences to scores, scores to answers.

The first and the last run in the threads of the tokenizer, the second in the one of the model.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from fastbert.check import InputError
from fastbert.data import special_tokens
from fastbert.embedding.model import pool
from fastbert.fill_mask import filled
from fastbert.finetune.features import Feature, TooLong, WindowEncoder, collate
from fastbert.finetune.task import to_host
from fastbert.models.inputs import wanted_rows
from fastbert.packing import IGNORE_INDEX
from fastbert.serve.refusal import Refusal

CUT = 'cut it off with "truncate": true'

_GAPS = 256  # whose scores of all words are computed at once


class Tokens:
    """A tokenizer whose `encode` lets other threads run, as the library's batches alone do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: Any, **options: Any) -> Encoding:
        return self.tokenizer.encode_batch([text], **options)[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class Ability(abc.ABC):
    """One of what a model can be asked for."""

    @abc.abstractmethod
    def features(self, inputs: Sequence[Any], truncate: bool) -> list[Feature]:
        """The sequences of the inputs, each with the number of its input; `Refusal` if too long."""

    @abc.abstractmethod
    def scores(self, model: Any, features: Sequence[Feature]) -> Sequence[Any]:
        """What the model says of each sequence, on the host."""


def windows_or_refusal(make: Any, *arguments: Any) -> Any:
    """What `make` gives; an input that cannot be one is refused with the reason."""
    try:
        return make(*arguments)
    except InputError as error:
        raise Refusal(413 if isinstance(error, TooLong) else 422, str(error)) from None


class Embedding(Ability):
    """Inputs: texts; scores: vectors (hidden_size,) float32."""

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int, pooling: str) -> None:
        self.tokenizer, self.pooling = tokenizer, pooling
        self.encoders = {
            cut: WindowEncoder(tokenizer, max_seq_len, None, cut, CUT) for cut in (False, True)
        }

    def features(self, inputs: Sequence[str], truncate: bool) -> list[Feature]:
        encodings = self.tokenizer.encode_batch_fast(list(inputs), add_special_tokens=False)
        windows = self.encoders[truncate].windows
        return [
            Feature(number, tuple(windows_or_refusal(windows, f"input {number}", one.ids)), None)
            for number, one in enumerate(encodings)
        ]

    def full(self, num_tokens: int) -> list[Feature]:
        """Sequences of about that many tokens, as long as they may be, to warm a model up with."""
        encoder = self.encoders[True]
        size = min(encoder.max_seq_len, max(num_tokens, 3))
        (window,) = encoder.windows("", [encoder.specials.unk] * (size - 2))
        return [Feature(number, (window,), None) for number in range(max(num_tokens // size, 1))]

    def scores(self, model: Any, features: Sequence[Feature]) -> list[NDArray[np.float32]]:
        batch = collate(features).to(model.device)
        if self.pooling == "cls":
            rows = wanted_rows(batch, first=True, labelled=False)
            return list(to_host(model.base_model(batch, rows=rows).last_hidden_state))
        hidden = model.base_model(batch).last_hidden_state.float()
        return list(to_host(pool(hidden, batch.cu_seqlens, self.pooling)))

    @staticmethod
    def vectors(scores: Sequence[NDArray[np.float32]], normalize: bool) -> NDArray[np.float32]:
        """(N, hidden_size); of length 1 if `normalize`, by the definition of torch's."""
        vectors = np.stack(scores)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


class MaskFilling(Ability):
    """Inputs: texts with [MASK] in them; scores: the likeliest words of each, with probabilities.

    A feature's target is the places of its [MASK].
    """

    MOST = 100  # words of a [MASK]

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int) -> None:
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.mask = special_tokens(tokenizer).mask
        self.pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}

    def features(self, inputs: Sequence[str], truncate: bool) -> list[Feature]:
        if truncate:
            raise Refusal(422, "truncate: not for /fill-mask, where it could cut off a [MASK]")
        encoder = WindowEncoder(self.tokenizer, self.max_seq_len, None, False, "shorten it")
        features = []
        encodings = self.tokenizer.encode_batch_fast(list(inputs), add_special_tokens=False)
        for number, encoding in enumerate(encodings):
            (window,) = windows_or_refusal(encoder.windows, f"input {number}", encoding.ids)
            gaps = [place for place, i in enumerate(window.input_ids) if i == self.mask]
            if not gaps:
                raise Refusal(422, f"input {number}: no [MASK] in the text")
            features.append(Feature(number, (window,), gaps))
        return features

    def scores(self, model: Any, features: Sequence[Feature]) -> list[tuple[NDArray, NDArray]]:
        """Probabilities and words (gaps, MOST) of each feature, the likeliest first."""
        batch = collate(features).to(model.device)
        gaps = [len(feature.target) for feature in features]
        ids = batch.input_ids
        assert ids is not None  # it was made of them
        labels = torch.full_like(ids, IGNORE_INDEX).masked_fill(ids == self.mask, 0)
        labelled = dataclasses.replace(batch, labels=labels, num_labels=sum(gaps))
        rows = wanted_rows(labelled, first=False, labelled=True)
        hidden = model.base_model(batch, rows=rows).last_hidden_state
        best = [self._best(model.cls(some)) for some in hidden.split(_GAPS)]
        shares, words = (torch.cat(parts).cpu() for parts in zip(*best, strict=True))
        pairs = zip(shares.split(gaps), words.split(gaps), strict=True)
        return [(a.numpy(), b.numpy()) for a, b in pairs]

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(C, V) -> probabilities and words (C, MOST)."""
        shares = logits[:, : len(self.pieces)].float().softmax(-1)
        best = shares.topk(min(self.MOST, len(self.pieces)))
        return best.values, best.indices

    def answer(self, text: str, scores: tuple[NDArray, NDArray], top: int) -> list[list[dict]]:
        """For each [MASK] the `top` likeliest words, as Hugging Face's pipeline says them."""
        answers = []
        for number, (shares, words) in enumerate(zip(*scores, strict=True)):
            pairs = list(zip(shares[:top].tolist(), words[:top].tolist(), strict=True))
            answers.append(
                [
                    {
                        "score": share,
                        "token": word,
                        "token_str": self.pieces[word],
                        "sequence": filled(text, number, self.pieces[word]),
                    }
                    for share, word in pairs
                ]
            )
        return answers
