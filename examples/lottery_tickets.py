"""Iterative magnitude pruning with rewinding: the search for a lottery ticket.

    python examples/lottery_tickets.py                      # scikit-learn's digits, 95 %
    python examples/lottery_tickets.py --data DIR --sparsity 0.98 --rounds 8

Train, prune the smallest of the weights that are left, set the others back to what they were early
in the first training, and start again (Frankle and Carbin, 2019, arXiv:1803.03635; rewinding to an
early step instead of the initialisation: Frankle et al., 2020, arXiv:1912.05671). The rounds are
the steps of a schedule, and the masks of a round are ``compute_masks`` with ``prev``: that is all
the method is. It trains once for every round, so compare it with that in mind.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from data import Digits, batches, load
from magnitude_pruning import accuracy, network
from purprune import ExponentialDecay, Rule, compute_masks, sparsity
from purprune_adapters import Pruner, resolve

Train = Callable[[nn.Module, Pruner | None, int, int], None]
"""Trains a model, beside a pruner, from one step to another."""


def lottery_ticket(
    model: nn.Module, train: Train, rule: Rule, *, rounds: int, steps: int, rewind: int
) -> dict[str, Tensor]:
    """Prune ``model`` in so many rounds of so many steps, and leave it trained.

    Args:
        model: an initialised model; it ends with the last round's weights.
        train: ``train(model, pruner, start, stop)``, in the same order of batches each time.
        rule: what is pruned, with a schedule over the rounds: round r has the sparsity of step r.
        rounds: how often to prune; the schedule ends there.
        steps: steps of a training.
        rewind: the step to which weights go back, 0 for the initialisation.

    Returns:
        The masks of the last round.
    """
    config = resolve(model, rule)
    train(model, None, 0, rewind)
    early = copy.deepcopy(model.state_dict())
    train(model, None, rewind, steps)
    masks: dict[str, Tensor] = {}
    for r in range(1, rounds + 1):
        masks = compute_masks(dict(model.named_parameters()), r, config, prev=masks)
        model.load_state_dict(early)
        pruner = Pruner(model, Rule(0.0), masks=masks)
        pruner.prepare(inplace=True)
        train(model, pruner, rewind, steps)
        pruner.finalize(inplace=True)
    return masks


def trainer(digits: Digits, *, seed: int, rate: float = 1e-3) -> Train:
    """Return a function that trains on the same batches for the same steps each time."""

    def train(model: nn.Module, pruner: Pruner | None, start: int, stop: int) -> None:
        loader = batches(digits.train_images, digits.train_labels, seed=seed)
        optimizer = torch.optim.Adam(model.parameters(), rate)
        model.train()
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
        for images, labels in itertools.islice(endless, start, stop):
            optimizer.zero_grad()
            F.nll_loss(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if pruner is not None:
                pruner.step()

    return train


def main(argv: Sequence[str] | None = None) -> int:
    """Find a ticket, and train its masks from other weights beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="a folder of MNIST-format files")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--rewind", type=int, default=20, help="the step to go back to")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    digits = load(given.data)
    train = trainer(digits, seed=given.seed)

    def tested(model: nn.Module) -> str:
        return f"{accuracy(model, digits.test_images, digits.test_labels):.2f} %"

    dense = network(given.seed)
    train(dense, None, 0, given.steps)
    print(f"dense:                       {tested(dense)}")
    rule = Rule(given.sparsity, ExponentialDecay(range(given.rounds + 1)))
    ticket = network(given.seed)
    masks = lottery_ticket(
        ticket, train, rule, rounds=given.rounds, steps=given.steps, rewind=given.rewind
    )
    print(f"ticket, {sparsity(masks)} zero: {tested(ticket)}")
    other = network(given.seed + 1)
    pruner = Pruner(other, Rule(0.0), masks=masks)
    pruner.prepare(inplace=True)
    train(other, pruner, 0, given.steps)
    print(f"its masks, other weights:    {tested(other)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
