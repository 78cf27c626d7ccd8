"""Measure what each layer can bear, give each its own sparsity, and compare at the same total.

A small convolutional network is trained dense on handwritten digits. Then the loss on *training*
images is measured with each layer alone pruned to several sparsities, and the targets are chosen
at which these losses grow least. The accuracy on *test* images is compared with the same sparsity
for every layer, with Erdos-Renyi-Kernel densities, which look at shapes alone, and with one
threshold for all layers: right after pruning, and after a short fine-tuning. All prune the same
number of weights, by magnitude.

    python examples/sensitivity.py               # scikit-learn's digits, three seeds
    python examples/sensitivity.py --data DIR    # MNIST, or any data set in its format

It prints a table and writes the picture ``sensitivity.png`` to ``--out``.
"""

from __future__ import annotations

import copy
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import magnitude_pruning as tutorial
from data import Digits, batches
from picture import STYLE
from purprune import (
    ErdosRenyi,
    PruneConfig,
    Rule,
    Sensitivity,
    Uniform,
    Unstructured,
    allocate_by_sensitivity,
)
from purprune.tables import text_table
from purprune_adapters import Pruner, measure_sensitivity, plot_sensitivity, resolve

LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
TOTALS = (0.9, 0.95)
COLOURS = {"uniform": "#8b8796", "erk": "#e66101", "global": "#0e8a80", "sensitivity": "#5e3c99"}


class Result(NamedTuple):
    """The accuracy on test images, in percent."""

    seed: int
    total: float
    method: str
    one_shot: float
    tuned: float


def network(seed: int) -> nn.Sequential:
    """Return the network with the weights that ``seed`` draws."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                dense1=nn.Linear(32 * 7 * 7, 64),
                relu3=nn.ReLU(),
                dense2=nn.Linear(64, 10),
                softmax=nn.LogSoftmax(dim=1),
            )
        )


def configs(model: nn.Module, curves: Sensitivity, total: float) -> dict[str, PruneConfig]:
    """Return the ways to divide a total among the layers."""
    params = dict(model.named_parameters())
    uniform = resolve(model, Rule(total, budget=Uniform()))
    return {
        "uniform": uniform,
        "erk": resolve(model, Rule(total, budget=ErdosRenyi(kernel=True))),
        "global": resolve(model, Rule(total, pattern=Unstructured(scope="global"))),
        "sensitivity": allocate_by_sensitivity(curves, params, uniform),
    }


def run(data: Digits, seed: int, epochs: int, tuning: int) -> tuple[Sensitivity, list[Result]]:
    """Train, measure, and compare the ways to prune; return the curves and the accuracies."""
    loader = batches(data.train_images, data.train_labels, seed=seed)
    test = (data.test_images, data.test_labels)
    model = network(seed)
    tutorial.train(model, loader, epochs, f"dense, seed {seed}")
    dense = tutorial.accuracy(model, *test)
    results = [Result(seed, 0.0, "dense", dense, dense)]
    curves = measure_sensitivity(model, F.nll_loss, loader, LEVELS, Rule())
    for total in TOTALS:
        for method, config in configs(model, curves, total).items():
            pruner = Pruner(copy.deepcopy(model), config)
            pruned = pruner.prepare(inplace=True)
            one_shot = tutorial.accuracy(pruned, *test)
            shuffled = batches(data.train_images, data.train_labels, seed=seed)
            tutorial.train(pruned, shuffled, tuning, f"{method}, {total:.0%}", pruner)
            tuned = tutorial.accuracy(pruned, *test)
            results.append(Result(seed, total, method, one_shot, tuned))
    return curves, results


def table(results: Sequence[Result]) -> str:
    """Return the accuracies as a table: the mean of the seeds, and each of them."""
    rows = []
    for (total, method), some in grouped(results).items():
        cells = [spread([r.one_shot for r in some]), spread([r.tuned for r in some])]
        rows.append((f"{total:.0%}", method, *cells))
    return text_table(("total", "division", "one-shot", "fine-tuned"), rows)


def grouped(results: Sequence[Result]) -> dict[tuple[float, str], list[Result]]:
    """Return the results of all seeds by total and method."""
    found: dict[tuple[float, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.total, result.method), []).append(result)
    return found


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the values in brackets."""
    return f"{sum(values) / len(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"


def draw(path: Path, curves: Sensitivity, results: Sequence[Result]) -> None:
    """Write the picture: the curves of one seed, and the accuracies of all."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), dpi=150, facecolor="white", layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_sensitivity(curves, left)
        left.set_title("What each layer alone can bear")
        right.set_title("Accuracy at the same total")
        _accuracies(right, results)
        figure.savefig(path)


def _accuracies(axes: Axes, results: Sequence[Result]) -> None:
    """Draw a mark for every seed: a disc right after pruning, a triangle after fine-tuning."""
    for place, total in enumerate(TOTALS):
        for shift, (method, colour) in enumerate(COLOURS.items()):
            some = [r for r in results if (r.total, r.method) == (total, method)]
            x = [place + 0.2 * (shift - 1.5)] * len(some)
            label = method if place == 0 else None
            axes.plot(x, [r.one_shot for r in some], "o", color=colour, alpha=0.7)
            axes.plot(x, [r.tuned for r in some], "^", color=colour, alpha=0.7, label=label)
    axes.plot([], [], "o", color="none", markeredgecolor=COLOURS["uniform"], label="one-shot")
    axes.plot([], [], "^", color="none", markeredgecolor=COLOURS["uniform"], label="fine-tuned")
    axes.set_xticks(range(len(TOTALS)), [f"{total:.0%} pruned" for total in TOTALS])
    axes.set_ylabel("test images right, %")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; return the exit code."""
    parser = tutorial.arguments(__doc__)
    parser.set_defaults(dense_epochs=20)
    parser.add_argument("--seeds", type=int, default=3, help="from --seed on (default: 3)")
    parser.add_argument("--tuning-epochs", type=int, default=3, help="after pruning (default: 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sensitivity"), help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # results don't depend on the cores
    data = tutorial.load_or_exit(parser, args.data)
    begin = time.perf_counter()
    runs = [
        run(data, seed, args.dense_epochs, args.tuning_epochs)
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    results = [result for _, some in runs for result in some]
    print(f"{runs[0][0]}\n\n{table(results)}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "sensitivity.png", runs[0][0], results)
    print(f"{args.out / 'sensitivity.png'} written, {time.perf_counter() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
