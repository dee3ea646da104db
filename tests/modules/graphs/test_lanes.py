"""Several forwards before their backwards, as of contrastive losses and teachers; and in FP8."""

import copy
import threading

import pytest
import torch

import fastbert
from fastbert.modules.graphs import pool
from fastbert.modules.products import fp8
from tests.modules.graphs.case import (
    Repeats,
    assert_same,
    batch,
    gradients,
    logits,
    models,
    step,
    use,
)

LENGTHS = [7, 3, 5, 6], [9, 8, 2], [7, 3, 5, 6], [40, 2, 4], [6, 6, 6, 3], [5, 5, 2]


def contrasted(model, count, number=0):
    """The gradients of a loss of as many forwards."""
    torch.manual_seed(3)
    model.zero_grad()
    outputs = [model(**batch(LENGTHS[i], number + i)).logits.mean(0) for i in range(count)]
    torch.stack(outputs).softmax(-1).prod(0).sum().mul(100).backward()
    return gradients(model)


@pytest.mark.parametrize("count", [2, 3, pool.MOST_LANES, pool.MOST_LANES + 2])
@pytest.mark.parametrize("kind", ["own", "Bert", "DistilBert"])
def test_forwards_before_a_backward_have_a_lane_each(kind, count, recorder):
    plain, recorded = (model.train() for model in models(kind))
    with_graphs = min(count, pool.MOST_LANES)
    for number in range(3):
        actual, expected = (contrasted(model, count, number) for model in (recorded, plain))
        assert_same(actual, expected)
    assert recorder.recorded == 2 * with_graphs
    assert recorder.replayed == 3 * 2 * with_graphs
    assert len(recorder.lanes) == with_graphs


def test_explain_says_when_all_lanes_are_taken(recorder):
    _, model = models("Bert")
    inputs = batch([7, 3])
    kept = [model.train()(**inputs).logits for _ in range(pool.MOST_LANES)]
    found = fastbert.explain(model, **inputs, show=False).routes
    (route,) = [route for route in found if route.module == "CUDA graph"]
    assert route.reason == "4 earlier forwards whose backwards are yet to run"
    kept.pop()
    model(**inputs)
    assert recorder.replayed == pool.MOST_LANES + 1


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_a_forward_without_gradients_in_between(kind, recorder):
    """Of the model itself, as a check of it, and of a teacher."""
    found = []
    for model in models(kind):
        teacher = copy.deepcopy(model).eval()
        for number in range(2):
            torch.manual_seed(3)
            inputs = batch([7, 3, 5, 6], number)
            wanted = model.train()(**inputs).logits
            given = logits(teacher, inputs)
            seen = logits(model.eval(), inputs)
            (wanted - given).square().sum().backward()
            found.append([given, seen, *gradients(model)])
    assert_same(found[2], found[0])
    assert_same(found[3], found[1])
    assert recorder.replayed == 2 * 4
    assert [len(lane.results) > 0 for lane in recorder.lanes] == [True, True]


def test_backwards_in_the_order_of_their_forwards(recorder):
    found = []
    for model in models("Bert"):
        torch.manual_seed(3)
        outputs = [model.train()(**batch(lengths)).logits for lengths in LENGTHS[:3]]
        for output in outputs:
            output.square().sum().backward()
        found.append(gradients(model))
    assert_same(*found)
    assert recorder.replayed == 6


def test_threads_that_train_at_once(recorder):
    pairs = [models("Bert") for _ in range(3)]
    inputs, labels = batch([7, 3]), torch.tensor([0, 2])
    barrier = threading.Barrier(len(pairs))
    for one in (model.train() for pair in pairs for model in pair):
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def run(model):
        for _ in range(3):
            barrier.wait()
            loss = model(**inputs, labels=labels).loss
            barrier.wait()
            loss.backward()

    threads = [threading.Thread(target=run, args=(recorded,)) for _, recorded in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for plain, recorded in pairs:
        for _ in range(3):
            plain(**inputs, labels=labels).loss.backward()
        assert_same(gradients(recorded), gradients(plain))
    assert recorder.replayed > 0  # while one of them records, the others run without graphs


def test_while_another_thread_records_nothing_waits_for_it(monkeypatch):
    """Its recording runs a backward, in the thread in which autograd runs those of all threads."""
    begun, done = threading.Event(), threading.Event()

    class Slow(Repeats):
        slow = False

        def record(self, lane, work):
            if self.slow:
                begun.set()
                assert done.wait(60)
            return super().record(lane, work)

    recorder = use(Slow(), monkeypatch)
    plain, recorded = (model.train() for model in models("Bert"))
    _, other = models("Bert")
    inputs, labels = batch(LENGTHS[0]), torch.arange(4) % 3
    torch.manual_seed(5)
    loss = recorded(**inputs, labels=labels).loss
    recorder.slow = True
    thread = threading.Thread(target=lambda: logits(other.eval(), batch([40, 3])))
    thread.start()
    assert begun.wait(60)
    loss.backward()  # without a graph, as its own might wait for the other's recording
    found = [loss.detach(), *gradients(recorded)]
    seen = logits(recorded.eval(), batch([7, 3]))
    assert recorder.replayed == 1
    done.set()
    thread.join()
    assert_same(found, step(plain, inputs, labels))
    assert_same([seen], [logits(plain.eval(), batch([7, 3]))])
    recorder.slow = False
    assert_same(step(recorded.train(), inputs), step(plain.train(), inputs))
    assert recorder.replayed == 1 + 1 + 2


def test_a_lane_that_takes_too_much_leaves_the_first_one_as_it_is(monkeypatch):
    recorder = use(Repeats(taken=10), monkeypatch, most_memory=25)
    plain, recorded = (model.train() for model in models("Bert"))
    for number in range(4):
        actual, expected = (contrasted(model, 2, number) for model in (recorded, plain))
        assert_same(actual, expected)
    # two recordings for each bucket; those of the second lane were tried and given up
    assert recorder.recorded == 4
    assert recorder.replayed == 2 * 4
    assert [lane.held for lane in recorder.lanes] == [20, 0]


def test_graphs_that_have_no_room_beside_each_other_are_not_recorded_for_ever(monkeypatch):
    recorder = use(Repeats(taken=10), monkeypatch, most_memory=15)
    plain, recorded = (model.eval() for model in models("Bert"))
    counts = []
    for _ in range(10):
        for lengths in ([5], [20], [40]):
            inputs = batch(lengths)
            torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
        counts.append(recorder.recorded)
    assert counts[-1] == counts[5]
    assert recorder.memory() <= 15


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)  # which is then emulated


def in_fp8(kind, head="ForSequenceClassification"):
    both = [model.train() for model in models(kind, head)]
    for model in both:
        fp8.enable(model)
    return both


def assert_same_scales(recorded, plain, exact=False):
    """exact: without spare tokens, whose values count among the largest, but not as gradients."""
    (own,), (expected,) = fp8.scales_of(recorded), fp8.scales_of(plain)
    for name in ("history", "amax"):
        a, e = getattr(own, name), getattr(expected, name)
        same = slice(None) if exact else slice(1, None)
        torch.testing.assert_close(a[:, same], e[:, same], rtol=1e-4, atol=0)
        assert (a[:, 0] >= e[:, 0] * (1 - 1e-4)).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("exact", [False, True], ids=["spare", "full"])
@pytest.mark.parametrize("kind", ["own", "Bert", "Roberta", "DistilBert"])
def test_layers_in_fp8_have_the_same_scales_and_steps(kind, exact, recorder):
    """Recording, which runs the layers several times, counts as no pass."""
    plain, recorded = in_fp8(kind, "ForTokenClassification" if exact else "ForMaskedLM")
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, recorded)]
    spare = 0 if exact else 1
    for number, lengths in enumerate([[7, 3, 6], [8, 8 - spare], [9, 7 - spare], [30, 2 - spare]]):
        inputs = batch(lengths, number)
        labels = inputs["input_ids"] % 3
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
        assert_same(step(recorded.train(), inputs, labels), step(plain.train(), inputs, labels))
        assert_same_scales(recorded, plain, exact)
        assert_same([logits(recorded.eval(), inputs)], [logits(plain.eval(), inputs)])
        for optimizer in optimizers:
            optimizer.step()
    # of three buckets; in inference, where graphs begin with the batch, of two
    assert recorder.recorded == 2 * 3 + 2
    assert recorder.replayed == 4 * 3


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_layers_in_fp8_in_several_lanes_and_beyond_them(kind, recorder):
    plain, recorded = in_fp8(kind)
    for number in range(3):
        both = [contrasted(model, pool.MOST_LANES + 1, number) for model in (recorded, plain)]
        assert_same(*both)
        assert_same_scales(recorded, plain)
    assert recorder.recorded == 2 * pool.MOST_LANES


@pytest.mark.usefixtures("emulated")
def test_in_fp8_nothing_reads_the_scales_of_a_recording_from_its_graphs_memory(monkeypatch):
    recorder = use(Repeats(again=False), monkeypatch)
    _, recorded = in_fp8("Bert")
    step(recorded, batch([7, 3]))
    (own,) = fp8.scales_of(recorded)
    assert recorder.replayed == 2
    assert own.scale is own.inverse is None


@pytest.mark.usefixtures("emulated")
def test_in_fp8_a_recording_that_fails_leaves_the_scales_as_they_are(monkeypatch):
    use(Repeats(error="CUDA error: not permitted"), monkeypatch)
    plain, recorded = in_fp8("Bert")
    for number in range(2):
        inputs = batch([7, 3], number)
        assert_same(step(recorded, inputs), step(plain, inputs))
        assert_same_scales(recorded, plain, exact=True)


@pytest.mark.usefixtures("emulated")
def test_in_fp8_a_second_backward_through_the_same_call(recorder):
    found = []
    for model in in_fp8("Bert"):
        torch.manual_seed(3)
        loss = model(**batch([7, 3, 5, 6])).logits.square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(gradients(model))
    assert_same(*found)


@pytest.mark.usefixtures("emulated")
def test_fp8_that_is_switched_off_or_on_again_is_recorded_anew(recorder):
    plain, recorded = (model.train() for model in models("Bert"))
    inputs = batch([7, 3])
    for change in (fp8.enable, fp8.disable, fp8.enable):
        for model in (plain, recorded):
            change(model)
        for _ in range(2):
            assert_same(step(recorded, inputs), step(plain, inputs))
    assert recorder.recorded == 2 * 3
