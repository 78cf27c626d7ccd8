"""Pruning a sharded checkpoint on the disk beside copying it.

    python benchmarks/checkpoints.py                          # 10 GB, bfloat16, in runs/bench
    python benchmarks/checkpoints.py --gigabytes 4 --folder /mnt/scratch

A synthetic checkpoint is made (layers of a transformer, an embedding, norms). Each contender runs
in a process of its own, from its start to its exit, in turn; before each the files are dropped
from the page cache and the disk has written what it had to. ``cp`` is timed by itself and until
``sync`` returns; purprune syncs what it writes. Peak memory is the process's. It prints JSON lines
and a table, and removes what it made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from masks import environment
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, WORDS = 4096, 11008, 32000
SHARD_BYTES = 1 << 30
PURPRUNE = [sys.executable, "-m", "purprune_adapters.cli", "prune"]
CONTENDERS: dict[str, list[str]] = {
    "cp": ["cp", "-r"],
    "cp and sync": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*'],
    "purprune, 2:4": [*PURPRUNE, "--nm", "2:4"],
    "purprune, 50 % of each": [*PURPRUNE, "--sparsity", "0.5"],
    "purprune, 50 % of all": [*PURPRUNE, "--sparsity", "0.5", "--scope", "global"],
}


def tensors(target_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Yield layers until there are as many bytes; values of one block, shifted and scaled."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 24, generator=generator)

    def weight(i: int, *shape: int) -> Tensor:
        numel = torch.Size(shape).numel()
        rolled = block.roll(7919 * i).repeat(-(-numel // len(block)))[:numel]
        return (rolled * (0.5 + (i * 37 % 100) / 100)).to(torch.bfloat16).reshape(shape)

    yield "model.embed_tokens.weight", weight(1, WORDS, HIDDEN)
    made, layer = WORDS * HIDDEN * 2, 0
    while made < target_bytes:
        shapes = {
            **{f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"},
            **{f"mlp.{p}_proj": (INNER, HIDDEN) for p in ("gate", "up")},
            "mlp.down_proj": (HIDDEN, INNER),
        }
        for i, (name, shape) in enumerate(shapes.items()):
            yield f"model.layers.{layer}.{name}.weight", weight(10 * layer + i, *shape)
            made += shape[0] * shape[1] * 2
        yield f"model.layers.{layer}.input_layernorm.weight", torch.ones(HIDDEN).bfloat16()
        layer += 1


def make(folder: Path, target_bytes: int) -> None:
    """Write the checkpoint as Hugging Face shards it."""
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors(target_bytes):
        shard[name] = tensor
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            write()
    write()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def forget(folder: Path) -> None:
    """Write out what is waiting, and drop files from the page cache."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(command: list[str], source: Path, target: Path) -> dict[str, float]:
    """Run a command with the two folders; return seconds, those of the CPU, and peak memory."""
    shutil.rmtree(target, ignore_errors=True)
    forget(source)
    start = time.perf_counter()
    process = subprocess.Popen([*command, str(source), str(target)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"Expected exit code 0 of {command}; got {process.returncode}.")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    """Time all contenders in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    source, target = args.folder / "checkpoint", args.folder / "checkpoint.out"
    where = environment()
    try:
        # in another process: a child's peak of memory begins with what its parent had
        maker = multiprocessing.get_context("spawn").Process(
            target=make, args=(source, int(args.gigabytes * 1e9))
        )
        maker.start()
        maker.join()
        size = sum(file.stat().st_size for file in source.iterdir())
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
        for _ in range(args.rounds):
            for name in args.only:
                rows[name].append(timed(CONTENDERS[name], source, target))
                row = {**where, "contender": name, "bytes": size, **rows[name][-1]}
                row["load"] = os.getloadavg()[0]
                print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
    show(rows, size)


def show(rows: dict[str, list[dict[str, float]]], size: int) -> None:
    """Print a table of medians."""
    table = Table(title=f"{size / 1e9:.1f} GB in bfloat16")
    heads = ("contender", "seconds", "GB/s", "of cp", "of cp and sync", "CPU seconds", "peak MB")
    for head in heads:
        table.add_column(head, justify="left" if head == "contender" else "right")

    def median(name: str, key: str) -> float:
        return statistics.median(row[key] for row in rows[name])

    for name in rows:
        seconds = median(name, "seconds")
        shares = [f"{seconds / median(peer, 'seconds'):.2f}" if peer in rows else "-"
                  for peer in ("cp", "cp and sync")]  # fmt: skip
        peak = max(row["peak_bytes"] for row in rows[name])
        table.add_row(name, f"{seconds:.1f}", f"{size / seconds / 1e9:.2f}", *shares,
                      f"{median(name, 'cpu_seconds'):.1f}", f"{peak / 1e6:,.0f}")  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
