"""Calibration: statistics of a model's inputs and gradients, collected over batches of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from purprune import ConfigError, PruneConfig, Rule
from purprune.errors import near_misses
from purprune.ranking import refuse_nan
from purprune.scores import needs_of
from purprune_adapters.batches import Forward, batches, evaluating, run, target
from purprune_adapters.gradients import GRADIENT_STATS, GradientSums
from purprune_adapters.inputs import INPUT_STATS, InputSums, layers_of
from purprune_adapters.resolve import resolve_rules
from purprune_adapters.wrappers import unwrapped

Loss = Callable[[Any, Any], Tensor]
Stats = dict[str, dict[str, Tensor]]


def collect_stats(
    model: nn.Module,
    loader: Iterable[Any],
    config: PruneConfig | Rule | Mapping[str, Any] | None = None,
    *,
    needs: Iterable[str] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool = True,
) -> Stats:
    """Return the statistics that the scores of a config need, by parameter and by name.

    The model runs once over ``loader`` in eval mode. Nothing of it changes: no weight, buffer,
    gradient or mode, and no hook stays.

    - ``input_norm``: the L2 norm of each input feature over all samples, tokens and patches, summed
      in float64, of shape ``weight.shape[1:]``. (in, 1) for transformers' Conv1D, whose inputs are
      along dim 0, and the weight's whole shape for convolutions in groups, whose outputs do not all
      see the same inputs.
    - ``hessian``: the sum of x x^T over the same x, (n, n) in the order of ``weight.flatten(1)``.
    - ``gradient``: the mean of the batches' gradients g; ``squared_gradient``: the mean of g**2;
      ``movement``: the sum of -w * g. They are of batches: with batches of one sample, the mean of
      g**2 is the diagonal of the empirical Fisher information; the larger the batches, the less of
      it is left.

    Memory: the statistics, and the inputs of one layer at a time; convolutions unfold theirs.

    Args:
        model: the model; of DistributedDataParallel and ``torch.compile`` the one inside runs.
        loader: batches: a tensor or a dict of keyword arguments for the model, or a pair (input,
            target). They are moved to the device of the model's first parameter.
        config: which parameters. None means all that a global rule is for, with ``needs``.
        needs: the names of statistics; None means what the score of each parameter's rule needs.
        loss: ``loss(output, target) -> scalar`` for the statistics of gradients; of batches that
            are no pairs, the batch itself is the target. ``cross_entropy`` with pairs, ``lambda
            output, batch: output.loss`` with the models of transformers.
        forward: ``forward(model, batch) -> output`` where batches are of another kind.
        progress: False shows no bar; there is none either where there is no terminal.

    Raises:
        ConfigError: a statistic is unknown, needs a loss, or saw no data.
        SelectionError: no hook sees the inputs of a selected weight; names it and the way out.
        NaNError: a statistic is NaN.

    >>> import torch
    >>> model = nn.Linear(3, 2)
    >>> stats = collect_stats(model, [torch.ones(4, 3), torch.zeros(1, 3)], Rule(score="wanda"))
    >>> stats
    {'weight': {'input_norm': tensor([2., 2., 2.], dtype=torch.float64)}}
    >>> from purprune import compute_masks
    >>> masks = compute_masks(dict(model.named_parameters()), 0, Rule(score="wanda"), stats=stats)
    """
    model = unwrapped(model)
    wanted = _wanted(model, config, needs)
    if not wanted:
        return {}
    inputs = InputSums(layers_of(model, _of(wanted, INPUT_STATS)), wanted)
    gradients = GradientSums(model, _of(wanted, GRADIENT_STATS))
    if gradients.params and loss is None:
        raise ConfigError(
            f"Expected a loss for statistics of gradients; {next(iter(gradients.params))!r} needs "
            f"them. Pass loss=torch.nn.functional.cross_entropy, or lambda output, batch: ..."
        )
    with ExitStack() as stack:
        for context in (evaluating(model), inputs.listening(), gradients.enabled()):
            stack.enter_context(context)
        for batch in batches(model, loader, "calibrating", progress):
            output = (forward or run)(model, batch)
            if gradients.params and loss is not None:
                gradients.add(loss(output, target(batch)))
    sums, means = inputs.results(), gradients.results()
    return {name: _joined(name, wanted[name], sums, means) for name in wanted}


def _wanted(
    model: nn.Module,
    config: PruneConfig | Rule | Mapping[str, Any] | None,
    needs: Iterable[str] | None,
) -> dict[str, tuple[str, ...]]:
    """Return the statistics to collect by parameter; parameters that need none are left out."""
    if config is None and needs is None:
        raise ConfigError(
            "Expected a config or needs=[...]; got neither. Try needs=['input_norm']."
        )
    if isinstance(needs, str):
        needs = [needs]
    rules = resolve_rules(model, Rule() if config is None else config).rules
    given = None if needs is None else tuple(needs)
    found = {name: needs_of(r.score) if given is None else given for name, r in rules.items()}
    known = (*INPUT_STATS, *GRADIENT_STATS)
    for name, stats in found.items():
        for stat in stats:
            if stat not in known:
                raise ConfigError(
                    f"Expected statistics among {', '.join(known)}; {name!r} needs {stat!r}."
                    f"{near_misses(stat, known)} What else a score needs, make with functions of "
                    f"your own and pass to compute_masks(..., stats=...)."
                )
    return {name: tuple(dict.fromkeys(stats)) for name, stats in found.items() if stats}


def _of(wanted: Mapping[str, tuple[str, ...]], kinds: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the parameters that need some of these statistics, and which."""
    found = {name: [stat for stat in stats if stat in kinds] for name, stats in wanted.items()}
    return {name: stats for name, stats in found.items() if stats}


def _joined(name: str, wanted: tuple[str, ...], *sources: Stats) -> dict[str, Tensor]:
    found = {
        stat: source[name][stat]
        for stat in wanted
        for source in sources
        if stat in source.get(name, {})
    }
    for stat, tensor in found.items():
        refuse_nan(tensor, f"the statistic {stat!r} of {name!r}")
    return found
