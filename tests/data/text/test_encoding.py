"""The fast way to the beginnings of words is taken only where it is right."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from fastbert.data import train_tokenizer
from fastbert.data.text.encoding import DocumentEncoder, continuing_tokens

TEXT = [
    "unbelievable ##able don't #1 a##b ## ###",
    "[UNK] [MASK] été 中文 a中b ☃ unknowable☃",
    "x" * 101 + " able",
    " \t able\u00adable  \u200b",
    "",
    "\x00",
    "##believ",
    "added ##added addedable",
]
VOCAB = ["un", "##believ", "##able", "able", "中", "文", "#", "##", "##中", "a", "##b", "b", "x"]


def odd(vocab=VOCAB, *, before=None, added=(), **model):
    """A WordPiece of these tokens, with all of what a tokenizer.json may say."""
    options = {"unk_token": "[UNK]", **model}
    vocab = {token: number for number, token in enumerate([options["unk_token"], *vocab])}
    tokenizer = Tokenizer(models.WordPiece(vocab, **options))
    tokenizer.pre_tokenizer = before or pre_tokenizers.BertPreTokenizer()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def two_tokens_of_one_id():
    state = json.loads(odd().to_str())
    state["model"]["vocab"]["able"] = state["model"]["vocab"]["##able"]
    return json.dumps(state)


TOKENIZERS = {
    "trained": (train_tokenizer([*TEXT, "able unbelievable"] * 3, 90).to_str(), True),
    "bert": (odd().to_str(), True),
    "added": (odd(added=["added", "un"]).to_str(), True),
    "added with prefix": (odd(added=["##added"]).to_str(), False),
    "added piece": (odd(added=["##able"]).to_str(), False),
    "unknown with prefix": (odd(unk_token="##unk").to_str(), False),
    "other prefix": (odd(continuing_subword_prefix="@@").to_str(), False),
    "words with #": (odd(before=pre_tokenizers.WhitespaceSplit()).to_str(), False),
    "no words": (odd(before=pre_tokenizers.Sequence([])).to_str(), False),
    "one id": (two_tokens_of_one_id(), False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_word_starts_are_where_the_word_ids_change(name):
    text, is_fast = TOKENIZERS[name]
    tokenizer = Tokenizer.from_str(text)
    assert (continuing_tokens(tokenizer) is not None) == is_fast
    encoded = DocumentEncoder(text).encode([TEXT])
    tokenizer.encode_special_tokens = True
    tokens, starts = [], []
    for sentence in TEXT:
        encoding = tokenizer.encode(sentence, add_special_tokens=False)
        words = encoding.word_ids
        tokens += encoding.ids
        starts += [i == 0 or words[i] != words[i - 1] for i in range(len(words))]
    assert encoded.tokens.tolist() == tokens
    assert encoded.word_starts.tolist() == starts
    assert encoded.sentence_lengths.sum() == len(tokens)


def test_the_fast_way_is_right_on_random_text():
    rng = np.random.default_rng(0)
    letters = list("abx#' -[]UNK中文é☃\u00ad\u0301")
    text = ["".join(rng.choice(letters, rng.integers(0, 30))) for _ in range(3000)]
    tokenizer = train_tokenizer(text[:200], 80)
    text = [sentence.replace("x", "\u03a9") for sentence in text]  # not in the alphabet
    encoded = DocumentEncoder(tokenizer.to_str()).encode([text])
    slow = DocumentEncoder(tokenizer.to_str())
    assert slow.continuing is not None
    slow.continuing = None
    for ours, theirs in zip(encoded, slow.encode([text]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert 0.1 < encoded.word_starts.mean() < 0.9
    assert (encoded.tokens == tokenizer.token_to_id("[UNK]")).sum() > 100
