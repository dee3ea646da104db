"""The default corpus: Python's own language reference and the standard library's docstrings.

About 2 MB of English prose about programming: small, but available without a download.
"""

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastbert.check import InputError
from fastbert.data.text.sentences import split_sentences

_READER_VERSION = 2  # increase it when a change gives other documents from the same files

# Tests, vendored and generated code, and packages that are not part of the standard library.
_SKIPPED = {
    "__pycache__",
    "_vendor",
    "dist-packages",
    "idle_test",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}


def python_documents() -> Iterator[list[str]]:
    """Yields the documents (lists of sentences) of the running Python, always in the same order.

    First come the topics of `pydoc_data.topics`, then the docstrings of the standard library's
    modules, read from the source without imports. Raises InputError if the installation has
    neither.
    """
    empty = True
    for text in (*_topics(), *map(_docstrings, _modules())):
        if sentences := _prose(text):
            empty = False
            yield sentences
    if empty:
        raise InputError("--corpus: missing, and this Python has no sources for the default corpus")


def fingerprint_python() -> str:
    """SHA-256 of the sources that `python_documents` reads."""
    digest = hashlib.sha256(f"python {_READER_VERSION}".encode())
    for text in _topics():
        digest.update(text.encode())
    for file in _modules():
        digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _topics() -> list[str]:
    if importlib.util.find_spec("pydoc_data") is None:  # some distributions omit it
        return []
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _modules() -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    files = ((file.relative_to(library), file) for file in library.rglob("*.py"))
    return [file for name, file in sorted(files) if _SKIPPED.isdisjoint(name.parts)]


def _docstrings(file: Path) -> str:
    try:
        # the parser warns of invalid escapes in the standard library's strings
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # a template or a test file that is not valid Python
        return ""
    return "\n\n".join(_docstrings_below(tree))


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        # expressions contain no definitions
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _docstrings_below(child)


# Lines and paragraphs that are not prose, and markup in prose.
_RULE = re.compile(r"^[\s=\-~^*#+|.`\"']*$", re.MULTILINE)  # underlines, table borders
# interactive sessions, shell commands and directives, up to the end of the paragraph
_SESSION = re.compile(r"^\s*(?:>>>|\$ |\.\. ).*", re.MULTILINE | re.DOTALL)
_BULLET = re.compile(r"^\s*(?:[*+-]|\d+\.)\s+", re.MULTILINE)
_HYPHENATED = re.compile(r"(?<=\w-)\n\s*(?=\w)")
_MARKS = [
    (re.compile(r":(?:[a-z]+:)+`~?([^`]*)`"), r"\1"),  # :class:`dict`
    (re.compile(r"`+([^`]*)`+_*"), r"\1"),  # ``code``, `name`, `link`_
    (re.compile(r"(?<!\w)\*{1,2}(\w[^*\n]*?)\*{1,2}(?!\w)"), r"\1"),  # **bold**, *emphasis*
]


def _prose(text: str) -> list[str]:
    """Strips the markup of reStructuredText, joins each paragraph's lines, and splits sentences."""
    sentences = []
    for paragraph in re.split(r"\n(?:\s*\n)+", _RULE.sub("", text)):
        for item in _BULLET.split(_SESSION.sub("", paragraph)):
            item = " ".join(_HYPHENATED.sub("", item).split())
            for mark, plain in _MARKS:
                item = mark.sub(plain, item)
            sentences += split_sentences(item)
    return [sentence for sentence in sentences if any(map(str.isalpha, sentence))]
