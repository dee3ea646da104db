"""Patched models under Hugging Face's Trainer, against Hugging Face's own on the same batches."""

import copy
import functools

import pytest
import torch
import transformers

import fastbert
from fastbert.hf import stack
from fastbert.modules import layer
from tests.hf.trainer_case import Sentences, collate, train
from tests.hf.training_case import (
    SHAPE,
    assert_same_gradients,
    gradients,
    make_batch,
    make_model,
    make_pair,
)

pytest.importorskip("accelerate", reason="Trainer needs accelerate")


def test_a_patched_classifier_learns_is_evaluated_and_reloads_unpatched(tmp_path):
    model = fastbert.patch(
        make_model(transformers.BertForSequenceClassification, dropout=0.1, num_labels=3)
    )
    columns = []

    def watching(rows):
        columns.append(rows[0].keys())
        return collate(rows)

    trainer, seen = train(model, tmp_path, collator=watching, max_steps=60, learning_rate=3e-3)
    assert columns[0] == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert seen.losses[-1] < 0.5 * seen.losses[0]
    assert trainer.evaluate()["eval_accuracy"] > 0.9

    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert not fastbert.is_patched(loaded)
    batch = collate([{**row, "text": []} for row in map(Sentences().__getitem__, range(8))])
    del batch["text"]
    expected = model.eval()(**batch).logits
    torch.testing.assert_close(loaded.eval()(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def masked_lm_data(folder):
    """A dataset without labels, and the collator that masks it and counts its batches."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(5, 64))]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    masking = transformers.DataCollatorForLanguageModeling(tokenizer, seed=0)
    rows = [
        {name: row[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        for row in map(Sentences().__getitem__, range(8))
    ]
    batches = []

    def collator(rows):
        batches.append(masking(rows))
        return dict(batches[-1])

    return rows, collator, batches


def test_accumulated_masked_lm_gradients_are_those_of_the_whole_batch(tmp_path):
    """Hugging Face's loss and gradients are about 4 times too large here."""
    model, theirs = make_pair(transformers.BertForMaskedLM)
    rows, collator, batches = masked_lm_data(tmp_path)
    _, seen = train(
        model,
        tmp_path,
        rows,
        collator,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert len(batches) == 4
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert len(set(counts)) > 1, "equal shares would hide a mean of means"
    total = 0
    for batch in batches:
        logits = theirs(**{k: v for k, v in batch.items() if k != "labels"}).logits
        labels = batch["labels"].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        (loss / sum(counts)).backward()
        total += loss.item() / sum(counts)
    assert seen.losses[0] == pytest.approx(total, rel=1e-3)  # Trainer prints four digits
    assert_same_gradients(seen.first, gradients(theirs))


def test_masked_lm_evaluation_gives_the_logits_of_all_tokens(tmp_path):
    model, theirs = make_pair(transformers.BertForMaskedLM)
    rows, collator, batches = masked_lm_data(tmp_path)
    trainer, _ = train(model, tmp_path, rows, collator, max_steps=1, learning_rate=0.0)
    predicted = trainer.predict(rows)
    batch = batches[-1]
    expected = theirs.eval()(**batch)
    real = batch["attention_mask"].bool()
    assert predicted.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    torch.testing.assert_close(
        torch.tensor(predicted.predictions)[real], expected.logits[real], rtol=1e-4, atol=1e-5
    )


def test_bf16_gradients_are_as_exact_as_hugging_faces():
    model, theirs = make_pair(transformers.BertForMaskedLM)
    truth = copy.deepcopy(theirs).double()
    batch = make_batch()
    truth(**batch).loss.backward()
    errors = []
    for one in (model, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(**batch).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in one.parameters())
        difference = [
            (p.grad - q.grad).abs().max() / q.grad.abs().max()
            for (name, p), q in zip(one.named_parameters(), truth.parameters(), strict=True)
            if "key.bias" not in name  # 0 but for rounding
        ]
        errors.append(torch.stack(difference))
    ours, hugging_faces = errors
    assert ours.max() <= 2 * hugging_faces.max()
    assert ours.square().mean().sqrt() <= 1.5 * hugging_faces.square().mean().sqrt()


def test_a_patched_classifier_learns_in_bf16(tmp_path):
    model = fastbert.patch(make_model(transformers.BertForSequenceClassification, num_labels=3))
    _, seen = train(model, tmp_path, bf16=True, max_steps=60, learning_rate=3e-3)
    assert seen.losses[-1] < 0.5 * seen.losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "reentrant", [False, pytest.param(True, id="reentrant", marks=pytest.mark.exhaustive)]
)
def test_checkpointed_layers_are_recomputed_with_the_same_dropout(tmp_path, monkeypatch, reentrant):
    runs = []
    for module in (stack, layer):  # of layers that are called as modules, and of others
        run = functools.partial(lambda own, *args: runs.append(1) or own(*args), module.run_layer)
        monkeypatch.setattr(module, "run_layer", run)
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    seen = []
    for changes in ({}, options):
        model = fastbert.patch(
            make_model(transformers.BertForSequenceClassification, dropout=0.3, num_labels=3)
        )
        seen.append(train(model, tmp_path, max_steps=1, seed=3, **changes)[1].first)
    layers = SHAPE["num_hidden_layers"]
    assert len(runs) == layers + 2 * layers
    assert_same_gradients(*seen, tolerance=1e-6)
    without = make_model(transformers.BertForSequenceClassification, num_labels=3)
    undropped = train(fastbert.patch(without), tmp_path, max_steps=1, seed=3)[1].first
    assert not torch.allclose(
        undropped["bert.pooler.dense.weight"], seen[0]["bert.pooler.dense.weight"]
    )
