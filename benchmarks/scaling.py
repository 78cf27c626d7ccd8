"""Time of one mask against the number of entries, and what a network of many tensors costs.

    python benchmarks/scaling.py                      # 100 K to 268 M entries, table and plot
    python benchmarks/scaling.py --largest 67108864

Each size is timed beside the floor (read the weights, write a bool mask) and beside peers as far as
they end in reasonable time; medians, in alternating rounds. ``global`` is eight tensors of equal
size that share one count. The last rows are a network of 500 tensors, beside the sum of what its
tensors cost one at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from masks import SPARSITY, Work, environment, floor, milliseconds, numpy_partition, ours, topk
from rich.console import Console
from rich.table import Table
from torch import Tensor

from purprune import Rule, Unstructured, compute_masks

SIZES = [10**5, 10**6, 1 << 22, 1 << 24, 1 << 26, 1 << 28]
PEERS_UP_TO = {"torch.topk": 1 << 26, "numpy.partition": 1 << 26}


def weight_of(entries: int, dtype: torch.dtype) -> Tensor:
    """Return a weight of normal numbers, of 1,000 columns or so."""
    rows = max(1, entries >> 10)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, entries // rows, generator=generator).to(dtype)


def global_scope(weight: Tensor) -> Work:
    """Eight parts of the weight under one count."""
    params = {f"{i}": part for i, part in enumerate(weight.chunk(8))}
    rule = Rule(SPARSITY, pattern=Unstructured(scope="global"))
    return lambda: compute_masks(params, 0, rule)


def medians(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(milliseconds(work, "cpu"))
    return {name: statistics.median(t) for name, t in times.items()}


def of_size(entries: int, dtype: torch.dtype) -> dict[str, float]:
    """Time all contenders at one size."""
    weight = weight_of(entries, dtype)
    works = {"floor": floor(weight), "purprune": ours("unstructured", weight)}
    works["purprune, global"] = global_scope(weight)
    if entries <= PEERS_UP_TO["torch.topk"]:
        works["torch.topk"] = topk("unstructured", weight)
    if entries <= PEERS_UP_TO["numpy.partition"]:
        works["numpy.partition"] = numpy_partition("unstructured", weight)
    return medians(works, 5 if entries > 1 << 22 else 21)


def network(tensors: int, side: int) -> dict[str, float]:
    """Time a network of equal tensors, its tensors one at a time, and torch.topk on each."""
    generator = torch.Generator().manual_seed(0)
    params = {f"layers.{i}.weight": torch.randn(side, side, generator=generator)
              for i in range(tensors)}  # fmt: skip
    rule = Rule(SPARSITY)
    tops = [topk("unstructured", weight) for weight in params.values()]
    return medians(
        {
            "purprune, the network": lambda: compute_masks(params, 0, rule),
            "purprune, one at a time": lambda: [
                compute_masks({name: weight}, 0, rule) for name, weight in params.items()
            ],
            "torch.topk, one at a time": lambda: [top() for top in tops],
        },
        7,
    )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot nanoseconds per entry against entries."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = sorted({row["dtype"] for row in rows})
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6 * len(dtypes), 4), sharey=True)
    for axis, dtype in zip(axes if len(dtypes) > 1 else [axes], dtypes, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            found = [row for row in rows if (row["contender"], row["dtype"]) == (name, dtype)]
            axis.loglog(
                [row["entries"] for row in found],
                [1e6 * row["median_ms"] / row["entries"] for row in found],
                marker="o",
                label=name,
            )
        axis.set(title=f"one mask, {dtype}, {SPARSITY:.0%} sparsity", xlabel="entries")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("nanoseconds per entry")
    figure.axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run all sizes up to the largest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    console, where = Console(width=120), environment()
    console.print(where)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [
        {"dtype": str(dtype)[6:], "entries": entries, "contender": name, "median_ms": ms}
        for dtype in (torch.float32, torch.bfloat16)
        for entries in SIZES
        if entries <= args.largest
        for name, ms in of_size(entries, dtype).items()
    ]
    many = [
        {"tensors": 500, "side": side, "contender": name, "median_ms": ms}
        for side in (16, 64, 256)
        for name, ms in network(500, side).items()
    ]
    with (args.out / "scaling.jsonl").open("w") as file:
        file.writelines(json.dumps({**where, **row}) + "\n" for row in [*rows, *many])
    table = Table(title=f"one mask, {SPARSITY:.0%} sparsity")
    for head in ("dtype", "entries", "contender", "median ms", "ns per entry"):
        table.add_column(head, justify="right" if head[0] in "emn" else "left")
    for row in rows:
        ns = 1e6 * row["median_ms"] / row["entries"]
        table.add_row(row["dtype"], f"{row['entries']:,}", row["contender"],
                      f"{row['median_ms']:.3g}", f"{ns:.2f}")  # fmt: skip
    console.print(table)
    for row in many:
        console.print(
            f"500 tensors of {row['side']} x {row['side']}: {row['contender']} "
            f"{row['median_ms']:.3g} ms, {2 * row['median_ms']:.3g} us each"
        )
    draw(rows, args.out / "scaling.png")
    console.print(f"plot: {args.out / 'scaling.png'}")


if __name__ == "__main__":
    main()
