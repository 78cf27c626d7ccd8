"""The training adapter: masks that follow a schedule while a model trains."""

from __future__ import annotations

import copy
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.optim does: it imports the compiler late

import purprune
from purprune import Plan, PruneConfig, Rule
from purprune.config import as_config
from purprune.totals import sparsities_at
from purprune.updating import comes_back, may_come_back, needs_whole_gradient
from purprune_adapters.activity import Activity
from purprune_adapters.checkpoint import Held, pack_state, unpack_state
from purprune_adapters.checks import (
    refuse_another_model,
    refuse_another_optimizer,
    refuse_copy,
    refuse_finalized,
    refuse_idle_exchanges,
    refuse_nan,
    refuse_options_without,
    refuse_regrow_without,
    refuse_two_pruners,
    refuse_unfit_options,
    refuse_unfit_parameters,
    refuse_zero_gradients,
    require_prepared,
    warn_unless_over,
)
from purprune_adapters.distributed import reshard
from purprune_adapters.floors import floor_of_zeros, given_floor
from purprune_adapters.hooks import (
    Masks,
    MaskStore,
    add_forward_hooks,
    remove_forward_hooks,
    write_zeros_,
)
from purprune_adapters.memory import Memory, MemoryHooks
from purprune_adapters.optimizers import ZeroKeeper
from purprune_adapters.report import Report, report_of
from purprune_adapters.resolve import resolve_rules
from purprune_adapters.targets import Targets
from purprune_adapters.wrappers import unwrapped


class Pruner:
    """Keeps a model pruned while it trains, and lets the sparsity follow the schedule.

    The model stays an ordinary model: no parameter is renamed, wrapped or replaced, and its
    ``state_dict`` has the keys that it had. Masks live here. Pruned entries are zero after every
    :meth:`step` and in every forward pass, and their gradients are zero.

    n calls of :meth:`step` leave the weights and masks of the pure fold: for each step t,
    ``masks = update_masks(params, masks, t, cfg); params = apply_masks(params, masks)``, which is
    ``compute_masks(params, t, cfg, prev=masks)`` for rules that let nothing come back.
    With ``masks`` given, each step of the fold has ``floor=given``, from step 0 on: what they prune
    stays pruned, also where the schedule asks for less.

    Args:
        model: the model to prune. Of DistributedDataParallel and ``torch.compile`` it is the model
            inside, and its names have no prefix.
        config: a :class:`purprune.PruneConfig`, a :class:`purprune.Rule` for all supported
            modules, or a dict.
        optimizer: when given, weights are masked right after each ``optimizer.step()`` too, so
            that nothing sees an entry that momentum moved. It needs ``prepare(inplace=True)``.
        mask_gradients: False leaves the gradients of pruned entries as they are.
        mask_optimizer_state: True zeroes momentum and the like of pruned entries whenever masks
            change; it needs ``optimizer``.
        trust_optimizer: True does not write zeros again after a step that provably leaves them:
            of SGD, Adam, AdamW, Adagrad and RMSprop, where gradients are masked and the state is
            zero. It saves a pass over the weights, and it needs ``optimizer`` and that nobody
            writes to weights, gradients or the optimizer's state through ``.data``.
        masks: masks by parameter name that hold at every step, for a model that was pruned
            before. In every group the larger of the schedule's count and theirs is pruned.
        keep_zeros: True takes as ``masks`` the zeros that the pruned parameters have at
            :meth:`prepare`.
        stats: statistics by parameter for scores that need them, as ``compute_masks`` takes them.
            Those that grow with the steps (``"movement"``) are summed here unless they are given.

    Rules with ``regrow`` or with a score that sums over the steps need ``optimizer``. Where units
    are exchanged by their gradients, these are not masked in the step before an update, and where
    entries come back, their optimizer state starts at zero.

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
        mask_optimizer_state: bool = False,
        trust_optimizer: bool = False,
        masks: Mapping[str, Tensor] | None = None,
        keep_zeros: bool = False,
        stats: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Resolve the config on the model; nothing is changed yet."""
        self._config = as_config(config)
        self._given, model = model, unwrapped(model)
        selection = resolve_rules(model, self._config)
        self._skipped = selection.skipped
        self._targets = Targets(model, selection.rules)
        self._optimizer = optimizer
        self._mask_state, self._trust = mask_optimizer_state, trust_optimizer
        refuse_options_without(
            optimizer, mask_optimizer_state=mask_optimizer_state, trust_optimizer=trust_optimizer
        )
        if masks is not None and keep_zeros:
            raise ValueError("Expected masks or keep_zeros=True; got both. Give the masks alone.")
        refuse_unfit_parameters(self._params(), optimizer)
        self._stats = {} if stats is None else stats
        refuse_unfit_options(self._params(), selection.rules, self._stats, mask_optimizer_state)
        self._memory = Memory(selection.rules, self._stats)
        refuse_regrow_without(optimizer, selection.rules, bool(self._memory))
        self._step = 0
        self._phase = "new"  # then "prepared", then "finalized"
        self._trained = False
        self._regrowing = {name: r for name, r in self._rules.items() if r.regrow is not None}
        self._activity = Activity()
        self._store = MaskStore(uuid.uuid4().hex, mask_gradients)
        self._store.passing = frozenset(n for n, r in self._rules.items() if may_come_back(r))
        self._keeper: ZeroKeeper | None = None
        self._memory_hooks: MemoryHooks | None = None
        self._loaded: Held | None = None
        self.plan(step=0)  # a pattern that does not fit is found before training
        refuse_idle_exchanges(self._regrowing, self._params())
        self._keep_zeros = keep_zeros
        self._floor = given_floor({} if masks is None else masks, self._params(), self._rules)

    @property
    def model(self) -> nn.Module:
        """The model that is pruned, without wrappers: a copy after ``prepare(inplace=False)``."""
        return self._targets.model

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
        """The masks in force now by parameter name, True = keep; empty before :meth:`prepare`.

        Later steps change nothing in it: ask again for theirs. It can be copied, and saved so
        that ``torch.load`` takes it with ``weights_only=True``.
        """
        return Masks(self._store.masks)

    def plan(self, step: int | None = None) -> Plan:
        """Return what the config prunes at a step (None: at the end), in integers."""
        planned = purprune.plan(self._params(), self.resolved_config, step)
        return Plan(planned.step, planned.tensors, self._skipped, planned.shared)

    def sparsity_at(self, step: int) -> dict[str, float]:
        """Return the sparsity of units that is in force at ``step``, by parameter name."""
        found = sparsities_at(self._rules, self._params(), step)
        return {name: float(sparsity) for name, sparsity in found.items()}

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
        refuse_two_pruners(self.model, self._params(), self._store.token)
        held = self._loaded or self._start()
        if not inplace:
            self._given = copy.deepcopy(self.model)
            self._targets = Targets(self._given, self._rules)
        self._take(held)
        self._activity.start(self._params())
        add_forward_hooks(self.model, self._store, self._rules)
        self._attach()
        self._phase, self._loaded = "prepared", None
        return self._given

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow another optimizer from now on, such as one that was made anew in mid-training.

        Raises:
            ValueError: it does not hold a pruned parameter.
            RuntimeError: after ``finalize(inplace=True)``.
        """
        refuse_finalized("follow", self._phase)
        refuse_unfit_parameters(self._params(), optimizer)
        self._detach()
        self._optimizer = optimizer
        if self._phase == "prepared":
            self._attach()

    @_disable_dynamo  # counting and ranking are no graphs; around them all may be compiled
    def step(self) -> None:
        """Count one optimizer step: renew the masks where the schedule says so, and apply them.

        Call it after ``optimizer.step()``.

        Raises:
            RuntimeError: before :meth:`prepare`, or after ``finalize(inplace=True)``.
            NaNError: a weight holds NaN; step and masks stay as they were.
        """
        require_prepared("step", self._phase)
        params = self._params()
        if self._memory_hooks is not None or self._regrowing:
            has_stepped = self._keeper is not None and self._keeper.has_stepped
            if not has_stepped and self._activity.has_moved(params):
                refuse_another_optimizer(params)
        # Its warning may be an error: nothing is changed yet.
        early = self._store.are_as_at_gradient(params) and self._keeper is None
        self._activity.count(params, self._store.masks, early)
        step = self._step + 1
        due = {name: rule for name, rule in self._rules.items() if rule.changes_at(step)}
        if due:
            self._move_on(params, step, due)
        self._step = step
        self._leave_gradients()
        # An attached optimizer left everything masked; what nobody wrote to since is not read.
        self._apply(params, self._keeper is not None and self._keeper.has_stepped)
        if self._keeper is not None:
            self._keeper.forget_step()
        self._activity.leave(params)

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
        require_prepared("finalize", self._phase)
        chosen = self.model if model is None else model
        if not inplace:
            refuse_copy("finalize", chosen)
        reshard(chosen)
        params = dict(chosen.named_parameters())
        refuse_another_model(chosen, params, self._store.masks)
        refuse_nan({name: params[name] for name in self._rules})
        trained = self._trained or self._activity.trained(self._params(), self._store.masks)
        warn_unless_over(self._rules, params, self._step, trained)
        final = chosen if inplace else copy.deepcopy(chosen)
        params = dict(final.named_parameters())
        for name in self._rules:
            write_zeros_(params[name], self._store.mask_for(name, params[name]))
        remove_forward_hooks(final, self._store.token)
        if final is self.model:
            self._store.release()
            self._detach()
            self._phase = "finalized"
        return final

    def report(self) -> Report:
        """Count the zeros in the weights as they are now; each weight is read once.

        Of sharded weights all are counted, in every process: call it in all of them.
        """
        return report_of(self._phase, self._step, self._targets, self._store.masks, self._skipped)

    def state_dict(self, *, packed: bool = False) -> dict[str, Any]:
        """Return step, masks and config as tensors and plain values, for ``torch.save``.

        Before :meth:`prepare` it has the same keys and shapes, so that a checkpoint which loads
        in place (``torch.distributed.checkpoint``) finds tensors to fill.

        Args:
            packed: True stores masks at one bit per entry instead of a byte;
                :meth:`load_state_dict` takes either. Masks in shards are not packed.
        """
        refuse_finalized("state_dict", self._phase)
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
        refuse_finalized("load_state_dict", self._phase)
        held = unpack_state(state, self._config, self._params(), self._rules, self._memory)
        if self._phase == "new":
            self._loaded = held
        elif held is None:
            raise ValueError("Expected the state of a prepared pruner; got one of a new pruner.")
        else:
            self._take(held)
        self._trained = self._trained or held is not None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the hooks of the optimizer: it is copied and pickled without them."""
        masks = dict(self._store.masks)  # of which the store leaves out some
        return {**self.__dict__, "_keeper": None, "_memory_hooks": None, "_masks": masks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Attach a copy to the copy of its optimizer."""
        masks = state.pop("_masks")
        self.__dict__.update(state)
        self._store.masks.update(masks)
        if self._phase == "prepared":
            self._attach()

    def __repr__(self) -> str:
        """Return a short description."""
        return f"Pruner({len(self._rules)} parameters, {self._phase}, step {self._step})"

    @property
    def _rules(self) -> Mapping[str, Rule]:
        return self._targets.rules

    def _params(self) -> dict[str, Tensor]:
        return self._targets.params()

    def _start(self) -> Held:
        """Return what holds at step 0."""
        params, floor = self._params(), self._floor
        if self._keep_zeros:
            floor = floor_of_zeros(params, self._rules)
        held = Held(0, {}, floor, self._memory.at_start(params))
        masks = self._targets.updated(0, self._rules, held, self._memory, self._stats)
        return held._replace(masks=masks)

    def _held(self) -> Held:
        """Return what holds now."""
        if self._phase == "prepared":
            return Held(self._step, self._store.masks, self._floor, self._memory.tensors)
        params = self._params()
        floor = None if self._keep_zeros else self._floor
        return self._loaded or Held.nothing(params, floor, self._memory.at_start(params))

    def _take(self, held: Held) -> None:
        self._step, self._floor = held.step, dict(held.floor)
        self._memory.tensors = dict(held.memory)
        self._memory.show(self._params())
        self._renew(held.masks)
        self._leave_gradients()
        self._apply(self._params())

    def _move_on(self, params: Mapping[str, Tensor], step: int, due: Mapping[str, Rule]) -> None:
        """Take the masks of a step; entries that come back do so as zero, without a state."""
        refuse_zero_gradients(due, params, step)
        back = [name for name, rule in due.items() if comes_back(rule, step)]
        self._memory.refresh(params, self._store)
        masks = self._targets.updated(step, due, self._held(), self._memory, self._stats)
        for name in back:  # by the old masks: momentum, or a whole gradient, moved them
            self._store.apply_if_changed_(name, params[name])
        if self._keeper is not None:
            self._keeper.zero_state(back)
        self._memory.show({name: params[name] for name in due})
        self._renew(masks)

    def _leave_gradients(self) -> None:
        """Say which gradients are needed whole when the next step is counted."""
        step = self._step + 1
        self._store.whole_gradients = frozenset(
            name for name, rule in self._regrowing.items() if needs_whole_gradient(rule, step)
        )

    def _attach(self) -> None:
        """Follow the optimizer. What is remembered goes first: the keeper writes zeros."""
        if self._optimizer is None:
            return
        look_up, store = self._targets.params, self._store
        if self._memory:
            self._memory_hooks = MemoryHooks(self._optimizer, self._memory, store, look_up)
        self._keeper = ZeroKeeper(
            self._optimizer, store, look_up, mask_state=self._mask_state, trust=self._trust
        )
        self._keeper.attach()

    def _apply(self, params: Mapping[str, Tensor], only_changed: bool = False) -> None:
        apply = self._store.apply_if_changed_ if only_changed else self._store.apply_
        for name, param in params.items():
            apply(name, param)

    def _renew(self, masks: Mapping[str, Tensor]) -> None:
        self._store.renew(masks)
        if self._keeper is not None:
            self._keeper.masks_changed(masks)

    def _detach(self) -> None:
        for hooks in (self._memory_hooks, self._keeper):
            if hooks is not None:
                hooks.remove()
        self._memory_hooks = self._keeper = None
