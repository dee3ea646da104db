"""Whole words of Chinese, by a segmenter; every character alone without one."""

import sys

import numpy as np
import pytest
from tokenizers import normalizers

from fastbert.check import InputError
from fastbert.data import make_masking, make_segmenter, special_tokens, tokenize_corpus
from fastbert.data.masking.selection import Tokens
from fastbert.data.text.segment import continuations, is_chinese, name_of
from fastbert.data.text.tokenizer import train_tokenizer

SENTENCE = "使用语言模型来预测下一个词的probability"
WORDS = ["使用", "语言", "模型", "来", "预测", "下", "一个", "词", "的", "probability"]


def divide(sentence):
    return WORDS if sentence == SENTENCE else [sentence]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([SENTENCE, "模型预测语言 it is probable"] * 20, 120)


def word_starts(tokenizer, directory, sentence, segmenter):
    documents = [[sentence]] * 4
    corpus = tokenize_corpus(documents, tokenizer, directory, fingerprint="f", segmenter=segmenter)
    first, last = corpus.sentence_offsets[:2]
    pieces = [tokenizer.id_to_token(int(i)) for i in corpus.tokens[first:last]]
    words = []
    for piece, begins in zip(pieces, corpus.word_starts[first:last], strict=True):
        if begins:
            words.append("")
        words[-1] += piece.removeprefix("##")
    return words


def test_a_segmenter_tells_the_words(tokenizer, tmp_path):
    assert word_starts(tokenizer, tmp_path / "a", SENTENCE, divide) == WORDS
    alone = [*SENTENCE.removesuffix("probability"), "probability"]
    assert word_starts(tokenizer, tmp_path / "b", SENTENCE, None) == alone


def test_text_that_is_divided_already(tokenizer, tmp_path):
    spaces = make_segmenter("spaces")
    assert word_starts(tokenizer, tmp_path, " ".join(WORDS), spaces) == WORDS


def test_an_undivided_sentence_is_not_one_word(tokenizer, tmp_path):
    spaces = make_segmenter("spaces")
    alone = [*SENTENCE.removesuffix("probability"), "probability"]
    assert word_starts(tokenizer, tmp_path, SENTENCE, spaces) == alone


def test_without_a_segmenter_every_character_is_a_word(tokenizer, tmp_path):
    assert word_starts(tokenizer, tmp_path / "words", SENTENCE, divide) == WORDS
    assert word_starts(tokenizer, tmp_path / "characters", SENTENCE, None) != WORDS


def test_words_of_other_scripts_are_the_tokenizers():
    assert continuations("don't 不知道 stop", lambda s: ["don't", "不知道", "st", "op"]) == {7, 8}


def test_chinese_characters_are_those_that_berts_tokenizer_divides():
    """It puts blanks around each; the blocks end where it does so no longer."""
    normalizer = normalizers.BertNormalizer(lowercase=False)
    for block in ("㐀䶿", "一鿿", "𠀀𪛟", "𪜀𫜿", "𫝀𫠟", "豈﫿", "丽𯨟"):
        assert all(map(is_chinese, block))
        assert normalizer.normalize_str(block).split() == list(block)
    assert not any(map(is_chinese, "a한かé㏿ꀀ𯨠"))


def test_a_word_that_is_not_in_the_sentence_is_an_error():
    with pytest.raises(InputError, match="segmenter: returned the word '不'"):
        continuations("知道", lambda s: ["不", "知道"])


def test_masks_whole_chinese_words(tokenizer, tmp_path):
    corpus = tokenize_corpus(
        [[SENTENCE]] * 4, tokenizer, tmp_path, fingerprint="f", segmenter=divide
    )
    specials = special_tokens(tokenizer)
    count = int(corpus.sentence_offsets[1])
    ids = corpus.tokens[:count].astype(np.int64)
    starts = corpus.word_starts[:count]
    masking = make_masking("whole-word", specials, tokenizer.get_vocab_size(), probability=0.3)
    word = np.cumsum(starts)
    seen = set()
    for epoch in range(200):
        zeros = np.zeros(count, np.int64)
        tokens = Tokens(ids, zeros, np.arange(count), ids > 4, starts)
        _, labels = masking(tokens, seed=0, epoch=epoch)
        chosen = labels >= 0
        for number in np.unique(word[chosen]):
            assert chosen[word == number].all()
        seen.update(word[chosen].tolist())
        assert chosen.sum() < count / 2
    assert seen == set(word.tolist())


def test_jieba_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(InputError, match=r"pip install 'fastbert\[chinese\]'"):
        make_segmenter("jieba")


def test_jieba_divides_real_sentences(tokenizer, tmp_path):
    pytest.importorskip("jieba")
    sentence = "我来到北京清华大学"
    found = word_starts(tokenizer, tmp_path, SENTENCE, make_segmenter("jieba"))
    assert "语言" in found
    assert "模型" in found
    assert continuations(sentence, make_segmenter("jieba")) == {2, 4, 6, 7, 8}


def test_an_unknown_segmenter_is_refused():
    with pytest.raises(InputError, match="--segmenter: expected one of characters, spaces, jieba"):
        make_segmenter("words")


def test_a_cache_tells_the_functions_of_one_module_apart():
    assert name_of(divide) != name_of(word_starts)
