"""Makes data of this Python's docstrings: which module of the standard library is a text from?

Writes train.csv, dev.csv and test.csv for `fastbert finetune` (text, label; the module's own name
is taken out of the text), and corpus.txt for `fastbert pretrain`: all that this Python says of
itself, without what dev.csv and test.csv hold. Other modules may be named, as arguments.
"""

import ast
import csv
import hashlib
import re
import sys
import sysconfig
import warnings
from collections import defaultdict
from pathlib import Path

from fastbert.data import python_documents

MODULES = (
    *("asyncio", "email", "http", "importlib", "inspect", "logging", "multiprocessing", "tkinter"),
    *("turtle", "unittest", "urllib", "xml"),
)
LIBRARY = Path(sysconfig.get_path("stdlib"))


def docstrings(name: str) -> list[str]:
    """Those of a module or package with six words or more beside its name, each once."""
    single = LIBRARY / f"{name}.py"
    files = [single] if single.is_file() else sorted((LIBRARY / name).rglob("*.py"))
    found = set()
    for file in files:
        if {"test", "tests", "idle_test"} & set(file.relative_to(LIBRARY).parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # about escapes in other people's strings
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(re.sub(rf"\b{name}\b", "", text, flags=re.IGNORECASE).split()) >= 6:
                    found.add(text)
    return sorted(found)


def part_of(text: str) -> str:
    """One in ten is for choosing the best epoch, two in ten are for measuring it."""
    digit = hashlib.sha256(text.encode()).digest()[0] % 10
    return "dev" if digit == 0 else "test" if digit <= 2 else "train"


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def main(modules: tuple[str, ...]) -> None:
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    kept_back = []
    for name in modules:
        for text in docstrings(name):
            part = part_of(text)
            if part != "train":
                kept_back.append(letters(text))
            text = re.sub(rf"\b{name}\b", "", text, flags=re.IGNORECASE)
            rows[part].append((" ".join(text.split()[:80]), name))
    for part, found in rows.items():
        with Path(f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *found])
        print(f"{part}.csv: {len(found)} docstrings of {len({name for _, name in found})} modules")
    all_kept_back = "\n".join(kept_back)
    documents = [
        [sentence for sentence in document if letters(sentence) not in all_kept_back]
        for document in python_documents()
    ]
    text = "\n\n".join("\n".join(document) for document in documents if document) + "\n"
    Path("corpus.txt").write_text(text, encoding="utf-8")
    print(f"corpus.txt: {text.count(chr(10)):,} lines, {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or MODULES)
