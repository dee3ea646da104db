"""Names of google-research/bert's checkpoints, and Hugging Face's for the same weights."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Applied in order; other names of google-research/bert differ from HF's only by separators.
_FROM_TENSORFLOW = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r":0$", ""),
        (r"^cls/squad/output_(weights|bias)$", r"qa_outputs/\1"),
        (r"^output_(weights|bias)$", r"classifier/\1"),
        (r"^(cls/seq_relationship)/output_(weights|bias)$", r"\1/\2"),
        (r"^(cls/predictions)/output_bias$", r"\1/bias"),
        (r"/layer_(\d+)/", r"/layer/\1/"),
        (r"_embeddings$", r"_embeddings/weight"),
        (r"/(gamma|kernel|weights)$", "/weight"),
        (r"/beta$", "/bias"),
    )
]
_OF_THE_OPTIMIZER = re.compile(
    r"(^|/)(global_step|good_steps|loss_scale|beta\d_power|(adam|lamb)_[mv]|\w*Optimizer\w*)(/|:|$)",
    re.IGNORECASE,
)
_TENSORFLOW_LINEARS = re.compile(r"/kernel(:0)?$")  # stored (in, out)


def from_tensorflow(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Renames the weights of google-research/bert and of models fine-tuned with it.

    tensors: arrays, or tensors, by their names in the TensorFlow checkpoint, such as
    bert/encoder/layer_0/attention/self/query/kernel. Returns copies under Hugging Face's names, for
    `load_weights`, which refuses unknown names; the optimizer's slots and step are left out.
    """
    weights = {}
    for name, array in tensors.items():
        if _OF_THE_OPTIMIZER.search(name):
            continue
        tensor = array.detach().clone() if isinstance(array, Tensor) else torch.tensor(array)
        if _TENSORFLOW_LINEARS.search(name):
            tensor = tensor.T.contiguous()
        for pattern, replacement in _FROM_TENSORFLOW:
            name = pattern.sub(replacement, name)
        weights[name.replace("/", ".")] = tensor
    return weights
