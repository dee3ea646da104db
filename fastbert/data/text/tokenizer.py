"""BERT's WordPiece tokenizer: training, loading, and saving in Hugging Face's files."""

import contextlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fastbert.check import InputError, first_line
from fastbert.data.text.tokenizer_config import TokenizerConfig
from fastbert.system.files import Unwritable, write_text

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LONGEST_WORD = 100  # characters; WordPiece turns a longer word into [UNK]
# longer runs without blanks, punctuation or Chinese, which BERT's pre-tokenizer does not split
_LONG_WORD = re.compile(
    "[^\\s!-/:-@\\[-`{-~\u2000-\u206f\u3000-\u303f\uff00-\uffef\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    f"\U00020000-\U0002fa1f]{{{_LONGEST_WORD + 1},}}"
)
_PREFIX = "##"  # begins every piece except a word's first


class SpecialTokens(NamedTuple):
    """The ids of [PAD], [UNK], [CLS], [SEP] and [MASK]."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The ids of [PAD], [UNK], [CLS], [SEP] and [MASK]; InputError if one is missing."""
    vocab = tokenizer.get_vocab()
    _require_special_tokens(vocab, "--tokenizer")
    return SpecialTokens(*(vocab[token] for token in _SPECIAL))


def _require_special_tokens(vocab: Container[str], who: str) -> None:
    if missing := [token for token in _SPECIAL if token not in vocab]:
        raise InputError(f"{who}: the vocabulary lacks {', '.join(missing)}")


def train_tokenizer(
    sentences: Iterable[str],
    vocab_size: int,
    lowercase: bool = True,
    strip_accents: bool | None = None,
) -> Tokenizer:
    """Trains a WordPiece tokenizer on sentences.

    WordPiece is by Schuster & Nakajima 2012 and Wu et al. 2016, https://arxiv.org/abs/1609.08144.
    The special tokens have the ids 0 to 4. The same sentences give the same vocabulary, with at
    most `vocab_size` entries, fewer if the text is small.

    strip_accents: None strips accents if `lowercase`. Raises InputError for a vocab_size of 5 or
    less, and if there is no text; Unwritable if a copy of the text does not fit into TMPDIR.

    The library's trainer numbers the pieces `##x` in the order of a randomly seeded hash map, and
    breaks ties between merges by number, so two runs would give two vocabularies. Naming these
    pieces first fixes their order. It also gives every known letter a piece inside words, so that
    no word of known letters becomes [UNK]. This needs the alphabet before the training, hence two
    passes over the sentences, which a temporary file keeps.
    """
    if vocab_size <= len(_SPECIAL):
        raise InputError(
            f"--vocab-size: expected more than the {len(_SPECIAL)} special tokens, got {vocab_size}"
        )
    normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer = _wordpiece({}, normalizer)
    with _temporary_file() as spool:
        characters: Counter[str] = Counter()
        for sentence in sentences:
            characters.update(sentence)
            # the trainer's time grows with the square of a word's length
            if len(sentence) > _LONGEST_WORD:
                sentence = _LONG_WORD.sub(" ", sentence)
            spool.write(sentence + "\n")
        spool.seek(0)
        # letters get at most half of the vocabulary: Chinese needs thousands, but stray emoji must
        # not crowd out words
        alphabet, inner = _alphabet(tokenizer, characters, (vocab_size - len(_SPECIAL) + 1) // 2)
        if not alphabet:
            raise InputError("--tokenizer: there is no text to train on")
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            special_tokens=[*_SPECIAL, *inner],  # gives them the first ids, in order
            continuing_subword_prefix=_PREFIX,
            show_progress=False,
        )
        tokenizer.train_from_iterator(spool, trainer)
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    return _with_special_tokens(_wordpiece(vocab, normalizer))


@contextlib.contextmanager
def _temporary_file() -> Iterator[TextIO]:
    """A file that is removed after the block; raises Unwritable if its disk is full."""
    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
            yield spool
    except OSError as error:
        if error.filename is not None:  # a file of the text failed, not the temporary file
            raise
        reason = f"{error.strerror}; TMPDIR can name another directory"
        raise Unwritable(tempfile.gettempdir(), reason) from error


def _alphabet(
    tokenizer: Tokenizer, characters: Counter[str], room: int
) -> tuple[list[str], list[str]]:
    """The most frequent normalised characters, and pieces `##x` of those that occur inside words.

    room: the most entries of both lists together
    """
    counts: Counter[str] = Counter()
    for character, count in characters.items():
        for normal in "".join(tokenizer.normalizer.normalize_str(character).split()):
            counts[normal] += count
    alphabet: list[str] = []
    inner: list[str] = []
    for character in sorted(counts, key=lambda c: (-counts[c], c)):
        # punctuation and Chinese characters are words by themselves, so they need no piece `##x`
        alone = len(tokenizer.pre_tokenizer.pre_tokenize_str("a" + character)) > 1
        alone = alone or " " in tokenizer.normalizer.normalize_str(character)
        if len(alphabet) + len(inner) + (1 if alone else 2) > room:
            break
        alphabet.append(character)
        if not alone:
            inner.append(_PREFIX + character)
    return alphabet, sorted(inner)


def _wordpiece(vocab: dict[str, int], normalizer: normalizers.BertNormalizer) -> Tokenizer:
    """BERT's tokenizer for a vocabulary, built like Hugging Face's BertTokenizer."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_PREFIX)
    return tokenizer


def _with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Registers the special tokens and the form [CLS] A [SEP] B [SEP] of a pair, in place."""
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def load_tokenizer(path: str | Path, *, model_vocab_size: int | None = None) -> Tokenizer:
    """Loads a tokenizer from a `tokenizer.json`, a `vocab.txt`, or a directory with either.

    A directory's tokenizer.json takes precedence. Like transformers, this also reads the files
    beside it: the tokens that `tokenizer_config.json` or `added_tokens.json` adds and, for a
    vocab.txt or a BertTokenizer, whether to lower-case (by default), to strip accents and to
    divide Chinese characters.

    model_vocab_size: rows of the model's embedding table, of which up to 63 may be spare, because
        vocabularies are padded for speed

    Raises InputError if a file cannot be read, is not a WordPiece, lacks a special token or has ids
    other than 0 to V - 1, if V does not match model_vocab_size, and if a setting has a wrong type.
    """
    path = file = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise InputError(f"tokenizer {path}: holds neither tokenizer.json nor vocab.txt")
        file = found[0]
    config = TokenizerConfig(file.parent)
    read = _from_json if file.suffix == ".json" else _from_vocab
    try:
        tokenizer = read(file, config)
    except OSError as error:
        raise InputError(f"tokenizer {file}: cannot be read: {error.strerror}") from error
    vocab = tokenizer.get_vocab()
    if len(vocab) != 1 + max(vocab.values(), default=-1):
        raise InputError(
            f"tokenizer {file}: {len(vocab)} different tokens but ids up to {max(vocab.values())}; "
            "remove duplicate lines or gaps"
        )
    config.add_tokens(tokenizer)
    vocab = tokenizer.get_vocab()
    _require_special_tokens(vocab, f"tokenizer {file}")
    if (unknown := tokenizer.model.unk_token) not in tokenizer.get_vocab(with_added_tokens=False):
        raise InputError(
            f"tokenizer {file}: expected {unknown} in the vocabulary, got it as an added token only"
        )
    if model_vocab_size is not None and not len(vocab) <= model_vocab_size < len(vocab) + 64:
        raise InputError(
            f"{path}: the vocabulary has {len(vocab)} entries, but the checkpoint has "
            f"{model_vocab_size}; use the tokenizer of the same model"
        )
    tokenizer.no_truncation()  # a saved tokenizer may have truncation, which would cut the corpus
    tokenizer.no_padding()
    return _with_special_tokens(tokenizer)


def _from_json(file: Path, config: TokenizerConfig) -> Tokenizer:
    text = file.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(text.decode("utf-8-sig"))
    except Exception as error:  # the library raises no narrower class
        raise InputError(f"tokenizer {file}: not a tokenizer.json: {first_line(error)}") from error
    if not isinstance(tokenizer.model, models.WordPiece):
        kind = type(tokenizer.model).__name__
        raise InputError(f"tokenizer {file}: expected a WordPiece tokenizer, got {kind}")
    if config.is_berts and isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        tokenizer.normalizer = config.normalizer()
    return tokenizer


def _from_vocab(file: Path, config: TokenizerConfig) -> Tokenizer:
    config.require_wordpiece(file)
    try:
        lines = file.read_text("utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"tokenizer {file}: not a vocab.txt: not UTF-8") from error
    vocab = {token: number for number, token in enumerate(lines)}
    return _wordpiece(vocab, config.normalizer())


def save_tokenizer(
    tokenizer: Tokenizer, directory: str | Path, *, max_length: int | None = None
) -> None:
    """Writes the files that `transformers.AutoTokenizer` and `load_tokenizer` read.

    These are tokenizer.json, tokenizer_config.json, special_tokens_map.json and vocab.txt. Each is
    written atomically. Raises Unwritable if one cannot be written.

    max_length: the most tokens that the model computes, to which transformers truncates texts on
        request; None for no limit
    """
    state = json.loads(tokenizer.to_str())
    normalizer = state["normalizer"] or {}
    special_map = {f"{token[1:-1].lower()}_token": token for token in _SPECIAL}
    added = {str(token.pop("id")): token for token in state["added_tokens"]}
    config: dict[str, object] = {**special_map, "added_tokens_decoder": added}
    if max_length is not None:
        config["model_max_length"] = max_length
    if normalizer.get("type") == "BertNormalizer" and normalizer["clean_text"]:
        config |= {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    else:  # BertTokenizer would replace another normalizer with its own
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if len(vocab) != 1 + max(vocab.values(), default=0):  # a line's number must be its token's id
        vocab = tokenizer.get_vocab()
    contents = {
        "vocab.txt": "".join(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__)),
        "special_tokens_map.json": json.dumps(special_map, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=True),
    }
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable.because(directory, error) from error
    for name, text in contents.items():
        write_text(directory / name, text)
