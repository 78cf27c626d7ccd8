"""Templates of pages, and what they all have: style, script, words for numbers, versions."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch

import purprune
from purprune_adapters.html_report import words


def render(name: str, **values: Any) -> str:
    """Return a page."""
    page: str = (
        _environment()
        .get_template(name)
        .render(
            versions={"purprune": purprune.__version__, "torch": torch.__version__},
            style=_text("page.css"),
            script=_text("page.js"),
            **values,
        )
    )
    return page


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("purprune_adapters.html_report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": words.size,
        "short": words.short,
        "share": words.short_percent,
        "breakable": _breakable,
    }
    environment.globals |= {"percent": words.percent, "plural": words.plural}
    return environment


def _breakable(name: str) -> Any:
    """Let a long name break behind its dots, and escape it."""
    from markupsafe import Markup, escape

    return escape(name).replace(".", Markup(".<wbr>"))


def _text(name: str) -> str:
    return files("purprune_adapters.html_report").joinpath(name).read_text(encoding="utf-8")
