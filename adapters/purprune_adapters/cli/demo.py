"""``purprune demo``: a small network is trained and pruned on handwritten digits, in seconds."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
import typer
from torch import Tensor, nn

from purprune import PolynomialDecay, PruneConfig, Rule
from purprune_adapters.cli.output import AsJson, Command, say, say_json
from purprune_adapters.coreml.export import export_coreml
from purprune_adapters.coreml.paths import destination
from purprune_adapters.coreml.quiet import load_coremltools
from purprune_adapters.pruner import Pruner
from purprune_adapters.report import Report

_EXAMPLES = "Examples:\n\npurprune demo\n\npurprune demo --export digits.mlpackage --json"
UPDATES = range(0, 180, 20)
CONFIG = (
    PruneConfig()
    .set_module_type(nn.Conv2d, Rule(0.7, PolynomialDecay(UPDATES)))
    .set_module_type(nn.Linear, Rule(0.8, PolynomialDecay(UPDATES)))
)
ZEROS = {"conv.weight": 75, "dense.weight": 1536}  # floor(108 * 0.7), floor(1,920 * 0.8)
MOST_LOST = 3.0
_EPOCHS, _BATCH, _TEST = 20, 128, 450


class Images(NamedTuple):
    """Images and what they show."""

    images: Tensor
    labels: Tensor


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", cls=Command, epilog=_EXAMPLES)(demo_command)


def demo_command(
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write a verified Core ML package too."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a package that is there.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train, prune while fine-tuning, and count: scikit-learn's digits, nothing is downloaded.

    Exit code 1 when the zeros are not exactly those that were asked for, or more than three points
    of accuracy are lost. examples/magnitude_pruning.py of the sources is the long form.
    """
    if export is not None:  # before the training, which takes a while
        load_coremltools()
        export = destination(export, overwrite=overwrite)
    train, test = _digits()
    model = _network(seed)
    _fit(model, train, _EPOCHS, seed)
    before = _accuracy(model, test)
    pruner = Pruner(model, CONFIG)
    pruner.prepare(inplace=True)
    _fit(model, train, _EPOCHS, seed + 1, pruner)
    pruner.finalize(inplace=True)
    after, report = _accuracy(model, test), pruner.report()
    found: dict[str, Any] = {"accuracy": {"dense": before, "pruned": after}}
    found |= {"pruning": report.as_dict(), "export": None}
    text = f"accuracy: {before:.2f} % dense, {after:.2f} % pruned\n\n{report}"
    if export is not None:
        exported = export_coreml(model.eval(), test.images[:1], export, overwrite=overwrite)
        found["export"], text = exported.as_dict(), f"{text}\n\n{exported}"
    found["problems"] = _problems(before, after, report)
    if as_json:
        say_json(found)
    else:
        say("\n".join([text, *found["problems"]]))
    if found["problems"]:
        raise typer.Exit(1)


def _digits() -> tuple[Images, Images]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "Expected scikit-learn, which has the digits; install it with "
            "pip install 'purprune[examples]'."
        ) from None
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.from_numpy(found.target)[order]
    return Images(images[_TEST:], labels[_TEST:]), Images(images[:_TEST], labels[:_TEST])


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(1, 12, kernel_size=3, padding="same"),
                relu=nn.ReLU(),
                pool=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                dense=nn.Linear(12 * 4 * 4, 10),
            )
        )


def _fit(
    model: nn.Module, data: Images, epochs: int, seed: int, pruner: Pruner | None = None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for at in torch.split(torch.randperm(len(data.labels), generator=generator), _BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.images[at]), data.labels[at])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if pruner is not None:
                pruner.step()


@torch.no_grad()
def _accuracy(model: nn.Module, data: Images) -> float:
    model.eval()
    right = (model(data.images).argmax(dim=1) == data.labels).sum()
    return 100 * int(right) / len(data.labels)


def _problems(before: float, after: float, report: Report) -> list[str]:
    found = []
    if after < before - MOST_LOST:
        found.append(
            f"Expected an accuracy within {MOST_LOST:g} points of the dense {before:.2f} %; got "
            f"{after:.2f} %."
        )
    for name, zeros in ZEROS.items():
        if report[name].weight.zeros != zeros:
            found.append(f"Expected {zeros:,} zeros in '{name}'; got {report[name].weight}.")
    return found
