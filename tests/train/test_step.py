"""A graphed step trains as an eager one does; a step that is not finite is left out."""

import copy
import dataclasses
import functools
import itertools

import pytest
import torch

import fastbert
from fastbert.config.pretrain import PretrainConfig
from fastbert.modules.graphs.recorder import WARM_UP, CudaGraphs
from fastbert.modules.products.weight_copies import WeightCopies
from fastbert.ops import attention_plain
from fastbert.train.objective import PretrainingObjective
from fastbert.train.optimizer import make_optimizer
from fastbert.train.step import EagerStep, GraphedStep, as_graph
from tests.models.pretraining_case import make_model
from tests.train.step_case import (
    BUCKET,
    CONFIG,
    CPU,
    STEPS,
    Recorded,
    Repeats,
    assert_moved_alike,
    assert_same_weights,
    batches,
    counts_of,
    distillation,
    make_steps,
    run_both,
)


@pytest.mark.parametrize("parts", [1, 2])
def test_trains_as_the_eager_step_does(parts):
    eager, graphed = make_steps()
    before = copy.deepcopy(eager.objective.state_dict())
    run_both(eager, graphed, parts)
    assert graphed.replay is not None
    assert_same_weights(eager, graphed)
    moved = [not torch.equal(before[name], t) for name, t in eager.objective.state_dict().items()]
    assert all(moved)


@pytest.mark.parametrize(
    ("parts", "objective"),
    [
        (1, PretrainingObjective),
        (2, PretrainingObjective),
        (2, distillation),
        (1, functools.partial(distillation, cosine=0.0)),
    ],
    ids=["whole", "parts", "distillation", "distillation without cosine"],
)
def test_what_is_recorded_reads_all_that_changes_from_its_places(
    parts, objective, monkeypatch, capsys
):
    """Rate, batch, counts and the state of dropout; and the host reads nothing."""
    # as on a GPU, where attention does not read the lengths on the host
    monkeypatch.setattr(attention_plain, "reads_lengths", lambda call: False)
    eager, graphed = make_steps(objective=objective)
    graphed.graphs = Recorded(graphed.eager.objective, graphed.eager.optimizer)
    run_both(eager, graphed, parts)
    assert graphed.replay is not None, capsys.readouterr().out
    assert_same_weights(eager, graphed)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_copies_of_weights_change_no_bit_of_a_run(optimizer, monkeypatch):
    """Each step, and each replay of a recorded one, reads the weights of its time."""
    monkeypatch.setattr(attention_plain, "reads_lengths", lambda call: False)
    config = dataclasses.replace(CONFIG, precision="bf16")
    models = [PretrainingObjective(make_model(dropout=0.1)) for _ in range(4)]
    steps = [EagerStep(m, make_optimizer(m, 0.01, optimizer), config, CPU) for m in models]
    plain, copied, repeated, inner = steps
    assert copied.copies.starts
    plain.copies = WeightCopies(plain.objective, None)
    repeated = GraphedStep(repeated, BUCKET, Repeats())
    recorded = GraphedStep(inner, BUCKET, Recorded(inner.objective, inner.optimizer))
    for number, batch in enumerate(batches(parts=2)):
        for one, other in ((copied, plain), (recorded, repeated)):
            results = [step(number, batch, counts_of(batch)) for step in (one, other)]
            assert torch.equal(*results)
    assert recorded.replay is not None
    states = [model.state_dict() for model in models]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
        assert torch.equal(states[2][name], states[3][name]), name


def test_a_step_that_does_not_fit_runs_eagerly_and_says_so_once(capsys):
    eager, graphed = make_steps(bucket=BUCKET._replace(num_tokens=40))
    run_both(eager, graphed)
    assert_same_weights(eager, graphed)
    assert (
        capsys.readouterr().out.count("a step runs without the CUDA graph: a batch of num_t") == 1
    )


def test_a_failing_recording_is_said_once_and_loses_nothing(capsys):
    class Fails(Repeats):
        def record(self, work):
            for parameter in graphed.eager.objective.parameters():  # as one behind the backward
                parameter.grad = torch.ones_like(parameter)
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    eager, graphed = make_steps(graphs=Fails())
    run_both(eager, graphed)
    assert_same_weights(eager, graphed)
    said = capsys.readouterr().out
    assert said == (
        "steps run without a CUDA graph: operation not permitted when stream is capturing\n"
    )


def test_records_once_after_the_warm_up():
    recorded = []

    class Counts(Repeats):
        def record(self, work):
            recorded.append(graphed.steps)
            return work

    eager, graphed = make_steps(graphs=Counts())
    run_both(eager, graphed)
    assert recorded == [WARM_UP + 1]


@pytest.mark.parametrize("first", ["eager", "graphed"])
def test_goes_on_from_the_other_kinds_checkpoint(first):
    eager, graphed = make_steps()
    run_both(eager, graphed)
    saved = copy.deepcopy((eager if first == "eager" else graphed.eager).optimizer.state_dict())
    eager, graphed = make_steps()
    for one in (eager, graphed.eager):
        one.optimizer.load_state_dict(copy.deepcopy(saved))
    # as in a run, which makes its step from the loaded optimizer
    eager = EagerStep(eager.objective, eager.optimizer, eager.config, CPU)
    inner = graphed.eager
    graphed = GraphedStep(
        EagerStep(inner.objective, inner.optimizer, inner.config, CPU), BUCKET, Repeats()
    )
    run_both(eager, graphed)
    assert_same_weights(eager, graphed)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "parts"), [("fp32", 1), ("fp32", 2), ("bf16", 1)])
def test_a_cuda_graph_trains_as_the_eager_step_does(precision, parts, capsys):
    device = torch.device("cuda")
    eager, graphed = make_steps(device, CudaGraphs(), precision=precision)
    before = copy.deepcopy(eager.objective.state_dict())
    tolerance, share = (1e-4, 0.01) if precision == "fp32" else (5e-2, 0.05)
    for number, batch in enumerate(batches(parts=parts)):
        expected = eager(number, batch, counts_of(batch))
        actual = graphed(number, batch, counts_of(batch))
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert graphed.replay is not None, capsys.readouterr().out
    assert_moved_alike(eager, graphed, before, share)


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.01), ("bf16", 0.05)])
def test_how_alike_two_steps_of_a_gpu_are_is_judged_rightly(precision, share):
    """Padding's rounding passes, one step at another learning rate of nine does not."""
    eager, graphed = make_steps(precision=precision)
    for step in (eager, graphed.eager):
        step.objective.float()
    before = copy.deepcopy(eager.objective.state_dict())
    right = graphed.eager.set_learning_rate
    for wrong in (False, True):
        for step in (eager, graphed.eager):
            step.objective.load_state_dict(before)
            step.optimizer.state.clear()
        graphed.eager.set_learning_rate = lambda n, w=wrong: right(0 if w and n == 4 else n)
        run_both(eager, graphed, tolerance=1.0 if wrong else 1e-4)
        if wrong:
            with pytest.raises(AssertionError):
                assert_moved_alike(eager, graphed, before, share)
        else:
            assert_moved_alike(eager, graphed, before, share)


def test_the_bucket_of_real_data_fits_nearly_all(corpus, tmp_path):
    from fastbert.train.prepare import prepare_text

    sizes = {"vocab_size": 400, "batch_tokens": 512, "max_seq_len": 64}
    config = PretrainConfig(preset="tiny", corpus=(corpus,), **sizes)
    data = prepare_text(config, tmp_path).training
    for micro_batches in (1, 3):
        bucket = data.bucket(micro_batches)
        parts = [p for step in range(120) for p in data.batch(step, micro_batches=micro_batches)]
        misfits = [reason for part in parts if (reason := part.misfit(bucket))]
        assert len(misfits) <= 0.02 * len(parts), misfits
    assert data.bucket().num_tokens == 512


def test_runs_eagerly_without_a_gpu():
    model = fastbert.BertForPreTraining(make_model().config)
    step = EagerStep(PretrainingObjective(model), make_optimizer(model, 0.0), CONFIG, CPU)
    assert as_graph(step, None) is step


@pytest.mark.pairs
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("kind", ["eager", "recorded"])
@pytest.mark.parametrize("bad_part", [0, 1])
def test_a_step_with_gradients_that_are_not_finite_is_left_out_and_counted(
    kind, bad_part, optimizer, monkeypatch
):
    """As if it had not been there: weights, moments, number of steps, and the metrics' sums."""
    monkeypatch.setattr(attention_plain, "reads_lengths", lambda call: False)
    eager, graphed = make_steps(optimizer=optimizer)
    model = graphed.eager.objective.model
    graphed.graphs = Recorded(model, graphed.eager.optimizer)
    step = graphed if kind == "recorded" else graphed.eager
    poison = torch.zeros((), dtype=torch.float64)
    parts_seen = [0]

    def poisoned(module, arguments, output):
        place = torch.arange(2).eq(bad_part)[parts_seen[0] % 2]
        parts_seen[0] += 1
        return output + poison * place

    model.bert.embeddings.register_forward_hook(poisoned)
    for number, batch in enumerate(batches(parts=2)):
        poison.fill_(float("nan") if number in (0, 4, 7) else 0.0)
        actual = step(number, batch, counts_of(batch))
        if number in (0, 4, 7):
            assert actual.tolist() == [0.0] * 6 + [1.0]
            continue
        expected = eager(number, batch, counts_of(batch))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert actual[-1] == 0
    if kind == "recorded":
        assert graphed.replay is not None
    assert_same_weights(eager, graphed)
    for ours, theirs in zip(
        eager.optimizer.state.values(), graphed.eager.optimizer.state.values(), strict=True
    ):
        assert ours["step"] == theirs["step"] == STEPS - 3


def test_a_state_of_a_graphed_run_goes_on_eagerly():
    """With the option that only a recording needs, PyTorch would warn on a GPU."""
    model = make_model()
    optimizer = make_optimizer(model, 0.01)
    for group in optimizer.param_groups:
        group["capturable"] = True
    step = EagerStep(PretrainingObjective(model), optimizer, CONFIG, CPU)
    batch = next(iter(batches()))
    assert step(0, batch, counts_of(batch)).isfinite().all()
    assert not any(group["capturable"] for group in optimizer.param_groups)


def test_fp16_halves_its_scale_where_it_overflows_and_goes_on():
    model = make_model()
    config = dataclasses.replace(CONFIG, precision="fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    step = EagerStep(PretrainingObjective(model), make_optimizer(model, 0.01), config, CPU)
    step.scaler = scaler
    skipped = []
    for number, batch in enumerate(itertools.chain(batches(), batches(), batches(), batches())):
        sums = step(number % STEPS, batch, counts_of(batch))
        assert sums.isfinite().all()
        skipped.append(sums[-1].item())
    number = int(sum(skipped))
    assert skipped[0] == 1.0
    assert 10 < number < len(skipped)
    assert scaler.get_scale() == 2.0 ** (30 - number)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
