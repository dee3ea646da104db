"""Splits running text into sentences: enough for English and Chinese, with no model and no data."""
# ruff: noqa: RUF001, SIM905 -- Chinese stops and quotes are meant; a list of words reads as words

import re

# Words whose full stop does not end the sentence, without it. Some of them can end one ("Inc.");
# two sentences taken for one do no harm in pretraining, a sentence cut in two does.
_ABBREVIATIONS = frozenset(
    "al approx apr asst aug ca capt cf ch co col corp dec dept dr eds eq eqs est feb fig figs "
    "gen gov hon inc jan jr jul jun lt ltd mar messrs mr mrs ms mt no nos nov oct op p pp prof "
    "ref refs rep resp rev sec sen sep sept sgt sr st univ viz vol vols vs".split()
)

# A Chinese stop ends a sentence where it stands; a Latin one needs white space after it, which is
# what keeps 3.14, os.path and example.com whole.
_STOP = re.compile(
    r"""(?: [。！？；…]+ [”’」』）】》〉"']* \s* )
      | (?: (?<![.!?]) (?P<latin>[.!?]++) ["'”’»)\]}*]*+ \s+ )""",
    re.VERBOSE,  # never backtracks: a page of dots takes linear time
)

_LOOK_BACK = 24  # characters before a full stop that are searched for an abbreviation


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, stripped, none empty, in order. A newline always ends one.

    A stop followed by a lower-case letter ends nothing, nor does the full stop of an abbreviation
    (Mr., e.g.), of an initial (J. Smith) or after the number of a list item.
    """
    return [sentence for line in text.splitlines() for sentence in _split_line(line)]


def _split_line(line: str) -> list[str]:
    sentences = []
    start = 0
    for stop in _STOP.finditer(line):
        end = stop.end()
        if line[end : end + 1].islower():
            continue
        before = line[max(start, stop.start() - _LOOK_BACK) : stop.start()]
        if stop["latin"] == "." and _takes_full_stop(before):
            continue
        sentences.append(line[start:end].strip())
        start = end
    sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _takes_full_stop(before: str) -> bool:
    """Whether a full stop after `before`, the sentence so far, belongs to its last word."""
    if before.strip().isdigit():  # "2. Second item"
        return True
    word = before.rpartition(" ")[2].strip("\"'“”‘’»()[]{}*")
    initials = re.fullmatch(r"[^\W\d_](\.[^\W\d_])*", word) is not None  # e.g, i.e, U.S, J
    return initials or word.lower() in _ABBREVIATIONS
