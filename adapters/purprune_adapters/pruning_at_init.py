"""Pruning at initialisation in one call: SynFlow, GraSP and SNIP for a model.

What comes back are masks by parameter name, for ``Pruner(model, Rule(0.0), masks=masks)`` or
:func:`purprune.apply_masks`. The config says how much is pruned of what, and its schedule how often
scores are computed anew; the score of its rules is the method's. The model is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from purprune import (
    ConfigError,
    Given,
    Magnitude,
    PruneConfig,
    Rule,
    Taylor,
    gradients,
    grasp_scores,
    iterative_masks,
    synflow_scores,
)
from purprune.context import wide, wide_dtype
from purprune_adapters.resolve import resolve
from purprune_adapters.wrappers import unwrapped

Config = PruneConfig | Rule | Mapping[str, Any]
Loss = Callable[[Any, Any], Tensor]


def synflow_masks(model: nn.Module, example: Tensor, config: Config) -> dict[str, Tensor]:
    """Return the masks of SynFlow, which needs no data: an input of ones takes the example's place.

    Forward passes run in float64 (mps: float32) and in eval mode, with absolute weights and
    biases. BatchNorm is made linear: it divides by its running deviation and subtracts no mean.
    Layers that normalise by their own input (LayerNorm, GroupNorm) stay as they are; the flow is
    not conserved through them.

    Give a schedule of many updates, or layers may be emptied; the paper takes 100 iterations, all
    layers together::

        Rule(0.99, ExponentialDecay(range(101)), pattern=Unstructured(scope="global"))

    Args:
        model: the model; it returns one tensor.
        example: an input of floats, of which the shape of the first sample is read.
        config: as a Pruner takes it, with rules by module type or name.

    Raises:
        ConfigError: a rule has another score, or a schedule has no end.
        ValueError: the sum over all paths is too large for a float.

    >>> from purprune import ExponentialDecay
    >>> rule = Rule(0.5, ExponentialDecay(range(11)))
    >>> masks = synflow_masks(nn.Linear(4, 2), torch.rand(1, 4), rule)
    >>> int(masks["weight"].sum())
    4
    """
    model = unwrapped(model)
    if not isinstance(example, Tensor) or not example.is_floating_point():
        got = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(
            f"Expected a floating-point tensor as example; got {got}. For other inputs write the "
            f"closure: purprune.synflow_scores(forward, params)."
        )
    ones = torch.ones_like(example[:1], dtype=wide_dtype(example), requires_grad=False)
    buffers = _linear_buffers(model)

    def forward(params: dict[str, Tensor]) -> Tensor:
        found = functional_call(model, {**params, **buffers}, (ones,))
        if not isinstance(found, Tensor):
            raise TypeError(
                f"Expected a model that returns one tensor; got {type(found).__name__}. Write the "
                f"closure: purprune.synflow_scores(forward, params)."
            )
        return found

    with _evaluating(model):
        return _masks(model, config, Given("synflow"), lambda p: synflow_scores(forward, p))


def grasp_masks(model: nn.Module, loss: Loss, batch: Any, config: Config) -> dict[str, Tensor]:
    """Return the masks of GraSP: what goes is what the gradient flow of a batch needs least.

    The model runs in the mode that it is in, and its buffers stay as they are; attention runs by
    its formula, since its fused forms have no second derivative. The paper divides the logits by
    200 in the loss, and takes all layers together (``scope="global"``).

    Args:
        model: the model.
        loss: ``loss(model, batch) -> scalar``, which calls the model that it is given.
        batch: handed on to the loss.
        config: as a Pruner takes it, with rules by module type or name.

    >>> model, batch = nn.Linear(4, 2), torch.rand(8, 4)
    >>> masks = grasp_masks(model, lambda m, x: m(x).square().mean(), batch, Rule(0.5))
    >>> int(masks["weight"].sum())
    4
    """
    model = unwrapped(model)
    closure = _closure(model, loss, batch)
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
        return _masks(model, config, Given("grasp"), lambda p: grasp_scores(closure, p))


def snip_masks(model: nn.Module, loss: Loss, batch: Any, config: Config) -> dict[str, Tensor]:
    """Return the masks of SNIP: what goes is what the loss of a batch feels least, ``|w * g|``.

    The model runs in the mode that it is in, and its buffers stay as they are. The paper takes all
    layers together (``scope="global"``) and one step; a schedule of many updates makes it the
    iterative SNIP of de Jorge et al., 2021 (arXiv:2006.09081).

    Args are those of :func:`grasp_masks`.

    >>> model, batch = nn.Linear(4, 2), torch.rand(8, 4)
    >>> masks = snip_masks(model, lambda m, x: m(x).square().mean(), batch, Rule(0.5))
    >>> int(masks["weight"].sum())
    4
    """
    model = unwrapped(model)
    closure = _closure(model, loss, batch)
    return _masks(model, config, Taylor(), lambda p: gradients(closure, p))


def _masks(
    model: nn.Module,
    config: Config,
    score: Given | Taylor,
    scores_of: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    named = resolve(model, config).module_name_configs
    rules = {name: _with_score(name, rule, score) for name, rule in named.items() if rule}
    params = {name: param.detach() for name, param in model.named_parameters()}
    (stat,) = score.needs
    return iterative_masks(scores_of, params, PruneConfig(module_name_configs=rules), stat=stat)


def _with_score(name: str, rule: Rule, score: Given | Taylor) -> Rule:
    """Return the rule with the score of the method; refuse another that was meant."""
    if rule.score not in (Magnitude(), score):
        raise ConfigError(
            f"Expected a rule for {name!r} without a score of its own, or with {score!r}; got "
            f"{rule.score!r}. Leave it out: the score is the method's."
        )
    return replace(rule, score=score)


class _Objective(nn.Module):
    """A loss of a model and a batch as a module, so that the loss sees the model itself."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        """Return the loss."""
        return self.loss(self.model, batch)


def _closure(model: nn.Module, loss: Loss, batch: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return the loss as a function of parameters; what it does to buffers is done to copies."""
    objective = _Objective(model, loss)

    def closure(params: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        tensors = {f"model.{name}": tensor for name, tensor in {**params, **buffers}.items()}
        found: Tensor = functional_call(objective, tensors, (batch,))
        return found

    return closure


def _linear_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in float64 (mps: float32), with running means of 0."""
    means = {
        f"{name}.running_mean".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    }
    return {
        name: wide(torch.zeros_like(buffer) if name in means else buffer)
        if buffer.is_floating_point()
        else buffer
        for name, buffer in model.named_buffers()
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and each back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
