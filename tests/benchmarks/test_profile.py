"""Where a step's time goes: kernels by the part of the step that they belong to."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.reporting.tables import PARTS
from benchmarks.steps import footprint, profile

# As a profile of a step on an H200 names them.
KERNELS = {
    "nvjet_sm90_tst_256x152_64x4_1x2_h_bz_coopA_NNT": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "products",
    "attention_drop_words_kernel": "attention, forward",
    "attention_dkdv_kernel": "attention, backward",
    "attention_single_kernel": "attention, backward",
    "_bias_gelu_bwd_kernel": "bias + GELU, backward",
    "_cast_transpose_kernel": "casts to FP8",
    "layer_norm_fwd_kernel": "dropout + add + LayerNorm, forward",
    "void multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>": "AdamW",
    "void multi_tensor_apply_kernel<TensorListMetadata<1>>": "norm of the gradients, clipping",
    "void vectorized_elementwise_kernel<8, bfloat16_copy_kernel_cuda>": (
        "casts of weights and gradients, QKV packed"
    ),
    "void multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<c10::BFloat16, float>>": (
        "casts of weights and gradients, QKV packed"
    ),
    "void vectorized_elementwise_kernel<8, CUDAFunctor_add<c10::BFloat16>>": (
        "sums of gradients at the residual connections"
    ),
    "void vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>": profile.OTHERS,
    "void reduce_kernel<128, 4, sum_functor<c10::BFloat16>>": "gradient of the QKV bias",
    "Memset (Device)": profile.OTHERS,
}


def test_each_kernel_counts_for_its_part():
    for kernel, part in KERNELS.items():
        found = profile.parts({kernel: 2.0})
        assert {name: time for name, time in found.items() if time} == {part: 2.0}, kernel
    assert sum(profile.parts(dict.fromkeys(KERNELS, 1.0)).values()) == len(KERNELS)


def test_the_span_of_a_region_is_no_kernel():
    cuda = torch.autograd.DeviceType.CUDA
    assert footprint.ran_on_gpu(SimpleNamespace(device_type=cuda, is_user_annotation=False))
    assert not footprint.ran_on_gpu(SimpleNamespace(device_type=cuda, is_user_annotation=True))


def test_parts_are_shown_with_their_sum():
    row = {"part": "step_parts", "case": {"preset": "large"}, "total_s": 0.5}
    lines = PARTS["step_parts"]([{**row, "seconds": {"products": 0.4, "all else": 0.1}}]).lines
    assert lines == [
        ("large", "products", "400 ms", "80%"),
        ("", "all else", "100 ms", "20%"),
        ("", "all kernels", "500 ms", "100%"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--only", "masking", "--quick"], marks=pytest.mark.exhaustive),
        ["kernels", "--only", "compact", "--quick"],
    ],
    ids=["all", "kernels"],
)
def test_results_name_the_program_that_made_them(arguments, tmp_path):
    out = tmp_path / "results.jsonl"
    arguments = [*arguments, "--out", str(out)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=gpu_check.ROOT,
        capture_output=True,
        check=True,
    )
    about = json.loads(out.read_text().splitlines()[0])
    assert about["command"] == f"python -m benchmarks {' '.join(arguments)}"
