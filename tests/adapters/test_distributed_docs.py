"""The scripts of docs/distributed.md, each run by real processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from ranks import on_ranks

DOC = Path(__file__).parents[2] / "docs" / "distributed.md"
SCRIPTS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", DOC.read_text(), re.DOTALL))


def run(name: str) -> None:
    """Run a script in the group of the tests, which its own first call would start again."""
    with patch.object(dist, "init_process_group") as start:
        exec(compile(SCRIPTS[name], f"{DOC.name}: {name}", "exec"), {"__name__": name})
    start.assert_called_once_with("gloo")


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


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_as_printed_with_torchrun(name, tmp_path):
    """Defends the command of the document, and that no script needs what a test set up."""
    script = tmp_path / f"{name}.py"
    script.write_text(SCRIPTS[name])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_script_of_the_document_has_a_test():
    """Defends that no script is left out."""
    assert set(SCRIPTS) == {"ddp", "fsdp", "checkpoint"}
    assert DOC.read_text().count("```python") == len(SCRIPTS)
