"""How the site shows interactive examples and docstrings; read by mkdocs and by mkdocstrings.

Pages and docstrings are written to be read as text and run by doctest. Here their examples get the
highlighting of a session, roles such as ``:func:`` become links, and values show how they are
built.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from typing import Any, ClassVar

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


def full_name(name: str, role: str, obj: Any) -> str:
    """Return the dotted name of what a docstring of ``obj`` calls ``name``."""
    if name.startswith(_PACKAGES):
        return name
    if role in ("meth", "attr") and "." not in name:
        return f"{(obj if obj.is_class else obj.parent).path}.{name}"
    first, dot, rest = name.partition(".")
    try:
        return f"{obj.resolve(first)}{dot}{rest}"
    except griffe.NameResolutionError:
        return f"{obj.package.path}.{name}"


def linked(text: str, obj: Any) -> str:
    """Turn roles into links to the reference; what is not in it stays a name."""

    def link(match: re.Match[str]) -> str:
        role, short, name = match.groups()
        shown = name.rpartition(".")[2] if short else name
        target = full_name(name, role, obj)
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(link, text)


class _Plain(ast.NodeTransformer):
    """Leaves of ``Annotated[type, checks]`` the type, and of ``StrictInt`` int."""

    names: ClassVar = {"StrictInt": "int", "StrictFloat": "float"}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated":
            assert isinstance(node.slice, ast.Tuple)
            plain: ast.AST = self.visit(node.slice.elts[0])
            return plain
        return self.generic_visit(node)


def parameter(given: inspect.Parameter, owner: Any) -> Any:
    """Return what the reference shows of a parameter of a value."""
    type_ = _Plain().visit(ast.parse(str(given.annotation), mode="eval").body)
    default = None if given.default is given.empty else repr(given.default)
    return griffe.Parameter(
        given.name,
        annotation=griffe.get_expression(type_, parent=owner),
        kind=griffe.ParameterKind(given.kind.description),
        default="{}" if default == "<factory>" else default,
    )


def add_constructor(cls: Any) -> None:
    """Give a class that ``@value`` made the constructor that it has at run time.

    ``kind``, which tells values apart in files, is left out.
    """
    made = getattr(importlib.import_module(cls.module.path), cls.name)
    given = inspect.signature(made).parameters.values()
    shown = [parameter(p, cls) for p in given if p.name != "kind"]
    this = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
    cls.set_member(
        "__init__", griffe.Function("__init__", parameters=griffe.Parameters(this, *shown))
    )


class Rendered(griffe.Extension):  # type: ignore[misc]  # the base is not followed
    """Changes every object of a package before mkdocstrings shows it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Add the constructor of a value, and rewrite the docstring."""
        if obj.is_class and any(d.callable_path == "purprune.values.value" for d in obj.decorators):
            add_constructor(obj)
        if obj.docstring:
            obj.docstring.value = linked(fenced(obj.docstring.value), obj)
