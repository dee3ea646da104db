"""FP8 in the encoders of own and patched models: which products, which scales, and what is kept."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
import torch.nn.utils.prune
import transformers
from torch.distributed.fsdp import fully_shard

import fastbert
from fastbert import backend
from fastbert.modules.products import PRODUCTS, fp8
from fastbert.ops import fp8_plain
from fastbert.ops.fp8_linear import fp8_feed_forward, fp8_linear
from fastbert.ops.fp8_plain import E4M3, E5M2, LARGEST

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PER_LAYER = 6  # query, key, value, attention's output, intermediate, output
IDS = torch.randint(1, 60, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def emulated():
    with backend.use("reference"):
        yield


def own():
    torch.manual_seed(0)
    model = fastbert.BertForMaskedLM(fastbert.BertConfig(**SHAPE))
    fp8.enable(model)
    return model.train()


def patched():
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE))
    return fastbert.patch(model, precision="fp8").train()


KINDS = pytest.mark.parametrize("make", [own, patched])


def step(model):
    loss = model(IDS, labels=IDS).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def without(model):
    plain = copy.deepcopy(model)
    fp8.disable(plain)
    return plain


@KINDS
def test_training_is_near_that_of_float32_and_not_the_same(make):
    model = make()
    (loss, gradients), (expected, exact) = step(model), step(without(model))
    assert 0 < abs(loss - expected) < 0.01
    for name, gradient in gradients.items():
        if exact[name].norm() > 1e-6:  # a key's bias has none
            wrong = (gradient - exact[name]).norm() / exact[name].norm()
            assert wrong < 0.15, name


@KINDS
def test_eval_mode_is_that_of_the_model_without(make):
    model = make()
    step(model)
    with torch.no_grad():
        found, expected = (one.eval()(IDS).logits for one in (model, without(model)))
    assert torch.equal(found, expected)


@KINDS
def test_the_products_of_layers_and_no_others_are_in_fp8(make):
    model = make()
    report = str(fastbert.explain(model, input_ids=IDS, labels=IDS))
    marked = [name for name, module in model.named_modules() if PRODUCTS in vars(module)]
    assert len(marked) == 1 + 2 * PER_LAYER
    assert all("encoder.layer" in name for name in marked)
    assert report.count("fp8_linear") >= 1


@KINDS
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_a_feed_forward_with_gelu_is_one_operator(make, hidden_act, monkeypatch):
    monkeypatch.setitem(SHAPE, "hidden_act", hidden_act)
    report = str(fastbert.explain(make(), input_ids=IDS, labels=IDS))
    assert ("fp8_feed_forward" in report) == (hidden_act != "relu")


@KINDS
def test_kernels_train_as_the_emulation_does(make):
    if not backend.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    model = make()
    other = copy.deepcopy(model)
    loss, expected = step(model)
    with backend.use("triton"):
        found_loss, found = step(other)
    assert abs(found_loss - loss) < 1e-4
    for name, gradient in found.items():
        wrong = (gradient - expected[name]).norm()
        # a few casts round to the other neighbour; a key's bias has no gradient but by rounding
        assert wrong <= 0.02 * expected[name].norm() + 1e-6 * ("key.bias" in name), name


@KINDS
def test_scales_follow_the_largest_values_of_the_last_passes(make):
    model = make()
    (scales,) = fp8.scales_of(model)
    initial = scales.history[:, :, 0].clone()
    seen = []
    norms = [m.weight for n, m in model.named_modules() if n.endswith("output.LayerNorm")]
    for number in range(fp8.HISTORY + 3):
        with torch.no_grad():  # so that what flows has another size in each pass
            for weight in norms:
                weight.fill_(1 + number * 7 % 5)
        step(model)
        seen.append(scales.amax.clone())
    model(IDS)  # begins another pass
    # query, key and value are one product; two in the last layer, which has few queries
    used = seen[0] > 0
    assert used.sum() == 3 * (PER_LAYER - 2 + PER_LAYER - 1)
    last = torch.stack(seen[-fp8.HISTORY :]).amax(0)
    largest = torch.where(used, last, initial)
    for number, format in enumerate((E4M3, E4M3, E5M2)):
        for place in range(len(largest)):
            scale, most = scales.scale[place, number].item(), largest[place, number].item()
            assert math.frexp(scale)[0] == 0.5
            assert scale * most <= LARGEST[format] < 2 * scale * most


@KINDS
def test_a_pass_that_began_later_does_not_change_the_gradients_of_an_earlier_one(make):
    model = make()
    other = copy.deepcopy(model)
    _, expected = step(other)
    loss = model(IDS, labels=IDS).loss
    model(IDS.flip(1), labels=IDS)
    (scales,) = fp8.scales_of(model)
    scales.scale.mul_(2.0**-12)  # which would flush most casts to 0
    loss.backward()
    # the second pass's scales are a tensor of their own
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_on_the_meta_device_it_is_enabled_too():
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE))
    (scales,) = fp8.scales_of(fastbert.patch(model, precision="fp8"))
    assert scales.history.device.type == "cpu"


def test_powers_of_two():
    x = torch.tensor([1.0, 1.999, 2.0, 0.3, 448.0, 0.0, torch.inf, torch.nan, 1e38, 1e-38])
    found = fp8.power_of_two(x).tolist()
    assert found == [1, 1, 2, 0.25, 256, 1, 1, 1, 2.0**60, 2.0**-60]


@KINDS
def test_checkpoints_have_the_same_keys(make):
    model = make()
    assert model.state_dict().keys() == without(model).state_dict().keys()


@KINDS
def test_copies_and_pickles_have_scales_of_their_own(make):
    model = make()
    step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (scales,), (theirs,) = fp8.scales_of(model), fp8.scales_of(other)
        assert torch.equal(scales.history, theirs.history)
        assert scales is not theirs
        assert step(copy.deepcopy(model))[0] == step(other)[0]
        slots = [vars(module).get(PRODUCTS) for module in other.modules()]
        assert all(slot.scales is theirs for slot in slots if isinstance(slot, fp8.Slot))


def test_the_state_goes_on_where_it_was():
    model, other = own(), own()
    for _ in range(3):
        step(model)
    fp8.load(other, fp8.state(model))
    assert step(model)[0] == step(other)[0]
    with pytest.raises(ValueError, match="scales of 1 encoders, got 0"):
        fp8.load(other, [])


@KINDS
def test_a_checkpointed_encoder_has_the_same_gradients(make):
    model, other = make(), make()
    other.gradient_checkpointing_enable()
    (loss, gradients), (expected, exact) = step(other), step(model)
    assert loss == expected
    for name in exact:
        torch.testing.assert_close(gradients[name], exact[name], rtol=1e-5, atol=1e-7)


def test_without_the_hardware_it_is_one_clear_error():
    model = patched()
    with backend.use(None), pytest.raises(RuntimeError, match="cpu does not multiply FP8"):
        model(IDS)
    with backend.use(None), torch.no_grad():
        model.eval()(IDS)


def test_unpatching_or_patching_again_takes_it_back():
    model = patched()
    assert fp8.scales_of(model)
    assert not fp8.scales_of(fastbert.patch(model))
    model = patched()
    assert not fp8.scales_of(fastbert.unpatch(model))
    with pytest.raises(ValueError, match='precision: expected "auto" or "fp8", got \'int8\''):
        fastbert.patch(model, precision="int8")
    with pytest.raises(ValueError, match="linear layers whose sizes are multiples of 16"):
        fp8.enable(torch.nn.Linear(16, 16))


def test_sizes_that_the_products_do_not_take_stay_as_they_are():
    torch.manual_seed(0)
    config = fastbert.BertConfig(**SHAPE | {"intermediate_size": 40})
    model = fastbert.BertModel(config)
    fp8.enable(model)
    marked = [
        name
        for name, module in model.named_modules()
        if isinstance(vars(module).get(PRODUCTS), fp8.Slot)
    ]
    assert len(marked) == 2 * 4
    assert not any("intermediate" in name for name in marked)


def test_an_adapter_is_in_no_fp8_whichever_is_there_first():
    peft = pytest.importorskip("peft", reason="adapters need peft")

    def adapted(model):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=16, target_modules=["query"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    losses = []
    for order in ("before", "after"):
        model = patched() if order == "before" else fastbert.unpatch(patched())
        model = adapted(model)
        if order == "after":
            fastbert.patch(model, precision="fp8")
        losses.append(model.train()(IDS, labels=IDS).loss.item())
        assert len(fp8.scales_of(model)[0].history) == 2 * PER_LAYER
    assert losses[0] == losses[1]


@KINDS
def test_a_pruned_layer_is_refused(make):
    """It would multiply by itself, without FP8."""
    model = make()
    linear = next(m for m in model.modules() if PRODUCTS in vars(m) and hasattr(m, "weight"))
    torch.nn.utils.prune.l1_unstructured(linear, "weight", 0.5)
    with pytest.raises(RuntimeError, match=r"as while it is pruned: call .*prune\.remove"):
        model(IDS)
    model.eval()(IDS)
    torch.nn.utils.prune.remove(linear, "weight")
    model.train()(IDS)


@KINDS
def test_tensors_in_the_place_of_parameters_train_alike(make):
    """As FSDP1 sets them; a model wrapped by it spoils later calls of torch.compile."""
    usual, sharded = make(), make()
    expected, tensors = step(usual)[1], {}
    for name, module in sharded.named_modules():
        if type(module) is torch.nn.Linear:
            for own in ("weight", "bias"):
                tensor = module._parameters.pop(own).detach().requires_grad_()
                setattr(module, own, tensor)
                tensors[f"{name}.{own}"] = tensor
    sharded(IDS, labels=IDS).loss.backward()
    for name, tensor in tensors.items():
        if name in expected:  # a tied table is an embedding's parameter
            assert torch.equal(tensor.grad, expected[name]), name
    (own,), (others,) = fp8.scales_of(usual), fp8.scales_of(sharded)
    assert torch.equal(own.amax, others.amax)


@KINDS
def test_shards_that_a_layer_gathers_itself_train_alike(make):
    whole, sharded = make(), make()
    with one_process():
        for layer in next(m for m in sharded.modules() if isinstance(m, torch.nn.ModuleList)):
            fully_shard(layer)
        fully_shard(sharded)
        for _ in range(3):
            losses = []
            for model in (whole, sharded):
                loss = model(IDS, labels=IDS).loss
                loss.backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
                losses.append(loss.item())
            assert losses[0] == losses[1]
    (own,), (others) = fp8.scales_of(whole), fp8.scales_of(sharded)
    assert torch.equal(own.history, others[0].history)


@contextlib.contextmanager
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.exhaustive
def test_torch_compile_leaves_the_products_out_or_says_so():
    model = patched()
    loss, _ = step(copy.deepcopy(model))
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    assert step(compiled)[0] == loss
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"not under torch\.compile"):
        whole(IDS)


@pytest.fixture
def products(monkeypatch):
    """Counts products, whose scales must lie where cuBLAS takes them from: at multiples of 16."""
    plain, met = fp8_plain.product, []

    def product(a, b, of_a, of_b, bias, dtype):
        met.append((of_a.data_ptr() % 16, of_b.data_ptr() % 16))
        return plain(a, b, of_a, of_b, bias, dtype)

    monkeypatch.setattr(fp8_plain, "product", product)
    return met


@KINDS
def test_a_steps_scales_lie_where_cublas_takes_them_from(make, products):
    step(make())
    assert len(products) >= 3 * 2 * 4  # three for each of a layer's four products
    assert set(products) == {(0, 0)}


def test_an_operators_scales_lie_where_cublas_takes_them_from(products):
    x, weight = torch.randn(16, 16), torch.randn(16, 16, requires_grad=True)
    scale, amax = torch.tensor([8.0, 4.0, 2.0]), torch.zeros(3)
    fp8_linear(x, weight, None, scale, amax).sum().backward()
    fp8_feed_forward(x, weight, weight[0], weight, scale, amax, scale, amax).sum().backward()
    assert len(products) == 2 + 5
    assert set(products) == {(0, 0)}
