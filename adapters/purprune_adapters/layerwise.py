"""Pruning a stack of blocks one after the other, each with the inputs that it will then see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from purprune import (
    ConfigError,
    Magnitude,
    NaNError,
    Pattern,
    PruneConfig,
    Rule,
    SelectionError,
    apply_masks,
    compute_masks,
    plan,
    sparsegpt,
)
from purprune.config import as_config
from purprune.errors import near_misses
from purprune.groups import EveryGroup, RowGroup
from purprune.obs import refuse_pattern
from purprune.ranking import refuse_nan
from purprune.scores import Score, needs_of
from purprune.totals import sparsities_at
from purprune_adapters.batches import Forward, batches, evaluating, run, tracked
from purprune_adapters.blocks import calls_of, names_of, without_cache
from purprune_adapters.inputs import INPUT_STATS, InputSums, Layer, layers_of, with_outputs_first
from purprune_adapters.layer_report import LayerReport, LayerRow, row_of
from purprune_adapters.resolve import resolve_rules
from purprune_adapters.wrappers import unwrapped


class Layerwise(NamedTuple):
    """What :func:`prune_layerwise` returns."""

    model: nn.Module
    masks: dict[str, Tensor]
    report: LayerReport


def prune_layerwise(
    model: nn.Module,
    blocks: str | nn.Module | Sequence[nn.Module],
    loader: Iterable[Any],
    config: PruneConfig | Rule | Mapping[str, Any],
    *,
    method: str | Score | None = "sparsegpt",
    block_size: int = 128,
    damping: float = 0.01,
    inplace: bool = False,
    forward: Forward | None = None,
    progress: bool = True,
) -> Layerwise:
    """Prune a model block by block in one shot, on calibration data and without training.

    For each block in order: the inputs of its selected layers are summed up over the batches, the
    layers are pruned to the targets of their rules (or what a budget gives them), and the block's
    outputs are computed again, with the pruned weights, as the inputs of the next block.

    Memory beside the model and its copy (with ``inplace`` one of the weights to prune): the
    Hessians of one block's layers in float64 (8 n**2 bytes for n inputs; SparseGPT needs a few more
    of them for one layer at a time), the hidden states of all batches at one place in the stack,
    and what else the model hands to its blocks, by reference.

    Args:
        model: the model; of ``torch.compile`` and DistributedDataParallel it is the one inside.
        blocks: where the stack is: the name or the module of a ``ModuleList`` or ``Sequential``, or
            the blocks themselves. What a block returns (or the first of what it returns) has to be
            what the next one gets first.
        loader: batches as :func:`collect_stats` takes them; it is run through once.
        config: the rules, as :class:`Pruner` takes them. Patterns mean the weight as it is stored:
            of transformers' Conv1D, inputs are along dim 0, so 2:4 is ``NM(2, 4, dim=0)``. What
            rules select outside of the blocks stays as it is, and the report says so.
        method: ``"sparsegpt"``; a score as ``Rule(score=...)`` takes it (``"wanda"``,
            ``"magnitude"``, ``RIA()``, ...), which then is every rule's; None: each rule's own.
        block_size: as :func:`purprune.sparsegpt` takes it.
        damping: as :func:`purprune.sparsegpt` takes it.
        inplace: False prunes and returns a deepcopy.
        forward: ``forward(model, batch)`` where batches are of another kind.
        progress: False shows no bar; there is none either where there is no terminal.

    Returns:
        The pruned model, the masks by parameter name, and the report with each layer's error. The
        masks go into ``Pruner(model, config, masks=masks)`` to fine-tune.

    Raises:
        SelectionError: no selected weight is in the blocks, or no hook sees one's inputs.
        ConfigError: blocks are not in sequence, a pattern does not fit, or a layer saw no input.
        NaNError: a weight or an input is NaN.

    On an error every weight is as it was.

    >>> from purprune import NM
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> pruned, masks, report = prune_layerwise(
    ...     model, [model[0], model[1]], [torch.randn(64, 8)], Rule(pattern=NM(2, 4)))
    >>> int((pruned[1].weight == 0).sum()), str(report.total)
    (16, '48 of 96 (50.00 %)')
    """
    model = unwrapped(model)
    names = names_of(model, blocks)
    rules, skipped = _rules_in(model, names, config, method)
    prune = partial(_pruned, sparse=method == "sparsegpt", block_size=block_size, damping=damping)
    model = model if inplace else copy.deepcopy(model)
    undone = _undone_on_error(model, rules) if inplace else nullcontext()
    masks: dict[str, Tensor] = {}
    rows: list[LayerRow] = []
    with evaluating(model), without_cache(model), torch.no_grad(), undone:
        stack = [model.get_submodule(name) for name in names]
        calls = [
            calls_of(stack, partial(forward or run, model, batch))
            for batch in batches(model, loader, "calibrating", progress)
        ]
        hidden = [first for first, _ in calls]
        for at, block in tracked([*enumerate(stack)], "pruning", progress):
            chosen = {
                name: rule for name, rule in rules.items() if _is_in(name, names[at : at + 1])
            }
            inputs = [partial(own[at], block, x) for (_, own), x in zip(calls, hidden, strict=True)]
            for layer, stats in _layers_with_stats(model, chosen, inputs):
                weight, masks[layer.name] = prune(layer, chosen[layer.name], stats)
                rows.append(row_of(layer, weight, masks[layer.name], stats["hessian"]))
                layer.weight.copy_(weight)
            hidden = [call() for call in inputs]
    return Layerwise(model, masks, LayerReport(tuple(rows), skipped))


def _rules_in(
    model: nn.Module,
    blocks: Sequence[str],
    config: PruneConfig | Rule | Mapping[str, Any],
    method: str | Score | None,
) -> tuple[dict[str, Rule], dict[str, str]]:
    """Return the rules for weights in the blocks, and why each other parameter stays as it is."""
    if method not in ("sparsegpt", None):
        _refuse_method(method)
    selection = resolve_rules(model, as_config(config))
    rules = {name: rule for name, rule in selection.rules.items() if _is_in(name, blocks)}
    if not rules:
        raise SelectionError(
            f"Expected rules for weights in the blocks; got none in {', '.join(blocks[:3])}. They "
            f"are for {', '.join([*selection.rules][:3])}."
        )
    outside = {name: "outside of the blocks" for name in selection.rules if name not in rules}
    targets = sparsities_at(rules, dict(model.named_parameters()), None)
    chosen = {name: _one_shot(name, rules[name], targets[name], method) for name in rules}
    for layer, (name, rule) in zip(layers_of(model, chosen), chosen.items(), strict=True):
        refuse_nan(layer.weight.detach(), f"the weight {name!r}")
        if method == "sparsegpt":
            with _named(name):
                refuse_pattern(
                    _along_inputs(layer, rule.pattern), with_outputs_first(layer, layer.weight)
                )
    plan(
        {name: model.get_parameter(name) for name in chosen},
        PruneConfig(module_name_configs=chosen),
    )
    return chosen, {**selection.skipped, **outside}


def _is_in(name: str, blocks: Sequence[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _refuse_method(method: Any) -> None:
    try:
        Rule(score=method)
    except ConfigError as error:
        near = near_misses(method, ["sparsegpt"]) if isinstance(method, str) else ""
        words = str(error).removeprefix("Rule.score: ")
        raise ConfigError(f"Expected method='sparsegpt', None or a score: {words}{near}") from None


def _one_shot(name: str, rule: Rule, target: Fraction, method: str | Score | None) -> Rule:
    """Return the rule that prunes to the target at once, by the method."""
    if rule.is_global:
        raise ConfigError(
            f"Expected counts that values of other layers do not change, since those are not "
            f"pruned yet; {name!r} has scope='global'. A budget divides a total by shapes."
        )
    if method == "sparsegpt" and rule.score != Magnitude():
        raise ConfigError(
            f"Expected rules without a score with method='sparsegpt'; {name!r} has {rule.score}. "
            f"Pass method=None to prune by it."
        )
    chosen: Any = rule.score if method in ("sparsegpt", None) else method
    rule = Rule(target, pattern=rule.pattern, score=chosen)
    if other := set(needs_of(rule.score)) - set(INPUT_STATS):
        raise ConfigError(
            f"Expected a score of weights and inputs for {name!r}; {rule.score} needs "
            f"{', '.join(sorted(other))}. Use collect_stats and compute_masks."
        )
    return rule


def _layers_with_stats(
    model: nn.Module, rules: Mapping[str, Rule], inputs: Iterable[Callable[[], Tensor]]
) -> Iterator[tuple[Layer, dict[str, Tensor]]]:
    """Yield the layers of one block with the sums over their inputs."""
    layers = layers_of(model, rules)
    needs = {name: ("hessian", *needs_of(rule.score)) for name, rule in rules.items()}
    sums = InputSums(layers, needs)
    with sums.listening():
        for call in inputs if layers else ():
            call()
    found = sums.results()
    for layer in layers:
        yield layer, found.pop(layer.name)


def _pruned(
    layer: Layer, rule: Rule, stats: Mapping[str, Tensor], *, sparse: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return a layer's new weight and its mask."""
    name, weight = layer.name, layer.weight.detach()
    if not sparse:
        masks = compute_masks(
            {name: weight}, 0, PruneConfig(module_name_configs={name: rule}), stats={name: stats}
        )
        return apply_masks({name: weight}, masks)[name], masks[name]
    with _named(name):
        matrix, pattern = with_outputs_first(layer, weight), _along_inputs(layer, rule.pattern)
        found = sparsegpt(matrix, stats["hessian"], pattern, rule.target, **options)
    pruned, mask = (with_outputs_first(layer, tensor).contiguous() for tensor in found)
    return pruned, mask


def _along_inputs(layer: Layer, pattern: Pattern) -> Pattern:
    """Return what a pattern of the stored weight is with outputs along dim 0."""
    group = pattern.group
    if not layer.transposed or not isinstance(group, RowGroup | EveryGroup):
        return pattern
    return replace(pattern, group=replace(group, dim=1 - group.dim % 2))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let the errors of the pure function name the parameter."""
    try:
        yield
    except (ConfigError, NaNError) as error:
        raise type(error)(f"{name!r}: {error}") from None


@contextmanager
def _undone_on_error(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Put the weights back where something fails; for that it holds a copy of them."""
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    except BaseException:
        for name, weight in before.items():
            model.get_parameter(name).copy_(weight)
        raise
