"""Training that may be killed at any moment and goes on as if it had not been.

    python examples/resumable_training.py runs/resumable            # start, or go on
    python examples/resumable_training.py runs/resumable --steps 400

Stop it with Ctrl-C, kill it, cut the power, and start it again: the digest of the weights, masks
and report that it prints at the end is the one of the run that never stopped. Three rules do it.

1. What a step reads is a function of the step. Batches come from a generator that is seeded with
   the step, so there is no random state to save, and no place in a data loader.
2. A checkpoint holds everything that a step changes: weights, the optimizer's averages, and the
   pruner's masks and step. They are in one file, because two could be of two different steps.
3. A checkpoint is complete or not there. It is written aside and forced onto the disk, and takes
   the old one's place in one move, which is forced onto the disk too. A kill leaves the old one or
   the new one, and perhaps half a file of another name, which the next start never reads.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from data import Digits, load
from purprune import Block, PolynomialDecay, PruneConfig, Rule
from purprune_adapters import Pruner

BATCH = 64
SCHEDULE = PolynomialDecay("range(0, 160, 20)")
CONFIG = (
    PruneConfig()
    .set_module_name("conv", Rule(0.6, SCHEDULE))
    .set_module_name("dense", Rule(0.8, SCHEDULE, pattern=Block((1, 4))))
)


class Network(nn.Module):
    """A small convolutional network for images of 28 x 28."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 5, stride=2)
        self.dense = nn.Linear(8 * 12 * 12, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, 10)``."""
        logits: Tensor = self.dense(F.relu(self.conv(images)).flatten(1))
        return logits


def batch(data: Digits, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a step: a function of step and seed, whoever ran before."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    at = torch.randint(len(data.train_labels), (BATCH,), generator=generator)
    return data.train_images[at], data.train_labels[at]


def save(checkpoint: dict[str, object], path: Path) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one."""
    aside = path.with_suffix(".partial")
    with aside.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # the content is on the disk before the name is
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # and now the name
    finally:
        os.close(folder)


def train(data: Digits, path: Path, steps: int, save_every: int, seed: int) -> Pruner:
    """Train up to ``steps`` from the checkpoint at ``path``, or from the start if there is none."""
    torch.manual_seed(seed)
    model = Network()
    pruner = Pruner(model, CONFIG)
    found = torch.load(path, weights_only=True) if path.exists() else None
    if found:
        model.load_state_dict(found["model"])
        pruner.load_state_dict(found["pruner"])  # before prepare: no mask of step 0 touches it
    pruner.prepare(inplace=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if found:
        optimizer.load_state_dict(found["optimizer"])
    print(f"training from step {pruner.step_count}", file=sys.stderr, flush=True)
    while pruner.step_count < steps:
        images, labels = batch(data, pruner.step_count, seed)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        pruner.step()
        if pruner.step_count % save_every == 0:
            states = (model.state_dict(), optimizer.state_dict(), pruner.state_dict())
            save(dict(zip(("model", "optimizer", "pruner"), states, strict=True)), path)
    return pruner


def digest(pruner: Pruner) -> str:
    """Return a hash of every bit of the weights and masks, and of the report."""
    found = hashlib.sha256(str(pruner.report()).encode())
    for name, tensor in [*pruner.model.state_dict().items(), *pruner.masks.items()]:
        found.update(name.encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def accuracy(model: nn.Module, data: Digits) -> float:
    """Return the share of test images that are classified right, in percent."""
    with torch.no_grad():
        guesses = model(data.test_images).argmax(dim=1)
    return 100 * int((guesses == data.test_labels).sum()) / len(data.test_labels)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the checkpoint is kept")
    parser.add_argument("--data", type=Path, help="a folder of MNIST files; default: digits")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums of another order are other bits
    args.folder.mkdir(parents=True, exist_ok=True)
    data = load(args.data)
    path = args.folder / "checkpoint.pt"
    pruner = train(data, path, args.steps, args.save_every, args.seed)
    print(pruner.report())
    print(f"accuracy: {accuracy(pruner.model, data):.2f} %")
    print(f"digest: {digest(pruner)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
