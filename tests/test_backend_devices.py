"""Which body a machine's GPUs have run, and what is said where they run none."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers

import fastbert
from fastbert import backend
from fastbert.hf import stack
from fastbert.hf.families import Unsupported
from fastbert.hf.stack import require_kernels
from fastbert.kernels import runtime
from fastbert.ops.bias_gelu import bias_gelu
from tests import command_line
from tests.modules.plan_case import IDS, MASK, SHAPE


@pytest.fixture
def a_gpu(monkeypatch):
    """Choices as on a machine with these GPUs, of which nothing but their properties is there."""

    def use(*capabilities, hip=None, fault=""):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(runtime, "fault", lambda: fault)
        backend._forget()

    yield use
    monkeypatch.undo()
    backend._forget()


NEEDS = "the kernels need compute capability 8.0, and GPU 1, GPU number 1, has 7.5; hide it with C"


@pytest.mark.parametrize(
    ("capabilities", "hip", "reason"),
    [
        (((9, 0), (7, 5)), None, NEEDS),
        (((9, 0),), "6.2", "the kernels are written for NVIDIA's GPUs"),
    ],
)
def test_gpus_that_cannot_run_the_kernels_run_the_plain_bodies(capabilities, hip, reason, a_gpu):
    a_gpu(*capabilities, hip=hip)
    choice = bias_gelu.chosen("cuda")
    assert choice.kernels is None
    assert reason in choice.reason
    with backend.use("triton"), pytest.raises(backend.BackendUnavailable, match=reason):
        bias_gelu.chosen("cuda")


def test_a_wrong_variable_is_one_line_of_the_command(monkeypatch):
    monkeypatch.setattr(backend, "_forced", "nope")
    backend._forget()
    try:
        status, _, said = command_line.call("info")
    finally:
        backend._forget()
    expected = "FASTBERT_BACKEND: expected one of ext, triton, reference, got 'nope'"
    assert (status, said) == (2, f"fastbert: error: {expected}\n")


def test_a_forced_backend_that_cannot_run_is_one_line_of_the_command(monkeypatch, tmp_path):
    fastbert.BertForMaskedLM(fastbert.BertConfig(**SHAPE)).save_pretrained(tmp_path)
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a")
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with backend.use("triton"):
        status, _, said = command_line.call("fill-mask", "--model", tmp_path, "a [MASK]")
    expected = "Triton runs on CPU tensors only under TRITON_INTERPRET=1"
    assert (status, said) == (2, f"fastbert: error: FASTBERT_BACKEND: {expected}\n")


@pytest.mark.parametrize("capabilities", [((8, 0),), ((8, 9), (12, 0))])
def test_gpus_from_ampere_on_run_triton(capabilities, a_gpu):
    a_gpu(*capabilities)
    assert bias_gelu.chosen("cuda").backend == "triton"


def test_a_machine_on_which_triton_cannot_compile_says_what_it_lacks(a_gpu, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    a_gpu((8, 0), fault="RuntimeError: no compiler")
    choice = bias_gelu.chosen("cuda")
    assert choice.kernels is None
    assert "Python's headers (gcc and python3-dev): RuntimeError: no compiler" in choice.reason


def test_triton_compiles_nothing_without_a_gpu_and_says_so():
    command = [sys.executable, "-c", "from fastbert.kernels import runtime; print(runtime.fault())"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("RuntimeError: 0 active drivers")


def test_a_patched_model_on_a_gpu_without_kernels_is_hugging_faces(a_gpu, monkeypatch):
    device = torch.device("cuda")
    a_gpu((7, 5))
    with pytest.raises(Unsupported, match=r"no kernels for cuda: triton: .* 8\.0"):
        require_kernels(device)
    with pytest.raises(Unsupported, match="no kernels for mps: its only implementation"):
        require_kernels(torch.device("mps"))
    with backend.use("reference"):
        require_kernels(device)
    a_gpu((8, 0))
    require_kernels(device)

    a_gpu((7, 5))
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
    ours = fastbert.patch(copy.deepcopy(theirs))
    monkeypatch.setattr(stack, "require_kernels", lambda _: require_kernels(device))
    found, expected = (m(IDS, MASK).last_hidden_state for m in (ours, theirs))
    assert torch.equal(found, expected)
    report = str(fastbert.explain(ours, input_ids=IDS, attention_mask=MASK, show=False))
    assert "no kernels for cuda" in report
