"""The convergence benchmark trains three models on the same batches, and would see a difference."""

import dataclasses
import re
import statistics
from pydoc_data.topics import topics

import pytest
import torch

from benchmarks.results import FASTBERT, FP8, Options, Results
from benchmarks.training import convergence, jump
from fastbert.packing import PackedBatch


def test_pads_a_batch():
    batch = PackedBatch(
        input_ids=torch.tensor([5, 6, 7, 8, 9]),
        cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32),
        max_seqlen=3,
        position_ids=torch.tensor([0, 1, 0, 1, 2]),
        token_type_ids=torch.tensor([0, 1, 0, 0, 1]),
        labels=torch.tensor([-100, 6, -100, -100, 4]),
        next_sentence_label=torch.tensor([0, 1]),
    )
    arguments = convergence.padded(batch)
    assert arguments["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert arguments["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert arguments["token_type_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert arguments["labels"].tolist() == [[-100, 6, -100], [-100, -100, 4]]
    assert arguments["next_sentence_label"].tolist() == [0, 1]


@pytest.fixture
def measured(monkeypatch, write):
    """Runs the benchmark on text and a vocabulary that are small."""

    def measured(precision, **changes):
        options = Options(torch.device("cpu"), precision, quick=True)
        case, *_ = convergence.cases(options)
        documents = (topics[name].replace("\n\n", "\n") for name in sorted(topics)[:24])
        corpus = (write("corpus.txt", "\n\n".join(documents)),)
        changes |= {"corpus": corpus, "vocab_size": 800, "batch_tokens": 512}
        case = dataclasses.replace(case, **changes)
        monkeypatch.setattr(convergence, "cases", lambda _: [case])
        results = Results(options)
        convergence.run(options, results)
        (row,) = results.of("convergence")
        return row

    return measured


@pytest.mark.slow
def test_the_curves_agree(measured):
    row = measured("fp32")
    assert set(row["curves"]) == {FASTBERT, convergence.REFERENCE, convergence.HUGGING_FACE}
    assert max(row["largest_gap"].values()) < 1e-4
    for losses in row["curves"].values():
        assert len(losses) == row["case"]["steps"]
        assert statistics.mean(losses[-5:]) < statistics.mean(losses[:5]) - 0.3  # they learn


@pytest.mark.slow
def test_in_bf16_there_is_a_curve_in_fp8(measured):
    row = measured("bf16", steps=4)
    assert 0 < row["largest_gap"][FP8] < 0.1


@pytest.mark.slow
def test_losses_around_a_step_are_taken_apart(capsys):
    """Without dropout and autocast, as on a CPU, all ways give the same; other weights do not."""
    jump.main(seed=1, step=3, quick=True)
    *lines, last = capsys.readouterr().out.strip().splitlines()
    found = [re.findall(r"batch (\d+).*words +(\d+\.\d{4}), pairs +(\d+\.\d{4})", x) for x in lines]
    rows = [(int(one[0][0]), *map(float, one[0][1:])) for one in found if one]
    assert [number for number, *_ in rows] == [*[2] * 8, 3, 4, *[3] * 8, 2, 4, *[4] * 8, 2, 3]
    trained = [float(loss) for loss in re.findall(r"\d+\.\d{4}", last)][-3:]
    for begin, loss in zip((0, 10, 20), trained, strict=True):
        for _, words, pairs in rows[begin : begin + 8]:
            assert words + pairs == pytest.approx(loss, abs=3e-4)
            assert 0.4 < pairs < 1.2
    assert len(set(trained)) == 3
