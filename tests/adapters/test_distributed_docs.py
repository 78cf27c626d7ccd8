"""The scripts of docs/distributed.md, each run by real processes."""

from __future__ import annotations

import re
from pathlib import Path

from ranks import on_ranks

DOC = Path(__file__).parents[2] / "docs" / "distributed.md"
SCRIPTS = dict(
    re.findall(r"```python\n# run with 2 processes: (\w+)\n(.*?)```", DOC.read_text(), re.DOTALL)
)


def run(name: str) -> None:
    exec(compile(SCRIPTS[name], f"{DOC.name}: {name}", "exec"), {"__name__": name})


@on_ranks(2)
def test_the_script_for_ddp_runs():
    """Defends the recipe, and the count of zeros that it states."""
    run("ddp")


@on_ranks(2)
def test_the_script_for_fully_shard_runs():
    """Defends the recipe, and the count of zeros that it states."""
    run("fsdp")


@on_ranks(2)
def test_the_script_for_checkpoints_runs():
    """Defends the recipe: the loaded masks are the saved ones."""
    run("checkpoint")


def test_every_script_of_the_document_has_a_test():
    """Defends that no script is left out."""
    assert set(SCRIPTS) == {"ddp", "fsdp", "checkpoint"}
    assert DOC.read_text().count("```python") == len(SCRIPTS)
