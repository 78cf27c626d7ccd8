"""The pure training ends where the Pruner's training ends, and is pure."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
import data
import functional_training as functional


@dataclass(frozen=True)
class Checked:
    code: int
    printed: str
    state: functional.State


@pytest.fixture(scope="module")
def checked(bands: Path) -> Checked:
    """Run ``--check`` on 20 easy images, and keep the state that the pure training ended with."""
    states: list[functional.State] = []
    original = functional.train

    def train(*args: Any) -> functional.State:
        states.append(original(*args))
        return states[-1]

    arguments = ["--data", str(bands), "--seed", "1", "--dense-epochs", "1", "--check"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(functional, "train", train)
        code = functional.main(arguments)
    [state] = states
    return Checked(code, printed.getvalue(), state)


def test_the_check_finds_both_trainings_equal_bit_for_bit(checked: Checked) -> None:
    """900 steps of gradients, Adam and masks: the Pruner adds nothing to the pure fold."""
    assert "dense.weight: 18,816 of 23,520 (80.00 %) pruned" in checked.printed
    assert "the same, bit for bit" in checked.printed
    assert checked.code == 0


def test_the_check_names_what_differs(checked: Checked, bands: Path) -> None:
    """One zero of the other sign, one moved bias and one flipped mask bit must all be seen."""
    params = {name: p.clone() for name, p in checked.state.params.items()}
    masks = {name: mask.clone() for name, mask in checked.state.masks.items()}
    zero = tuple((params["dense.weight"] == 0).nonzero()[0])
    params["dense.weight"][zero] = -0.0
    params["conv.bias"][3] += 1
    masks["conv.weight"][0, 0, 0, 0] ^= True
    state = checked.state._replace(params=params, masks=masks)
    found = functional.differences(state, data.load(bands), 1, 1)
    assert found == [
        "mask of conv.weight: 1 of 108 entries differ",
        "conv.bias: 1 of 12 entries differ",
        "dense.weight: 1 of 23,520 entries differ",
    ]


def test_a_step_changes_no_argument_and_no_module() -> None:
    """Purity is what lets the step be transformed, replayed and compared."""
    generator = torch.Generator().manual_seed(0)
    params = {name: p.detach() for name, p in functional.tutorial.network(0).named_parameters()}
    masks = functional.compute_masks(params, 500, functional.CONFIG)
    state = functional.start(params, masks)
    batch = (torch.randn(4, 1, 28, 28, generator=generator), torch.tensor([0, 1, 2, 3]))
    tensors = [*params.values(), *masks.values(), *batch, *state.params.values()]
    before = [tensor.clone() for tensor in tensors]
    random = torch.random.get_rng_state()
    (first, loss), (second, again) = (
        functional.train_step(state, batch, functional.CONFIG) for _ in range(2)
    )
    assert all(map(torch.equal, tensors, before))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(loss, again)
    assert all(torch.equal(first.params[n], second.params[n]) for n in params)
    assert all(p.is_meta for p in functional.TEMPLATE.parameters())


def test_the_pure_adam_is_torch_optim_adam_bit_for_bit() -> None:
    """Equal masks rest on equal weights: one other rounding, and the ranking may differ."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (7, 33), "b": (5,), "scalar": ()}
    params = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    theirs = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = torch.optim.Adam(theirs.values(), eps=1e-7, foreach=False, fused=False)
    state = functional.start(params, {}).adam
    for _ in range(50):
        grads = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        params, state = functional.adam_step(params, grads, state)
        for name, param in theirs.items():
            param.grad = grads[name]
        optimizer.step()
    assert all(torch.equal(params[n], theirs[n]) for n in params)
