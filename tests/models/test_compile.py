"""torch.compile of the packed encoder, in a process of its own: with an empty cache, and warm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
import fastbert
from fastbert import rng
torch.manual_seed(0)
config = fastbert.BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
)
encoder = fastbert.BertEncoder(config).train()
lengths = [5, 1, 18]
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
state = rng.for_batch(cu_seqlens, 24, state=torch.tensor([3, 4]))

def step(encoder, x):
    output = encoder(x, cu_seqlens=cu_seqlens, max_seqlen=18, rng=state).last_hidden_state
    return output, *torch.autograd.grad(output.sin().sum(), [x, *encoder.parameters()])

x = torch.randn(24, 32, requires_grad=True)
expected = step(encoder, x)
actual = step(torch.compile(encoder, fullgraph=True), x)
for a, e in zip(actual, expected, strict=True):
    torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
def test_the_packed_encoder_compiles_whole_and_gives_the_eager_result(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    for cache in ("cold", "warm"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, f"{cache}: {done.stderr}"
    assert any(tmp_path.iterdir())
