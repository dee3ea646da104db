"""Packed, masked batches; the position in the data is one integer, the global step.

The examples of a global batch and their masks depend only on (seed, step). Ranks and micro-batches
divide the batch.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbert.check import InputError
from fastbert.data.batches.pairs import PairPlan, plan_pairs, plan_sentences
from fastbert.data.masking.mlm import Masking
from fastbert.data.masking.selection import Tokens
from fastbert.data.streams import Purpose, stream
from fastbert.data.text.tokenizer import SpecialTokens
from fastbert.data.tokenized.corpus import TokenizedCorpus
from fastbert.packing import Bucket, PackedBatch

TOKENS_OF_A_BUCKET = 128  # a bucket's tokens are a multiple of this, for fast matrix products


class GlobalCounts(NamedTuple):
    """The counts that divide the losses of a global batch, the same on every rank."""

    masked_tokens: int
    pairs: int
    tokens: int


class PretrainingData:
    """The documents `docs` of a corpus as an endless sequence of global batches, epoch by epoch.

    Each epoch plans new sentence pairs (or, without `pairs`, full sentences), shuffles the examples
    and fills batches with whole examples, up to `batch_tokens` tokens including special tokens. The
    last batch of an epoch, which is smaller, is dropped unless it is the only one.

    docs: (D,) indices of documents. Raises InputError for options out of range.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        docs: NDArray[np.int64],
        specials: SpecialTokens,
        masking: Masking,
        *,
        seed: int,
        batch_tokens: int,
        max_seq_len: int,
        short_seq_prob: float = 0.1,
        pairs: bool = True,
    ) -> None:
        if batch_tokens < max_seq_len:
            raise InputError(
                f"--batch-tokens: expected at least --max-seq-len = {max_seq_len}, "
                f"got {batch_tokens}"
            )
        self.corpus = corpus
        self.docs = docs
        self.specials = specials
        self.masking = masking
        self.pairs = pairs
        self.seed = seed
        self.batch_tokens = batch_tokens
        self.max_seq_len = max_seq_len
        self.short_seq_prob = short_seq_prob
        self._num_batches: list[int] = []  # batches of each epoch that `locate` has reached
        self._epoch = self._make_plan(0)

    @property
    def random_share(self) -> float | None:
        """The share of the current epoch's pairs whose B is random; None without pairs."""
        is_random = self._epoch.plan.is_random
        return None if is_random is None else float(is_random.mean())

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, index of the batch in the epoch) of a global step.

        Epochs have different numbers of batches, so each epoch up to the step is planned, once.
        """
        epoch = 0
        while True:
            if epoch == len(self._num_batches):
                self._num_batches.append(max(self._plan(epoch).num_batches - 1, 1))
            if step < self._num_batches[epoch]:
                return epoch, step
            step -= self._num_batches[epoch]
            epoch += 1

    def targets(self, step: int) -> GlobalCounts:
        """The counts of a whole global batch, which every rank computes without communication."""
        epoch, index = self.locate(step)
        plan = self._plan(epoch)
        rows = self._rows(plan, plan.batch(index))
        masked = self.masking.num_targets(rows.tokens, seed=self.seed, epoch=epoch)
        return GlobalCounts(masked, len(rows.begins) - 1 if self.pairs else 0, len(rows.in_b))

    def bucket(self, micro_batches: int = 1) -> Bucket:
        """Sizes into which nearly every micro-batch fits, estimated from the current epoch."""
        examples = -(-max(np.diff(self._epoch.bounds)) // micro_batches)
        tokens = -(-self.batch_tokens // micro_batches)
        if micro_batches > 1:  # micro-batches differ by about one example
            tokens += self.max_seq_len
        tokens += -tokens % TOKENS_OF_A_BUCKET
        # batches of other epochs may have more examples, and filler sequences are added
        sequences = int(1.1 * examples) + 8
        # `+ sequences`: each example predicts at least one token
        labels = int(np.ceil(self.masking.probability * tokens)) + sequences
        return Bucket(tokens, sequences, labels, self.max_seq_len)

    def batch(
        self, step: int, rank: int = 0, world_size: int = 1, micro_batches: int = 1
    ) -> list[PackedBatch]:
        """A rank's share of a global batch: micro-batches with nearly equal numbers of tokens.

        Raises InputError if the batch has fewer examples than world_size * micro_batches.
        """
        epoch, index = self.locate(step)
        plan = self._plan(epoch)
        examples = plan.batch(index)
        self._require(len(examples), world_size, micro_batches)
        shares = _shares(plan.lengths[examples], world_size * micro_batches)
        mine = shares[rank * micro_batches : (rank + 1) * micro_batches]
        return [self._pack(plan, examples[share]) for share in mine]

    def require_examples(self, world_size: int, micro_batches: int) -> None:
        """Raises the InputError of `batch` if a batch of the current epoch has too few examples.

        A run's number of micro-batches is fixed, so a run could not continue after such a batch.
        """
        fewest = min(np.diff(self._epoch.bounds)[: self._epoch.num_batches - 1 or 1])
        self._require(fewest, world_size, micro_batches)

    def _require(self, examples: int, world_size: int, micro_batches: int) -> None:
        if examples < world_size * micro_batches:
            raise InputError(
                f"--batch-tokens: a batch of {self.batch_tokens} tokens has {examples} example(s), "
                f"too few for {world_size} rank(s) x {micro_batches} micro-batch(es); raise it, or "
                "name a larger corpus"
            )

    def _plan(self, number: int) -> "_Epoch":
        """The plan of an epoch; the most recent plan is cached."""
        if self._epoch.number != number:
            self._epoch = self._make_plan(number)
        return self._epoch

    def _make_plan(self, number: int) -> "_Epoch":
        if self.pairs:
            plan = plan_pairs(
                self.corpus,
                self.docs,
                seed=self.seed,
                epoch=number,
                max_seq_len=self.max_seq_len,
                short_seq_prob=self.short_seq_prob,
            )
        else:
            plan = plan_sentences(self.corpus, self.docs, max_seq_len=self.max_seq_len)
        lengths = plan.lengths
        order = stream(self.seed, Purpose.SHUFFLE, number).permutation(len(lengths))
        return _Epoch(number, plan, lengths, order, _cut(lengths[order], self.batch_tokens))

    def _rows(self, epoch: "_Epoch", examples: NDArray[np.int64]) -> "_Rows":
        """The packed tokens of the examples, each [CLS] A [SEP] B [SEP] or [CLS] A [SEP]."""
        a_start, a_end, b_start, _ = epoch.plan.spans[examples].T
        lengths = epoch.lengths[examples]
        begins = np.append(0, np.cumsum(lengths))
        number = np.repeat(np.arange(len(examples)), lengths)
        position = np.arange(begins[-1]) - begins[number]
        a_sep = (a_end - a_start + 1)[number]
        in_b = position > a_sep
        source = np.where(
            in_b, b_start[number] + position - a_sep - 1, a_start[number] + position - 1
        )
        cls = begins[:-1]
        sep = np.concatenate([begins[:-1] + (a_end - a_start + 1), begins[1:] - 1])
        source[cls] = source[sep] = 0  # a valid index; these tokens are overwritten below
        ids = self.corpus.tokens[source].astype(np.int64)
        ids[cls] = self.specials.cls
        ids[sep] = self.specials.sep
        maskable = ~np.isin(ids, self.specials)  # not [UNK] either, which is no word to predict
        starts = self.corpus.word_starts[source]
        tokens = Tokens(ids, examples[number], position, maskable, starts)
        return _Rows(tokens, begins, in_b)

    def _pack(self, epoch: "_Epoch", examples: NDArray[np.int64]) -> PackedBatch:
        rows = self._rows(epoch, examples)
        masked, labels = self.masking(rows.tokens, seed=self.seed, epoch=epoch.number)
        is_random = epoch.plan.is_random
        return PackedBatch(
            input_ids=torch.from_numpy(masked),
            cu_seqlens=torch.from_numpy(rows.begins.astype(np.int32)),
            max_seqlen=int(epoch.lengths[examples].max()),
            position_ids=torch.from_numpy(rows.tokens.position),
            token_type_ids=torch.from_numpy(rows.in_b.astype(np.int64)),
            labels=torch.from_numpy(labels),
            num_labels=int((labels >= 0).sum()),
            next_sentence_label=None
            if is_random is None
            else torch.from_numpy(is_random[examples].astype(np.int64)),
            sequence_ids=torch.from_numpy(examples.astype(np.int64)),
        )


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """The E examples of an epoch; batch i holds `order[bounds[i] : bounds[i + 1]]`."""

    number: int
    plan: PairPlan
    lengths: NDArray[np.int64]
    order: NDArray[np.int64]
    bounds: list[int]

    @property
    def num_batches(self) -> int:
        """The number of batches, including the last one, which is smaller."""
        return len(self.bounds) - 1

    def batch(self, index: int) -> NDArray[np.int64]:
        return self.order[self.bounds[index] : self.bounds[index + 1]]


class _Rows(NamedTuple):
    """T tokens of B examples.

    begins: (B + 1,) int64, where each example begins, and T; in_b: (T,) bool, True in segment B
    """

    tokens: Tokens
    begins: NDArray[np.int64]
    in_b: NDArray[np.bool_]


def _cut(lengths: NDArray[np.int64], batch_tokens: int) -> list[int]:
    """Where each batch begins, and E; a batch takes as many examples as fit into batch_tokens.

    No example may be longer than batch_tokens.
    """
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < len(lengths):
        used = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, used + batch_tokens, side="right")))
    return bounds


def _shares(lengths: NDArray[np.int64], parts: int) -> list[NDArray[np.int64]]:
    """Splits examples into `parts` index arrays with nearly equal numbers of tokens.

    The parts get examples in turn, the longest first, in order and then in reverse order.
    """
    order = np.argsort(-lengths, kind="stable")
    turn = np.arange(len(order)) % (2 * parts)
    part = np.minimum(turn, 2 * parts - 1 - turn)
    return [order[part == number] for number in range(parts)]


def heldout_batches(data: PretrainingData) -> Iterator[PackedBatch]:
    """Each batch of epoch 0 once, including the last one, which is smaller."""
    epoch = data._plan(0)
    for index in range(epoch.num_batches):
        yield data._pack(epoch, epoch.batch(index))


def unigram_baseline(counts: NDArray[np.int64], targets: Tensor | NDArray[np.int64]) -> float:
    """Mean negative log-likelihood of `targets`, in nats, under the unigram distribution `counts`.

    A model that has learnt anything from context has a lower loss. counts: (V,), each token's
    occurrences in the training text, to which 1/2 is added here for smoothing; targets: (N,)
    integers, the masked tokens of the held-out text.
    """
    probability = (counts + 0.5) / (counts.sum() + 0.5 * len(counts))
    return float(-np.log(probability[np.asarray(targets)]).mean())
