"""Layers replayed as CUDA graphs on a GPU: test_buckets.py has what needs none."""

import threading

import pytest
import torch

from fastbert.modules import sequences
from fastbert.modules.graphs import buckets, pool
from fastbert.modules.products import fp8
from fastbert.modules.products.weight_copies import WeightCopies
from tests.modules.graphs.case import KINDS, MASKS, assert_same, batch, logits, step
from tests.modules.graphs.gpu_case import num_recorded, on_gpu, on_gpu_batch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def at_the_first_use(monkeypatch):
    monkeypatch.setattr(pool, "RECORDED_AT", 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_replays_give_what_the_layers_give(kind, precision):
    plain, recorded = on_gpu(kind)
    before = num_recorded()
    for number, lengths in enumerate([[7, 3, 5, 6], [130, 20], [9, 2, 8], [6, 4, 4, 4], [130, 25]]):
        inputs = on_gpu_batch(lengths, number)
        labels = (torch.arange(len(lengths)) % 3).cuda()
        autocast = torch.autocast("cuda", precision, enabled=precision != torch.float32)
        for training in (False, True):
            found = []
            for model in (plain, recorded):
                model.train(training)
                with autocast:
                    outputs = [logits(model, inputs).float()]
                    outputs += [x if x is None else x.float() for x in step(model, inputs, labels)]
                found.append(outputs)
            size = 1e-4 if precision == torch.float32 else 2e-2
            for a, e in zip(*found, strict=True):
                if e is not None:
                    assert (a - e).abs().max() <= size * (1 + e.abs().max())
    assert num_recorded() - before >= 6


@pytest.mark.parametrize("counts", [False, True], ids=["", "counted"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_on_a_gpu_a_graph_packs_embeds_and_pads(kind, mask, counts, monkeypatch):
    monkeypatch.setattr(sequences, "LEAST_COUNTED", 0 if counts else 2**30)
    plain, recorded = (model.eval() for model in on_gpu(kind, "Model"))
    given = {"input_ids": torch.randint(3, 61, (3, 7)).cuda()}
    if MASKS[mask] is not None:
        given["attention_mask"] = torch.tensor(MASKS[mask]).cuda()
    before = num_recorded()
    for number in range(3):
        with torch.no_grad():
            if number == 2 and not counts:  # recorded, so that the host need not wait
                torch.cuda.set_sync_debug_mode("error")
            try:
                actual = recorded(**given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            expected = plain(**given)
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5)
    assert num_recorded() - before == (mask != "all padding" or not counts)


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
@pytest.mark.parametrize("by", ["own model", "hidden states"])
def test_on_a_gpu_the_host_waits_for_no_small_batch_without_a_padded_graph(by, mask, monkeypatch):
    _, model = on_gpu("own" if by == "own model" else "Bert")
    given = {"input_ids": torch.randint(3, 61, (3, 7)), "attention_mask": torch.tensor(MASKS[mask])}
    given = {name: x.cuda() for name, x in given.items()}
    if by == "hidden states":
        given["output_hidden_states"] = True
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(sequences, "LEAST_COUNTED", 0)
            expected = model.eval()(**given).logits
        for number in range(3):
            torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
            try:
                actual = model(**given).logits
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_on_a_gpu_a_graph_reads_the_copies_of_weights_as_each_step_makes_them():
    plain, recorded = (model.train() for model in on_gpu("own", hidden_dropout_prob=0.0))
    buckets.allow(plain, False)
    copies = [WeightCopies(model, torch.bfloat16) for model in (plain, recorded)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (plain, recorded)]
    inputs = on_gpu_batch([7, 3, 5, 6])
    labels = (torch.arange(4) % 3).cuda()
    before = num_recorded()
    for _ in range(4):
        found = []
        for model, own, optimizer in zip((plain, recorded), copies, optimizers, strict=True):
            with torch.autocast("cuda", torch.bfloat16), own.in_use():
                found.append([x.float() for x in step(model, inputs, labels) if x is not None])
            optimizer.step()
        for a, e in zip(*found, strict=True):
            assert (a - e).abs().max() <= 2e-2 * (1 + e.abs().max())
    assert num_recorded() == before + 1


def test_on_a_gpu_other_streams_and_threads_see_their_own_results():
    plain, recorded = (model.eval() for model in on_gpu())
    inputs = [on_gpu_batch([100, 60], number) for number in range(6)]
    expected = [logits(plain, one) for one in inputs]
    torch.cuda.synchronize()
    found = [None] * len(inputs)

    def run(number):
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for _ in range(10):
                found[number] = recorded(**inputs[number]).logits
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(found, expected)


def test_on_a_gpu_the_callers_own_recording_holds_no_graph_of_ours():
    _, recorded = (model.eval() for model in on_gpu())
    ids = batch([64])["input_ids"].cuda()
    expected = logits(recorded, {"input_ids": ids})
    before = num_recorded()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        recorded(ids)
        with torch.cuda.graph(graph):
            out = recorded(ids).logits
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    assert num_recorded() == before


def test_on_a_gpu_training_goes_the_same_way_with_graphs():
    found = []
    for model in on_gpu():
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
        scaler = torch.amp.GradScaler("cuda")
        losses = []
        for number in range(12):
            inputs = on_gpu_batch([40, 30, 20, 10], number)
            with torch.autocast("cuda", torch.float16):
                loss = model(**inputs, labels=inputs["input_ids"][:, 1] % 3).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(torch.tensor(losses))
    torch.testing.assert_close(*found, rtol=0.05, atol=0.02)


def test_on_a_gpu_layers_in_fp8_are_replayed():
    if not fp8.multiplies_fp8(torch.device("cuda", 0)):
        pytest.skip("needs a GPU that multiplies FP8")
    plain, recorded = (m.train() for m in on_gpu(hidden_size=64, hidden_dropout_prob=0.0))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, recorded)]
    for model in (plain, recorded):
        fp8.enable(model)
    before = num_recorded()
    for number in range(6):
        inputs = on_gpu_batch([7, 3, 5, 6], number)
        found = []
        for model, optimizer in zip((plain, recorded), optimizers, strict=True):
            with torch.autocast("cuda", torch.bfloat16):
                found.append(step(model, inputs, (torch.arange(4) % 3).cuda()))
            optimizer.step()
        for a, e in zip(*found, strict=True):
            if e is not None:
                assert (a.float() - e.float()).norm() <= 0.05 * e.float().norm() + 1e-3
        (own,), (expected,) = fp8.scales_of(recorded), fp8.scales_of(plain)
        # of weights and gradients: spare tokens count among the largest inputs
        torch.testing.assert_close(own.history[:, 1:], expected.history[:, 1:], rtol=0.1, atol=0)
    assert num_recorded() == before + 1


def test_on_a_gpu_a_recording_that_fails_leaves_the_generator_and_the_pool_as_they_are():
    def waits(x):
        return torch.nn.functional.gelu(x) * (1 + 0 * x.sum().item())

    plain, recorded = (model.train() for model in on_gpu("own", hidden_act=waits))
    inputs = on_gpu_batch([7, 3, 5, 6])
    labels = (torch.arange(4) % 3).cuda()
    before = num_recorded()
    for _ in range(2):
        a, e = (step(model, inputs, labels)[0] for model in (recorded, plain))
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
    assert num_recorded() == before
    torch.nn.functional.dropout(torch.ones(9, device="cuda"), 0.5)
    _, other = (model.eval() for model in on_gpu())
    logits(other, inputs)
    assert num_recorded() == before + 1
