"""docs/walkthrough.md names what is there, in ten files at most."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")


def walk():
    """Pairs of a file and a name in it, in order."""
    file, found = None, []
    for first in re.findall(r"^\| (\*{0,2}`[^`]+`\*{0,2}) \|", PAGE, flags=re.MULTILINE):
        name = first.strip("*`")
        if first.startswith("**"):
            file = name
        else:
            found.append((file, name))
    return found


def test_the_walk_opens_at_most_ten_files():
    files = list(re.findall(r"^\| \*\*`([^`]+)`\*\* \|", PAGE, flags=re.MULTILINE))
    assert len(files) == len(set(files)) <= 10


def test_each_name_of_the_walk_is_defined_where_it_says():
    for file, name in walk():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        assert name in {node.name for node in tree.body if isinstance(node, kinds)}, (file, name)


def test_files_that_the_page_names_exist():
    for file in re.findall(r"`((?:fastbert|kernels)/[\w/]+\.py)`", PAGE):
        assert (ROOT / file).is_file(), file
