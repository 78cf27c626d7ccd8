"""Exporting with proof beside coremltools alone: the same model converted, pruned and stored.

    python benchmarks/export.py                     # 20 million parameters, float16, iOS 17
    python benchmarks/export.py --width 1024 --rounds 5

Both begin with the pruned model and end with a package on the disk. coremltools traces, converts,
stores zeros sparse (``prune_weights`` with a threshold of 0) and saves. ``export_coreml`` does that
too, then reads the package back, matches every pruned weight with the model's, and evaluates the
saved program beside torch. The two take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from masks import environment, quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from purprune import Rule
from purprune_adapters import Pruner, export_coreml

SPARSITY = 0.8


def model_of(width: int) -> tuple[nn.Module, Tensor]:
    """Return five pruned Linear(width, width) with ReLU between them, and an input."""
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(width, width), nn.ReLU())]
    pruner = Pruner(nn.Sequential(*layers[:-1]), Rule(SPARSITY))
    pruner.prepare(inplace=True)
    return pruner.finalize(inplace=True).eval(), torch.randn(1, width)


def alone(model: nn.Module, example: Tensor, path: Path) -> None:
    """Trace, convert, store sparse and save with coremltools."""
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    traced = torch.jit.trace(model, example)  # type: ignore[no-untyped-call]
    package: Any = ct.convert(
        traced,
        inputs=[ct.TensorType(shape=example.shape)],
        minimum_deployment_target=ct.target.iOS17,
    )
    every = cto.OpThresholdPrunerConfig(
        threshold=0.0, minimum_sparsity_percentile=0.0, weight_threshold=2048
    )
    cto.prune_weights(package, cto.OptimizationConfig(global_config=every)).save(str(path))


def with_proof(model: nn.Module, example: Tensor, path: Path) -> None:
    """Convert, store, verify and check with export_coreml, which raises where something is lost."""
    export_coreml(model, example, path, target="iOS17")


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    model, example = model_of(args.width)
    works = {"coremltools alone": alone, "export_coreml": with_proof}
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(args.rounds + 1):
        for name, work in works.items():
            with tempfile.TemporaryDirectory() as folder, quiet():
                start = time.perf_counter()
                work(model, example, Path(folder) / "net.mlpackage")
                if turn:  # the first loads what is imported late
                    times[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    row = {
        **environment(),
        "parameters": sum(param.numel() for param in model.parameters()),
        **{name: statistics.median(seconds) for name, seconds in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "export.jsonl").write_text(json.dumps(row) + "\n")
    table = Table(title=f"{row['parameters']:,} parameters, {SPARSITY:.0%} pruned: seconds")
    for name in works:
        table.add_column(name, justify="right")
    table.add_column("ratio, round by round", justify="right")
    spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    table.add_row(*(f"{row[name]:.2f}" for name in works), spread)
    Console(width=100).print(table)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
