import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.check import InputError
from fastbert.data import SpecialTokens, Tokens, make_masking
from fastbert.data.masking.noising import _ordinary_tokens
from fastbert.data.masking.philox import philox, uniform

SPECIALS = SpecialTokens(
    pad=0, unk=7, cls=101, sep=5, mask=60
)  # scattered, as in other vocabularies
VOCAB = 120


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_random123s_known_answers(counter, key, expected):
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == expected


def test_a_uniform_number_has_53_bits():
    words = np.array([0, 1 << 11, 2**32 - 1], np.uint64)
    assert uniform(words[:1], words[1:2]) == 2.0**-53
    assert uniform(words[2:], words[2:]) == 1 - 2.0**-53


def test_a_random_token_is_any_but_a_special_one():
    ordinary = VOCAB - len(SPECIALS)
    words = np.arange(ordinary, dtype=np.uint64) * np.uint64(2**32 // ordinary + 1)
    drawn = _ordinary_tokens(words, VOCAB, SPECIALS)
    assert drawn.tolist() == [token for token in range(VOCAB) if token not in SPECIALS]


def batch(lengths, seed=0, special_share=0.05):
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    ids = rng.integers(0, VOCAB, total)
    ids[np.isin(ids, SPECIALS)] = 1
    ids = np.where(rng.random(total) < special_share, rng.choice(SPECIALS, total), ids)
    example = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    return ids, example, position


def mask(ids, example, position, seed=1, epoch=0, probability=0.15):
    maskable = ~np.isin(ids, SPECIALS)
    tokens = Tokens(ids, example, position, maskable, np.ones(len(ids), bool))
    masking = make_masking("bert", SPECIALS, VOCAB, probability=probability)
    masked, labels = masking(tokens, seed=seed, epoch=epoch)
    assert masking.num_targets(tokens, seed=seed, epoch=epoch) == (labels != -100).sum()
    return masked, labels


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    seed=st.integers(0, 2**64 - 1),
    probability=st.sampled_from([0.01, 0.15, 0.5, 0.99]),
)
def test_counts_and_places(lengths, seed, probability):
    ids, example, position = batch(lengths, seed % 1000, special_share=0.3)
    before = ids.copy()
    masked, labels = mask(ids, example, position, seed=seed, probability=probability)
    np.testing.assert_array_equal(ids, before)
    assert masked.dtype == labels.dtype == np.int64
    chosen = labels != -100
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(masked[~chosen], ids[~chosen])
    assert not np.isin(labels[chosen], SPECIALS).any()
    for number in range(len(lengths)):
        maskable = int((~np.isin(ids[example == number], SPECIALS)).sum())
        wanted = min(max(1, round(probability * maskable)), maskable)
        assert chosen[example == number].sum() == wanted


def test_eighty_ten_ten():
    ids, example, position = batch([100] * 4000)
    masked, labels = mask(ids, example, position)
    chosen = labels != -100
    n = chosen.sum()
    assert n > 50_000
    outcome = masked[chosen]
    changed = outcome != labels[chosen]
    to_mask = outcome == SPECIALS.mask
    random = changed & ~to_mask
    ordinary = VOCAB - len(SPECIALS)
    seen_random = 0.1 * (1 - 1 / ordinary)  # a random token may be the old one
    for count, share in [(to_mask, 0.8), (random, seen_random), (~changed, 0.2 - seen_random)]:
        assert abs(count.sum() - share * n) < 4 * np.sqrt(share * (1 - share) * n)
    others = np.setdiff1d(SPECIALS, [SPECIALS.mask])
    assert not np.isin(outcome, others).any()
    # replacements are uniform over all ordinary tokens: chi-squared with 114 degrees of freedom
    counts = np.delete(np.bincount(outcome[random], minlength=VOCAB), SPECIALS)
    expected = counts.sum() / ordinary
    assert counts.min() > 0
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - 114) < 4 * np.sqrt(2 * 114)


def test_every_position_is_equally_likely():
    ids, example, position = batch([20] * 20_000, special_share=0)
    _, labels = mask(ids, example, position)
    chosen = (labels != -100).reshape(-1, 20)
    assert (chosen.sum(axis=1) == 3).all()
    sigma = np.sqrt(0.15 * 0.85 / len(chosen))
    assert (abs(chosen.mean(axis=0) - 0.15) < 4.5 * sigma).all()
    # and pairs of positions: 3 of 20 without replacement
    together = (chosen.T.astype(float) @ chosen) / len(chosen)
    share = 3 * 2 / (20 * 19)
    off = together[~np.eye(20, dtype=bool)]
    assert (abs(off - share) < 5 * np.sqrt(share / len(chosen))).all()


def test_what_becomes_of_a_token_does_not_depend_on_where_it_is():
    """The choice of a token and what it becomes come from different random words."""
    ids, example, position = batch([20] * 20_000, special_share=0)
    masked, labels = mask(ids, example, position)
    chosen = labels != -100
    shares = [(masked[chosen & (position == p)] == SPECIALS.mask).mean() for p in range(20)]
    assert (abs(np.array(shares) - 0.8) < 4.5 * np.sqrt(0.16 / 3000)).all()


def test_a_random_token_does_not_tell_how_long_its_span_is():
    ids, example, position = batch([100] * 4000, special_share=0)
    tokens = Tokens(ids, example, position, np.ones(len(ids), bool), np.ones(len(ids), bool))
    masked, labels = make_masking("span", SPECIALS, VOCAB)(tokens, seed=1, epoch=0)
    chosen = labels != -100
    begins = chosen & ~np.append(False, chosen[:-1])
    random = begins & (masked != ids) & (masked != SPECIALS.mask)
    alone = ~np.append(chosen[1:], False)
    short, long = masked[random & alone], masked[random & ~alone]
    error = np.sqrt(VOCAB**2 / 12 * (1 / len(short) + 1 / len(long)))
    assert len(short) > 300
    assert abs(short.mean() - long.mean()) < 4 * error


def test_the_tokens_of_a_span_become_all_masks_or_none():
    """SpanBERT's 80/10/10 is drawn for each span, not for each of its tokens."""
    ids, example, position = batch([200] * 20, special_share=0)
    tokens = Tokens(ids, example, position, ~np.isin(ids, SPECIALS), np.ones(len(ids), bool))
    masking = make_masking("span", SPECIALS, VOCAB)
    masked, _ = masking(tokens, seed=1, epoch=0)
    chosen, _ = masking._choose(tokens, 1, 0)
    assert (np.bincount(chosen.leader) > 2).sum() > 20
    is_mask = masked[chosen.targets] == SPECIALS.mask
    for leader in set(chosen.leader):
        assert len(set(is_mask[chosen.leader == leader])) == 1


def test_the_same_whatever_else_is_in_the_batch():
    ids, example, position = batch([30, 7, 50, 1, 20])
    masked, labels = mask(ids, example, position)
    order = [3, 0, 4]
    where = np.concatenate([np.flatnonzero(example == number) for number in order])
    masked_part, labels_part = mask(ids[where], example[where], position[where])
    np.testing.assert_array_equal(masked_part, masked[where])
    np.testing.assert_array_equal(labels_part, labels[where])


def test_seed_epoch_and_example_each_change_the_masks():
    ids, example, position = batch([200])
    base = mask(ids, example, position)[1]
    np.testing.assert_array_equal(base, mask(ids, example, position)[1])
    for other in (
        mask(ids, example, position, seed=2),
        mask(ids, example, position, seed=1 + 2**32),
        mask(ids, example, position, epoch=1),
        mask(ids, example + 1, position),
    ):
        assert not np.array_equal(base, other[1])


def test_an_example_of_special_tokens_only_has_no_targets():
    ids = np.array([101, 7, 5, 7, 5, 101, 33, 5, 34, 5])
    example = np.repeat([4, 9], 5)
    masked, labels = mask(ids, example, np.tile(np.arange(5), 2))
    np.testing.assert_array_equal(masked[:5], ids[:5])
    assert (labels[:5] == -100).all()
    assert (labels[5:] != -100).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "words"}, "expected one of bert, whole-word, span, blank, unigram, bigram-kn"),
        ({"probability": 0.0}, "--mlm-probability: expected a number between 0 and 1"),
        ({"gamma": 0.0}, "gamma: expected a number above 0"),
        ({"scheme": "blank", "gamma": 1.5}, "gamma: expected a probability for blank"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        make_masking(**{"scheme": "bert", "specials": SPECIALS, "vocab_size": VOCAB, **options})
