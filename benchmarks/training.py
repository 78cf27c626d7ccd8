"""A training step with masks against the dense step, and against peers, in alternating rounds.

    python benchmarks/training.py                   # the three networks, eager
    python benchmarks/training.py --net mlp --rounds 15
    python benchmarks/training.py --device cuda     # waits for the device after every step

Every contender trains a network of its own from the same weights. The pruner's schedule is over
before anything is timed: what is left is what every step pays (hooks, gradients, zeros in place).
All prune the same layers. glibc's thresholds for trimming and for mapping are raised first
(``--default-malloc`` leaves them).
Both: with the first alone every large gradient is mapped anew, and its fresh pages make the dense
step itself up to twice as long. The order of the contenders rotates from round to round, and a
second dense network shows how large the noise is; a third one multiplies its gradients by 1, which
is the least that any masking of gradients in place can cost. What else runs on the machine only
adds time, so the last column compares what a tenth of all steps took at most.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from masks import environment, quiet, synchronize
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from purprune import PruneConfig, Rule
from purprune_adapters import Pruner

SPARSITY = 0.8


def mlp() -> tuple[nn.Module, Tensor, Any]:
    """Return three Linear(2048, 2048), batch 64, SGD."""
    layers = [layer for _ in range(3) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(64, 2048), lambda p: torch.optim.SGD(p, 1e-3)


def mnist() -> tuple[nn.Module, Tensor, Any]:
    """Return the network of the demo, batch 128, Adam."""
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(2352, 10), nn.LogSoftmax(1),
    )  # fmt: skip
    return net, torch.randn(128, 1, 28, 28), lambda p: torch.optim.Adam(p, eps=1e-7)


def transformer() -> tuple[nn.Module, Tensor, Any]:
    """Return one encoder layer of width 256, batch 16 of 64 tokens, AdamW."""
    net = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return net, torch.randn(16, 64, 256), torch.optim.AdamW


NETS = {"mlp": mlp, "mnist": mnist, "transformer": transformer}


class Mask(nn.Module):
    """A parametrization that multiplies by a float mask."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        """Keep the mask as a buffer."""
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        return weight * self.mask


def _layers(net: nn.Module) -> list[nn.Module]:
    kinds = (nn.Linear, nn.Conv2d)
    return [m for m in net.modules() if type(m) in kinds]


def with_pruner(trust: bool) -> Callable[[nn.Module, Any], Callable[[], None]]:
    """Our pruner; with trust it relies on the optimizer to leave zeros where it provably does."""

    def prepare(net: nn.Module, optimizer: Any) -> Callable[[], None]:
        attached = optimizer if trust else None
        same = [name for name, module in net.named_modules() if module in _layers(net)]
        config = PruneConfig(module_name_configs=dict.fromkeys(same, Rule(SPARSITY)))
        pruner = Pruner(net, config, optimizer=attached, trust_optimizer=trust)
        pruner.prepare(inplace=True)
        return pruner.step

    return prepare


def with_one_pass(net: nn.Module, optimizer: Any) -> Callable[[], None]:
    """The floor of whoever masks gradients in place: each is read and written once, times 1."""

    def scale_(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(1.0)

    for layer in _layers(net):
        weight = layer.get_parameter("weight")
        weight.register_post_accumulate_grad_hook(scale_)  # type: ignore[no-untyped-call]
    return lambda: None


def with_coremltools(net: nn.Module, optimizer: Any) -> Callable[[], None]:
    """coremltools' pruner."""
    with quiet():
        from coremltools.optimize.torch import pruning as ct
    module = ct.ModuleMagnitudePrunerConfig(target_sparsity=SPARSITY, initial_sparsity=SPARSITY)
    types = dict.fromkeys({type(layer) for layer in _layers(net)}, module)
    pruner = ct.MagnitudePruner(net, ct.MagnitudePrunerConfig(module_type_configs=types))
    pruner.prepare(inplace=True)
    step: Callable[[], None] = pruner.step
    return step


def with_torch_prune(net: nn.Module, optimizer: Any) -> Callable[[], None]:
    """torch.nn.utils.prune."""
    for layer in _layers(net):
        prune.l1_unstructured(layer, "weight", SPARSITY)  # type: ignore[no-untyped-call]
    return lambda: None


def with_parametrize(net: nn.Module, optimizer: Any) -> Callable[[], None]:
    """torch.nn.utils.parametrize with a float mask."""
    for layer in _layers(net):
        keep = layer.get_parameter("weight").detach().abs()
        mask = (keep > keep.flatten().kthvalue(int(keep.numel() * SPARSITY)).values).float()
        parametrize.register_parametrization(layer, "weight", Mask(mask))
    return lambda: None


CONTENDERS: dict[str, Callable[[nn.Module, Any], Callable[[], None]]] = {
    "dense": lambda net, optimizer: lambda: None,
    "dense, again": lambda net, optimizer: lambda: None,
    "dense, gradients times 1": with_one_pass,
    "purprune": with_pruner(trust=False),
    "purprune, trust_optimizer": with_pruner(trust=True),
    "coremltools": with_coremltools,
    "torch.nn.utils.prune": with_torch_prune,
    "parametrize, float mask": with_parametrize,
}


def step_of(name: str, net_name: str, device: str, compiled: bool) -> Callable[[], None]:
    """Return one training step of a contender."""
    torch.manual_seed(0)
    net, x, make = NETS[net_name]()
    net, x = net.train().to(device), x.to(device)
    in_place = name.startswith(("dense", "purprune"))
    optimizer = make(net.parameters()) if in_place else None
    after = CONTENDERS[name](net, optimizer)
    optimizer = optimizer or make(net.parameters())
    call: Any = torch.compile(net) if compiled else net

    def step() -> None:
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
        after()
        synchronize(device)

    return step


def run(net: str, device: str, rounds: int, inner: int, compiled: bool) -> list[dict[str, Any]]:
    """Time all contenders in alternating rounds of several steps."""
    names = [n for n in CONTENDERS if not compiled or n.startswith(("dense", "purprune"))]
    steps = {name: step_of(name, net, device, compiled) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():
        for _ in range(5):
            step()
    single: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for _ in range(inner):
                start = time.perf_counter()
                steps[name]()
                single[name].append(1e3 * (time.perf_counter() - start))
            times[name].append(statistics.mean(single[name][-inner:]))
    fastest = {name: statistics.quantiles(single[name], n=10)[0] for name in names}
    rows = []
    for name in names:
        ratios = sorted(a / b for a, b in zip(times[name], times["dense"], strict=True))
        rows.append(
            {
                "net": net,
                "mode": "compile" if compiled else "eager",
                "contender": name,
                "median_ms": statistics.median(times[name]),
                "ratio": statistics.median(ratios),
                "ratio_quarter": ratios[len(ratios) // 4],
                "ratio_three_quarters": ratios[3 * len(ratios) // 4],
                "ratio_fastest": fastest[name] / fastest["dense"],
            }
        )
    return rows


def keep_memory() -> str:
    """Let glibc keep what it was given back, instead of mapping fresh pages for large tensors."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return "default: no glibc here"
    kept = mallopt(-1, 1 << 30) and mallopt(-3, 1 << 25)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    return "trim threshold 1 GiB, mmap threshold 32 MiB" if kept else "default: refused"


def main() -> None:
    """Run the networks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--net", choices=list(NETS), action="append")
    parser.add_argument("--device", default="cpu", help="such as cuda or mps")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--default-malloc", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    console = Console(width=120)
    where = {
        **environment(args.device),
        "malloc": "default" if args.default_malloc else keep_memory(),
    }
    console.print(where)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for net in args.net or list(NETS):
        inner = {"mlp": 2, "transformer": 3, "mnist": 8}[net]
        rows += run(net, args.device, args.rounds, inner, args.compile)
    with (args.out / "training.jsonl").open("w") as file:
        file.writelines(json.dumps({**where, **row}) + "\n" for row in rows)
    table = Table(title="one training step against the dense one, round by round")
    heads = ("net", "mode", "contender", "median ms", "x dense", "middle half", "x dense, fastest")
    for head in heads:
        table.add_column(head, justify="right" if head[0] in "xm" and head != "mode" else "left")
    for row in rows:
        table.add_row(
            row["net"], row["mode"], row["contender"], f"{row['median_ms']:.3g}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_quarter']:.3f} to {row['ratio_three_quarters']:.3f}",
            f"{row['ratio_fastest']:.3f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
