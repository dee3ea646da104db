"""Loads trained models, with no newly initialized parameters, and fingerprints them."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.models.base import BertPreTrainedModel


class Headless(InputError):
    """A checkpoint lacks parameters of the head that is needed."""


Model = TypeVar("Model", bound=BertPreTrainedModel)


def trained(kind: type[Model], directory: Path, config: Any, **options: Any) -> Model:
    """A model of class `kind` in eval mode with the directory's weights.

    options: for the class's constructor. Raises InputError as `from_pretrained` does, and Headless
    where `from_pretrained` would newly initialize parameters.
    """
    model = kind(config, **options)
    absent = checkpoint.load_weights(model, checkpoint.read_weights(directory), directory)
    if absent:
        raise Headless(
            f"{directory}: the checkpoint has no {', '.join(absent)}, which {kind.__name__} needs; "
            "train it first, or name another model"
        )
    return model.eval()


def fingerprint(model: BertPreTrainedModel) -> str:
    """SHA-256 of a model's configuration and weights, in hexadecimal digits."""
    shape = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(shape.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
