"""The queue before the model, and the thread that takes batches from it.

A batch packs whole sequences without padding, up to a number of tokens; it does not wait to become
full. Requests take turns, one sequence each, so a request with many texts does not delay the
others. Sequences whose client has left are dropped before the model runs.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from fastbert.finetune.features import Feature
from fastbert.serve.abilities import Ability
from fastbert.serve.metrics import Metrics
from fastbert.serve.refusal import Refusal

_LONGEST_WAIT = 60  # seconds, the largest Retry-After

log = logging.getLogger(__name__)


class Job:
    """The sequences of one request, which are answered together."""

    def __init__(self, ability: Ability, features: Sequence[Feature]) -> None:
        self.ability, self.features = ability, features
        self.future: Future[list[Any]] = Future()
        self.scores: list[Any] = [None] * len(features)
        self.taken = 0  # sequences that the model's thread has taken
        self.missing = len(features)
        self.began = time.perf_counter()

    @property
    def num_waiting(self) -> int:
        return len(self.features) - self.taken


class Batcher:
    """Runs a model in one thread, on batches of waiting sequences.

    batch_tokens: the most tokens of a batch; a longer sequence is a batch by itself; max_queue: the
    most waiting sequences; autocast: the context in which the model computes
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: contextlib.AbstractContextManager[Any],
        batch_tokens: int,
        max_queue: int,
        metrics: Metrics,
    ) -> None:
        self.model, self.autocast = model, autocast
        self.batch_tokens, self.max_queue, self.metrics = batch_tokens, max_queue, metrics
        self.jobs: deque[Job] = deque()
        self.num_sequences = self.num_tokens = 0  # in the queue
        self.rate = 0.0  # tokens per second, a moving average
        self.is_closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="fastbert-model", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Ends the thread once the queue is empty."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        self.thread.join()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    async def scores(self, ability: Ability, features: Sequence[Feature]) -> list[Any]:
        """The model's scores of the sequences, in order.

        Raises `Refusal` if the queue has no room (413, 429) or the model fails (500). If the caller
        is cancelled, its sequences leave the queue.
        """
        job = Job(ability, features)
        self._put(job)
        try:
            return await asyncio.wrap_future(job.future)
        finally:
            if job.num_waiting:
                self._drop(job)

    def _put(self, job: Job) -> None:
        count = len(job.features)
        if count > self.max_queue:
            raise Refusal(
                413,
                f"{count} sequences, more than the {self.max_queue} that may wait for the model",
            )
        with self.changed:
            if self.num_sequences + count > self.max_queue:
                raise Refusal(
                    429,
                    f"{self.num_sequences} sequences wait for the model, and {count} more would "
                    f"exceed the limit of {self.max_queue}; try again later",
                    self.wait_s(),
                )
            self.jobs.append(job)
            self._waiting(count, sum(feature.num_tokens for feature in job.features))
            self.changed.notify()

    def _drop(self, job: Job) -> None:
        """Removes the remaining sequences of a request from the queue, if its client has left."""
        with self.changed:
            if job in self.jobs:
                self.jobs.remove(job)
                left = job.features[job.taken :]
                self._waiting(-len(left), -sum(feature.num_tokens for feature in left))
                self.metrics.dropped.inc(len(left))

    def wait_s(self) -> int:
        """Estimated seconds until the model has computed the queue, from 1 to _LONGEST_WAIT."""
        wait = self.num_tokens / self.rate if self.rate else 1
        return min(max(math.ceil(wait), 1), _LONGEST_WAIT)

    def _waiting(self, sequences: int, tokens: int) -> None:
        self.num_sequences += sequences
        self.num_tokens += tokens
        self.metrics.queue_sequences.set(self.num_sequences)
        self.metrics.queue_tokens.set(self.num_tokens)

    def _work(self) -> None:
        with torch.inference_mode(), self.autocast:
            while True:
                with self.changed:
                    while not self.jobs and not self.is_closing:
                        self.changed.wait()
                    batch = self._take()
                    if not batch and self.is_closing:
                        return
                if batch:
                    self._compute(batch)

    def _take(self) -> list[tuple[Job, int]]:
        """The next batch: pairs of a request and the index of one of its sequences.

        All of them need the same ability as the first request in the queue.
        """
        batch: list[tuple[Job, int]] = []
        passed_over, used = [], 0
        now = time.perf_counter()
        while self.jobs:
            job = self.jobs.popleft()
            if batch and job.ability is not batch[0][0].ability:
                passed_over.append(job)
                continue
            size = job.features[job.taken].num_tokens
            if batch and used + size > self.batch_tokens:
                self.jobs.appendleft(job)
                break
            if not job.taken:
                self.metrics.queue_seconds.observe(now - job.began)
            batch.append((job, job.taken))
            job.taken += 1
            used += size
            if job.num_waiting:
                self.jobs.append(job)
        self.jobs.extendleft(reversed(passed_over))
        self._waiting(-len(batch), -used)
        return batch

    def _compute(self, batch: list[tuple[Job, int]]) -> None:
        features = [job.features[number] for job, number in batch]
        began = time.perf_counter()
        try:
            scores = batch[0][0].ability.scores(self.model, features)
        except Exception as error:  # such as out of memory: the next batch may succeed
            log.exception("a batch of %d sequences failed", len(batch))
            self.metrics.failed_batches.inc()
            reason = f"the model failed on the batch: {type(error).__name__}"
            _deliver({job for job, _ in batch}, Refusal(500, reason))
            return
        self._count(features, time.perf_counter() - began)
        done = []
        for (job, number), own in zip(batch, scores, strict=True):
            job.scores[number] = own
            job.missing -= 1
            if not job.missing:
                done.append(job)
        _deliver(done)

    def _count(self, features: list[Feature], seconds: float) -> None:
        tokens = sum(feature.num_tokens for feature in features)
        self.metrics.batch_sequences.observe(len(features))
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.batch_seconds.observe(seconds)
        self.rate = tokens / seconds if not self.rate else 0.9 * self.rate + 0.1 * tokens / seconds


def _deliver(jobs: Iterable[Job], error: BaseException | None = None) -> None:
    """Answers requests, except those whose client has left or that have failed before."""
    for job in jobs:
        if job.future.done() or not job.future.set_running_or_notify_cancel():
            continue
        if error is None:
            job.future.set_result(job.scores)
        else:
            job.future.set_exception(error)
