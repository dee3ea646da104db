"""What all models share: initialization, tied weights, loading and saving."""

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from fastbert import checkpoint
from fastbert.config import BertConfig, check_config


class BertPreTrainedModel(nn.Module):
    """Base of the models.

    `config` is a `fastbert.BertConfig` or a Hugging Face object, kept by reference.
    """

    base_model_prefix: ClassVar[str] = "bert"
    config: Any

    def __init__(self, config) -> None:
        super().__init__()
        check_config(config)
        self.config = config

    def initialize(self) -> None:
        """Draws the weights as BERT does, and ties the decoder to the word embeddings."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the decoder, where there is one, share the word embeddings' parameter."""
        decoder = self.get_output_embeddings()
        if decoder is not None and self.config.tie_word_embeddings:
            decoder.weight = self.get_input_embeddings().weight

    def get_input_embeddings(self) -> nn.Embedding:
        base: Any = getattr(self, self.base_model_prefix, self)
        return base.embeddings.word_embeddings

    def get_output_embeddings(self) -> nn.Linear | None:
        return None

    @classmethod
    def from_pretrained(cls, name_or_directory: str | Path, **options: Any) -> Self:
        """A model in eval mode, with the weights of a Hugging Face directory, a run, or a hub name.

        `options` go to the constructor. Parameters of a head that the checkpoint lacks are drawn
        anew, with a warning; anything else that is missing or does not fit is an InputError.
        """
        directory = checkpoint.resolve(name_or_directory)
        model = cls(BertConfig.from_pretrained(directory), **options)
        absent = checkpoint.load_weights(model, checkpoint.read_weights(directory), directory)
        if absent:
            warnings.warn(
                f"{directory}: {', '.join(absent)} not in the checkpoint, so drawn anew: train "
                "before use",
                stacklevel=2,
            )
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, which Hugging Face's from_pretrained loads."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(directory)
        path = directory / "config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        written["architectures"] = [type(self).__name__]
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        checkpoint.save_weights(self, directory)
