"""The abilities of a served model: texts to sequences, sequences to scores, scores to answers.

The first and the last step run in the tokenizer's threads, the second in the model's only thread.
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
from fastbert.models.request import wanted_rows
from fastbert.packing import IGNORE_INDEX
from fastbert.serve.refusal import Refusal

CUT = 'cut it off with "truncate": true'

Likeliest = tuple[NDArray[np.float32], NDArray[np.int64]]  # probabilities and word ids

_GAPS = 256  # how many [MASK] positions have their vocabulary scores computed at once


class Tokens:
    """A tokenizer whose `encode` uses batch encoding, because only that lets other threads run."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: Any, **options: Any) -> Encoding:
        return self.tokenizer.encode_batch([text], **options)[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class Ability(abc.ABC):
    """One kind of request that a model can answer.

    cuts: whether long texts may be cut off; if not, --truncate has no effect, and a request with
    "truncate" is refused.
    """

    cuts = True

    @abc.abstractmethod
    def features(self, inputs: Sequence[Any], truncate: bool) -> list[Feature]:
        """The features of the inputs; raises `Refusal` for one that is too long or unusable."""

    @abc.abstractmethod
    def scores(self, model: Any, features: Sequence[Feature]) -> Sequence[Any]:
        """The model's scores of each feature, on the host; called in the model's thread."""


def windows_or_refusal(make: Any, *arguments: Any) -> Any:
    """Calls `make`; turns its InputError into a `Refusal`, 413 for a text that is too long."""
    try:
        return make(*arguments)
    except InputError as error:
        raise Refusal(413 if isinstance(error, TooLong) else 422, str(error)) from None


class Embedding(Ability):
    """Embeds texts; its scores are vectors (hidden_size,) float32, not normalised."""

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
        """Features with about `num_tokens` tokens in the longest sequences, for a warm-up."""
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
        """(N, hidden_size) float32; scaled to length 1 if `normalize`, as F.normalize does."""
        vectors = np.stack(scores)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


class MaskFilling(Ability):
    """Fills [MASK] tokens in texts; scores: the likeliest words for each, with probabilities.

    A feature's target is the list of its [MASK] positions.
    """

    MOST = 100  # the number of words kept for a [MASK], and the largest top_k of a request
    cuts = False

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int) -> None:
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.mask = special_tokens(tokenizer).mask
        self.pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}

    def features(self, inputs: Sequence[str], truncate: bool) -> list[Feature]:
        if truncate:
            raise Refusal(422, "truncate: not for /fill-mask, because it could cut off a [MASK]")
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

    def scores(self, model: Any, features: Sequence[Feature]) -> list[Likeliest]:
        """For each feature, probabilities and word ids ([MASK]s, MOST), the likeliest first."""
        batch = collate(features).to(model.device)
        gaps = [len(feature.target) for feature in features]
        ids = batch.input_ids
        assert ids is not None  # the batch was made from token ids
        labels = torch.full_like(ids, IGNORE_INDEX).masked_fill(ids == self.mask, 0)
        labelled = dataclasses.replace(batch, labels=labels, num_labels=sum(gaps))
        rows = wanted_rows(labelled, first=False, labelled=True)
        hidden = model.base_model(batch, rows=rows).last_hidden_state
        best = [self._best(model.cls(some)) for some in hidden.split(_GAPS)]
        shares, words = (torch.cat(parts).cpu() for parts in zip(*best, strict=True))
        pairs = zip(shares.split(gaps), words.split(gaps), strict=True)
        return [(a.numpy(), b.numpy()) for a, b in pairs]

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (C, V) of C [MASK]s -> probabilities and word ids (C, MOST)."""
        shares = logits[:, : len(self.pieces)].float().softmax(-1)
        best = shares.topk(min(self.MOST, len(self.pieces)))
        return best.values, best.indices

    def answer(self, text: str, scores: Likeliest, top: int) -> list[list[dict[str, Any]]]:
        """The `top` likeliest words for each [MASK], with the fields of Hugging Face's pipeline."""
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
