"""What a pruner refuses before it changes anything, and what it warns of at the end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from purprune import PruneConfig, Regrow, Rule, SelectionError, StraightThrough, plan
from purprune.masks import check_given
from purprune.ranking import count, nan_error
from purprune.totals import sparsities_at
from purprune.updating import by_gradient, exchanges
from purprune_adapters.activity import untrained
from purprune_adapters.distributed import counted, fsdp_modules
from purprune_adapters.hooks import MaskHook
from purprune_adapters.wrappers import unwrapped


def refuse_options_without(optimizer: torch.optim.Optimizer | None, **options: bool) -> None:
    """Raise when an option that is about an optimizer is set, and there is none."""
    for name, is_set in options.items():
        if is_set and optimizer is None:
            raise ValueError(
                f"Expected optimizer=... with {name}=True; got None. Pass the optimizer that "
                f"trains the model."
            )


def refuse_regrow_without(
    optimizer: torch.optim.Optimizer | None, rules: Mapping[str, Rule], remembers: bool
) -> None:
    """Raise when rules need to follow an optimizer, and there is none."""
    if optimizer is not None:
        return
    for name, rule in rules.items():
        if rule.regrow is not None or remembers:
            why = "a score that sums over the steps" if rule.regrow is None else "regrow"
            raise ValueError(
                f"Expected optimizer=... with {why} in the rule of {name!r}; got None. Pass the "
                f"optimizer that trains the model: Pruner(model, config, optimizer=optimizer), "
                f"and prepare(inplace=True)."
            )


def refuse_unfit_options(
    params: Mapping[str, Tensor], rules: Mapping[str, Rule], stats: Any, mask_optimizer_state: bool
) -> None:
    """Raise when statistics are of no pruned parameter, or options contradict ``regrow``."""
    if not isinstance(stats, Mapping):
        raise TypeError(f"Expected stats as a dict by parameter; got {type(stats).__name__}.")
    check_given(params, stats=stats)
    for name, rule in rules.items():
        if by_gradient(rule) and not params[name].requires_grad:
            raise ValueError(
                f"Expected parameters that are trained where gradients decide what comes back; "
                f"{name!r} is frozen. Set it to None, or give it a rule without regrow."
            )
        if isinstance(rule.regrow, StraightThrough) and mask_optimizer_state:
            raise ValueError(
                f"Expected mask_optimizer_state=False with StraightThrough, which trains pruned "
                f"entries too; got True, and such a rule for {name!r}."
            )


def refuse_idle_exchanges(rules: Mapping[str, Rule], params: Mapping[str, Tensor]) -> None:
    """Raise when a rule exchanges nothing at its first update in any of its tensors."""
    distinct = {id(rule): rule for rule in rules.values()}.values()
    for rule in distinct:
        if not isinstance(rule.regrow, Regrow):
            continue
        step = rule.regrow.every
        names = {name: same for name, same in rules.items() if same == rule}
        config, share = PruneConfig(module_name_configs=names), rule.regrow.fraction_at(step)
        planned = plan(params, config, step)
        sizes = [(g.units, t.sparsity) for t in planned.tensors for g in t.groups]
        sizes += [(group.units, group.sparsity) for group in planned.shared]
        if not any(count(n, s + share * (1 - s)) > count(n, s) for n, s in sizes):
            raise ValueError(
                f"Expected an exchange of at least one unit in {', '.join([*names][:3])}; "
                f"{float(share):.3g} of what is kept in a group is less than one. Raise "
                f"regrow.fraction, or choose larger groups."
            )


def refuse_another_optimizer(params: Mapping[str, Tensor]) -> None:
    """Raise when weights were trained, and not by the optimizer that is followed."""
    if any(param.grad is not None for param in params.values()):
        raise RuntimeError(
            "Expected steps of the optimizer that the Pruner follows; the weights moved without "
            "one. Tell it of a new one: pruner.follow(optimizer)."
        )


def refuse_zero_gradients(
    rules: Mapping[str, Rule], params: Mapping[str, Tensor], step: int
) -> None:
    """Raise when gradients decide what comes back at a step, and all of them are zero."""
    found = {name: params[name].grad for name, r in rules.items() if exchanges(r, step)}
    grads = {n: g for n, g in found.items() if g is not None and by_gradient(rules[n])}
    if grads and not any(counted(grads, lambda _, g: int(torch.count_nonzero(g))).values()):
        raise ValueError(
            f"Expected gradients at step {step}, by which entries come back; all are zero. Call "
            f"pruner.step() after loss.backward() and before zero_grad()."
        )


def refuse_unfit_parameters(
    params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None
) -> None:
    """Raise when a parameter has no memory of its own, or the optimizer does not hold it."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"Expected an optimizer of torch.optim; got {type(optimizer).__name__}. Pass the "
            f"object, such as torch.optim.AdamW(model.parameters())."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else {}
    for name, param in params.items():
        if param.is_meta:
            raise SelectionError(
                f"Expected parameters with data; {name!r} is on the meta device. Load the model's "
                f"weights first; purprune.plan and resolve work without data."
            )
        if any(n > 1 and s == 0 for n, s in zip(param.shape, param.stride(), strict=True)):
            raise SelectionError(
                f"Expected parameters that can be written to; {name!r} is an expanded view. Make "
                f"it contiguous first."
            )
        if optimizer is not None and param.requires_grad and id(param) not in held:
            raise ValueError(
                f"Expected an optimizer that holds the model's parameters; it does not hold "
                f"{name!r}. Make it from model.parameters() of the model given to Pruner."
            )


def refuse_two_pruners(model: nn.Module, params: Mapping[str, Tensor], token: str) -> None:
    """Raise when another pruner masks one of the parameters: the masks would work together."""
    names = {id(param): name for name, param in params.items()}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if not isinstance(hook, MaskHook) or hook.store.token == token:
                continue
            for look_up, _ in hook.params:
                if name := names.get(id(look_up(module))):
                    raise ValueError(
                        f"Expected parameters that no other pruner masks; {name!r} has a pruner. "
                        f"End that one first with its finalize(inplace=True), or set {name!r} to "
                        f"None here."
                    )


def refuse_copy(
    call: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Raise when there is no deepcopy of a model that would do what the model itself does."""
    if optimizer is not None:
        raise ValueError(
            f"Expected {call}(inplace=True) with optimizer=..., which holds the parameters of "
            f"this model; a deepcopy would train without it."
        )
    if unwrapped(model) is not model:
        raise ValueError(
            f"Expected {call}(inplace=True) for a model inside {type(model).__name__}; a "
            f"deepcopy would train without the wrapper. Or prepare the model, then wrap it."
        )
    if fsdp_modules(model):
        raise ValueError(
            f"Expected {call}(inplace=True) for a model under fully_shard, which can't be copied. "
            f"Or load its full state dict into a plain model first."
        )


def refuse_nan(params: Mapping[str, Tensor]) -> None:
    """Raise when a parameter holds NaN; names it and the count, over all its shards."""
    found = counted(params, lambda _, tensor: int(tensor.isnan().sum()))
    for name, bad in found.items():
        if bad:
            raise nan_error(f"the weight {name!r}", bad, params[name].numel())


def refuse_another_model(
    model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> None:
    """Raise when a model to finalize has other parameters than the pruned one."""
    for name, mask in masks.items():
        if name not in params:
            wraps = f"module.{name}" in params
            raise ValueError(
                f"Expected a model with the parameters of the pruned one; got "
                f"{type(model).__name__} without {name!r}."
                + (" It wraps the model: pass its .module." if wraps else "")
            )
        if params[name].shape != mask.shape:
            raise ValueError(
                f"Expected {name!r} of shape {tuple(mask.shape)}; got {tuple(params[name].shape)}."
            )


def require_prepared(call: str, phase: str) -> None:
    """Raise before prepare(), and after the end."""
    if phase == "new":
        raise RuntimeError(f"Expected prepare() before {call}(); call pruner.prepare() first.")
    refuse_finalized(call, phase)


def refuse_finalized(call: str, phase: str) -> None:
    """Raise after the end."""
    if phase == "finalized":
        raise RuntimeError(
            f"Expected a pruner in training; got {call}() after finalize(inplace=True), which "
            f"ended it. Make a new Pruner, or finalize a copy with inplace=False."
        )


def warn_unless_over(
    rules: Mapping[str, Rule], params: Mapping[str, Tensor], step: int, trained: bool
) -> None:
    """Warn the caller of finalize() when nothing trained, or the schedules are not over."""
    if step > 1 and not trained:  # one step alone prunes once, without training
        warnings.warn(untrained(step), stacklevel=3)
    ended = {name: rule for name, rule in rules.items() if rule.last_step is not None}
    now, ends = sparsities_at(ended, params, step), sparsities_at(ended, params, None)
    early = [
        f"{name} at {float(now[name]):.4g} of {float(end):.4g}"
        for name, end in ends.items()
        if now[name] != end
    ]
    if early:
        last = max(rule.last_step or 0 for rule in rules.values())
        warnings.warn(
            f"finalize() at step {step}, before the schedule's end at step {last}: "
            f"{', '.join(early[:3])}{' and others' if len(early) > 3 else ''}. Call "
            f"pruner.step() after each optimizer.step() until it is over.",
            stacklevel=3,
        )
