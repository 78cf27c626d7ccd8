"""Write the tutorial page as a notebook: ``python docs/book/make_notebook.py``.

With ``--print`` it goes to the standard output.

The page is the source. Its text becomes cells of text, its examples become cells of code without
prompts and outputs, so that there is nothing to keep in step by hand; a test compares the two.
"""

from __future__ import annotations

import doctest
import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
PAGE, NOTEBOOK = DOCS / "tutorial.md", DOCS / "tutorial.ipynb"
_BLOCK = re.compile(r"```python\n(>>> .*?)```\n", re.DOTALL)
_SELF = re.compile(r" The same text is a notebook:\s*\[tutorial.ipynb\]\(tutorial.ipynb\)\.")
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def code(block: str) -> str:
    """Return the sources of an interactive session, with empty lines around definitions."""
    sources = [example.source for example in doctest.DocTestParser().get_examples(block)]
    return "".join(f"\n{s}\n" if s.startswith(("def ", "class ")) else s for s in sources)


def cells(page: str) -> list[tuple[str, str]]:
    """Split a page into cells, each of a kind (``markdown`` or ``code``) and a source."""
    parts = _BLOCK.split(_SELF.sub("", page))  # text and examples by turns
    kinds = (("markdown", "code")[i % 2] for i in range(len(parts)))
    made = [
        (kind, code(part) if kind == "code" else part)
        for kind, part in zip(kinds, parts, strict=True)
    ]
    return [(kind, source.strip()) for kind, source in made if source.strip()]


def notebook(page: str) -> str:
    """Return the notebook of a page, as JSON of nbformat 4.5."""
    written = []
    for i, (kind, source) in enumerate(cells(page)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        written.append(cell)
    whole: dict[str, Any] = {"cells": written, "metadata": {"kernelspec": _KERNEL}}
    whole |= {"nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    made = notebook(PAGE.read_text("utf-8"))
    if sys.argv[1:] == ["--print"]:
        sys.stdout.buffer.write(made.encode("utf-8"))
    else:
        NOTEBOOK.write_text(made, "utf-8")
