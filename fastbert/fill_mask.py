"""Predicts the words at the [MASK] tokens of a text, for `fastbert fill-mask`."""

from pathlib import Path
from typing import NamedTuple

import torch

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.config.options import text_of
from fastbert.data import load_tokenizer, special_tokens
from fastbert.models.pretraining import BertForMaskedLM
from fastbert.models.trained import trained
from fastbert.packing import PackedBatch


class Word(NamedTuple):
    """A prediction. word: an entry of the vocabulary; text: the input with its [MASK] replaced."""

    word: str
    probability: float
    text: str


@torch.inference_mode()
def fill_mask(name_or_directory: str | Path, text: str, top: int = 5) -> list[list[Word]]:
    """The `top` likeliest words for each [MASK] of `text`, in order, likeliest first.

    name_or_directory: directory of a model or of a run, or a hub name. Raises InputError if the
    model cannot be read or has no masked-LM head, the text has no [MASK] or is longer than the
    model reads, or the tokenizer does not belong to the model.
    """
    text = text_of(text, "TEXT")
    directory = checkpoint.resolve(name_or_directory)
    config = BertConfig.from_pretrained(directory)
    model = trained(BertForMaskedLM, directory, config)
    tokenizer = load_tokenizer(directory, model_vocab_size=config.vocab_size)
    words_known = tokenizer.get_vocab_size()
    mask = special_tokens(tokenizer).mask
    ids = torch.tensor(tokenizer.encode(text).ids)
    gaps = (ids == mask).nonzero().flatten().tolist()
    if not gaps:
        raise InputError(f"no [MASK] in the text {text!r}")
    if len(ids) > config.max_position_embeddings:
        raise InputError(
            f"the text has {len(ids)} tokens, the model reads {config.max_position_embeddings}"
        )
    logits = model(PackedBatch.from_sequences([ids.tolist()])).logits  # (S, V)
    pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
    best = logits[gaps, :words_known].float().softmax(-1).topk(min(top, words_known))
    return [
        [
            Word(word, p, filled(text, number, word))
            for p, word in zip(probabilities, map(pieces.__getitem__, words), strict=True)
        ]
        for number, (probabilities, words) in enumerate(
            zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
    ]


def filled(text: str, number: int, word: str) -> str:
    """`text` with its `number`-th [MASK], counted from 0, replaced; `##x` joins the word before."""
    before, *rest = text.split("[MASK]")
    pieces = [before]
    for index, piece in enumerate(rest):
        filling = word if index == number else "[MASK]"
        if filling.startswith("##"):
            pieces[-1] = pieces[-1].rstrip()
        pieces += [filling.removeprefix("##"), piece]
    return "".join(pieces)
