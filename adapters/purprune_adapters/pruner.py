"""The training adapter: masks that follow a schedule while a model trains."""

from __future__ import annotations

import copy
import uuid
import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.optim does: it imports the compiler late

import purprune
from purprune import Count, GlobalGroup, Plan, PruneConfig, Rule
from purprune.config import as_config
from purprune_adapters.activity import Activity
from purprune_adapters.checkpoint import pack_state, unpack_state
from purprune_adapters.checks import (
    refuse_another_model,
    refuse_copy,
    refuse_nan,
    refuse_two_pruners,
    refuse_unfit_parameters,
)
from purprune_adapters.distributed import counted, masks_at, reshard
from purprune_adapters.hooks import (
    MaskStore,
    add_forward_hooks,
    remove_forward_hooks,
    write_zeros_,
)
from purprune_adapters.optimizers import ZeroKeeper
from purprune_adapters.report import Report, ReportRow
from purprune_adapters.resolve import resolve_rules
from purprune_adapters.wrappers import unwrapped


class Pruner:
    """Keeps a model pruned while it trains, and lets the sparsity follow the schedule.

    The model stays an ordinary model: no parameter is renamed, wrapped or replaced, and its
    ``state_dict`` has the keys that it had. Masks live here. Pruned entries are zero after every
    :meth:`step` and in every forward pass, and their gradients are zero.

    n calls of :meth:`step` leave the weights and masks of the pure fold: for each step t,
    ``masks = compute_masks(params, t, cfg, prev=masks); params = apply_masks(params, masks)``.

    Args:
        model: the model to prune. Of DistributedDataParallel and ``torch.compile`` it is the model
            inside, and its names have no prefix.
        config: a :class:`purprune.PruneConfig`, a :class:`purprune.Rule` for all supported
            modules, or a dict.
        optimizer: when given, weights are masked right after each ``optimizer.step()`` too, so
            that nothing sees an entry that momentum moved. It needs ``prepare(inplace=True)``.
            Where a step provably leaves zeros at zero (SGD, Adam, AdamW, Adagrad and RMSprop with
            masked gradients and a state that is zero there), they are not written again.
        mask_gradients: False leaves the gradients of pruned entries as they are.
        mask_optimizer_state: True zeroes momentum and the like of pruned entries whenever masks
            change; it needs ``optimizer``.

    Raises:
        SelectionError: a selector matches nothing, or a parameter can't be pruned.
        ConfigError: a pattern does not fit its parameter.

    >>> from purprune import PolynomialDecay, Rule
    >>> model = nn.Linear(8, 4)
    >>> pruner = Pruner(model, Rule(0.75, PolynomialDecay([1, 2])))
    >>> _ = pruner.prepare(inplace=True)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(3, 8)).square().sum().backward()
    ...     optimizer.step()
    ...     pruner.step()
    >>> model = pruner.finalize()
    >>> int((model.weight == 0).sum())
    24
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | Rule | Mapping[str, Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        mask_gradients: bool = True,
        mask_optimizer_state: bool = False,
    ) -> None:
        """Resolve the config on the model; nothing is changed yet."""
        self._config = as_config(config)
        self._given, model = model, unwrapped(model)
        selection = resolve_rules(model, self._config)
        self._rules, self._skipped = selection.rules, selection.skipped
        self._model = model
        self._owners = _owners(model, self._rules)
        self._optimizer = optimizer
        self._mask_state = mask_optimizer_state
        if mask_optimizer_state and optimizer is None:
            raise ValueError(
                "Expected optimizer=... with mask_optimizer_state=True; got None. Pass the "
                "optimizer whose state is to be masked."
            )
        refuse_unfit_parameters(self._params(), optimizer)
        self._step = 0
        self._phase = "new"  # then "prepared", then "finalized"
        self._trained = False
        self._activity = Activity()
        self._store = MaskStore(uuid.uuid4().hex, mask_gradients)
        self._keeper: ZeroKeeper | None = None
        self._loaded: tuple[int, dict[str, Tensor]] | None = None
        self.plan(step=0)  # a pattern that does not fit is found before training

    @property
    def model(self) -> nn.Module:
        """The model that is pruned, without wrappers: a copy after ``prepare(inplace=False)``."""
        return self._model

    @property
    def config(self) -> PruneConfig:
        """The config as it was given."""
        return self._config

    @property
    def resolved_config(self) -> PruneConfig:
        """The config by parameter name, as the pure core takes it."""
        return PruneConfig(module_name_configs=self._rules)

    @property
    def step_count(self) -> int:
        """How many optimizer steps were counted."""
        return self._step

    @property
    def last_step(self) -> int | None:
        """The step from which on all sparsities are the targets; None with a callable schedule."""
        ends = [rule.last_step for rule in self._rules.values()]
        return None if None in ends else max(end for end in ends if end is not None)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The masks in force by parameter name, True = keep; empty before :meth:`prepare`."""
        return MappingProxyType(self._store.masks)

    def plan(self, step: int | None = None) -> Plan:
        """Return what would be pruned at a step (None: at the end), in integers."""
        planned = purprune.plan(self._params(), self.resolved_config, step)
        return Plan(planned.step, planned.tensors, self._skipped, planned.shared)

    def sparsity_at(self, step: int) -> dict[str, float]:
        """Return the sparsity of units that is in force at ``step``, by parameter name."""
        return {name: float(rule.sparsity_at(step)) for name, rule in self._rules.items()}

    def prepare(self, inplace: bool = False) -> nn.Module:
        """Apply the masks of step 0, install the hooks, and return the model to train.

        After :meth:`load_state_dict` the loaded masks are applied instead, and counting goes on
        at the loaded step.

        Args:
            inplace: False prunes and returns a deepcopy; make the optimizer from its parameters.
                True prunes and returns the model that was given, its wrapper included.

        Raises:
            NaNError: a weight holds NaN; nothing is changed then.
            ValueError: another pruner masks one of the parameters, or the optimizer would train
                another model than the copy.
        """
        if self._phase != "new":
            warnings.warn(
                f"The model is {self._phase} already; prepare() changes nothing. Make a new "
                f"Pruner to start again.",
                stacklevel=2,
            )
            return self._given
        if not inplace:
            refuse_copy("prepare", self._given, self._optimizer)
        refuse_two_pruners(self._model, self._params(), self._store.token)
        step, masks = self._loaded or (0, None)
        if masks is None:
            masks = self._compute(0, self._rules, {})
        if not inplace:
            self._given = self._model = copy.deepcopy(self._model)
            self._owners = _owners(self._model, self._rules)
        self._step, self._loaded = step, None
        if self._optimizer is not None:
            self._keeper = ZeroKeeper(
                self._optimizer, self._store, self._params, mask_state=self._mask_state
            )
        self._renew(masks)
        self._apply()
        self._activity.start(self._params())
        add_forward_hooks(self._model, self._store, self._rules)
        self._phase = "prepared"
        return self._given

    @_disable_dynamo  # counting and ranking are no graphs; around them all may be compiled
    def step(self) -> None:
        """Count one optimizer step: renew the masks where the schedule says so, and apply them.

        Call it after ``optimizer.step()``.

        Raises:
            RuntimeError: before :meth:`prepare`, or after ``finalize(inplace=True)``.
            NaNError: a weight holds NaN; step and masks stay as they were.
        """
        self._require_prepared("step")
        step = self._step + 1
        due = {name: rule for name, rule in self._rules.items() if rule.changes_at(step)}
        if due:
            self._renew(self._compute(step, due, self._store.masks))
        self._activity.count(self._params())
        self._step = step
        # An attached optimizer left everything masked; what nobody wrote to since is not read.
        self._apply(only_changed=self._keeper is not None)
        self._activity.leave(self._params())

    def finalize(self, model: nn.Module | None = None, inplace: bool = False) -> nn.Module:
        """Return a model with the zeros baked in and no trace of pruning.

        Args:
            model: the model to finalize, for instance a copy with averaged weights; None means
                the pruned model itself.
            inplace: False finalizes a deepcopy, and training can go on. True removes the hooks
                from the model itself and ends this pruner.

        Raises:
            NaNError: a pruned parameter holds NaN.
            ValueError: ``model`` has other parameters than the pruned one.
        """
        self._require_prepared("finalize")
        chosen = self._model if model is None else model
        if not inplace:
            refuse_copy("finalize", chosen)
        reshard(chosen)
        params = dict(chosen.named_parameters())
        refuse_another_model(chosen, params, self._store.masks)
        refuse_nan({name: params[name] for name in self._rules})
        self._warn_unless_over()
        final = chosen if inplace else copy.deepcopy(chosen)
        params = dict(final.named_parameters())
        for name in self._rules:
            write_zeros_(params[name], self._store.mask_for(name, params[name]))
        remove_forward_hooks(final, self._store.token)
        if final is self._model:
            self._remove_handles()
            self._phase = "finalized"
        return final

    def report(self) -> Report:
        """Count the zeros in the weights as they are now; each weight is read once.

        Of sharded weights all are counted, in every process: call it in all of them.
        """
        params = self._params()
        zeros, pruned = _zeros(params), _zeros(self._store.masks)
        rows = [
            ReportRow(
                name,
                tuple(params[name].shape),
                Count(zeros[name], params[name].numel()),
                Count(pruned.get(name, 0), params[name].numel()),
                float(rule.sparsity_at(self._step)),
                None if rule.last_step is None else float(rule.target),
                isinstance(rule.pattern.group, GlobalGroup),
            )
            for name, rule in self._rules.items()
        ]
        entries = sum(param.numel() for param in self._model.parameters())
        skipped = MappingProxyType(dict(self._skipped))
        return Report(self._phase, self._step, entries, tuple(rows), skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return step, masks and config as tensors and plain values, for ``torch.save``."""
        self._require_prepared("state_dict")
        return pack_state(self._step, self._store.masks, self._config)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take step and masks from :meth:`state_dict`.

        Before :meth:`prepare` (best: no mask of step 0 touches the loaded weights) or after it.

        Raises:
            ValueError: the state belongs to another config or to other shapes, or is damaged;
                says what differs, and nothing is changed.
        """
        step, masks = unpack_state(state, self._config, self._params(), self._rules)
        self._trained = True
        if self._phase == "new":
            self._loaded = (step, masks)
            return
        self._require_prepared("load_state_dict")
        self._step = step
        self._renew(masks)
        self._apply()

    def __repr__(self) -> str:
        """Return a short description."""
        return f"Pruner({len(self._rules)} parameters, {self._phase}, step {self._step})"

    def _params(self) -> dict[str, Tensor]:
        """Look the parameters up in their modules: ``load_state_dict(assign=True)`` renews them."""
        reshard(self._model)
        return {name: getattr(owner, leaf) for name, (owner, leaf) in self._owners.items()}

    def _compute(
        self, step: int, rules: Mapping[str, Rule], prev: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        params = {name: param for name, param in self._params().items() if name in rules}
        before = {n: self._store.mask_for(n, params[n]) for n in params if n in prev}
        return masks_at(
            params,
            step,
            PruneConfig(module_name_configs=dict(rules)),
            prev=before,
            grads={name: param.grad for name, param in params.items()},
        )

    def _apply(self, only_changed: bool = False) -> None:
        apply = self._store.apply_if_changed_ if only_changed else self._store.apply_
        for name, param in self._params().items():
            apply(name, param)

    def _renew(self, masks: Mapping[str, Tensor]) -> None:
        self._store.renew(masks)
        if self._keeper is not None:
            self._keeper.masks_changed(masks)

    def _remove_handles(self) -> None:
        self._store.release()
        if self._keeper is not None:
            self._keeper.remove()

    def _require_prepared(self, call: str) -> None:
        if self._phase == "new":
            raise RuntimeError(f"Expected prepare() before {call}(); call pruner.prepare() first.")
        if self._phase == "finalized":
            raise RuntimeError(
                f"Expected a pruner in training; got {call}() after finalize(inplace=True), which "
                f"ended it. Make a new Pruner, or finalize a copy with inplace=False."
            )

    def _warn_unless_over(self) -> None:
        trained = self._trained or self._activity.trained(self._params(), self._store.masks)
        if self._step > 1 and not trained:  # one step alone prunes once, without training
            warnings.warn(
                f"step() was called {self._step} times, but no pruned weight ever changed in "
                f"between. Is the optimizer made from the parameters of the model that prepare() "
                f"returned? It is a copy unless inplace=True.",
                stacklevel=3,
            )
        early = [
            f"{name} at {float(rule.sparsity_at(self._step)):.4g} of {float(rule.target):.4g}"
            for name, rule in self._rules.items()
            if rule.last_step is not None and rule.sparsity_at(self._step) != rule.target
        ]
        if early:
            last = max(rule.last_step or 0 for rule in self._rules.values())
            warnings.warn(
                f"finalize() at step {self._step}, before the schedule's end at step {last}: "
                f"{', '.join(early[:3])}{' and others' if len(early) > 3 else ''}. Call "
                f"pruner.step() after each optimizer.step() until it is over.",
                stacklevel=3,
            )


def _owners(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    paths = {name: name.rpartition(".") for name in names}
    return {name: (model.get_submodule(path), leaf) for name, (path, _, leaf) in paths.items()}


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    kept = counted(tensors, lambda _, tensor: int(torch.count_nonzero(tensor.detach())))
    return {name: tensor.numel() - kept[name] for name, tensor in tensors.items()}
