"""Patched Hugging Face models on an NVIDIA GPU: accuracy, kernels taken, and waits of the host."""

import copy

import pytest
import torch
import transformers

import fastbert
from tests.hf.cases import FAMILIES, Case, build, inputs

pytestmark = pytest.mark.gpu
BASE = {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "vocab_size": 3001}
LENGTHS = [1, 128, 37, 200, 512, 5, 64, 333]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_as_near_the_truth_as_the_unpatched(family):
    case = Case(family, "ForMaskedLM", heads=3, head_dim=16, dtype=torch.float64)
    truth, _ = build(case)
    arguments, _ = inputs(case, truth)
    expected, patched = (model.float().cuda() for model in build(case))
    arguments = {name: value.cuda() for name, value in arguments.items()}
    truth = truth.cuda()
    found = []
    for model in (truth, expected, patched):
        model(**arguments).loss.backward()
        found.append([p.grad.double() for p in model.parameters() if p.grad is not None])
    for t, e, a in zip(*found, strict=True):
        allowed = 8 * (e - t).abs().max() + 1e-6 * t.abs().max() + 1e-9  # tf32x3 in the kernels
        assert (a - t).abs().max() <= allowed


def base_models(kind, **options):
    config = transformers.BertConfig(**BASE, **options)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).cuda()
    return model, fastbert.patch(copy.deepcopy(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_kernels_run_and_outputs_have_hugging_faces_dtypes(dtype):
    """How near they are to the truth is tested in test_precision.py."""
    model, patched = base_models("BertModel")
    mask = (torch.arange(512) < torch.tensor(LENGTHS)[:, None]).cuda()
    ids = torch.randint(1, 3001, mask.shape, device="cuda") * mask
    for training in (False, True):
        model.train(training)
        patched.train(training)
        with torch.autocast("cuda", dtype), torch.no_grad():
            expected, output = (one(ids, mask.long()) for one in (model, patched))
            told = fastbert.explain(patched, ids, mask.long(), show=False)
        for name in ("last_hidden_state", "pooler_output"):
            assert output[name].dtype == expected[name].dtype
        kernels = {row.backend for row in told.rows if row.operator == "attention_qkvpacked"}
        assert kernels == {"triton"}


def test_packed_documents_make_the_host_wait_for_nothing():
    _, patched = base_models("BertModel")
    total = sum(LENGTHS)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()
    batch = {
        "input_ids": torch.randint(1, 3001, (1, total), device="cuda"),
        "position_ids": positions,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens.clone(),
        "max_length_q": max(LENGTHS),
    }
    for dropout in (False, True):
        patched.train(dropout)
        for checked in (False, True):  # the first call compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if checked else "default")
            try:
                with torch.autocast("cuda", torch.bfloat16):
                    output = patched(**batch)
                output.pooler_output.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_one_graph_of_torch_compile_waits_for_nothing(training):
    """`torch.compile(mode="reduce-overhead")` makes CUDA graphs of it, which cannot wait."""
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    _, patched = base_models("BertForMaskedLM", **without)
    patched.train(training)
    mask = (torch.arange(512) < torch.tensor(LENGTHS)[:, None]).cuda()
    ids = torch.randint(1, 3001, mask.shape, device="cuda") * mask
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}
    compiled = torch.compile(patched, mode="reduce-overhead", fullgraph=True)
    with torch.set_grad_enabled(training):
        expected = patched(**batch).loss.item()
        for _ in range(3):
            loss = compiled(**batch).loss
            if training:
                loss.backward()
                patched.zero_grad()
            assert loss.item() == pytest.approx(expected, rel=1e-4)
