"""Running the recipes of the documentation as a reader would."""

from __future__ import annotations

import re
from pathlib import Path


def run_recipe(page: str, heading: str) -> None:
    """Run the one plain code block below a heading of a page in docs/."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(code, f"docs/{page}", "exec"), {"__name__": "recipe"})
