"""Splits English and Chinese text into sentences with rules, without a model."""
# ruff: noqa: RUF001, SIM905 -- Chinese stops and quotes are meant; a list of words reads as words

import re

# Abbreviations whose full stop does not end a sentence, written without it. Some can end one
# ("Inc."), but for pre-training two joined sentences do no harm, and a sentence cut in two does.
# "etc." is not here, because before a capital letter it nearly always ends its sentence.
_ABBREVIATIONS = frozenset(
    "al approx apr asst aug ave blvd ca capt cf ch co col corp dec dept dr ed eds eq eqs est feb "
    "fig figs gen gov hon inc jan jr jul jun lt ltd maj mar messrs mr mrs ms mt no nos nov oct op "
    "p pp prof rd ref refs rep resp rev sec sen sep sept sgt sr st univ viz vol vols vs".split()
)

# A Chinese stop always ends a sentence, a Latin one only before white space, so that 3.14, os.path
# and example.com stay whole.
_STOP = re.compile(
    r"""(?: [。！？；…]+ [”’」』）】》〉"']* \s* )
      | (?: (?<![.!?]) (?P<latin>[.!?]++) ["'”’»)\]}*]*+ \s+ )""",
    re.VERBOSE,  # nothing backtracks, so that a page of dots takes linear time
)

# J, and parts of one or two letters with stops between them: e.g, U.S, Ph.D, M.Sc.
_INITIALS = re.compile(r"[^\W\d_]|[^\W\d_]{1,2}(?:\.[^\W\d_]{1,2})+")

_LOOK_BACK = 24  # characters before a full stop that are searched for an abbreviation


def split_sentences(text: str) -> list[str]:
    """The sentences of `text` in order, stripped, without empty ones.

    A newline always ends a sentence. A stop before a lower-case letter does not, and neither does
    the full stop of an abbreviation (Mr., e.g., Ph.D.), of an initial (J. Smith) or of a list
    number.
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
    """Whether a full stop after the text `before` belongs to its last word, as in "e.g."."""
    if before.strip().isdigit():  # "2. Second item"
        return True
    word = before.rpartition(" ")[2].strip("\"'“”‘’»()[]{}*")
    return _INITIALS.fullmatch(word) is not None or word.lower() in _ABBREVIATIONS
