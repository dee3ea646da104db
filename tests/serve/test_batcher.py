"""How sequences are packed into batches, whose turn it is, and what becomes of failures."""

import asyncio
import contextlib

import numpy as np
import pytest
from torch import nn

from fastbert.finetune.features import Feature, Window
from fastbert.serve.abilities import Ability
from fastbert.serve.batcher import Batcher, Job
from fastbert.serve.metrics import Metrics
from fastbert.serve.refusal import Refusal


class Echo(Ability):
    """Scores a sequence by its first token; fails on -1."""

    def __init__(self):
        self.batches = []

    def features(self, inputs, truncate):
        return [Feature(i, (Window([*ids], [], 0, 0, 0),), None) for i, ids in enumerate(inputs)]

    def scores(self, model, features):
        firsts = [feature.windows[0].input_ids[0] for feature in features]
        self.batches.append([feature.num_tokens for feature in features])
        if -1 in firsts:
            raise RuntimeError("out of memory")
        return np.array(firsts)


@contextlib.contextmanager
def batcher(*, batch_tokens=10, max_queue=100, start=True):
    made = Batcher(nn.Identity(), contextlib.nullcontext(), batch_tokens, max_queue, Metrics())
    if start:
        made.start()
    yield made
    if start:
        made.close()
        assert not made.is_alive


def sequences(ability, *lengths, first=7):
    return ability.features([[first] * length for length in lengths], False)


def jobs_taken(made):
    """The lengths of the next batch's sequences, in order."""
    return [job.features[number].num_tokens for job, number in made._take()]


async def queued(made, ability, *jobs):
    for lengths in jobs:
        made._put(Job(ability, sequences(ability, *lengths)))


def test_a_batch_is_as_full_as_whole_sequences_make_it():
    ability = Echo()
    with batcher(start=False) as made:
        asyncio.run(queued(made, ability, [3], [4], [4], [25], [1]))
        assert (made.num_sequences, made.num_tokens) == (5, 37)
        assert [jobs_taken(made) for _ in range(4)] == [[3, 4], [4], [25], [1]]
        assert (made.num_sequences, made.num_tokens) == (0, 0)
        assert jobs_taken(made) == []


def test_requests_take_turns():
    ability = Echo()
    with batcher(start=False) as made:
        asyncio.run(queued(made, ability, [2] * 6, [3], [1, 1]))
        assert jobs_taken(made) == [2, 3, 1, 2, 1]
        assert jobs_taken(made) == [2] * 4


def test_a_batch_is_of_one_ability():
    one, other = Echo(), Echo()
    with batcher(start=False) as made:
        asyncio.run(queued(made, one, [1]))
        asyncio.run(queued(made, other, [2]))
        asyncio.run(queued(made, one, [3]))
        asyncio.run(queued(made, other, [4]))
        assert jobs_taken(made) == [1, 3]
        assert jobs_taken(made) == [2, 4]


def test_scores_go_back_to_their_requests_in_order():
    async def main(made, ability):
        asked = [[[10 * number + i, 1, 1] for i in range(number % 4 + 1)] for number in range(40)]
        each = [made.scores(ability, ability.features(some, False)) for some in asked]
        answers = await asyncio.gather(*each)
        assert answers == [[ids[0] for ids in some] for some in asked]

    ability = Echo()
    with batcher() as made:
        asyncio.run(main(made, ability))
    assert max(map(sum, ability.batches)) <= 10
    assert sum(map(len, ability.batches)) == 100


def test_a_batch_that_fails_fails_its_requests_alone(caplog):
    async def main(made, ability):
        bad = made.scores(ability, sequences(ability, 1, first=-1))
        with pytest.raises(Refusal, match="RuntimeError") as error:
            await bad
        assert error.value.status == 500
        assert await made.scores(ability, sequences(ability, 2)) == [7]

    with batcher() as made:
        asyncio.run(main(made, Echo()))
        assert made.metrics.registry.get_sample_value("fastbert_failed_batches_total") == 1
    assert "out of memory" in caplog.text


def test_a_request_whose_batches_all_fail_fails_once():
    ability = Echo()
    with batcher(start=False) as made:
        made._put(job := Job(ability, sequences(ability, 6, 6, first=-1)))
        for _ in range(2):
            made._compute(made._take())  # the second one must not end the model's thread
    assert ability.batches == [[6], [6]]
    with pytest.raises(Refusal, match="RuntimeError"):
        job.future.result(timeout=0)


def test_the_queue_is_bounded():
    async def main(made, ability):
        with pytest.raises(Refusal, match="3 sequences, more than the 2") as error:
            await made.scores(ability, sequences(ability, 1, 1, 1))
        assert error.value.status == 413
        await queued(made, ability, [5, 5])
        with pytest.raises(Refusal, match="2 sequences wait") as error:
            await made.scores(ability, sequences(ability, 1))
        assert (error.value.status, error.value.retry_after) == (429, 1)
        made.rate = 2.0  # tokens a second
        with pytest.raises(Refusal) as error:
            await made.scores(ability, sequences(ability, 1))
        assert error.value.retry_after == 5

    with batcher(max_queue=2, start=False) as made:
        asyncio.run(main(made, Echo()))


def test_who_is_cancelled_leaves_nothing_in_the_queue():
    async def main(made, ability):
        waits = asyncio.create_task(made.scores(ability, sequences(ability, 6, 6, 6)))
        other = asyncio.create_task(made.scores(ability, sequences(ability, 2)))
        await asyncio.sleep(0)
        assert jobs_taken(made) == [6, 2]
        waits.cancel()
        other.cancel()
        await asyncio.gather(waits, other, return_exceptions=True)
        assert (made.num_sequences, made.num_tokens, len(made.jobs)) == (0, 0, 0)
        assert made.metrics.registry.get_sample_value("fastbert_dropped_sequences_total") == 2

    with batcher(start=False) as made:
        asyncio.run(main(made, Echo()))
