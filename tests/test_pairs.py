"""tests/pairs.py: of a test with the mark `pairs`, each two values meet in a case that runs."""

import itertools

import pytest

from tests.pairs import chosen

pytest_plugins = "pytester"

CONFTEST = """
from tests.pairs import mark_the_rest

def pytest_collection_modifyitems(items):
    mark_the_rest(items)
"""
CASES = """
import pytest

@pytest.fixture(params=["x", "y"])
def letter(request):
    return request.param

@pytest.mark.pairs
@pytest.mark.parametrize(("number", "is_odd"), [(1, True), (2, False), (3, True)])
@pytest.mark.parametrize("values", [[], pytest.param({}, marks=MARKS)], ids=["list", "dict"])
@pytest.mark.parametrize("sign", ["plus", "minus"])
def test_some(number, is_odd, values, sign, letter):
    pass

@pytest.mark.pairs(within="letter")
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("flag", ["yes", "no"])
@pytest.mark.parametrize("sign", ["plus", "minus"])
def test_within(number, flag, sign, letter):
    pass

@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("sign", "+-")
def test_all(number, sign, letter):
    pass

@pytest.mark.pairs
@pytest.mark.parametrize("value", [[], {}, None])
def test_each(value):
    pass
"""


def met(rows):
    """What the places of two parameters, and their values there, are in some row."""
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (7, 2, 2, 2), (3, 4, 5), (6, 1, 2, 2, 3), (4, 3)])
def test_every_two_values_meet(sizes):
    rows = list(itertools.product(*map(range, sizes)))
    kept = chosen(rows)
    assert met(rows[place] for place in kept) == met(rows)
    largest, second, *_ = sorted(sizes, reverse=True)
    assert largest * second <= len(kept) <= 1.4 * largest * second


def test_what_has_no_case_is_not_waited_for():
    rows = [row for row in itertools.product(range(3), repeat=3) if row[:2] != (1, 1)]
    assert met(rows[place] for place in chosen(rows)) == met(rows)


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_left_out_of_one_parameter_or_two(count):
    assert len(chosen(list(itertools.product(range(3), repeat=count)))) == 3**count


def collected(pytester, marks="()"):
    """What `make test` runs of the cases above, by the test's name; `marks` are one value's."""
    pytester.makeini("[pytest]\nmarkers =\n    pairs\n    exhaustive")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(CASES.replace("MARKS", marks))
    result = pytester.runpytest_inprocess("--collect-only", "-q", "-m", "not exhaustive")
    lines = [line.partition("::")[2] for line in result.outlines if "::" in line]
    names = [line.strip("]").partition("[") for line in lines]
    return {test: [ids for name, _, ids in names if name == test] for test, *_ in names}


def test_make_test_collects_the_same_few_each_time(pytester):
    names = collected(pytester)
    assert names == collected(pytester)  # as another process of pytest-xdist does
    assert (len(names["test_all"]), len(names["test_each"])) == (12, 3)
    rows = [row.split("-") for row in names["test_some"]]
    assert 6 <= len(rows) <= 8  # of 24
    two = met([letter, sign, values, number] for letter, sign, values, number, _ in rows)
    assert len(two) == 3 * (2 * 2) + 3 * (2 * 3)


def test_a_case_that_is_exhaustive_anyway_stands_for_no_pair(pytester):
    rows = [row.split("-") for row in collected(pytester, "pytest.mark.exhaustive")["test_some"]]
    assert {values for _, _, values, *_ in rows} == {"list"}
    assert len(met([letter, sign, number] for letter, sign, _, number, _ in rows)) == 16


def test_within_a_parameters_value_every_two_others_meet(pytester):
    rows = [row.split("-") for row in collected(pytester)["test_within"]]
    for letter in "xy":
        some = [others for first, *others in rows if first == letter]
        assert 6 <= len(some) <= 8  # of 12
        assert len(met(some)) == 2 * 2 + 2 * 3 + 2 * 3
