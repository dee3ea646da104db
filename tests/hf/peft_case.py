"""Small models with LoRA's adapters."""

import pytest
import torch
import transformers

from tests.hf.training_case import make_batch, make_model

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
