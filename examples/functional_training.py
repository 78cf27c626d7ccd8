"""The training of magnitude_pruning.py, written purely: values in, values out, no Pruner.

Parameters, optimizer state and masks are dicts of tensors that go through one function per step,

    gradients -> masked gradients -> Adam -> masks of this step -> masked parameters,

and nothing is ever written in place. The module is a template without data: it lends its forward
pass to ``functional_call`` and keeps nothing.

    python examples/functional_training.py              # scikit-learn's digits
    python examples/functional_training.py --data DIR   # MNIST, or any data set in its format
    python examples/functional_training.py --check      # run the Pruner too, compare every bit
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor
from torch.func import functional_call, grad_and_value

import magnitude_pruning as tutorial
from data import Digits, batches
from purprune import PolynomialDecay, PruneConfig, Rule, apply_masks, compute_masks, sparsity
from purprune_adapters import Pruner

Tensors = Mapping[str, Tensor]

# A flat dict has no modules, so the rules go by name; ``conv`` stands for ``conv.weight``.
CONFIG = (
    PruneConfig()
    .set_module_name("conv", Rule(0.7, PolynomialDecay(tutorial.UPDATES)))
    .set_module_name("dense", Rule(0.8, PolynomialDecay(tutorial.UPDATES)))
)
TEMPLATE = tutorial.network(seed=0).to("meta")


class Adam(NamedTuple):
    """The state of Adam: the number of steps, and running means of gradients and their squares."""

    steps: int
    mean: Tensors
    square: Tensors


class State(NamedTuple):
    """All that training changes."""

    params: Tensors
    adam: Adam
    masks: Tensors


def start(params: Tensors, masks: Tensors) -> State:
    """Return the state before the first step: masked parameters and an Adam that knows nothing."""
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    return State(apply_masks(params, masks), Adam(0, zeros, zeros), masks)


def loss(params: Tensors, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the labels."""
    return F.nll_loss(functional_call(TEMPLATE, dict(params), (images,)), labels)


def adam_step(params: Tensors, grads: Tensors, adam: Adam) -> tuple[dict[str, Tensor], Adam]:
    """Return parameters and state after one step of Adam (Kingma and Ba, arXiv:1412.6980).

    The operations are those of ``torch.optim.Adam(foreach=False, fused=False)``, in its order, down
    to ``lerp``, ``addcmul`` and ``addcdiv``: equal formulas are not equal bits. Written out as
    ``b * mean + (1 - b) * grad``, or with torch's fused kernel, other entries round up.
    """
    lr, b1, b2, eps = 1e-3, 0.9, 0.999, 1e-7
    t = adam.steps + 1
    mean = {n: torch.lerp(adam.mean[n], g, 1 - b1) for n, g in grads.items()}
    square = {n: torch.addcmul(adam.square[n] * b2, g, g, value=1 - b2) for n, g in grads.items()}
    size, scale = lr / (1 - b1**t), (1 - b2**t) ** 0.5
    moved = {
        n: torch.addcdiv(p, mean[n], square[n].sqrt() / scale + eps, value=-size)
        for n, p in params.items()
    }
    return moved, Adam(t, mean, square)


def train_step(
    state: State, batch: Sequence[Tensor], config: PruneConfig | None
) -> tuple[State, Tensor]:
    """Return the state after one step, and the loss before it; without a config it stays dense."""
    grads, value = grad_and_value(loss)(state.params, *batch)
    params, adam = adam_step(state.params, apply_masks(grads, state.masks), state.adam)
    masks = state.masks
    if config is not None:  # Adam's steps and the schedule's both count from the start of a phase
        masks = compute_masks(params, adam.steps, config, prev=masks)
    return State(apply_masks(params, masks), adam, masks), value


def fit(
    state: State, loader: tutorial.Loader, epochs: int, config: PruneConfig | None, title: str
) -> State:
    """Return the state after some epochs."""
    with tutorial.progress_bar() as bar:
        task = bar.add_task(title, total=epochs * len(loader), loss=float("nan"))
        for _ in range(epochs):
            for batch in loader:
                state, value = train_step(state, batch, config)
                bar.update(task, advance=1, loss=value.item())
    return state


def train(data: Digits, seed: int, epochs: int | None = None) -> State:
    """Train dense, then fine-tune while the sparsity grows; return the last state."""
    loader = batches(data.train_images, data.train_labels, seed=seed)
    params = {name: p.detach() for name, p in tutorial.network(seed).named_parameters()}
    dense_epochs = epochs or tutorial.dense_epochs(loader)
    dense = fit(start(params, {}), loader, dense_epochs, None, "pure, dense")
    masks = compute_masks(dense.params, 0, CONFIG)
    epochs = tutorial.fine_tune_epochs(loader)
    return fit(start(dense.params, masks), loader, epochs, CONFIG, "pure, pruning")


def differences(state: State, data: Digits, seed: int, epochs: int | None = None) -> list[str]:
    """Run the same training with a Pruner; return what differs from ``state``, bit for bit."""
    loader = batches(data.train_images, data.train_labels, seed=seed)
    model = tutorial.network(seed)
    tutorial.train(model, loader, epochs or tutorial.dense_epochs(loader), "Pruner, dense")
    pruner = Pruner(model, tutorial.CONFIG)
    pruner.prepare(inplace=True)
    tutorial.train(model, loader, tutorial.fine_tune_epochs(loader), "Pruner, pruning", pruner)
    pairs = {f"mask of {n}": (state.masks[n], mask) for n, mask in pruner.masks.items()}
    pairs |= {n: (state.params[n], p.detach()) for n, p in pruner.finalize().named_parameters()}
    return [
        f"{name}: {count:,} of {ours.numel():,} entries differ"
        for name, (ours, theirs) in pairs.items()
        if (count := int((_bits(ours) != _bits(theirs)).sum()))
    ]


def _bits(tensor: Tensor) -> Tensor:
    # 0.0 and -0.0 are equal floats, but not the same bits.
    return tensor if tensor.dtype == torch.bool else tensor.view(torch.int32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; return the exit code: 0, or 1 when --check finds a difference."""
    parser = tutorial.arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with a Pruner's run")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as the tutorial does, so that the results are the same
    data = tutorial.load_or_exit(parser, args.data)
    begin = time.perf_counter()
    state = train(data, args.seed, args.dense_epochs)
    with torch.no_grad():
        guesses = functional_call(TEMPLATE, dict(state.params), (data.test_images,)).argmax(dim=1)
    print(f"accuracy: {100 * (guesses == data.test_labels).float().mean():.2f} % pruned")
    for name, count in sparsity(state.masks).tensors.items():
        print(f"{name}: {count} pruned")
    print(f"{time.perf_counter() - begin:.1f} s")
    if not args.check:
        return 0
    found = differences(state, data, args.seed, args.dense_epochs)
    print("\n".join(found) or "The Pruner's masks and weights are the same, bit for bit.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
