"""Makes train.csv and dev.csv of this Python's docstrings: which module does a text belong to?

Data for `fastbert finetune` that every machine has. The module's name is taken out of the text.
"""

import ast
import csv
import hashlib
import re
import sysconfig
import warnings
from pathlib import Path

MODULES = (
    *("asyncio", "email", "http", "importlib", "inspect", "logging", "multiprocessing", "tkinter"),
    *("turtle", "unittest", "urllib", "xml"),
)
LIBRARY = Path(sysconfig.get_path("stdlib"))


def docstrings(name: str) -> list[str]:
    """Those of a module or package with six words or more, each once."""
    single = LIBRARY / f"{name}.py"
    files = [single] if single.is_file() else sorted((LIBRARY / name).rglob("*.py"))
    found = []
    for file in files:
        if {"test", "tests", "idle_test"} & set(file.relative_to(LIBRARY).parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # about escapes in other people's strings
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                text = re.sub(rf"\b{name}\b", "", text, flags=re.IGNORECASE)
                if len(text.split()) >= 6:
                    found.append(" ".join(text.split()[:80]))
    return sorted(set(found))


def main() -> None:
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "dev": []}
    for name in MODULES:
        for text in docstrings(name):
            digest = hashlib.sha256(text.encode()).digest()
            rows["dev" if digest[0] < 51 else "train"].append((text, name))  # one in five
    for part, found in rows.items():
        with Path(f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *found])
        print(
            f"{part}.csv: {len(found)} docstrings of {len({label for _, label in found})} modules"
        )


if __name__ == "__main__":
    main()
