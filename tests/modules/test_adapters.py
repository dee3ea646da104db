"""LoRA layers read as leaves: the same numbers as by calling them, or not read at all."""

import contextlib

import pytest
import torch
from torch import nn

from fastbert import rng
from fastbert.config.bert import BertConfig
from fastbert.modules.adapters import MOST_ADAPTERS, MOST_LINEARS, read_leaf
from fastbert.modules.bert_layer import BertLayer, parts_of

peft = pytest.importorskip("peft", reason="adapters need peft")


class Model(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.linear = nn.Linear(24, 16, bias=bias)

    def forward(self, x):
        return self.linear(x)


def lora(model=None, **options):
    """The LoRA layer that peft makes of a linear layer, with two adapters, the first active."""
    torch.manual_seed(0)
    options = {"target_modules": ["linear"], "r": 4, "init_lora_weights": False, **options}
    adapted = peft.get_peft_model(model or Model(), peft.LoraConfig(**options))
    adapted.add_adapter("other", peft.LoraConfig(**options | {"r": 6, "lora_alpha": 3}))
    return adapted.base_model.model.linear


def active(module, *names):
    module.set_adapter(list(names))
    return module


def gradients(module, function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    trained = [p for p in module.parameters() if p.requires_grad]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *trained], dy)]


@pytest.mark.parametrize("precision", ["float32", "autocast", "low base"])
@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"]], ids="+".join)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_an_adapted_layer_gives_pefts_result_and_gradients(options, names, precision):
    module, dtype = active(lora(**options), *names), torch.float32
    if precision == "low base":  # as peft leaves adapters of a half-precision model in float32
        dtype = module.base_layer.bfloat16().weight.dtype
    leaf = read_leaf(module)
    assert (leaf.is_read, leaf.is_plain) == (True, False)
    assert len(leaf.inner) == 1 + 2 * len(names)
    x, context = torch.randn(7, 24, dtype=dtype), contextlib.nullcontext()
    if precision == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    with context:
        ours, theirs = gradients(module, leaf, x), gradients(module, module, x)
    assert len(ours) == 2 + (2 + ("lora_bias" in options)) * len(names)
    tolerance = {} if precision == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    for a, e in zip(ours, theirs, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.slow
def test_a_compiled_layer_gives_the_same():
    module, x = lora(), torch.randn(7, 24)
    compiled = torch.compile(lambda x: read_leaf(module)(x))
    torch.testing.assert_close(compiled(x), module(x))


def test_an_adapter_that_is_off_or_merged_leaves_a_plain_layer():
    module, x = lora(), torch.randn(7, 24)
    expected = module(x)
    module.merge()
    leaf = read_leaf(module)
    assert leaf.is_plain
    torch.testing.assert_close(leaf(x), expected)
    module.unmerge()
    module.enable_adapters(False)
    assert read_leaf(module).module is module.base_layer
    assert read_leaf(module).is_plain


def test_the_scale_is_the_present_one():
    module, x = lora(), torch.randn(7, 24)
    module.scale_layer(3.0)
    torch.testing.assert_close(read_leaf(module)(x), module(x))
    assert not torch.allclose(module(x), module.base_layer(x), atol=1e-2)


class OfTheUsers(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def hooked(module):
    module.lora_A["default"].register_forward_hook(lambda *_: None)


def watched(module):
    module.register_forward_pre_hook(lambda *_: None)


def another_base(module):
    module.base_layer.__class__ = OfTheUsers


def another_down(module):
    module.lora_A["default"].__class__ = OfTheUsers


def another_dropout(module):
    module.lora_dropout["default"] = nn.AlphaDropout(0.1)


def nothing_kept(module):
    module.lora_dropout["default"] = nn.Dropout(1.0)


def merged_and_off(module):
    """Its forward takes the adapters out of the weight."""
    module.merge()
    module._disable_adapters = True


def without_casts(module):
    module.cast_input_dtype_enabled = False


def many(module):
    for number in range(MOST_ADAPTERS):
        module.update_layer(
            f"n{number}", 2, lora_alpha=1, config=peft.LoraConfig(init_lora_weights=False)
        )
    module.set_adapter(list(module.lora_A))


def replaced(module):
    module.forward = lambda x: x


CHANGES = [hooked, watched, another_base, another_down, another_dropout, merged_and_off]
CHANGES += [nothing_kept, without_casts, many, replaced]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_layers_are_called(change):
    module = lora()
    change(module)
    leaf = read_leaf(module)
    assert leaf.module is module
    assert not leaf.is_read


def test_variants_are_called():
    assert not read_leaf(lora(use_dora=True)).is_read


def test_users_own_forward_is_called(monkeypatch):
    module = lora()
    monkeypatch.setattr(type(module), "forward", lambda self, x: self.base_layer(x))
    assert not read_leaf(module).is_read


def test_dropout_is_by_counter_at_sites_of_its_own():
    """All different: linear layers of a layer, adapters of one, layers of a model, other sites."""
    module = active(lora(lora_dropout=0.5, r=24), "default")
    with torch.no_grad():
        module.lora_A["default"].weight.copy_(torch.eye(24))
    module.lora_B["default"] = nn.Linear(24, 24, bias=False)
    module.lora_B["other"] = nn.Linear(6, 24, bias=False)
    module.base_layer = nn.Linear(24, 24)
    nn.init.zeros_(module.base_layer.weight)
    nn.init.zeros_(module.base_layer.bias)
    nn.init.eye_(module.lora_B["default"].weight)
    state, x = rng.fresh(40, torch.device("cpu")), torch.ones(40, 24)
    masks = {0: rng.hidden_keep_mask(state, 24, 0.5)}
    for place in range(6):
        for site in (1, 2, 3, 4):
            leaf = read_leaf(module)
            leaf.place = place
            y = leaf(x, state.at(site))
            assert torch.equal(y, leaf(x, state.at(site)))
            masks[place, site] = y != 0
            assert 0.4 < masks[place, site].float().mean() < 0.6
    flat = [mask.flatten().tolist() for mask in masks.values()]
    assert len({*map(tuple, flat)}) == len(flat)
    module.eval()
    assert (read_leaf(module)(x, state) != 0).all()


def test_linear_layers_of_a_layer_have_places_of_their_own():
    layer = BertLayer(BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24))
    linears = [leaf for leaf in parts_of(layer).leaves if isinstance(leaf.module, nn.Linear)]
    assert sorted(leaf.place for leaf in linears) == list(range(MOST_LINEARS))


def test_a_layer_drops_where_an_adapter_does():
    config = BertConfig(
        hidden_size=24, num_attention_heads=2, hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )
    layer = BertLayer(config)
    assert not parts_of(layer).drops
    layer.output.dense = lora(Model(), lora_dropout=0.5)
    assert parts_of(layer).drops
    layer.eval()
    assert not parts_of(layer).drops


def test_two_adapters_drop_by_themselves():
    module = active(lora(lora_dropout=0.5), "default", "other")
    (first, _), state = read_leaf(module).adapters, rng.fresh(40, torch.device("cpu"))
    x = torch.ones(40, 24)
    twice = read_leaf(module)
    twice.adapters = [first, first._replace(scaling=-first.scaling)]
    assert not torch.allclose(twice(x, state), module.base_layer(x), atol=1e-2)


def test_the_sites_of_the_last_adapter_have_16_bits():
    module = lora(lora_dropout=0.5)
    leaf, state = read_leaf(active(module, "default")), rng.fresh(4, torch.device("cpu"))
    (adapter,), seen = leaf.adapters, []

    class Told(type(state)):
        def at(self, site):
            seen.append(site)
            return state.at(site)

    leaf.adapters, leaf.place = [adapter] * MOST_ADAPTERS, 5
    leaf(torch.ones(4, 24), Told(state.state, state.token_key, 1023))
    assert len({*seen}) == MOST_ADAPTERS
    assert max(seen) < 2**16
