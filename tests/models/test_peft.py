"""Adapters and prompts of peft on fastbert's own models."""

import copy

import pytest
import torch
import transformers

import fastbert
from fastbert.modules import sequences
from tests.hf.peft_case import add_adapter, make_base, make_batch_of_three_classes, peft
from tests.hf.training_case import assert_same_gradients, gradients, make_batch, make_model


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


def test_an_adapters_file_names_the_checkpoint_below_it(tmp_path):
    make_model(transformers.BertForMaskedLM).save_pretrained(tmp_path / "below")
    said = []
    for library in (transformers, fastbert):
        model = library.BertForMaskedLM.from_pretrained(tmp_path / "below")
        adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
        adapter.save_pretrained(tmp_path / "adapter")
        said.append(peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path)
    assert said == [str(tmp_path / "below")] * 2
