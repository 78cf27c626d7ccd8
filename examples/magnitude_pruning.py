"""Prune a small network while it trains, then export it to Core ML and check what was exported.

The network has one convolution and one dense layer and reads handwritten digits. It is trained
dense, then fine-tuned while the sparsity grows along a polynomial: to 70 % of the convolution's
weights and 80 % of the dense layer's.

    python examples/magnitude_pruning.py                # scikit-learn's digits, no download
    python examples/magnitude_pruning.py --data DIR     # MNIST, or any data set in its format

It writes to ``--out``: the Core ML package, ``summary.json``, and the picture ``pruning.png``. It
ends with an error when pruning cost more than two points of accuracy, or when the number of zeros
is not exactly the one that was asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import Digits, batches, load
from picture import draw
from purprune import PolynomialDecay, PruneConfig, Rule
from purprune_adapters import Pruner, Report
from purprune_adapters.coreml import ExportError, ExportReport, export_coreml

Loader = DataLoader[tuple[Tensor, ...]]

UPDATES = range(0, 900, 100)  # PolynomialDecay takes the text "range(0, 900, 100)" as well
CONFIG = (
    PruneConfig()
    .set_module_type(nn.Conv2d, Rule(0.7, PolynomialDecay(UPDATES)))
    .set_module_type(nn.Linear, Rule(0.8, PolynomialDecay(UPDATES)))
)
EXACT_ZEROS = {"conv.weight": 75, "dense.weight": 18_816}  # floor(108 * 0.7), floor(23,520 * 0.8)
MAX_LOSS = 2.0  # points of accuracy


def network(seed: int) -> nn.Sequential:
    """Return the network with the weights that ``seed`` draws."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(1, 12, kernel_size=3, padding="same"),
                relu=nn.ReLU(),
                pool=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                dense=nn.Linear(12 * 14 * 14, 10),
                softmax=nn.LogSoftmax(dim=1),
            )
        )


def train(
    model: nn.Module, loader: Loader, epochs: int, title: str, pruner: Pruner | None = None
) -> list[Report]:
    """Train with a new Adam; return the pruner's report at the start and after every step."""
    # fused rounds otherwise; without it functional_training.py ends with the very same bits.
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-7, foreach=False, fused=False)
    history = [pruner.report()] if pruner else []
    model.train()
    with progress_bar() as bar:
        task = bar.add_task(title, total=epochs * len(loader), loss=math.nan)
        for _ in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                loss = F.nll_loss(model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if pruner:
                    pruner.step()
                    history.append(pruner.report())
                bar.update(task, advance=1, loss=loss.item())
    return history


def progress_bar() -> Progress:
    """Return a bar that shows steps, the loss, and the time that is left."""
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified right, in percent."""
    model.eval()
    guesses = torch.cat([model(some).argmax(dim=1) for some in torch.split(images, 1000)])
    return 100 * int((guesses == labels).sum()) / len(labels)


def fine_tune_epochs(loader: Loader) -> int:
    """Return how many epochs the schedule takes: 2 for MNIST's 469 batches."""
    return math.ceil(UPDATES.stop / len(loader))


def dense_epochs(loader: Loader) -> int:
    """Return 4 epochs, as for MNIST, or more where an epoch is so short that they are too few.

    The dense network must have learned before pruning can cost it something: it gets at least as
    many steps as the fine-tuning, or the comparison of the two would be won in advance.
    """
    return max(4, fine_tune_epochs(loader))


def export(
    model: nn.Module, masks: Mapping[str, Tensor], image: Tensor, out: Path
) -> tuple[ExportReport | None, list[str]]:
    """Write the Core ML package and verify it; return the report, and what went wrong.

    Without coremltools there is no report, and nothing went wrong: what to install is printed.
    """
    try:
        report = export_coreml(
            model,
            image,
            out / "digits.mlpackage",
            masks=masks,
            keep_float32=("softmax", "log"),  # in float16 the softmax is 0 where the log needs it
            overwrite=True,
        )
    except ImportError as error:
        print(f"No Core ML package was written. {error}")
        return None, []
    except ExportError as error:  # the training before it is still worth its picture
        return None, [f"No Core ML package was written. {error}"]
    print(f"{report}\n")
    return report, []


def problems(before: float, after: float, report: Report) -> list[str]:
    """Return what is wrong with the result, one line each."""
    found = []
    if after < before - MAX_LOSS:
        found.append(
            f"Expected an accuracy within {MAX_LOSS:g} points of the dense {before:.2f} %; got "
            f"{after:.2f} % after pruning."
        )
    for name, zeros in EXACT_ZEROS.items():
        if report[name].weight.zeros != zeros:
            found.append(
                f"Expected exactly {zeros:,} zeros in '{name}'; got {report[name].weight}."
            )
    return found


def run(
    data: Digits, out: Path, *, seed: int = 0, epochs: int | None = None, coreml: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Train, prune, export and draw; return the summary that was written, and what is wrong."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    loader = batches(data.train_images, data.train_labels, seed=seed)
    test = (data.test_images, data.test_labels)
    print(f"{data.name}: {len(data.train_labels):,} images to train, {len(test[1]):,} to test")

    model = network(seed)
    epochs = dense_epochs(loader) if epochs is None else epochs
    train(model, loader, epochs, f"dense, {epochs} epochs")
    before = accuracy(model, *test)

    pruner = Pruner(model, CONFIG)
    pruner.prepare(inplace=True)
    more = fine_tune_epochs(loader)
    history = train(model, loader, more, f"pruning, {more} epochs", pruner)
    pruner.finalize(inplace=True)
    after = accuracy(model, *test)

    report = pruner.report()
    print(f"\naccuracy: {before:.2f} % dense, {after:.2f} % pruned\n\n{report}\n")
    wrong, exported = problems(before, after, report), None
    if coreml:
        exported, failed = export(model, pruner.masks, data.test_images[:1], out)
        wrong += failed
    draw(
        out / "pruning.png",
        title=f"{data.name}: {before:.1f} % of test images right dense, {after:.1f} % pruned",
        weights={name: param.detach() for name, param in model.named_parameters()},
        masks=pruner.masks,
        history=history,
        exported=exported,
    )
    summary = {
        "data": data.name,
        "images": {"train": len(data.train_labels), "test": len(data.test_labels)},
        "seed": seed,
        "epochs": {"dense": epochs, "fine_tune": more},
        "steps": {"dense": epochs * len(loader), "fine_tune": report.step},
        "accuracy": {"dense": before, "pruned": after},
        "pruning": report.as_dict(),
        "export": exported.as_dict() if exported else None,
        "seconds": round(time.perf_counter() - start, 2),
        "torch": str(torch.__version__),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary, wrong


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that both examples take."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="MNIST's IDX files (default: scikit-learn's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument(
        "--dense-epochs",
        type=_positive,
        metavar="N",
        help="before pruning begins (default: 4, or as many steps as the pruning takes)",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1; got {number}")
    return number


def load_or_exit(parser: argparse.ArgumentParser, folder: Path | None) -> Digits:
    """Return the images; where they can't be read, print why and end with exit code 2."""
    try:
        return load(folder)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; return the exit code: 0, 1 for a result out of bounds, 2 for bad input."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/magnitude_pruning"),
        help="where the results go (default: %(default)s)",
    )
    parser.add_argument("--no-export", action="store_true", help="write no Core ML package")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # results don't depend on the cores; so small a network gains little
    data = load_or_exit(parser, args.data)
    summary, wrong = run(
        data, args.out, seed=args.seed, epochs=args.dense_epochs, coreml=not args.no_export
    )
    print(f"written to {args.out} in {summary['seconds']} s: {_listed(args.out)}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _listed(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    sys.exit(main())
