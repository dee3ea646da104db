"""Reads models for use, none of whose parameters may be drawn anew, and tells them apart."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.models.base import BertPreTrainedModel


class Headless(InputError):
    """A checkpoint lacks parameters of the head that a model is read for."""


Model = TypeVar("Model", bound=BertPreTrainedModel)


def trained(kind: type[Model], directory: Path, config: Any, **options: Any) -> Model:
    """A model of class `kind` in eval mode, with the directory's weights; options: the class's.

    Raises InputError where `from_pretrained` does, and Headless for parameters that it would draw
    anew.
    """
    model = kind(config, **options)
    absent = checkpoint.load_weights(model, checkpoint.read_weights(directory), directory)
    if absent:
        raise Headless(
            f"{directory}: the checkpoint has no {', '.join(absent)}, which {kind.__name__} needs; "
            "train it, or name another model"
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
