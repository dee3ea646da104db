"""Attention over packed sequences, and users' alternatives for the same sequences."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators.bodies import EAGER, Body, Workload
from benchmarks.workloads import sequence_lengths
from fastbert import rng
from fastbert.config.presets import PRESETS
from fastbert.ops.attention import attention, attention_qkvpacked

SDPA_BACKENDS = {
    "SDPA flash": "FLASH_ATTENTION",
    "SDPA efficient": "EFFICIENT_ATTENTION",
    "SDPA cuDNN": "CUDNN_ATTENTION",
    "SDPA math": "MATH",
}
HEAD_DIM = 64


def attention_workloads(
    preset: str, tokens: int, device: str, dtype: torch.dtype
) -> Iterator[Workload]:
    """Both operators over about `tokens` tokens: sequences of 128, of 512, and Wikipedia-like."""
    cases = []
    for seqlen in (128, 512):
        count = max(tokens // seqlen, 1)
        cases.append((f"{count} x {seqlen}", [seqlen] * count))
    count = max(tokens // 254, 1)  # 254 tokens per sequence on average
    cases.append((f"{count} wikipedia", sequence_lengths("wikipedia", count)))
    for name, lengths in cases:
        for dropout_p in (0.0, 0.1):
            case = Sequences(preset, lengths, dropout_p, device, dtype)
            yield from case.workloads(f"{preset} {name} dropout {dropout_p}")


class Sequences:
    """Inputs and bodies for B sequences with T tokens in total and N heads of size D.

    Packed tensors are (T, N, D), padded ones (B, N, S, D); S is the longest sequence.
    """

    def __init__(
        self, preset: str, lengths: list[int], dropout_p: float, device: str, dtype: torch.dtype
    ) -> None:
        self.heads = PRESETS[preset].shape["num_attention_heads"]
        self.lengths, self.dropout_p = lengths, dropout_p
        self.device, self.dtype = device, dtype
        self.total, self.longest = sum(lengths), max(lengths)
        self.cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        ends = torch.tensor(lengths, device=device)[:, None]
        self.is_real = torch.arange(self.longest, device=device) < ends
        self.is_padded = len(set(lengths)) > 1
        self.numbers = rng.for_batch(self.cu_seqlens, self.total)

    def workloads(self, label: str) -> Iterator[Workload]:
        flops = 4.0 * self.heads * HEAD_DIM * sum(n**2 for n in self.lengths)
        shared = {"forward": flops, "backward": 2.5 * flops, "is_product": True}
        p, numbers, longest = self.dropout_p, self.numbers, self.longest
        cu = self.cu_seqlens
        yield Workload(
            attention_qkvpacked,
            label,
            lambda: (self.normal(self.total, 3, self.heads, HEAD_DIM),),
            lambda qkv: attention_qkvpacked(qkv, cu, longest, dropout_p=p, rng=numbers),
            {EAGER: Body(lambda qkv: self.plain(*qkv.unbind(1)), waits=self.is_padded)},
            **shared,
        )
        yield Workload(
            attention,
            label,
            lambda: tuple(self.normal(3, self.total, self.heads, HEAD_DIM).unbind()),
            lambda q, k, v: attention(q, k, v, cu, cu, longest, longest, dropout_p=p, rng=numbers),
            self.alternatives(),
            **shared,
        )

    def alternatives(self) -> dict[str, Body]:
        """Other functions; those that take padded tensors get them already padded."""
        bodies = {EAGER: Body(self.plain, waits=self.is_padded)}
        for name, backend in SDPA_BACKENDS.items():
            bodies[name] = Body(self._sdpa(backend), self._padded_inputs)
        bodies["torch varlen_attn"] = Body(self._varlen)
        bodies["flex attention"] = Body(self._flex(), self._flex_inputs)
        return bodies

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Pads, calls PyTorch's scaled_dot_product_attention and unpads with a mask.

        Indexing by the mask makes the host wait for its sum.
        """
        if not self.is_padded:
            shape = (len(self.lengths), self.longest, self.heads, HEAD_DIM)
            q, k, v = (x.view(shape).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p)
            return out.transpose(1, 2).reshape(self.total, self.heads, HEAD_DIM)
        rows = torch.zeros(self.is_real.shape, dtype=torch.int64, device=self.device)
        rows[self.is_real] = torch.arange(self.total, device=self.device)
        q, k, v = (x[rows].transpose(1, 2) for x in (q, k, v))
        mask = self.is_real[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout_p)
        return out.transpose(1, 2)[self.is_real]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def _padded_inputs(self) -> tuple[Tensor, ...]:
        shape = (3, len(self.lengths), self.heads, self.longest, HEAD_DIM)
        return tuple(self.normal(*shape).unbind())

    def _sdpa(self, backend: str) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            mask = self.is_real[:, None, None] if self.is_padded else None
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, mask, self.dropout_p)

        return run

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        self._without_dropout()
        cu = self.cu_seqlens
        out = varlen_attn(q, k, v, cu, cu, self.longest, self.longest)
        return out[0] if isinstance(out, tuple) else out

    def _flex_inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.normal(3, 1, self.heads, self.total, HEAD_DIM).unbind())

    def _flex(self) -> Callable[..., Tensor]:
        """Sequences are documents of one row; block mask and compiled function are made once."""
        made: list = []

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            self._without_dropout()
            if not made:
                places = torch.arange(self.total, device=self.device)
                document = torch.searchsorted(self.cu_seqlens[1:], places, right=True)

                def is_same(batch, head, query, key):
                    return document[query] == document[key]

                made.append(
                    create_block_mask(is_same, None, None, self.total, self.total, self.device)
                )
                made.append(torch.compile(flex_attention))
            return made[1](q, k, v, block_mask=made[0])

        return run

    def _without_dropout(self) -> None:
        if self.dropout_p:
            raise NotImplementedError("has no dropout")
