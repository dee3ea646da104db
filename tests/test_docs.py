"""The pages of docs/: the site names them all, and they name what is there.

`make docs` checks links and anchors; this file needs nothing that builds the site.
"""

import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import fastbert
from fastbert.backend import OPS
from fastbert.config.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
NO_OPTIONS = {"PYTHONPATH", "PYTEST_XDIST_WORKER", "WHO"}  # read by tests, and set by nobody


def named():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return re.findall(r"^ +- (?:.*: )?(\S+\.md)$", text, flags=re.MULTILINE)


def test_the_site_names_every_page_once():
    assert sorted(named()) == sorted(PAGES)


def test_the_index_links_every_page():
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([\w-]+\.md)\)", text)
    assert sorted(["index.md", *linked]) == sorted(named())


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_from_the_root_lead_to_files(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / link).is_file(), link


def test_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:fastbert|kernels|csrc|tests|docs|benchmarks)/[\w/.-]*)`", text)
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_readme_can_be_read_at_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_api_page_has_every_public_name_and_operator():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    operators = {name for name in OPS if not name.endswith("_keep_mask")}  # dropout's, for modules
    assert {*fastbert.__all__, *operators} - {"IGNORE_INDEX", "__version__"} <= shown


def test_what_a_page_tells_users_to_call_is_on_the_api_page():
    """Names that are not there may change in any version: see docs/releasing.md."""
    shown = (ROOT / "docs/api.md").read_text(encoding="utf-8").split()
    shown += [f"fastbert.{name}" for name in fastbert.__all__]
    texts = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES]
    texts.append((ROOT / "README.md").read_text(encoding="utf-8"))
    named = {name for text in texts for name in re.findall(r"`(fastbert\.[\w.]+)[`(]", text)}
    found = {name for name in named if callable(pkgutil.resolve_name(name))}
    assert {"fastbert.optim.Lamb", "fastbert.patch", "fastbert.backend.use"} <= found
    assert found <= {*shown}


def test_every_variable_of_the_code_is_on_its_page():
    sources = [ROOT / "setup.py"]
    for folder in ("fastbert", "kernels", "benchmarks", "tests"):
        sources += (ROOT / folder).rglob("*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    found = set(re.findall(r"""environ(?:\.get\(|\.setdefault\(|\[)"(\w+)""", text))
    assert {"FASTBERT_BACKEND", "FASTBERT_GRAPHS", "FASTBERT_BUILD_EXT"} <= found
    assert {name for name in found if f"`{name}" not in page} <= NO_OPTIONS


def test_the_presets_are_those_of_the_code():
    page = (ROOT / "docs/pretraining.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` ((?:\| [\d.]+ ){6})\|$", page, flags=re.MULTILINE)
    assert {name: [float(cell) for cell in cells.split("|")[1:]] for name, cells in rows} == {
        name: [preset.shape["num_hidden_layers"], preset.shape["hidden_size"], preset.max_seq_len,
               preset.learning_rate, preset.dropout, preset.nsp_weight]
        for name, preset in PRESETS.items()
    }  # fmt: skip


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {fastbert.__version__}\n" in citation
    assert f"## {fastbert.__version__} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"license: {project['license']}\n" in citation
