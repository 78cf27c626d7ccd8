"""Saliency: scores that see the whole network, as pure functions of closures.

``loss(params) -> scalar`` and ``forward(params) -> tensor`` are functions of a dict of parameters,
as ``lambda p: functional_call(model, p, x).sum()``. Parameters that are no floats are passed on as
they are and get no score. What comes back goes to :func:`purprune.compute_masks` as ``grads`` or
``stats``; :func:`iterative_masks` does it once for each update of a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from purprune.config import PruneConfig, as_config
from purprune.context import wide
from purprune.errors import ConfigError
from purprune.masks import apply_masks, compute_masks
from purprune.rules import Rule
from purprune.scores import needs_of
from purprune.selection import check_params, select

Params = Mapping[str, Tensor]


def gradients(loss: Callable[[dict[str, Tensor]], Tensor], params: Params) -> dict[str, Tensor]:
    """Return the gradient of a loss with respect to every parameter, for scores that need it.

    ``compute_masks(params, step, Rule(score="snip"), grads=gradients(loss, params))`` at
    initialisation is SNIP: ``|w * g|`` is ``|dL/dc|`` of a multiplier c = 1 of the entry (Lee et
    al., 2019, arXiv:1810.02340).

    >>> gradients(lambda p: p["w"].square().sum(), {"w": torch.tensor([3.0, -1.0])})
    {'w': tensor([ 6., -2.])}
    """
    floats, differentiated = _differentiated(loss, params)
    return differentiated(floats)


def grasp_scores(loss: Callable[[dict[str, Tensor]], Tensor], params: Params) -> dict[str, Tensor]:
    """Return ``w * (H g)`` with the gradient g and the Hessian H of the loss, in float64.

    Removing an entry changes the squared norm of the gradient by about -2 times this. The lowest
    go first: where it is negative, the gradient flow grows. The paper writes ``S(-w) = -w * (H g)``
    and removes the highest. Its loss divides the logits by a temperature of 200, which is the
    closure's affair.

    Source: Wang et al., "Picking winning tickets before training by preserving gradient flow",
    2020 (arXiv:2002.07376), algorithm 1.

    >>> grasp_scores(lambda p: p["w"].pow(3).sum() / 3, {"w": torch.tensor([1.0, -2.0])})
    {'w': tensor([  2., 32.], dtype=torch.float64)}
    """
    floats, differentiated = _differentiated(loss, params)
    # The product with the Hessian from the left: it is symmetric.
    gradient, product = torch.func.vjp(differentiated, floats)[:2]
    (curved,) = product(gradient)
    return {name: wide(w) * wide(curved[name]) for name, w in floats.items()}


def synflow_scores(
    forward: Callable[[dict[str, Tensor]], Tensor], params: Params
) -> dict[str, Tensor]:
    """Return ``|w| * dR/d|w|`` with ``R = sum(forward(|params|))``, where the input is all ones.

    Every parameter comes to the closure as its absolute value in float64 (mps: float32), and the
    closure makes its input in that dtype. In a network without biases whose activations are linear
    on positive numbers, the scores of every layer sum to R, so that no layer is emptied before the
    others when scores are computed anew often enough: see :func:`iterative_masks`.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", 2020 (arXiv:2006.05467), algorithm 1.

    Raises:
        ValueError: R or a score is too large for a float.

    >>> forward = lambda p: p["b"] @ (p["a"] @ torch.ones(2, dtype=p["a"].dtype))
    >>> params = {"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([[3.0]])}
    >>> synflow_scores(forward, params)
    {'a': tensor([[3., 6.]], dtype=torch.float64), 'b': tensor([[9.]], dtype=torch.float64)}
    """
    sizes = {name: wide(w.detach()).abs() if _is_float(w) else w for name, w in params.items()}
    floats, differentiated = _differentiated(lambda p: forward(p).sum(), sizes)
    scores = {name: g * floats[name] for name, g in differentiated(floats).items()}
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise ValueError(
                f"Expected finite SynFlow scores; got inf or NaN for {name!r}: the sum over all "
                f"paths is too large. Divide the weights of some layers by a constant first, which "
                f"in a network without biases changes no mask."
            )
    return scores


def iterative_masks(
    scores_of: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    params: Params,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    stat: str,
) -> dict[str, Tensor]:
    """Return the masks after all updates of a schedule, with scores computed anew for each.

    The fold, without training between the steps: ``masks = compute_masks(params, t, cfg,
    prev=masks, stats=scores_of(apply_masks(params, masks)))`` at every step t where a rule's masks
    change. The updates of ``ExponentialDecay(range(101))`` are the 100 iterations of SynFlow.

    Args:
        scores_of: what gives scores or other statistics by name from masked parameters.
        params: tensors by name.
        cfg: a config whose schedules have an end.
        stat: the name under which rules read what ``scores_of`` returns, such as ``"synflow"``.

    Raises:
        ConfigError: no rule reads the statistic, or a schedule is a callable, which has no end.

    >>> from purprune import ExponentialDecay
    >>> forward = lambda p: p["b"] @ (p["a"] @ torch.ones(2, dtype=p["a"].dtype))
    >>> params = {"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([[3.0]])}
    >>> rule = Rule(0.5, ExponentialDecay(range(5)), score="synflow")
    >>> iterative_masks(lambda p: synflow_scores(forward, p), params, rule, stat="synflow")["a"]
    tensor([[False,  True]])
    """
    config = as_config(cfg)
    rules = select(config, params).rules
    _refuse_unread(rules, stat)
    distinct = {id(rule): rule for rule in rules.values()}.values()
    masks: dict[str, Tensor] = {}
    for step in range(_last_step(rules) + 1):
        if any(rule.changes_at(step) for rule in distinct):
            scores = scores_of(apply_masks(params, masks))
            stats = {name: {stat: scores[name]} for name in rules if name in scores}
            masks = compute_masks(params, step, config, prev=masks, stats=stats)
    return masks


def _refuse_unread(rules: Mapping[str, Rule], stat: str) -> None:
    if not any(stat in needs_of(rule.score) for rule in rules.values()):
        name, rule = next(iter(rules.items()))
        raise ConfigError(
            f"Expected a rule whose score reads {stat!r}; got {rule.score!r} for {name!r}. Write "
            f"Rule(score={{'kind': 'given', 'stat': {stat!r}}})."
        )


def _last_step(rules: Mapping[str, Rule]) -> int:
    """Return the step from which on no rule changes anything."""
    ends = {name: rule.last_step for name, rule in rules.items()}
    for name, end in ends.items():
        if end is None:
            raise ConfigError(
                f"Expected a schedule with an end for {name!r}; got a callable. Use a ramp such as "
                f"ExponentialDecay(range(101))."
            )
    return max(end for end in ends.values() if end is not None)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _differentiated(
    function: Callable[[dict[str, Tensor]], Tensor], params: Params
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """Return the parameters that are floats, and the gradient of a function of all as one of them.

    Raises:
        ValueError: when it is called and the function does not return one number.
    """
    check_params(params)
    floats = {name: w.detach() for name, w in params.items() if _is_float(w)}

    def number(some: dict[str, Tensor]) -> Tensor:
        found = function({**params, **some})
        if not isinstance(found, Tensor) or found.numel() != 1:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"Expected a loss that is one number; got {got}. Take its mean.")
        return found.reshape(())

    differentiated: Callable[[dict[str, Tensor]], dict[str, Tensor]] = torch.func.grad(number)
    return floats, differentiated
