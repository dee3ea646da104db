"""What inductor makes of packed models: the eager result, with the eager masks of dropout.

In processes of their own: with an empty cache, and warm. One layer is what the others are.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastbert

ROOT = Path(__file__).parents[2]

ENCODER = """
import torch
import fastbert
from fastbert import rng
torch.manual_seed(0)
config = fastbert.BertConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
)
encoder = fastbert.BertEncoder(config).train()
lengths = [5, 1, 18]
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
seed = torch.tensor([3, 4])

def step(encoder, x):
    drawn = rng.for_batch(cu_seqlens, 24, state=seed)
    output = encoder(x, cu_seqlens=cu_seqlens, max_seqlen=18, rng=drawn).last_hidden_state
    return output, *torch.autograd.grad(output.sin().sum(), [x, *encoder.parameters()])

x = torch.randn(24, 32, requires_grad=True)
expected = step(encoder, x)
actual = step(torch.compile(encoder, fullgraph=True), x)
for a, e in zip(actual, expected, strict=True):
    torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
"""


# Keys and masks as a model draws them, among other integer arithmetic that inductor fuses.
MASKS = """
import sys, torch
from fastbert import backend, rng
from fastbert.ops.dropout import attention_keep_mask, hidden_keep_mask

def draw(cu_seqlens, ids, state, rows):
    drawn = rng.for_batch(cu_seqlens, 97, sequence_ids=ids * 2 + 1, state=state)
    fresh = rng.DropoutState(state, rng.row_keys(state, 70000), 3)
    found = [drawn.token_key, drawn.token_key[0::2], fresh.token_key]
    for site in (0, 7):
        for some in (drawn.at(site), drawn.at(site).rows(rows)):
            found.append(hidden_keep_mask(some, 768, 0.1))
            found.append(hidden_keep_mask(some, 40, 0.5).long() * 3)
            found.append(attention_keep_mask(some, 12, 128, 0.1))
    return found

torch.set_default_device(sys.argv[1])
lengths = [5, 1, 18, 0, 63]
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
ids = torch.tensor([2**31 - 7, 4, 2**20, 1, 0]) // 2
state = torch.tensor([7 << 40 | 5, 2**35 + 9])
rows = torch.tensor([0, 96, 50, -1], dtype=torch.int32)
for name in ("reference", None):
    with backend.use(name):
        torch.compiler.reset()
        expected = draw(cu_seqlens, ids, state, rows)
        actual = torch.compile(draw, fullgraph=True)(cu_seqlens, ids, state, rows)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype and torch.equal(a, e), (name, number)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "programs"),
    [
        ("cpu", {"cold": ENCODER, "warm, then masks": ENCODER + MASKS}),
        pytest.param("cuda", {"masks on a GPU": MASKS}, marks=pytest.mark.gpu),
    ],
    ids=["cpu", "cuda"],
)
def test_inductor_gives_the_eager_result(device, programs, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # each other is a process with torch in it
    environment["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # or each set of instructions is tried
    environment["PYTHONPATH"] = str(ROOT)
    for name, program in programs.items():
        done = subprocess.run(
            [sys.executable, "-c", program, device],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
    assert any(tmp_path.iterdir())


def test_an_own_model_compiles_without_a_warning_of_a_cache():
    config = fastbert.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = torch.compile(fastbert.BertModel(config).eval(), backend="eager")
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")
        model(torch.ones(2, 3, dtype=torch.long))
