"""Accuracy by pruning method, on real images: the same network, data, steps and seeds for all.

    python benchmarks/methods.py                                # scikit-learn's digits
    python benchmarks/methods.py --data DIR --train 20000       # MNIST-format files
    python benchmarks/methods.py --only RigL SET static --sparsities 0.9 --seeds 0

Every method trains for the same number of steps, with one exception that says so: lottery tickets
train once for every round. Which step prunes what is a rule, so that a method is a line in the
table :data:`RULES`, or a function that computes masks before training (:data:`AT_START`). Results
are appended to a file of JSON lines; what is in it already is not run again, so a run may be
stopped.
Nothing about the order of the methods is asserted: it is reported as it comes out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from rich.progress import track
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from data import CLASSES, Digits, batches, load
from lottery_tickets import lottery_ticket
from purprune import (
    LAMP,
    NM,
    SET,
    Alternating,
    ConstantSparsity,
    ErdosRenyi,
    ExponentialDecay,
    Given,
    PolynomialDecay,
    Random,
    RigL,
    Rule,
    StraightThrough,
    Taylor,
    Unstructured,
)
from purprune_adapters import Pruner, grasp_masks, snip_masks, synflow_masks

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
ERK = ErdosRenyi()
GLOBAL = Unstructured(scope="global")
IMP_ROUNDS = 5
BATCH = 64
TOKENS, WIDTH = 16, 32


class Job(NamedTuple):
    """One training."""

    net: str
    method: str
    sparsity: float
    seed: int
    steps: int
    data: str | None
    train: int | None


class Steps(NamedTuple):
    """When a method does what, as shares of all steps."""

    total: int

    @property
    def half(self) -> ConstantSparsity:
        """Prune once, when half of the steps are over."""
        return ConstantSparsity(self.total // 2)

    @property
    def ramp(self) -> PolynomialDecay:
        """Prune gradually, from one quarter of the steps to three."""
        first, last = self.total // 4, 3 * self.total // 4
        return PolynomialDecay(begin_step=first, end_step=last, frequency=max(1, self.total // 50))

    @property
    def exchange(self) -> dict[str, int]:
        """Exchange entries, until three quarters of the steps are over."""
        return {"every": max(1, self.total // 50), "end_step": 3 * self.total // 4}

    @property
    def phases(self) -> Alternating:
        """Train sparse and dense in turns, and sparse in the last quarter."""
        phase = max(1, self.total // 16)
        return Alternating(2 * phase, phase, phase, end_step=3 * self.total // 4)


RULES: dict[str, Callable[[float, int, Steps], Rule]] = {
    "one-shot": lambda s, seed, t: Rule(s, t.half),
    "one-shot, ERK": lambda s, seed, t: Rule(s, t.half, budget=ERK),
    "one-shot, global": lambda s, seed, t: Rule(s, t.half, pattern=GLOBAL),
    "one-shot, LAMP": lambda s, seed, t: Rule(s, t.half, pattern=GLOBAL, score=LAMP()),
    "one-shot, |w g|, global": lambda s, seed, t: Rule(s, t.half, pattern=GLOBAL, score=Taylor()),
    "gradual": lambda s, seed, t: Rule(s, t.ramp),
    "gradual, ERK": lambda s, seed, t: Rule(s, t.ramp, budget=ERK),
    "gradual, global": lambda s, seed, t: Rule(s, t.ramp, pattern=GLOBAL),
    "gradual, LAMP": lambda s, seed, t: Rule(s, t.ramp, pattern=GLOBAL, score=LAMP()),
    "gradual, movement": lambda s, seed, t: Rule(s, t.ramp, score=Given("movement")),
    "gradual, random": lambda s, seed, t: Rule(s, t.ramp, score=Random(seed)),
    "static random, ERK": lambda s, seed, t: Rule(s, score=Random(seed), budget=ERK),
    "SET, ERK": lambda s, seed, t: Rule(s, budget=ERK, regrow=SET(seed=seed, **t.exchange)),
    "RigL, ERK": lambda s, seed, t: Rule(s, budget=ERK, regrow=RigL(seed=seed, **t.exchange)),
    "GraNet, ERK": lambda s, seed, t: Rule(
        s, t.ramp, 0.5, budget=ERK, regrow=RigL(seed=seed, fraction=0.5, **t.exchange)
    ),
    "AC/DC": lambda s, seed, t: Rule(s, t.phases),
    "STE, gradual": lambda s, seed, t: Rule(s, t.ramp, regrow=StraightThrough()),
    "SR-STE, n:m": lambda s, seed, t: Rule(pattern=_nm(s), regrow=StraightThrough(decay=2e-4)),
}
AT_START: dict[str, Callable[..., Mapping[str, Tensor]]] = {
    "SNIP at the start": lambda net, s, batch: snip_masks(
        net, _loss, batch, Rule(s, pattern=GLOBAL)
    ),
    "GraSP at the start": lambda net, s, batch: grasp_masks(
        net, _loss, batch, Rule(s, pattern=GLOBAL)
    ),
    "SynFlow at the start": lambda net, s, batch: synflow_masks(
        net, batch[0][:1], Rule(s, ExponentialDecay(range(101)), pattern=GLOBAL)
    ),
}
TICKET = f"lottery ticket, {IMP_ROUNDS} rounds"
METHODS = ("dense", *RULES, *AT_START, TICKET)


def _nm(s: float) -> Any:
    """Return the N:M pattern of a sparsity: 4 of 5 for 80 %."""
    share = Fraction(str(s))
    return NM(share.numerator, share.denominator)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


class Attention(nn.Module):
    """Self-attention and a small MLP on tokens, which are normalised before each."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the four projections."""
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        batch, tokens, width = x.shape
        parts = (
            self.qkv(self.before(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        y: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return y


class Transformer(nn.Module):
    """A vision transformer of two blocks on 16 patches of 5 x 5 pixels, which overlap by two."""

    def __init__(self, width: int = WIDTH) -> None:
        """Make the layers."""
        super().__init__()
        self.embed = nn.Linear(25, width)
        self.place = nn.Parameter(torch.randn(TOKENS, width) * 0.02)
        self.blocks = nn.Sequential(*(Attention(width, heads=4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        patches = F.unfold(images, 5, stride=3).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(patches) + self.place)).mean(1))
        return logits


def convolutional() -> nn.Module:
    """Return three convolutions with batch norm, and a linear layer."""
    layers: list[nn.Module] = []
    for into, out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, CLASSES))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.optim.Optimizer]]] = {
    "convolutional": (
        convolutional,
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4),
    ),
    "transformer": (Transformer, lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=0.05)),
}


def train(
    net: nn.Module, pruner: Pruner | None, job: Job, data: Digits, start: int, stop: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:  # fmt: skip
    """Train from one step to another, on a cosine of the rate over all steps."""
    optimizer = optimizer or NETS[job.net][1](net.parameters())
    rates = [group["lr"] for group in optimizer.param_groups]
    loader = batches(data.train_images, data.train_labels, seed=job.seed, size=BATCH)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    net.train()
    for step, (images, labels) in enumerate(itertools.islice(endless, start, stop), start):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * step / job.steps)) / 2
        optimizer.zero_grad()
        _loss(net, (images, labels)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if pruner is not None:
            pruner.step()


def pruned(net: nn.Module, job: Job, data: Digits) -> nn.Module:
    """Train with the method of the job, and return the finalized network."""
    optimizer = NETS[job.net][1](net.parameters())
    if job.method == "dense":
        train(net, None, job, data, 0, job.steps, optimizer)
        return net
    if job.method == TICKET:
        rule = Rule(job.sparsity, ExponentialDecay(range(IMP_ROUNDS + 1)), pattern=GLOBAL)
        lottery_ticket(
            net, lambda n, p, a, b: train(n, p, job, data, a, b), rule,
            rounds=IMP_ROUNDS, steps=job.steps, rewind=job.steps // 20,
        )  # fmt: skip
        return net
    if job.method in AT_START:
        loader = batches(data.train_images, data.train_labels, seed=job.seed, size=512)
        images, labels = next(iter(loader))
        masks = AT_START[job.method](net, job.sparsity, (images, labels))
        pruner = Pruner(net, Rule(0.0), masks=masks, optimizer=optimizer)
    else:
        rule = RULES[job.method](job.sparsity, job.seed, Steps(job.steps))
        pruner = Pruner(net, rule, optimizer=optimizer)
    pruner.prepare(inplace=True)
    train(net, pruner, job, data, 0, job.steps, optimizer)
    return pruner.finalize(inplace=True)


def halved(data: Digits, train: int | None) -> Digits:
    """Return images of 14 x 14 pixels, so that a training takes seconds, of which some train."""
    small, tests = (F.avg_pool2d(images, 2) for images in (data.train_images, data.test_images))
    return Digits(data.name, small[:train], data.train_labels[:train], tests, data.test_labels)


def run(job: Job) -> dict[str, Any]:
    """Return one line of the results."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    data = halved(load(None if job.data is None else Path(job.data)), job.train)
    net = NETS[job.net][0]()
    began = time.perf_counter()
    net = pruned(net, job, data)
    seconds = time.perf_counter() - began
    weights = [p for p in net.parameters() if p.dim() > 1 and p.shape != (TOKENS, WIDTH)]
    zeros = sum(int((w == 0).sum()) for w in weights)
    return {
        **job._asdict(),
        "data": data.name,
        "accuracy": accuracy(net, data),
        "zeros": zeros,
        "entries": sum(w.numel() for w in weights),
        "seconds": round(seconds, 2),
    }


@torch.no_grad()
def accuracy(net: nn.Module, data: Digits) -> float:
    """Return the share of test images that are classified right, in percent."""
    net.eval()
    guesses = torch.cat([net(some).argmax(1) for some in torch.split(data.test_images, 1000)])
    return 100 * float((guesses == data.test_labels).double().mean())


def table(lines: Sequence[Mapping[str, Any]], net: str) -> str:
    """Return accuracies by method and sparsity as a Markdown table: mean and half of the range."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for line in lines:
        if line["net"] == net:
            found[line["method"], line["sparsity"]].append(line["accuracy"])
    sparsities = sorted({s for _, s in found if s})
    rows = [f"| {net} | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |"]
    rows += ["|---" * (len(sparsities) + 1) + "|"]
    for method in METHODS:
        cells = [found.get((method, 0.0 if method == "dense" else s), []) for s in sparsities]
        if any(cells):
            name = method.replace("|", "\\|")
            rows.append(f"| {name} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(rows)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against sparsity, a panel for each network."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    nets = [net for net in NETS if any(line["net"] == net for line in lines)]
    figure, axes = plt.subplots(1, len(nets), figsize=(6.5 * len(nets), 6), squeeze=False)
    for axis, net in zip(axes[0], nets, strict=True):
        own = [line for line in lines if line["net"] == net]
        dense = [line["accuracy"] for line in own if line["method"] == "dense"]
        if dense:
            axis.axhline(statistics.mean(dense), color="0.6", lw=1, label="dense")
        for i, method in enumerate(METHODS[1:]):
            by: dict[float, list[float]] = defaultdict(list)
            for line in own:
                if line["method"] == method:
                    by[line["sparsity"]].append(line["accuracy"])
            if by:
                levels = sorted(by)
                axis.plot(
                    range(len(levels)), [statistics.mean(by[s]) for s in levels], lw=1.3,
                    marker="osv^D"[i % 5], ms=4, ls=("-", "--", ":")[i // 8], label=method,
                    color=plt.get_cmap("tab10")(i % 10),
                )  # fmt: skip
                axis.set_xticks(range(len(levels)), [f"{s:.0%}" for s in levels])
        axis.set(title=net, xlabel="sparsity", ylabel="test accuracy, %")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def jobs_of(given: argparse.Namespace) -> list[Job]:
    """Return all trainings that were asked for; a dense one has sparsity 0."""
    data = None if given.data is None else str(given.data)
    return [
        Job(net, method, s, seed, given.steps, data, given.train)
        for seed in given.seeds
        for net in given.nets
        for method in given.only
        for s in ((0.0,) if method == "dense" else given.sparsities)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing in the file, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of MNIST-format files")
    parser.add_argument("--train", type=int, help="how many training images (default: all)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of a training")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/methods.jsonl"))
    given = parser.parse_args(argv)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    known = given.out.read_text().splitlines() if given.out.exists() else []
    lines = [json.loads(line) for line in known]
    done = {(li["net"], li["method"], li["sparsity"], li["seed"], li["steps"]) for li in lines}
    jobs = [job for job in jobs_of(given) if job[:5] not in done]
    with ProcessPoolExecutor(given.workers) as pool, given.out.open("a") as file:
        futures = [pool.submit(run, job) for job in jobs]
        for future in track(as_completed(futures), "training", total=len(futures)):
            lines.append(future.result())
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
    for net in given.nets:
        print(table(lines, net), end="\n\n")
    plot(lines, given.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
