"""LoRA adapters on patched models."""

import copy

import pytest
import torch
import transformers

import fastbert
from fastbert import backend
from fastbert.modules import sequences
from fastbert.ops.fp8_linear import fp8_linear
from tests.hf.peft_case import (
    KIND,
    TARGETS,
    add_adapter,
    make_base,
    make_batch_of_three_classes,
    peft,
)
from tests.hf.trainer_case import Sentences, collate, train
from tests.hf.training_case import assert_same_gradients, gradients

ORDERS = ["patched before", "patched after"]


def make_pair(order, dropout=0.0):
    """(patched model with an adapter, Hugging Face's with the same)"""
    base = make_base()
    theirs = add_adapter(copy.deepcopy(base), dropout)
    if order == "patched before":
        return add_adapter(fastbert.patch(base), dropout), theirs
    return fastbert.patch(add_adapter(base, dropout)), theirs


@pytest.fixture(params=ORDERS)
def adapted(request):
    return make_pair(request.param)


@pytest.mark.parametrize("inside", ["base_layer", "lora_A.default", "lora_dropout.default"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_hook_inside_an_adapter_sees_padded_sequences(order, inside):
    batch, shapes = make_batch_of_three_classes(), []
    for model in make_pair(order, dropout=0.1):
        query = model.base_model.model.bert.encoder.layer[0].attention.self.query
        query.get_submodule(inside).register_forward_hook(
            lambda module, args, output: shapes.append(output.shape[:2])
        )
        for training in (True, False):
            model.train(training)(**batch)
    assert shapes == [batch["input_ids"].shape] * 4


def test_an_adapter_gives_hugging_faces_loss_and_gradients(adapted):
    batch = make_batch_of_three_classes()
    losses = []
    for model in adapted:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    ours, theirs = map(gradients, adapted)
    assert any("lora_A" in name for name in ours)
    assert not any("base_layer" in name for name in ours)
    assert_same_gradients(ours, theirs)


def test_a_trained_adapter_works_on_an_unpatched_base(adapted, tmp_path):
    model, _ = adapted
    _, seen = train(model, tmp_path, max_steps=60, learning_rate=1e-2)
    assert seen.losses[-1] < 0.5 * seen.losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(make_base(), tmp_path / "adapter").eval()
    assert not fastbert.is_patched(loaded)
    batch = make_eval_batch()
    logits = model.eval()(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(make_base().eval()(**batch).logits, logits, atol=1e-2)


def make_eval_batch():
    rows = [dict(Sentences()[index]) for index in range(8)]
    batch = collate([{k: v for k, v in row.items() if k != "text"} for row in rows])
    del batch["labels"]
    return batch


def test_a_merged_adapter_is_a_patched_model(adapted):
    model, theirs = adapted
    batch = make_eval_batch()
    expected = theirs.eval()(**batch).logits
    merged = model.eval().merge_and_unload()
    assert type(merged.bert.encoder.layer[0].attention.self.query) is torch.nn.Linear
    assert fastbert.is_patched(merged)
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_disabled_adapter_leaves_the_base(adapted):
    model, _ = adapted
    batch = make_eval_batch()
    with model.disable_adapter():
        logits = model.eval()(**batch).logits
    expected = make_base().eval()(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_checkpointing_reaches_an_adapter_through_frozen_embeddings(adapted):
    """`enable_input_require_grads` hooks the word embeddings, as reentrant checkpointing needs."""
    model, _ = adapted
    batch = make_batch_of_three_classes()
    model(**batch).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(**batch).loss.backward()
    assert_same_gradients(gradients(model), plain)


def test_an_adapters_dropout_is_drawn():
    model = add_adapter(fastbert.patch(make_base()), dropout=0.5)
    batch = make_batch_of_three_classes()
    first, second = (model(**batch).logits for _ in range(2))
    assert not torch.allclose(first, second)


def other_adapter(model):
    model.set_adapter("other")


def both_adapters(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter(["default", "other"])


def no_adapter(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.merge_adapter()


def scaled(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(2.0)


def unloaded(model):
    model.delete_adapter("default")


def base_trained(model):
    query = model.bert.encoder.layer[0].attention.self.query
    query.base_layer.weight.requires_grad_(True)


CHANGES = [other_adapter, both_adapters, no_adapter, merged, scaled, unloaded, base_trained]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_adapters_is_seen_by_the_next_call(adapted, change):
    batch = make_batch_of_three_classes()
    for model in adapted:
        torch.manual_seed(2)
        model.add_adapter("other", peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False))
        model.base_model.set_adapter("default")
    before = adapted[0](**batch).logits
    for model in adapted:
        model(**batch)
        change(model)
        loss = model(**batch).loss
        if loss.requires_grad:
            loss.backward()
    ours, theirs = [model(**batch).logits for model in adapted]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert change in (merged, base_trained) or not torch.allclose(ours, before, atol=1e-3)
    assert_same_gradients(*map(gradients, adapted))


@pytest.mark.parametrize("order", ORDERS)
def test_the_base_of_an_adapted_layer_multiplies_in_fp8_and_the_adapter_does_not(
    order, monkeypatch
):
    """Layers have sizes that FP8 takes, adapters too."""
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    base, lora = KIND(config), peft.LoraConfig(r=16, target_modules=["query", "value", "dense"])
    if order == "patched before":
        model = peft.get_peft_model(fastbert.patch(base, precision="fp8"), lora)
    else:
        model = fastbert.patch(peft.get_peft_model(base, lora), precision="fp8")
    sizes, run = [], fp8_linear.run

    def seen(call):
        sizes.append(tuple(call.weight.shape))
        return run(call)

    monkeypatch.setattr(fp8_linear, "run", seen)
    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": float("inf")})  # all tokens
    with backend.use("reference"):
        model.train()(torch.randint(5, 99, (2, 8)))
    # queries, keys and values in one product, and the three others
    assert sizes == [(96, 32), (32, 32), (64, 32), (32, 64)]
