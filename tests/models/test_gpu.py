"""Whole models on an NVIDIA GPU: accuracy beside Hugging Face, bits, waits, and captured graphs."""

import pytest
import torch
import transformers

import fastbert
from fastbert import backend
from tests.models.pretraining_case import loss_and_gradients, make_batch, make_model

pytestmark = pytest.mark.gpu
LENGTHS = [1, 128, 37, 200, 512, 5, 64, 333]
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "vocab_size": 3001,
}


@pytest.fixture
def batch():
    return make_batch(LENGTHS, vocab_size=3001).to("cuda")


def base_model(dropout=0.0):
    model = make_model(dropout, **BASE)
    return model.cuda()


def named(model):
    return ["loss", *(name for name, _ in model.named_parameters())]


def test_gradients_through_twelve_layers_are_as_near_the_truth_as_the_plain_bodies(batch):
    model = base_model()
    with backend.use("reference"):
        truth = loss_and_gradients(model.double(), batch)
        expected = loss_and_gradients(model.float(), batch)
    actual = loss_and_gradients(model, batch)
    for name, a, e, t in zip(named(model), actual, expected, truth, strict=True):
        allowed = 8 * (e - t).abs().max() + 1e-6 * t.abs().max() + 1e-9
        assert (a - t).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_near_the_truth_as_hugging_faces(dtype):
    config = transformers.BertConfig(
        **BASE, hidden_dropout_prob=0, attention_probs_dropout_prob=0, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(config).cuda().train()
    ours = fastbert.BertForPreTraining(config).cuda().train()
    ours.load_state_dict(theirs.state_dict())
    mask = torch.arange(512) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(1, 3001, mask.shape) * mask
    labels = ids.where((torch.rand(mask.shape) < 0.15) & mask, -100)
    labels[:, 0] = ids[:, 0]
    arguments = {
        "input_ids": ids.cuda(),
        "attention_mask": mask.long().cuda(),
        "labels": labels.cuda(),
        "next_sentence_label": (torch.arange(len(LENGTHS)) % 2).cuda(),
    }

    def step(model, enabled):
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=enabled):
            loss = model(**arguments).loss
        (loss * 1024).backward()
        # shared by both models, in one order of names
        parameters = dict(model.named_parameters())
        return [parameters[n].grad.double() / 1024 for n in sorted(dict(theirs.named_parameters()))]

    truth = step(theirs.double(), False)
    theirs.float()
    for a, e, t in zip(step(ours, True), step(theirs, True), truth, strict=True):
        assert a.isfinite().all()
        error, allowed = (a - t).abs(), (e - t).abs()
        rounding = torch.finfo(dtype).eps * t.abs().max() + 1e-9
        assert error.max() <= 2 * allowed.max() + rounding
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + rounding / 100


def test_gradients_are_the_same_bits_each_time(batch):
    model = base_model(dropout=0.1).bfloat16()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (loss_and_gradients(model, batch) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, a, b in zip(named(model), first, second, strict=True):
        assert torch.equal(a, b), name


def test_dropout_is_that_of_the_plain_bodies(batch):
    model = base_model(dropout=0.1)
    actual = loss_and_gradients(model, batch)
    with backend.use("reference"):
        expected = loss_and_gradients(model, batch)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2, atol=1e-3 * e.abs().max().item() + 1e-7)


def test_a_step_never_makes_the_host_wait(batch):
    model = base_model(dropout=0.1)
    with torch.autocast("cuda", torch.bfloat16):
        loss_and_gradients(model, batch)  # compiles, and allocates workspaces
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_and_gradients(model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_draws_fresh_masks_at_each_replay(batch):
    model = base_model(dropout=0.1)
    step = batch.dropout_state

    def run():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return loss_and_gradients(model, batch)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    losses = []
    for number in (9, 10, 9):
        step[1] = number
        graph.replay()
        losses.append([output.clone() for output in outputs])
        expected = run()
        for a, e in zip(losses[-1], expected, strict=True):
            torch.testing.assert_close(a, e)
    assert not torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(a, b) for a, b in zip(losses[0], losses[2], strict=True))


def test_a_sequence_of_padding_alone_gives_zeros_and_finite_gradients():
    model = base_model()
    ids = torch.ones(2, 16, dtype=torch.long, device="cuda")
    mask = torch.ones_like(ids)
    mask[1] = 0
    with torch.autocast("cuda", torch.bfloat16):
        output = model.bert(ids, mask).last_hidden_state
    output.sum().backward()
    assert not output[1].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
