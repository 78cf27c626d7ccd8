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

import purprune
from purprune import Count, Plan, PruneConfig, Rule, infer_masks
from purprune.config import as_config
from purprune.given import refuse_unfit_floor
from purprune.ranking import refuse_nan
from purprune_adapters.checkpoint import Held, pack_state, unpack_state
from purprune_adapters.checks import refuse_another_model, refuse_unfit_parameters
from purprune_adapters.hooks import MaskStore, add_forward_hooks, remove_forward_hooks
from purprune_adapters.inplace import zero_pruned_
from purprune_adapters.report import Report, ReportRow
from purprune_adapters.resolve import resolve_rules


class Pruner:
    """Keeps a model pruned while it trains, and lets the sparsity follow the schedule.

    The model stays an ordinary model: no parameter is renamed, wrapped or replaced, and its
    ``state_dict`` has the keys that it had. Masks live here. Pruned entries are zero after every
    :meth:`step` and in every forward pass, and their gradients are zero.

    n calls of :meth:`step` leave the weights and masks of the pure fold: for each step t,
    ``masks = compute_masks(params, t, cfg, prev=masks); params = apply_masks(params, masks)``.
    With ``masks`` given, each step of the fold is ``compute_masks(..., prev=masks, floor=given)``,
    from step 0 on: what they prune stays pruned, also where the schedule asks for less.

    Args:
        model: the model to prune.
        config: a :class:`purprune.PruneConfig`, a :class:`purprune.Rule` for all supported
            modules, or a dict.
        optimizer: when given, weights are masked right after each ``optimizer.step()`` too, so
            that nothing sees an entry that momentum moved. It needs ``prepare(inplace=True)``.
        mask_gradients: False leaves the gradients of pruned entries as they are.
        masks: masks by parameter name that hold at every step, for a model that was pruned
            before. In every group the larger of the schedule's count and theirs is pruned.
        keep_zeros: True takes as ``masks`` the zeros that the pruned parameters have at
            :meth:`prepare`.

    Raises:
        SelectionError: a selector matches nothing, a parameter can't be pruned, or a mask is
            given for a parameter without a rule.
        ConfigError: a pattern does not fit its parameter, or its mask.

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
        masks: Mapping[str, Tensor] | None = None,
        keep_zeros: bool = False,
    ) -> None:
        """Resolve the config on the model; nothing is changed yet."""
        self._config = as_config(config)
        selection = resolve_rules(model, self._config)
        self._rules, self._skipped = selection.rules, selection.skipped
        self._model = model
        self._owners = _owners(model, self._rules)
        self._optimizer = optimizer
        refuse_unfit_parameters(self._params(), optimizer)
        self._step = 0
        self._phase = "new"  # then "prepared", then "finalized"
        self._trained = False
        self._store = MaskStore(uuid.uuid4().hex, mask_gradients)
        self._handles: list[Any] = []
        self._loaded: Held | None = None
        self.plan(step=0)  # a pattern that does not fit is found before training
        self._keep_zeros = keep_zeros
        self._floor = self._checked(masks)

    @property
    def model(self) -> nn.Module:
        """The model that is pruned: a copy after ``prepare(inplace=False)``."""
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
        """Return what the config prunes at a step (None: at the end), in integers."""
        planned = purprune.plan(self._params(), self.resolved_config, step)
        return Plan(planned.step, planned.tensors, self._skipped)

    def sparsity_at(self, step: int) -> dict[str, float]:
        """Return the sparsity of units that is in force at ``step``, by parameter name."""
        return {name: float(rule.sparsity_at(step)) for name, rule in self._rules.items()}

    def prepare(self, inplace: bool = False) -> nn.Module:
        """Apply the masks of step 0, install the hooks, and return the model to train.

        After :meth:`load_state_dict` the loaded masks are applied instead, and counting goes on
        at the loaded step.

        Args:
            inplace: False prunes and returns a deepcopy; make the optimizer from its parameters.

        Raises:
            NaNError: a weight holds NaN; nothing is changed then.
        """
        if self._phase != "new":
            warnings.warn(
                f"The model is {self._phase} already; prepare() changes nothing. Make a new "
                f"Pruner to start again.",
                stacklevel=2,
            )
            return self._model
        if self._optimizer is not None and not inplace:
            raise ValueError(
                "Expected prepare(inplace=True) with optimizer=..., which holds the parameters of "
                "this model; a deepcopy would train without it."
            )
        held = self._loaded or self._start()
        if not inplace:
            self._model = copy.deepcopy(self._model)
            self._owners = _owners(self._model, self._rules)
        self._take(held)
        add_forward_hooks(self._model, self._store, self._rules)
        self._attach()
        self._phase, self._loaded = "prepared", None
        return self._model

    def step(self) -> None:
        """Count one optimizer step: renew the masks where the schedule says so, and apply them.

        Call it after ``optimizer.step()``.

        Raises:
            RuntimeError: before :meth:`prepare`, or after ``finalize(inplace=True)``.
            NaNError: a weight holds NaN; step and masks stay as they were.
        """
        self._require_prepared("step")
        step = self._step + 1
        trained = self._trained or self._optimizer is not None or self._has_changed()
        due = {name: rule for name, rule in self._rules.items() if rule.changes_at(step)}
        if due:
            self._store.masks.update(self._compute(step, due, self._store.masks, self._floor))
        self._step, self._trained = step, trained
        # An attached optimizer left everything masked; what nobody wrote to since is not read.
        self._apply(only_changed=not due and self._optimizer is not None)

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
        params = dict(chosen.named_parameters())
        refuse_another_model(chosen, params, self._store.masks)
        for name in self._rules:
            refuse_nan(params[name], f"the weight {name!r}")
        self._warn_unless_over()
        final = chosen if inplace else copy.deepcopy(chosen)
        params = dict(final.named_parameters())
        for name in self._rules:
            zero_pruned_(params[name], self._store.mask_for(name, params[name]))
        remove_forward_hooks(final, self._store.token)
        if final is self._model:
            self._remove_handles()
            self._phase = "finalized"
        return final

    def report(self) -> Report:
        """Count the zeros in the weights as they are now; each weight is read once."""
        params = self._params()
        rows = [
            ReportRow(
                name,
                tuple(params[name].shape),
                _zeros(params[name]),
                _pruned(self._store.masks.get(name), params[name]),
                float(rule.sparsity_at(self._step)),
                None if rule.last_step is None else float(rule.target),
            )
            for name, rule in self._rules.items()
        ]
        entries = sum(param.numel() for param in self._model.parameters())
        skipped = MappingProxyType(dict(self._skipped))
        return Report(self._phase, self._step, entries, tuple(rows), skipped)

    def state_dict(self, *, packed: bool = False) -> dict[str, Any]:
        """Return step, masks and config as tensors and plain values, for ``torch.save``.

        Before :meth:`prepare` it has the same keys and shapes, so that a checkpoint which loads
        in place (``torch.distributed.checkpoint``) finds tensors to fill.

        Args:
            packed: True stores masks at one bit per entry instead of a byte;
                :meth:`load_state_dict` takes either.
        """
        if self._phase == "finalized":
            self._require_prepared("state_dict")
        prepared = self._phase == "prepared" or self._loaded is not None
        return pack_state(self._held(), self._config, prepared=prepared, packed=packed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take step and masks from :meth:`state_dict`.

        Before :meth:`prepare` (best: no mask of step 0 touches the loaded weights) or after it.
        Masks that were given to the pruner that was saved replace those given to this one.

        Raises:
            ValueError: the state belongs to another config or to other shapes, or is damaged;
                says what differs, and nothing is changed.
        """
        if self._phase == "finalized":
            self._require_prepared("load_state_dict")
        held = unpack_state(state, self._config, self._params(), self._rules)
        if self._phase == "new":
            self._loaded = held
        elif held is None:
            raise ValueError("Expected the state of a prepared pruner; got one of a new pruner.")
        else:
            self._take(held)
        self._trained = self._trained or held is not None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the handles of hooks: optimizers copy and pickle without theirs."""
        return {**self.__dict__, "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Attach a copy to the copy of its optimizer."""
        self.__dict__.update(state)
        if self._phase == "prepared":
            self._attach()

    def __repr__(self) -> str:
        """Return a short description."""
        return f"Pruner({len(self._rules)} parameters, {self._phase}, step {self._step})"

    def _params(self) -> dict[str, Tensor]:
        """Look the parameters up in their modules: ``load_state_dict(assign=True)`` renews them."""
        return {name: getattr(owner, leaf) for name, (owner, leaf) in self._owners.items()}

    def _checked(self, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return copies of the masks that were given, after a check that they fit."""
        if masks is not None and self._keep_zeros:
            raise ValueError("Expected masks or keep_zeros=True; got both. Give the masks alone.")
        if masks is not None and not isinstance(masks, Mapping):
            raise TypeError(f"Expected masks as a dict by name; got {type(masks).__name__}.")
        params, given = self._params(), dict(masks or {})
        refuse_unfit_floor(given, params, self._rules)
        return {name: mask.to(params[name].device, copy=True) for name, mask in given.items()}

    def _start(self) -> Held:
        """Return what holds at step 0."""
        floor = self._floor
        if self._keep_zeros:
            floor = infer_masks(self._params(), names=self._rules)
            refuse_unfit_floor(floor, self._params(), self._rules)
        return Held(0, self._compute(0, self._rules, {}, floor), floor)

    def _held(self) -> Held:
        """Return what holds now; masks of a new pruner keep everything."""
        if self._phase == "prepared":
            return Held(self._step, self._store.masks, self._floor)
        if self._loaded is not None:
            return self._loaded
        params = self._params().items()
        masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params}
        return Held(0, masks, masks if self._keep_zeros else self._floor)

    def _take(self, held: Held) -> None:
        self._step, self._floor = held.step, dict(held.floor)
        self._store.masks.update(held.masks)
        self._apply()

    def _compute(
        self,
        step: int,
        rules: Mapping[str, Rule],
        prev: Mapping[str, Tensor],
        floor: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        params = {name: param for name, param in self._params().items() if name in rules}
        before = {n: self._store.mask_for(n, params[n]) for n in params if n in prev}
        return purprune.compute_masks(
            params,
            step,
            PruneConfig(module_name_configs=dict(rules)),
            prev=before,
            floor={n: floor[n].to(params[n].device) for n in params if n in floor},
            grads={name: param.grad for name, param in params.items()},
        )

    def _apply(self, only_changed: bool = False) -> None:
        apply = self._store.apply_if_changed_ if only_changed else self._store.apply_
        for name, param in self._params().items():
            apply(name, param)

    def _has_changed(self) -> bool:
        return any(self._store.changed(name, param) for name, param in self._params().items())

    def _attach(self) -> None:
        if self._optimizer is not None:
            self._handles.append(self._optimizer.register_step_post_hook(self._after_optimizer))

    def _after_optimizer(self, *_: Any) -> None:
        self._apply()

    def _remove_handles(self) -> None:
        self._store.release()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _require_prepared(self, call: str) -> None:
        if self._phase == "new":
            raise RuntimeError(f"Expected prepare() before {call}(); call pruner.prepare() first.")
        if self._phase == "finalized":
            raise RuntimeError(
                f"Expected a pruner in training; got {call}() after finalize(inplace=True), which "
                f"ended it. Make a new Pruner, or finalize a copy with inplace=False."
            )

    def _warn_unless_over(self) -> None:
        if self._step > 1 and not self._trained:  # one step alone prunes once, without training
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


def _zeros(weight: Tensor) -> Count:
    return Count(weight.numel() - int(torch.count_nonzero(weight.detach())), weight.numel())


def _pruned(mask: Tensor | None, weight: Tensor) -> Count:
    kept = weight.numel() if mask is None else int(torch.count_nonzero(mask))
    return Count(weight.numel() - kept, weight.numel())
