"""Inputs of embedding_layer_norm, and its results written out in plain PyTorch."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import rng as random
from fastbert.ops.embedding import embedding_layer_norm
from tests.oracle import gradients

NAMES = ("y", "dword", "dposition", "dtoken_type", "dweight", "dbias")
WORDS, POSITIONS, TYPES = 50, 40, 3


@dataclasses.dataclass
class Inputs:
    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    parameters: list[Tensor]  # word, position, token_type, weight, bias
    dy: Tensor
    rng: random.DropoutState

    def results(self, **options):
        ids = self.input_ids, self.position_ids, self.token_type_ids
        return gradients(
            lambda *p: embedding_layer_norm(*ids, *p, rng=self.rng, **options),
            *self.parameters,
            dy=self.dy,
        )

    def plain(self, dtype, *, eps=1e-12, padding_idx=None, dropout_p=0.0):
        """Written out, in one dtype."""
        ids, hidden = self.input_ids, self.dy.shape[-1]
        types = torch.zeros_like(ids) if self.token_type_ids is None else self.token_type_ids
        keep, scale = 1, 1
        if dropout_p:
            keep = random.hidden_keep_mask(self.rng, hidden, dropout_p).view(self.dy.shape)
            scale = random.keep_scale(dropout_p)

        def function(word, position, token_type, weight, bias):
            z = F.embedding(ids, word, padding_idx) + F.embedding(types, token_type)
            z = z + F.embedding(self.position_ids, position).expand(self.dy.shape)
            return F.layer_norm(z, (hidden,), weight, bias, eps) * keep * scale

        return gradients(function, *(p.to(dtype) for p in self.parameters), dy=self.dy)


def inputs(num_tokens, hidden, dtype, device, *, sizes=(WORDS, POSITIONS, TYPES)):
    def ids(size):
        return torch.randint(size, (num_tokens,), device=device)

    tables = [torch.randn(size, hidden, device=device).to(dtype) for size in sizes]
    vectors = [torch.randn(hidden, device=device).to(dtype) for _ in range(2)]
    keys = torch.randint(2**31, (num_tokens,), device=device) << 32 | torch.arange(
        7, 7 + num_tokens, device=device
    )
    return Inputs(
        *map(ids, sizes),
        parameters=tables + vectors,
        dy=torch.randn(num_tokens, hidden, device=device).to(dtype),
        rng=random.DropoutState(random.new_state(torch.device(device)), keys, site=3),
    )
