"""By copies of its weights a step computes what autocast computes, with fewer launches."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from fastbert.modules.adapters import LowRank
from fastbert.modules.graphs import buckets
from fastbert.modules.linear import Leaf, biases_of, fused_linear, product
from fastbert.modules.products import PRODUCTS, fp8
from fastbert.modules.products.weight_copies import WeightCopies
from tests.modules.graphs.case import (
    Counter,
    Repeats,
    batch,
    layers_of,
    logits,
    models,
    plans_of,
    step,
    use,
)

BF16 = torch.bfloat16
LENGTHS = [9, 4, 16, 1]


def autocast(dtype=BF16):
    return torch.autocast("cpu", dtype)


def pair(**options):
    """The same own model twice, for training without graphs."""
    plain, copied = models("own", **options)
    buckets.allow(copied, False)
    return plain.train(), copied.train()


def marked(model):
    return [name for name, module in model.named_modules() if PRODUCTS in vars(module)]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["whole", "checkpointed"])
def test_a_step_computes_what_autocast_does_bit_by_bit(checkpointed, dtype):
    plain, copied = pair()
    copies = WeightCopies(copied, dtype)
    if checkpointed:
        plain.gradient_checkpointing_enable()
        copied.gradient_checkpointing_enable()
    for seed in range(2):
        inputs = batch(LENGTHS, seed)
        with autocast(dtype):
            expected = step(plain, inputs)
            with copies.in_use():
                actual = step(copied, inputs)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype
            assert torch.equal(a, e)
        with torch.no_grad():  # as an optimizer does
            for p, q in zip(plain.parameters(), copied.parameters(), strict=True):
                p.mul_(1.25)
                q.mul_(1.25)


def test_a_step_casts_each_weight_and_joins_none():
    """Of the encoder: heads and embeddings are autocast's."""
    plain, copied = pair()
    copies = WeightCopies(copied, BF16)
    inputs = batch(LENGTHS)
    with autocast(), Counter() as before:
        step(plain, inputs)
    with autocast(), copies.in_use(), Counter() as after:
        step(copied, inputs)
    layers = copied.config.num_hidden_layers
    # four products a layer, and one more in the last, whose queries are of some rows alone; as many
    # casts of gradients are still there, as a CPU's product cannot write another dtype
    assert before.calls["_to_copy"] - after.calls["_to_copy"] == 4 * layers + 1
    assert before.calls["cat"] - after.calls["cat"] == layers
    assert before.calls["mm"] == after.calls["mm"]


def test_copies_are_of_the_encoders_weights_but_for_wider_ones():
    _, model = pair()
    layers = layers_of(model)
    layers[0].attention.self.query.requires_grad_(False)
    layers[1].output.dense.to(BF16)
    layers[1].attention.output.dense.double()
    with WeightCopies(model, BF16).in_use():
        names = marked(model)
    assert len(names) == 1 + 2 * 6 - 1
    assert all("encoder.layer" in name for name in names)
    assert not any(name.endswith("1.attention.output.dense") for name in names)
    assert not marked(model)
    fp8.enable(model)
    before = {
        name: vars(module)[PRODUCTS] for name, module in model.named_modules() if name in names
    }
    with WeightCopies(model, BF16).in_use():
        now = {
            name: vars(module)[PRODUCTS] for name, module in model.named_modules() if name in before
        }
    assert now == before


def test_a_model_without_an_encoder_has_none():
    with WeightCopies(nn.Linear(4, 4), BF16).in_use():
        pass


def test_after_an_error_nothing_reads_the_copies():
    _, model = pair()
    with contextlib.suppress(ZeroDivisionError), WeightCopies(model, BF16).in_use():
        assert marked(model)
        raise ZeroDivisionError
    assert not marked(model)


def linears(*sizes, seed=0):
    """Lists of plain layers of 24 inputs, and copies of their weights."""
    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Linear(24, size) for size in sizes)
    return layers, WeightCopies(layers, BF16)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (64, 128), (5, 7, 3)], ids=str)
def test_weights_side_by_side_are_one_product(sizes):
    """Where sizes leave gaps between the copies, these are joined."""
    layers, copies = linears(*sizes)
    x = torch.randn(6, 24, requires_grad=True)
    leaves = [Leaf(layer) for layer in layers]
    with autocast():
        exact, _ = fused_linear(x, leaves, None)
        inputs = [x, *layers.parameters()]
        dy = torch.randn_like(exact)
        expected = torch.autograd.grad(exact, inputs, dy)
        with copies.in_use():
            y, _ = fused_linear(x, leaves, None)
            actual = torch.autograd.grad(y, inputs, dy)
    assert torch.equal(y, exact)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_what_is_not_asked_for_by_autocast_to_their_dtype_has_no_copies():
    layers, copies = linears(8)
    # whole numbers, whose products are the same bits in whatever order they are added up
    x, leaf = torch.randint(-1, 2, (3, 24)).float(), Leaf(layers[0])
    with torch.no_grad():
        leaf.weight.copy_(torch.randint(-1, 2, leaf.weight.shape))
    copies.renew()
    exact = product(x, [leaf], biases_of(leaf))
    with copies.in_use():
        assert torch.equal(product(x, [leaf], biases_of(leaf)), exact)
        with autocast():
            assert product(x.double(), [Leaf(layers.double()[0])], ()).dtype == torch.float64
        layers.float()
        with autocast(torch.float16):
            assert product(x, [leaf], biases_of(leaf)).dtype == torch.float16
        layers[0].weight = nn.Parameter(layers[0].weight * 2)  # another one than has the copy
        with autocast():
            new = product(x, [leaf], ())
    assert torch.equal(new, x.to(BF16) @ layers[0].weight.to(BF16).t())


def test_a_weight_at_the_address_of_one_that_moved_is_another():
    """An allocator gives the memory of a freed storage, and of its object, to the next one."""
    layers, copies = linears(8)
    copies.renew()
    for _ in range(100):
        layers[0].weight.data = layers[0].weight.data.clone()  # frees the one before
        other = Leaf(nn.Linear(24, 8))
        with autocast():
            assert copies.product(torch.ones(3, 24), [other.weight], ()) is None


def test_gradients_add_up_over_micro_batches_in_the_weights_dtype():
    layers, copies = linears(8)
    leaf = Leaf(layers[0])
    xs = [torch.randn(4, 24) for _ in range(3)]
    with autocast(), copies.in_use():
        for x in xs:
            product(x, [leaf], biases_of(leaf)).float().sum().backward()
    assert leaf.weight.grad.dtype == torch.float32
    expected = sum(x.to(BF16).double().sum(0) for x in xs)
    torch.testing.assert_close(leaf.weight.grad[0].double(), expected, rtol=2**-8, atol=1e-2)


def test_a_second_derivative_is_refused():
    layers, copies = linears(8)
    x = torch.randn(3, 24, requires_grad=True)
    with autocast(), copies.in_use():
        y = product(x, [Leaf(layers[0])], ())
        dy = torch.randn_like(y, requires_grad=True)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()


def test_weights_that_changed_between_forward_and_backward_are_an_error():
    """The backward needs the copies that the forward read."""
    layers, copies = linears(8)
    x = torch.randn(3, 24, requires_grad=True)
    with autocast(), copies.in_use():
        y = product(x, [Leaf(layers[0])], ())
    with copies.in_use(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_graph_of_a_bucket_keeps_to_the_copies_that_it_was_recorded_with(training, monkeypatch):
    recorder = use(Repeats(), monkeypatch)
    model = models("own")[1].train(training)
    inputs = batch(LENGTHS)
    first, second = WeightCopies(model, BF16), WeightCopies(model, BF16)
    with autocast():
        for _ in range(2):
            found = []
            for way in (contextlib.nullcontext, first.in_use, second.in_use):
                with way():
                    found.append(step(model, inputs) if training else [logits(model, inputs)])
            for others in found[1:]:
                assert all(map(torch.equal, found[0], others))
            with torch.no_grad():
                layers_of(model)[0].output.dense.weight.mul_(1.5)
    each = 1 + training  # a forward and a backward
    assert recorder.recorded == each * 3
    assert recorder.replayed == 2 * each * 3


@pytest.mark.parametrize("kind", ["own", "Bert"])
@pytest.mark.parametrize("casts", [True, False], ids=["autocast", "float32"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_graph_of_a_bucket_begins_with_copies_of_weights(kind, casts, training, monkeypatch):
    """Also of frozen ones, and made again by each replay, so that it sees what became of them."""
    precision = torch.autocast("cpu", BF16, enabled=casts)
    counted = []

    class Counts(Repeats):
        def record(self, lane, work):
            with Counter() as counter:
                replay = super().record(lane, work)
            counted.append(counter.calls)
            return replay

    def run(model):
        return step(model, inputs) if training else [logits(model, inputs)]

    recorder = use(Counts(), monkeypatch)
    plain, recorded = (model.train(training) for model in models(kind, hidden_size=64))
    inputs = batch(LENGTHS)
    for model in (plain, recorded):
        layers_of(model)[1].intermediate.dense.weight.requires_grad_(False)
    with precision:
        for _ in range(3):
            for a, e in zip(run(recorded), run(plain), strict=True):
                assert (a is None) == (e is None)
                if a is not None:  # products of more rows round in another way
                    torch.testing.assert_close(a.float(), e.float(), rtol=0.02, atol=2e-3)
            for model in (plain, recorded):
                layers_of(model)[0].output.dense.weight.data.mul_(1.5)
    each = 1 + training  # a forward and a backward
    assert (recorder.recorded, recorder.replayed) == (each, 3 * each)
    forward, layers = counted[0], plain.config.num_hidden_layers
    assert forward["_foreach_copy_"] == 1

    monkeypatch.setattr(WeightCopies, "product", lambda *_: None)
    counted.clear()
    for plan in plans_of(recorded):
        plan.recorded = None
    with precision:
        run(recorded)
    # there is one more product in the last layer, whose queries are of some rows alone; the biases
    # of queries, keys and values have copies where there is no gradient
    casts_of_weights = 4 * layers + 1
    casts_of_biases = 0 if training else layers + 1
    less = counted[0] - forward
    assert less["_to_copy"] == casts * (casts_of_weights + casts_of_biases)
    assert less["cat"] == layers * (1 if training else 2)


def test_adapters_read_their_copies():
    layers = nn.ModuleList([nn.Linear(24, 8), nn.Linear(24, 4), nn.Linear(4, 8)])
    copies, (_, down, up) = WeightCopies(layers, BF16), map(Leaf, layers)
    leaf, x = Leaf(layers[0], adapters=[LowRank(down, up, 0.0, 0.5)]), torch.randn(3, 24)
    with autocast(), Counter() as before:
        expected = leaf(x)
    with autocast(), copies.in_use(), Counter() as after:
        found = leaf(x)
    assert torch.equal(found, expected)
    assert before.calls["_to_copy"] - after.calls["_to_copy"] == len(layers)


def test_the_graphs_of_copies_go_with_their_model(monkeypatch):
    use(Repeats(), monkeypatch)
    _, model = models("own")
    copies = WeightCopies(model, BF16)
    with autocast(), copies.in_use():
        step(model.train(), batch(LENGTHS))
    gone = weakref.ref(layers_of(model))
    del model, copies
    gc.collect()
    assert gone() is None


def test_shards_have_no_copies():
    _, model = models("own")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        first, second = layers_of(model)
        fully_shard(first)
        copies = WeightCopies(model, BF16)
        assert set(copies.starts) == {*second.parameters()} - norms_of(second)
    finally:
        torch.distributed.destroy_process_group()


def norms_of(layer):
    norms = [module for module in layer.modules() if isinstance(module, nn.LayerNorm)]
    return {parameter for norm in norms for parameter in norm.parameters()}


@pytest.mark.gpu
def test_a_gpus_products_write_gradients_that_are_not_rounded():
    layers, _ = linears(64)
    layers.cuda()
    copies, leaf = WeightCopies(layers, BF16), Leaf(layers[0])
    x = torch.randn(512, 24, device="cuda")
    dy = torch.randn(512, 64, device="cuda", dtype=BF16)
    exact = dy.double().t() @ x.to(BF16).double()
    with torch.autocast("cuda", BF16):
        (rounded,) = torch.autograd.grad(product(x, [leaf], ()), leaf.weight, dy)
        with copies.in_use():
            (found,) = torch.autograd.grad(product(x, [leaf], ()), leaf.weight, dy)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.1 * (rounded - exact).norm()
