# ruff: noqa: RUF001 -- Chinese stops and quotes are meant
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        "The cat sat. | It purred! | Why? | Nobody knows.",
        "Mr. Smith met Dr. J. R. Jones at 3 p.m. today. | They spoke.",
        "Use a mapping, e.g. Dict or (i.e. Counter). | See os.path.join. | Or example.com",
        "Pi is 3.14. | It is irrational.",
        "He said “Stop.” | (Then he left.) | 'Really?' she asked. | Yes.",
        "See Fig. 3 and cf. No. 7 in vol. X of it. | It costs $5. | 20 are sold.",
        "Ask a Ph.D. Smith, M.Sc. Jones or Ll.B. Kay. | She lives in 5 Fifth Ave. West of us.",
        "Down Sunset Blvd. No. 3, 2nd ed. Paris. | Ask os.path. | See main.py. | Cats, etc. | Yes.",
        "1. Open the file. | 2. Read it.",
        "Wait… what? | So… | Nothing. | Ah!!! | OK?!",
        "no capital here. this goes on. | This ends",
    ],
)
def test_english(sentences):
    expected = sentences.split(" | ")
    assert split_sentences(" ".join(expected)) == expected


@pytest.mark.parametrize(
    "sentences",
    [
        "今天天气很好。|我们去公园吧！|你去吗？|不去；|太远了。",
        "他说：“你好。”|然后走了……|「真的？」|是。",
        "版本是3.14。|Python很好！|完",
    ],
)
def test_chinese_needs_no_spaces(sentences):
    expected = sentences.split("|")
    assert split_sentences("".join(expected)) == expected


def test_a_newline_ends_a_sentence():
    assert split_sentences("a heading\n\n  and a line \r\nmore") == [
        "a heading",
        "and a line",
        "more",
    ]


@given(st.text(alphabet="aB.?!…。” \n\t'1", max_size=60))
def test_loses_nothing(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in sentences)


@pytest.mark.parametrize("text", ["." * 200_000, '."' * 100_000, "a. " * 70_000, "a.\t" * 70_000])
def test_takes_linear_time(text):
    begin = time.perf_counter()
    split_sentences(text + "x")
    assert time.perf_counter() - begin < 2
