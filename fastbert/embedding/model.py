"""Embeds texts: sorts them by length and packs them into batches with a limited token count."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.config.options import POOLINGS
from fastbert.data import load_tokenizer
from fastbert.data.formats.texts import Text
from fastbert.data.text.encoding import warn_of_unknown
from fastbert.embedding.sentence_files import SentenceFiles
from fastbert.finetune.features import Feature, WindowEncoder, collate, parts
from fastbert.finetune.infer import evaluating
from fastbert.models.bert import BertModel
from fastbert.models.trained import fingerprint
from fastbert.train.precision import autocast, cast_once, resolve_precision

_CHARACTERS = 16  # how much of a long text is tokenised, for each token that is kept
_TOKENISED = 2**19  # characters at once, because tokenizers needs a hundred times the ids' memory


def pool(hidden: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """Pools hidden states (T, H) to one vector per sequence, (B, H).

    cu_seqlens: (B + 1,) int32; pooling: "mean" over a sequence's tokens, or "cls", its first token
    """
    if pooling == "cls":
        return hidden[cu_seqlens[:-1].long()]
    lengths = cu_seqlens.diff().long()
    return torch.segment_reduce(hidden, "mean", lengths=lengths)


class Embedder:
    """Embeds texts with a BERT without a head and its tokenizer.

    pooling: "mean" of the last hidden states of all tokens, [CLS] and [SEP] included, as in
    Sentence-BERT (Reimers & Gurevych 2019), or "cls", the last hidden state of [CLS]; normalize:
    scales vectors to length 1; max_seq_len: in tokens, special tokens included; truncate: cuts
    longer texts off instead of refusing them; batch_tokens: the most tokens in a batch; precision:
    auto, bf16, fp16 or fp32.

    If pooling, normalize or max_seq_len is None, the model's files of sentence-transformers give
    it; without such files, they are "mean", no scaling and the model's length. The files' default
    prompt is put before each text. Raises InputError for other values, for a model that cannot be
    read, and for a pipeline of sentence-transformers with other modules.
    """

    def __init__(
        self,
        model: str | Path,
        device: torch.device,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_seq_len: int | None = None,
        truncate: bool = False,
        batch_tokens: int = 4096,
        precision: str = "auto",
    ) -> None:
        if pooling not in (None, *POOLINGS):
            raise InputError(f"--pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        directory = checkpoint.resolve(model)
        files = SentenceFiles.read(directory)
        config = BertConfig.from_pretrained(directory)
        longest = config.max_position_embeddings
        if max_seq_len is not None and not 3 <= max_seq_len <= longest:
            raise InputError(
                f"--max-seq-len: expected 3 to the model's {longest}, got {max_seq_len}"
            )
        self.tokenizer = load_tokenizer(directory, model_vocab_size=config.vocab_size)
        self.encoder = WindowEncoder(
            self.tokenizer,
            max_seq_len or min(files.max_seq_len or longest, longest),
            None,
            truncate,
            "cut it off with --truncate",
        )
        self.prompt = files.prompts[files.default_prompt] if files.default_prompt else ""
        self.kept = self.encoder.max_seq_len - 2 if truncate else None
        self.divides_at_blanks = (
            truncate
            and isinstance(self.tokenizer.normalizer, BertNormalizer)
            and isinstance(self.tokenizer.pre_tokenizer, BertPreTokenizer)
        )
        self.bert = BertModel.from_pretrained(directory, add_pooling_layer=False)
        self.width = config.hidden_size
        self.pooling, self.batch_tokens = pooling or files.pooling or "mean", batch_tokens
        self.normalize = files.normalizes if normalize is None else normalize
        self.precision = resolve_precision(precision)
        self.device = device
        self.bert.to(device)
        cast_once(self.bert, self.precision)
        self.unknown = self.tokens = 0  # counts over all texts so far

    def made_from(self) -> dict[str, Any]:
        """Everything that determines a text's embedding, as JSON values.

        One SHA-256 covers the weights, the configuration and the tokenizer.
        """
        both = self.tokenizer.to_str() + fingerprint(self.bert)
        return {
            "model_sha256": hashlib.sha256(both.encode()).hexdigest(),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "prompt": self.prompt,
            "max_seq_len": self.encoder.max_seq_len,
            "truncate": self.encoder.truncate,
            "batch_tokens": self.batch_tokens,
            "precision": self.precision,
        }

    def __call__(
        self,
        texts: Sequence[Text],
        watched: Callable[[Sequence[range]], Iterable[range]] = iter,
    ) -> NDArray[np.float32]:
        """Embeddings (N, width) float32 of N texts, in their order.

        watched: wraps the iteration over batches, to show progress.

        A text's batch, and with it the last bits of its vector, depends only on the texts of this
        call. Raises `TooLong`, an InputError, for a text that is too long, unless `truncate` is
        set.
        """
        features = self._features(texts)
        order = sorted(range(len(features)), key=lambda number: features[number].num_tokens)
        embeddings = np.empty((len(features), self.width), np.float32)
        with evaluating(self.bert), autocast(self.precision, self.device):
            batches = parts([features[n].num_tokens for n in order], self.batch_tokens)
            for part in watched(batches):
                numbers = order[part.start : part.stop]
                batch = collate([features[n] for n in numbers]).to(self.device)
                hidden = self.bert(batch).last_hidden_state.float()
                vectors = pool(hidden, batch.cu_seqlens, self.pooling)
                if self.normalize:
                    vectors = F.normalize(vectors, dim=-1)
                embeddings[numbers] = vectors.cpu().numpy()
        return embeddings

    def _features(self, texts: Sequence[Text]) -> list[Feature]:
        features: list[Feature] = []
        for part in parts([len(text.text) for text in texts], _TOKENISED):
            some = texts[part.start : part.stop]
            prompted = [self.prompt + text.text for text in some]
            for text, ids in zip(some, self._ids(prompted), strict=True):
                windows = self.encoder.windows(text.where, ids)
                features.append(Feature(len(features), tuple(windows), None))
        unk = self.encoder.specials.unk
        self.unknown += sum(feature.windows[0].input_ids.count(unk) for feature in features)
        self.tokens += sum(feature.num_tokens for feature in features)
        return features

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without the ones that truncation would remove.

        Only the beginning of a long text is tokenised, unless it has too few tokens.
        """
        beginnings = [text[: self._end(text)] for text in texts]
        found = self._encode(beginnings)
        kept = self.kept or 0
        cut = zip(texts, beginnings, found, strict=True)
        again = [i for i, (t, b, ids) in enumerate(cut) if len(ids) < kept and len(b) < len(t)]
        for number, ids in zip(again, self._encode([texts[i] for i in again]), strict=True):
            found[number] = ids
        return [ids[: self.kept] for ids in found]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _end(self, text: str) -> int | None:
        """The end of a long text's beginning: before a blank, where BERT splits text anyway."""
        enough = _CHARACTERS * (self.kept or 0)
        if not self.divides_at_blanks or len(text) <= enough:
            return None
        end = text.rfind(" ", 0, enough)
        return None if end == -1 else end

    def warn_of_words(self, source: Path) -> None:
        """Warns if many tokens of the texts so far are [UNK]."""
        warn_of_unknown(str(source), self.unknown, self.tokens)
