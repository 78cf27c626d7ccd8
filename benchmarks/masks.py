"""Masks against peers and the floor: time and peak memory of one update, side by side.

Every contender works on the same weights in the same process, in alternating rounds; the figure is
the median. The floor reads the weights and writes a bool mask, and decides nothing. Our masks are
compared with a stable sort on the same data before anything is timed.

    python benchmarks/masks.py                      # the table of the README
    python benchmarks/masks.py --case unstructured --entries 1048576 --rounds 9
    python benchmarks/masks.py --device cuda        # waits for the device in every measurement
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from purprune import NM, Block, Channel, PruneConfig, Rule, Unstructured, compute_masks
from purprune_adapters import Pruner

SPARSITY = 0.8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATTERNS = {
    "unstructured": Unstructured(),
    "2:4": NM(zeros=2, m=4),
    "blocks of 4": Block(4),
    "channels": Channel(),
}
DEFAULT = [
    ("unstructured", 4096 * 4096, "float32"),
    ("unstructured", 4096 * 4096, "bfloat16"),
    ("unstructured", 1024 * 1024, "float32"),
    ("unstructured", 320 * 320, "float32"),
    ("2:4", 4096 * 4096, "float32"),
    ("blocks of 4", 4096 * 4096, "float32"),
    ("channels", 4096 * 4096, "float32"),
]
Work = Callable[[], Any]


def rule_for(case: str, step: int | None = None) -> Rule:
    """Return our rule; with a step the schedule changes at every one, for Pruner.step()."""
    pattern = PATTERNS[case]
    if step is not None:
        goal = float(pattern.target or SPARSITY)
        growth = 0.0 if pattern.target else 2e-4
        return Rule(schedule=lambda t: goal + growth * t + 1e-9 * (t % 2), pattern=pattern)
    return Rule(None if pattern.target else SPARSITY, pattern=pattern)


def layer_for(weight: Tensor) -> nn.Module:
    """Return a layer that holds the weight: a 1x1 convolution, so that peers see channels."""
    rows, columns = weight.shape
    layer = nn.Conv2d(columns, rows, 1, bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone().view(rows, columns, 1, 1))
    return layer


def floor(weight: Tensor) -> Work:
    """Read every weight, write every entry of a bool mask."""
    words = weight.view({4: torch.int32, 2: torch.int16}[weight.itemsize])
    if weight.device.type != "cpu":
        there = torch.empty(words.shape, dtype=torch.bool, device=words.device)
        return lambda: torch.gt(words, 0, out=there)
    mask, numbers = np.empty(words.shape, dtype=bool), words.numpy()
    return lambda: np.greater(numbers, 0, out=mask)


def ours(case: str, weight: Tensor) -> Work:
    """compute_masks."""
    config = PruneConfig().set_module_name("w", rule_for(case))
    return lambda: compute_masks({"w": weight}, 0, config)


def our_step(case: str, weight: Tensor) -> Work:
    """Pruner.step() at an update: new masks from the old ones, and zeros written in place."""
    model = nn.Sequential(layer_for(weight))
    pruner = Pruner(model, rule_for(case, step=0))
    pruner.prepare(inplace=True)
    return pruner.step


def coremltools_step(case: str, weight: Tensor) -> Work:
    """coremltools' pruner.step() at an update."""
    with quiet():
        from coremltools.optimize.torch import pruning as ct
    options: dict[str, dict[str, Any]] = {
        "unstructured": {},
        "2:4": {"n_m_ratio": (2, 4)},
        "blocks of 4": {"block_size": 4},
        "channels": {"granularity": "per_channel"},
    }

    class EveryStep(ct.pruning_scheduler.PruningScheduler):  # type: ignore[misc]
        def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
            goal: float = config.target_sparsity
            return goal + (1e-9 if case == "2:4" else 2e-4) * step_count

    module = ct.ModuleMagnitudePrunerConfig(
        scheduler=EveryStep(), target_sparsity=SPARSITY, **options[case]
    )
    pruner = ct.MagnitudePruner(
        nn.Sequential(layer_for(weight)), ct.MagnitudePrunerConfig(global_config=module)
    )
    pruner.prepare(inplace=True)
    step: Work = pruner.step
    return step


def torch_prune(case: str, weight: Tensor) -> Work:
    """torch.nn.utils.prune: the mask of L1Unstructured or LnStructured."""
    from torch.nn.utils import prune

    ones = torch.ones_like(weight)
    if case == "unstructured":
        method: Any = prune.L1Unstructured(SPARSITY)
    else:
        method = prune.LnStructured(SPARSITY, n=2, dim=0)
    return lambda: method.compute_mask(weight, default_mask=ones)


def topk(case: str, weight: Tensor) -> Work:
    """torch.topk of |w|, and the mask written through its indices."""
    k = weight.numel() - math.floor(weight.numel() * SPARSITY)

    def work() -> Tensor:
        kept = torch.topk(weight.abs().flatten(), k, sorted=False).indices
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        return mask.index_fill_(0, kept, True)

    return work


def kthvalue(case: str, weight: Tensor) -> Work:
    """torch.kthvalue of |w|, then a comparison (ties are all kept)."""
    k = math.floor(weight.numel() * SPARSITY)

    def work() -> Tensor:
        magnitude = weight.abs()
        return magnitude > torch.kthvalue(magnitude.flatten(), k).values

    return work


def sort(case: str, weight: Tensor) -> Work:
    """torch.sort of |w|, stable, and the mask written through its indices."""
    k = math.floor(weight.numel() * SPARSITY)

    def work() -> Tensor:
        order = torch.sort(weight.abs().flatten(), stable=True).indices
        mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        return mask.index_fill_(0, order[:k], False)

    return work


def numpy_partition(case: str, weight: Tensor) -> Work:
    """numpy.partition of the integer view of |w|, buffers kept (ties are all kept)."""
    bits = weight.view({4: torch.int32, 2: torch.int16}[weight.itemsize]).numpy().ravel()
    keys, ordered, mask = np.empty_like(bits), np.empty_like(bits), np.empty(bits.shape, bool)
    k = math.floor(bits.size * SPARSITY)

    def work() -> Any:
        np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=keys)
        np.copyto(ordered, keys)
        ordered.partition(k - 1)
        return np.greater(keys, ordered[k - 1], out=mask)

    return work


PEERS: dict[str, tuple[Callable[[str, Tensor], Work], set[str]]] = {
    "floor": (lambda case, weight: floor(weight), set(PATTERNS)),
    "purprune.compute_masks": (ours, set(PATTERNS)),
    "purprune Pruner.step": (our_step, set(PATTERNS)),
    "coremltools step": (coremltools_step, set(PATTERNS)),
    "torch.nn.utils.prune": (torch_prune, {"unstructured", "channels"}),
    "torch.topk": (topk, {"unstructured"}),
    "torch.kthvalue": (kthvalue, {"unstructured"}),
    "torch.sort": (sort, {"unstructured"}),
    "numpy.partition": (numpy_partition, {"unstructured"}),
}
ON_THE_CPU = {"numpy.partition"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a peer's log lines off the screen while it is imported."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def weight_of(entries: int, dtype: str, device: str) -> Tensor:
    """Return a square weight of normal numbers."""
    side = math.isqrt(entries)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(side, side, generator=generator).to(DTYPES[dtype]).to(device)


def check(case: str, weight: Tensor) -> None:
    """Compare our mask with a stable sort of the same data."""
    got = ours(case, weight)()["w"].cpu().numpy()
    weight = weight.cpu()
    if case == "unstructured":
        order = np.argsort(weight.float().abs().numpy().ravel(), kind="stable")
        expected = np.ones(weight.numel(), dtype=bool)
        expected[order[: math.floor(weight.numel() * SPARSITY)]] = False
        expected = expected.reshape(got.shape)
    else:
        w = weight.double().numpy() ** 2
        rows, columns = w.shape
        blocks = w.reshape(rows // 4, 4, columns)
        # The order in which purprune sums, so that near ties round alike.
        pairs = blocks[:, :2] + blocks[:, 2:]
        while w.shape[1] > 1:
            w = w[:, : w.shape[1] // 2] + w[:, w.shape[1] // 2 :]
        units = {
            "2:4": weight.double().numpy() ** 2,
            "blocks of 4": pairs[:, 0] + pairs[:, 1],
            "channels": w,
        }[case]
        units = units.reshape(-1, 4) if case == "2:4" else units.reshape(1, -1)
        k = math.floor(units.shape[1] * (PATTERNS[case].target or SPARSITY))
        keep = np.ones(units.shape, dtype=bool)
        order = np.argsort(units, axis=1, kind="stable")[:, :k]
        np.put_along_axis(keep, order, False, axis=1)
        if case == "2:4":
            expected = keep.reshape(weight.shape)
        elif case == "channels":
            expected = np.broadcast_to(keep.reshape(rows, 1), weight.shape)
        else:
            expected = np.repeat(keep.reshape(rows // 4, columns), 4, axis=0)
    differing = int((got != expected).sum())
    if differing:
        raise SystemExit(f"{case}: {differing} entries differ from a stable sort")


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was asked for."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def milliseconds(work: Work, device: str) -> float:
    """Time one call, and what it left to the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def peak_megabytes(case: str, entries: int, dtype: str, device: str, name: str) -> float | None:
    """Return what the peak memory grows by: on the CPU in a process of its own."""
    if device != "cpu":
        return memory_on_device(PEERS[name][0](case, weight_of(entries, dtype, device)), device)
    if sys.platform != "linux":
        return None
    command = [sys.executable, __file__, "--memory-of", name, "--case", case]
    command += ["--entries", str(entries), "--dtype", dtype]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


def memory_on_device(work: Work, device: str) -> float | None:
    """Return by how many MB one call raises the device's peak memory, with its result."""
    counts = torch.get_device_module(device)
    if not hasattr(counts, "max_memory_allocated"):
        return None
    work()
    counts.reset_peak_memory_stats()
    before = counts.memory_allocated()
    work()
    peak: float = (counts.max_memory_allocated() - before) / 1e6
    return peak


def memory_of(case: str, entries: int, dtype: str, name: str) -> float:
    """Return by how many MB one call raises this process's peak."""
    torch.optim.SGD([torch.zeros(1)])  # loads what torch loads with every optimizer

    work = PEERS[name][0](case, weight_of(entries, dtype, "cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident
    before = _status_kb("VmRSS")
    work()
    return (_status_kb("VmHWM") - before) * 1024 / 1e6


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def run(
    case: str, entries: int, dtype: str, device: str, rounds: int, memory: bool
) -> list[dict[str, Any]]:
    """Time all contenders of a case in alternating rounds."""
    weight = weight_of(entries, dtype, device)
    check(case, weight)
    names = [name for name, (_, cases) in PEERS.items() if case in cases]
    if device != "cpu":
        names = [name for name in names if name not in ON_THE_CPU]
    works = {name: PEERS[name][0](case, weight) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(milliseconds(work, device))
    medians = {name: statistics.median(t) for name, t in times.items()}
    mine = medians["purprune.compute_masks"]
    return [
        {
            "case": case,
            "entries": weight.numel(),
            "dtype": dtype,
            "contender": name,
            "median_ms": medians[name],
            "min_ms": min(times[name]),
            "max_ms": max(times[name]),
            "of_floor": medians[name] / medians["floor"],
            "of_compute_masks": medians[name] / mine,
            "peak_mb": peak_megabytes(case, entries, dtype, device, name) if memory else None,
        }
        for name in names
    ]


def environment(device: str = "cpu") -> dict[str, Any]:
    """Say what was measured on."""
    named = getattr(torch.get_device_module(device), "get_device_name", lambda: device)
    packages = ("torch", "numpy", "coremltools")
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "device": named(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE"),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Draw the table."""
    table = Table(title=f"{SPARSITY:.0%} sparsity (2:4: 50 %), one update")
    for head in ("case", "entries", "dtype", "contender", "median ms", "min to max", "x floor",
                 "x ours", "peak MB"):  # fmt: skip
        left = head in {"case", "dtype", "contender"}
        table.add_column(head, justify="left" if left else "right")
    for row in rows:
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        table.add_row(
            row["case"], f"{row['entries']:,}", row["dtype"], row["contender"],
            f"{row['median_ms']:.3g}", f"{row['min_ms']:.3g} to {row['max_ms']:.3g}",
            f"{row['of_floor']:.1f}", f"{row['of_compute_masks']:.1f}", peak,
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Run the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--case", choices=list(PATTERNS))
    parser.add_argument("--entries", type=int, default=4096 * 4096)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu", help="such as cuda or mps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--memory-of", choices=list(PEERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory_of(args.case, args.entries, args.dtype, args.memory_of))
        return
    console = Console(width=140)
    where = environment(args.device)
    console.print(where)
    cases = [(args.case, args.entries, args.dtype)] if args.case else DEFAULT
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with (args.out / "masks.jsonl").open("w") as file:
        for case, entries, dtype in cases:
            for row in run(case, entries, dtype, args.device, args.rounds, not args.no_memory):
                rows.append(row)
                file.write(json.dumps({**where, **row}) + "\n")
            file.flush()
    show(rows, console)


if __name__ == "__main__":
    main()
