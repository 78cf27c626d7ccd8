"""The documentation names what exists: public names, tests, pages; the notebook is the tutorial.

Two tests need the extra ``docs``, which `make docs` installs: one builds the site, one runs the
notebook in a kernel.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML

import purprune
import purprune_adapters

DOCS = Path(__file__).parents[1] / "docs"
BOOK = DOCS / "book"
README = DOCS.parent / "README.md"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)[^)]*\)")


def exported(module: ModuleType) -> set[str]:
    """Return what the ``__init__`` of a package exports, by ``from x import y as y``."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    names = [n for node in tree.body if isinstance(node, ast.ImportFrom) for n in node.names]
    return {f"{module.__name__}.{n.name}" for n in names if n.asname == n.name}


def pages_of(nav: object) -> list[str]:
    """Return the pages of a navigation, which is nested lists of one-key dicts."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


def test_every_public_name_has_one_entry_in_the_reference() -> None:
    """Defends the reference against names that are new, renamed, gone or shown twice."""
    text = "\n".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    written = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    # A function in a module of its name is written as resolve.resolve.
    entries = Counter(re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in written)
    public = exported(purprune) | exported(purprune_adapters)
    assert {name for name, times in entries.items() if times > 1} == set()
    assert public - set(entries) == set()
    assert {name for name in entries if name.count(".") == 1} - public == set()


def test_every_test_that_the_guarantees_name_exists() -> None:
    """Defends the page of guarantees: a promise whose test was renamed is a promise without one."""
    named = TEST.findall((DOCS / "guarantees.md").read_text("utf-8"))
    assert len(named) > 50
    missing = []
    for file, name in named:
        tree = ast.parse((DOCS.parent / file).read_text("utf-8"))
        missing += [name] * (name not in {getattr(node, "name", None) for node in tree.body})
    assert missing == []


def test_every_law_of_the_design_has_its_section_in_the_guarantees() -> None:
    """Defends against a law that nobody tests."""
    laws = re.findall(r"^(\d+)\. \*\*", (DOCS / "design.md").read_text("utf-8"), re.MULTILINE)
    text = (DOCS / "guarantees.md").read_text("utf-8")
    sections = re.findall(r"^## (\d+)\. [^#]*?tests/", text, re.MULTILINE)
    assert laws == sections


def test_every_page_is_in_the_navigation_once() -> None:
    """Defends a new page against being written and never found."""
    config = YAML(typ="safe").load((BOOK / "mkdocs.yml").read_text("utf-8"))
    assert sorted(pages_of(config["nav"])) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_within_the_documentation(page: str) -> None:
    """Defends links on the repository's page and in the site alike: both show `docs` alone."""
    at = (DOCS / page).parent
    for link in filter(None, LINK.findall((DOCS / page).read_text("utf-8"))):
        target = Path(os.path.normpath(at / link))
        assert target.is_file(), link
        assert target.is_relative_to(DOCS), link


def test_the_script_of_the_readme_runs_as_it_is_pasted(tmp_path: Path) -> None:
    """Defends the first thing that is pasted: it is complete, and ends with a package."""
    pytest.importorskip("coremltools")
    text = README.read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (script,) = [block for block in blocks if ">>>" not in block]
    (tmp_path / "script.py").write_text(script, "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "21,747 of 27,184 (80.00 %) zero" in done.stdout
    assert "read back: every surviving weight is there" in done.stdout
    assert (tmp_path / "net.mlpackage" / "Manifest.json").is_file()


def test_what_is_installed_as_a_first_step_is_installed_from_a_checkout() -> None:
    """Defends against a name that no package index has."""
    pages = [README, *(DOCS / page for page in PAGES)]
    assert [str(page) for page in pages if 'pip install "purprune' in page.read_text("utf-8")] == []


def test_the_notebook_is_the_tutorial() -> None:
    """Defends the one source: the page is run by doctest, so the notebook's cells are too."""
    done = subprocess.run(
        [sys.executable, BOOK / "make_notebook.py", "--print"], capture_output=True, check=True
    )
    written = (DOCS / "tutorial.ipynb").read_text("utf-8")
    same = done.stdout.decode("utf-8") == written
    assert same, "docs/tutorial.md changed: run `python docs/book/make_notebook.py`"


def test_the_notebook_runs_from_top_to_bottom() -> None:
    """Defends what doctest does not see: that each cell is one piece of code for a kernel."""
    pytest.importorskip("sklearn")
    pytest.importorskip("coremltools")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [
        output.get("data", {}).get("text/plain") or output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    assert "4,297 of 5,408 (79.46 %)\n" in shown
    assert shown[-1] == "True"


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Defends links, anchors and docstrings of the reference, and the reader's privacy."""
    pytest.importorskip("mkdocs")
    # Without --quiet, which silences warnings before --strict counts them.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "-f", BOOK / "mkdocs.yml", "-d", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    html = {path: path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    assert len(html) > len(PAGES)  # and the page for what is not found
    foreign = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")
    assert [found for text in html.values() for found in foreign.findall(text)] == []
    assert "compute_masks" in html[tmp_path / "reference" / "masks.html"]
