"""All-pairs testing: of a product of parameters, few cases in which every two values meet.

Most faults show in one value or in two that meet (Kuhn, Wallace, Gallo: "Software Fault
Interactions and Implications for Software Testing", 2004). A test with the mark `pairs` runs such
a subset in `make test`; its other cases have the mark `exhaustive`, for `make test-all`.

`pairs(within="body")` chooses for each value of that parameter by itself: where it names one of
several implementations, the cases of one say nothing of another.
"""

import itertools

import pytest


def mark_the_rest(items):
    """Marks `exhaustive` what need not run of the tests with the mark `pairs`.

    The caller leaves out cases that would be skipped: they stand for no pair.
    """
    cases = {}
    for item in items:
        mark = item.get_closest_marker("pairs")
        if mark and not item.get_closest_marker("exhaustive"):
            test = item.nodeid.partition("[")[0]
            group = test, item.callspec.params.get(mark.kwargs.get("within"))
            cases.setdefault(group, []).append(item)
    for same in cases.values():
        kept = chosen([_values(item) for item in same])
        for place, item in enumerate(same):
            if place not in kept:
                item.add_marker(pytest.mark.exhaustive)


def chosen(rows: list[tuple]) -> set[int]:
    """Places of the rows to run; a row has one hashable value of each parameter.

    Greedy: each next row is the first of those that have the most pairs that none has yet.
    """
    left = [_pairs(row) for row in rows]
    kept: set[int] = set()
    while any(left):
        best = max(range(len(left)), key=lambda place: len(left[place]))
        kept.add(best)
        met = left[best]
        left = [pairs - met for pairs in left]
    return kept


def _pairs(row):
    return set(itertools.combinations(enumerate(row), 2)) or {row}


def _values(item) -> tuple:
    """One value of each decorator `parametrize`, whatever it names, and of each fixture.

    Which object stands for the value: not all can be compared, and pytest copies none.
    """
    values = dict(item.callspec.params)
    named = [mark.args[0] for mark in item.iter_markers("parametrize")]
    groups = [x.replace(",", " ").split() if isinstance(x, str) else x for x in named]
    found = [tuple(id(values.pop(name)) for name in group) for group in groups]
    return (*found, *map(id, values.values()))
