"""Law 10 with a real process: killed in the middle of a training, started again from its file."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import functools, hashlib, os, pathlib, signal, sys
import torch
from torch import nn
from purprune import Block, PolynomialDecay, PruneConfig, Random, Rule
from purprune_adapters import Pruner

path, kill_at = pathlib.Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
schedule = PolynomialDecay(range(0, 30, 3))
config = (
    PruneConfig()
    .set_module_name("0", Rule(0.6, schedule, score=Random(2)))
    .set_module_name("3", Rule(0.8, schedule, 0.1, Block((1, 4))))
)
pruner = Pruner(model, config)
if path.exists():
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    pruner.load_state_dict(saved["pruner"])
pruner.prepare(inplace=True)
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
if path.exists():
    optimizer.load_state_dict(saved["optimizer"])
for step in range(pruner.step_count + 1, 41):
    optimizer.zero_grad()
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    nn.functional.cross_entropy(model(x), torch.arange(8) % 5).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    pruner.step()
    if step == kill_at - 1:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "pruner": pruner.state_dict()}
        torch.save(states, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    if step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
digest = hashlib.sha256()
for tensor in [*model.parameters(), *pruner.masks.values()]:
    digest.update(tensor.detach().contiguous().numpy().tobytes())
print(digest.hexdigest(), pruner.report().total)
"""


def _run(file: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(file), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_that_is_killed_twice_ends_with_the_bits_of_the_run_that_never_stopped(tmp_path):
    """Defends resume across processes: weights, masks and counts, through weights_only=True."""
    whole = _run(tmp_path / "whole.pt", 0)
    assert whole.returncode == 0, whole.stderr
    for kill_at in (5, 20):
        killed = _run(tmp_path / "killed.pt", kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = _run(tmp_path / "killed.pt", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout != ""
