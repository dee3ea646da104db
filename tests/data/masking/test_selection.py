"""The vectorised choices beside plain loops that say the same, and the shares of the papers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.masking.selection import (
    SPAN_MAX,
    SPAN_P,
    Draws,
    Tokens,
    _at_random,
    _words,
    choose_spans,
    choose_tokens,
    choose_words,
    examples_of,
    num_targets,
)


def laid_out(words, special_share=0.1, seed=0):
    """Examples of words, given as their sizes, with tokens that are not maskable among them."""
    rng = np.random.default_rng(seed)
    starts, maskable, example = [], [], []
    for number, sizes in enumerate(words):
        for size in sizes:
            special = rng.random() < special_share
            starts += [True] + [False] * (size - 1)
            maskable += [not special] * size
            example += [number] * size
    example = np.array(example, np.int64)
    position = np.concatenate([np.arange(n) for n in np.bincount(example)])
    return Tokens(position, example, position, np.array(maskable), np.array(starts))


def drawn(tokens, seed=0):
    rng = np.random.default_rng(seed)
    return Draws(*rng.integers(0, 2**32, (4, len(tokens.ids)), dtype=np.uint64))


def words_of(tokens, number):
    """Lists of an example's tokens, word by word, and the words' segments."""
    words, segments, segment = [], [], 0
    before = False
    for t in np.flatnonzero(tokens.example == number):
        if not tokens.maskable[t]:
            before, segment = False, segment + 1
            continue
        if tokens.word_starts[t] or not before:
            words.append([])
            segments.append(segment)
        words[-1].append(int(t))
        before = True
    return words, segments


def plain_words(tokens, draws, share):
    chosen = []
    for number in np.unique(tokens.example):
        words, _ = words_of(tokens, number)
        wanted = int(num_targets(np.array([sum(map(len, words))]), share)[0])
        taken = []
        for word in sorted(words, key=lambda word: draws.key[word[0]]):
            if not taken or len(taken) + len(word) <= wanted:
                taken += word
        chosen += taken
    return sorted(chosen)


def plain_spans(tokens, draws, share):
    chosen = {}
    for number in np.unique(tokens.example):
        words, segments = words_of(tokens, number)
        wanted = int(num_targets(np.array([sum(map(len, words))]), share)[0])
        covered, taken = set(), {}
        for anchor in sorted(range(len(words)), key=lambda w: draws.key[words[w][0]]):
            if anchor in covered:
                continue
            first = words[anchor][0]
            u = int(draws.low[first]) / 2**32
            length, reached = 0, 0.0
            while u >= reached and length < SPAN_MAX:
                reached += SPAN_P * (1 - SPAN_P) ** length / (1 - (1 - SPAN_P) ** SPAN_MAX)
                length += 1
            for word in range(anchor, min(anchor + length, len(words))):
                if segments[word] != segments[anchor] or word in covered:
                    continue
                covered.add(word)
                for token in words[word]:
                    if len(taken) < wanted:
                        taken[token] = first
            if len(taken) == wanted:
                break
        chosen |= taken
    return chosen


EXAMPLES = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=40), min_size=1, max_size=6)
SHARES = st.sampled_from([0.01, 0.15, 0.5, 0.95])


@settings(max_examples=150, deadline=None)
@given(words=EXAMPLES, share=SHARES, seed=st.integers(0, 99))
def test_words_are_those_of_a_plain_loop(words, share, seed):
    tokens = laid_out(words, seed=seed)
    draws = drawn(tokens, seed)
    chosen = choose_words(tokens, draws, share)
    assert sorted(chosen.targets.tolist()) == plain_words(tokens, draws, share)
    np.testing.assert_array_equal(chosen.targets, chosen.leader)


@settings(max_examples=150, deadline=None)
@given(words=EXAMPLES, share=SHARES, seed=st.integers(0, 99))
def test_spans_are_those_of_a_plain_loop(words, share, seed):
    tokens = laid_out(words, seed=seed)
    draws = drawn(tokens, seed)
    chosen = choose_spans(tokens, draws, share)
    found = dict(zip(chosen.targets.tolist(), chosen.leader.tolist(), strict=True))
    assert len(found) == len(chosen.targets)
    assert found == plain_spans(tokens, draws, share)


@pytest.mark.parametrize("choose", [choose_tokens, choose_words, choose_spans])
def test_nothing_but_special_tokens(choose):
    tokens = laid_out([[1, 2, 3], [1]], special_share=1.0)
    assert len(choose(tokens, drawn(tokens), 0.15).targets) == 0
    tokens = laid_out([[1, 2, 3], [1]], special_share=0.0)._replace(
        maskable=np.array([False] * 6 + [True])
    )
    assert choose(tokens, drawn(tokens), 0.15).targets.tolist() == [6]


@pytest.mark.parametrize("choose", [choose_words, choose_spans])
def test_the_same_whatever_else_is_in_the_batch(choose):
    tokens = laid_out([[1, 3, 2] * 9, [2] * 30, [5, 1] * 12])
    draws = drawn(tokens)
    chosen = set(choose(tokens, draws, 0.15).targets.tolist())
    for number in range(3):
        where = np.flatnonzero(tokens.example == number)
        alone = choose(Tokens(*(x[where] for x in tokens)), draws.at(where), 0.15).targets
        assert set(where[alone].tolist()) == chosen & set(where.tolist())


def test_words_make_about_the_share():
    rng = np.random.default_rng(0)
    tokens = laid_out([rng.integers(1, 5, 60).tolist() for _ in range(500)], special_share=0.0)
    chosen = choose_words(tokens, drawn(tokens), 0.15).targets
    assert 0.145 < len(chosen) / len(tokens.ids) <= 0.15
    # whole words alone
    word = np.cumsum(tokens.word_starts)
    sizes = np.bincount(word)
    assert (np.bincount(word[chosen], minlength=len(sizes))[np.unique(word[chosen])]
            == sizes[np.unique(word[chosen])]).all()  # fmt: skip


def test_spans_have_the_lengths_of_the_paper():
    """The first span of long examples, which neither others nor the share cut."""
    tokens = laid_out([[1] * 400 for _ in range(3000)], special_share=0.0)
    draws = drawn(tokens)
    chosen = choose_spans(tokens, draws, 0.15)
    first = np.flatnonzero(np.diff(tokens.example, prepend=-1))
    anchor = first + np.argmin(draws.key.reshape(-1, 400), axis=1)
    lengths = np.bincount(chosen.leader, minlength=len(tokens.ids))[anchor]
    inside = (anchor - first) <= 390
    counts = np.bincount(lengths[inside], minlength=11)[1:]
    shares = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    expected = shares * counts.sum()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 27.9  # of 9 degrees of freedom, once in a thousand
    assert np.arange(1, 11) @ shares == pytest.approx(3.8, abs=0.01)  # the paper's mean


def test_a_word_ends_with_its_example():
    """Also where the next one begins within a word, without a special token before it."""
    example, every = np.array([0, 0, 1, 1]), np.ones(4, bool)
    tokens = Tokens(np.arange(4), example, np.arange(4) % 2, every, np.array([1, 0, 0, 0], bool))
    words = _words(tokens, examples_of(tokens, 0.5))
    assert words.first.tolist() == [0, 2]
    assert words.size.tolist() == [2, 2]


@pytest.mark.parametrize("last", [3, 2**30])
def test_the_order_at_random_of_more_examples_than_fit_beside_the_keys(last):
    number = np.array([0, 0, 1, 1, last, last])
    key = np.array([2**32, 5, 7, 7, 2**32 - 1, 0], np.uint64)
    assert _at_random(number, key).tolist() == [1, 0, 2, 3, 5, 4]
