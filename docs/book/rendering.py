"""How the site shows interactive examples and docstrings; read by mkdocs and by mkdocstrings.

Pages and docstrings are written to be read as text and run by doctest. Here their examples get the
highlighting of a session, and roles such as ``:func:`` become links.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(func|class|meth|attr|mod|data):`(~?)([\w.]+)`")
_PACKAGES = ("purprune.", "purprune_adapters.")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Highlight the interactive examples of a page as sessions."""
    return re.sub(r"```python\n(?=>>> )", "```pycon\n", markdown).replace("\n<BLANKLINE>\n", "\n\n")


def fenced(text: str) -> str:
    """Put fences around the examples of a docstring, which end at the next empty line."""
    lines: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        starts, ends = not inside and line.startswith(">>> "), inside and not line.strip()
        lines += ["", "```pycon", line] if starts else ["```", ""] if ends else [line]
        inside = (inside or starts) and not ends
    return "\n".join(lines).replace("<BLANKLINE>", "")


def linked(text: str, owner: str) -> str:
    """Turn roles into links to the reference; what is not in it stays a name.

    A name without a package is one of ``owner``'s members, where it is a method, or else one of the
    names that the package exports.
    """

    def link(match: re.Match[str]) -> str:
        role, name = match[1], match[3]
        shown = name.rpartition(".")[2] if match[2] else name
        if not name.startswith(_PACKAGES):
            of_class = role in ("meth", "attr") and "." not in name
            name = f"{owner if of_class else owner.partition('.')[0]}.{name}"
        return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(link, text)


class Docstrings(griffe.Extension):  # type: ignore[misc]  # the base is not followed
    """Rewrites every docstring before mkdocstrings parses it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            owner = obj.path if obj.is_class else obj.parent.path if obj.parent else obj.path
            obj.docstring.value = linked(fenced(obj.docstring.value), owner)
