"""LoRA adapters on patched models."""

import copy

import pytest
import torch
import transformers

import fastbert
from fastbert import backend
from fastbert.modules import sequences
from fastbert.ops.fp8_linear import fp8_linear
from tests.hf.trainer_case import Sentences, collate, train
from tests.hf.training_case import assert_same_gradients, gradients, make_batch, make_model

peft = pytest.importorskip("peft", reason="adapters need peft")

KIND = transformers.BertForSequenceClassification
# some projections of a layer are wrapped and some are not, so that both paths are taken
TARGETS = ["query", "value", "output.dense"]


def make_base():
    return make_model(KIND, num_labels=3)


def add_adapter(model, dropout=0.0):
    """An adapter whose product is not zero, so that leaving it out shows."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=TARGETS,
        lora_dropout=dropout,
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config)


def make_batch_of_three_classes():
    return make_batch() | {"labels": torch.tensor([0, 2, 1, 1])}


@pytest.fixture(params=["patched before", "patched after"])
def adapted(request):
    """(patched model with an adapter, Hugging Face's with the same)"""
    base = make_base()
    theirs = add_adapter(copy.deepcopy(base))
    if request.param == "patched before":
        return add_adapter(fastbert.patch(base)), theirs
    return fastbert.patch(add_adapter(base)), theirs


def test_a_hook_inside_an_adapter_sees_padded_sequences(adapted):
    shapes = []
    for model in adapted:
        inner = model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer
        inner.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
        model(**make_batch_of_three_classes())
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]


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


def test_an_own_model_with_an_adapter_gives_the_patched_models_loss_and_gradients():
    base = make_base()
    own = fastbert.BertForSequenceClassification(base.config)
    own.load_state_dict(base.state_dict())
    batch, found = make_batch_of_three_classes(), []
    for model in (fastbert.patch(base), own):
        adapter = add_adapter(model.eval())
        loss = adapter(**batch).loss
        loss.backward()
        found.append((loss.detach(), gradients(adapter)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1])


def make_word_models():
    """(Hugging Face's, fastbert's own with the same weights)"""
    theirs = make_model(transformers.BertForMaskedLM).eval()
    ours = fastbert.BertForMaskedLM(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["word_embeddings", "decoder"]},
        {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
        {"target_modules": ["query"], "modules_to_save": ["cls"]},
        {"target_modules": ["query"], "trainable_token_indices": [1, 2]},
    ],
    ids=lambda adapter: list(adapter)[-1],
)
def test_an_own_models_tied_weights_are_adapted_and_read_back(adapter, tmp_path):
    batch = {name: make_batch()[name] for name in ("input_ids", "attention_mask")}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for model in make_word_models():
        base = copy.deepcopy(model)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(**adapter))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        model.save_pretrained(tmp_path)
        losses.append(model(**batch).loss)
        again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(again(**batch).loss, losses[-1])
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(**batch).loss, losses[-1])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_are_learned_with_an_own_model(kind):
    theirs = make_base().eval()
    ours = fastbert.BertForSequenceClassification(
        fastbert.BertConfig.from_dict(theirs.config.to_dict())
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    batch, found = make_batch_of_three_classes(), []
    del batch["token_type_ids"]  # which peft leaves out, with a warning
    options = {"encoder_hidden_size": 8} if kind == "PromptEncoderConfig" else {}
    for model in (theirs, ours):
        torch.manual_seed(1)
        config = getattr(peft, kind)(task_type="SEQ_CLS", num_virtual_tokens=3, **options)
        model = peft.get_peft_model(model, config)
        loss = model(**batch).loss
        loss.backward()
        gradients = [p.grad.sum() for p in model.prompt_encoder.parameters() if p.grad is not None]
        found.append(torch.stack([loss.detach(), *gradients]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_adapters_drop_the_same_where_the_last_layer_computes_some_rows_alone(monkeypatch):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = fastbert.BertConfig(vocab_size=99, num_hidden_layers=2, **shape, **dropouts)
    targets = ["query", "key", "value", "dense"]
    lora = peft.LoraConfig(target_modules=targets, lora_dropout=0.4, init_lora_weights=False)
    model = peft.get_peft_model(fastbert.BertForMaskedLM(config), lora).train()
    # the head's own adapter would draw from torch's generator, as the dropout state does
    model.cls.predictions.transform.dense.lora_dropout["default"].p = 0.0
    ids = torch.randint(5, 99, (3, 9))
    labels, found = ids.masked_fill(torch.rand(3, 9) > 0.4, -100), []
    for least in (0, float("inf")):
        monkeypatch.setattr(sequences, "LABELLED_ALONE", {"cpu": least})
        torch.manual_seed(7)
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1])


@pytest.mark.parametrize("order", ["patched before", "patched after"])
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
