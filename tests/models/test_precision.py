"""Gradients of a whole pre-training step in low precision, beside Hugging Face's."""

import copy

import pytest
import torch
import transformers

import fastbert
from fastbert.packing import IGNORE_INDEX
from tests.precision import LENGTHS, padded_batch, root_mean_square_error

SCALE = 1024  # of the loss, so that half precision has its gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_near_the_truth_as_hugging_faces(dtype, device):
    """With the residual stream in float32 as under its autocast, else as of its half() model."""
    large = device == "cuda"
    config = transformers.BertConfig(
        vocab_size=3001 if large else 301,
        hidden_size=768 if large else 128,
        num_hidden_layers=12 if large else 3,
        num_attention_heads=12 if large else 2,
        intermediate_size=3072 if large else 512,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(config).to(device).train()
    ours = fastbert.BertForPreTraining(config).to(device).train()
    ours.load_state_dict(theirs.state_dict())
    batch = padded_batch(LENGTHS, config.vocab_size, device)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    labels = ids.where((torch.rand(ids.shape, device=device) < 0.15) & real, IGNORE_INDEX)
    labels[:, 0] = ids[:, 0]
    pairs = torch.arange(len(LENGTHS), device=device) % 2
    names = sorted(dict(theirs.named_parameters()))

    def gradients(model):
        loss = model(**batch, labels=labels, next_sentence_label=pairs).loss
        (loss * SCALE).backward()
        parameters = dict(model.named_parameters())  # shared by both models, in one order
        return [parameters[name].grad / SCALE for name in names]

    truth = gradients(copy.deepcopy(theirs).double())

    def error(model, **precision):
        return root_mean_square_error(model, gradients, truth, **precision)

    near, far = error(theirs, autocast=dtype), error(theirs, dtype=dtype)
    in_low_precision = error(ours, autocast=dtype)
    config.residual_in_fp32 = True
    in_fp32 = error(ours, autocast=dtype)
    print(f"{near:.2e} {in_fp32:.2e} {far:.2e} {in_low_precision:.2e}")
    assert in_fp32 <= 1.2 * near
    assert in_low_precision <= 1.1 * far
