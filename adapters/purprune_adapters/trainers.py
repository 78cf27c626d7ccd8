"""What the callbacks for trainers share: one pruner that lasts from one training to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from purprune import PruneConfig, Rule
from purprune.config import as_config
from purprune_adapters.hooks import MaskHook
from purprune_adapters.memory import follows_optimizer
from purprune_adapters.pruner import Pruner
from purprune_adapters.resolve import resolve
from purprune_adapters.trackers import Record, SparsityLog


class PrunedTraining:
    """A config and the pruner that was made of it, for as long as a trainer is used.

    A model that was finalized and is trained again goes on where it ended: its masks stay, those
    that hold at every step among them, and its steps are counted on. Another model starts at
    step 0.
    """

    def __init__(
        self,
        config: PruneConfig | Rule | Mapping[str, Any],
        *,
        mask_gradients: bool,
        masks: Mapping[str, Tensor] | None,
        keep_zeros: bool,
        finalize: bool,
        tell: Callable[[Record], object] | None,
    ) -> None:
        """Check the config; a model comes with :meth:`begin`."""
        self.config = as_config(config)
        self.live = False
        self._mask_gradients = mask_gradients
        self._masks, self._keep_zeros = masks, keep_zeros
        self._finalize, self._tell = finalize, tell
        self._log: SparsityLog | None = None
        self._optimizer: Optimizer | None = None
        self._pruner: Pruner | None = None
        self._ended: dict[str, Any] = {}

    @property
    def pruner(self) -> Pruner:
        """The pruner of the training that runs, or that ran last."""
        if self._pruner is None:
            raise RuntimeError("Expected a training that began; the pruner is made when it does.")
        return self._pruner

    def follow(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Take the optimizer of pruned parameters, for rules that follow one."""
        if not any(map(follows_optimizer, self.config.rules.values())):
            return
        names = resolve(model, self.config).module_name_configs
        pruned = {id(model.get_parameter(name)) for name in names}
        for optimizer in optimizers:
            if any(id(p) in pruned for group in optimizer.param_groups for p in group["params"]):
                self._optimizer = optimizer
                if self.live and self.pruner.model is model:
                    self.pruner.follow(optimizer)
                return

    def begin(self, model: nn.Module, state: Mapping[str, Any] | None) -> None:
        """Prune the model in place, from the state, from where it was before, or from step 0."""
        same = self._pruner is not None and self._pruner.model is model
        if same and self.live:
            if state is not None:
                self.pruner.load_state_dict(state)
            return
        _refuse_two_pruners(model)
        pruner = self._new_pruner(model)
        state = self.state_dict() if same and state is None else state
        if state is not None:
            pruner.load_state_dict(state)
        pruner.prepare(inplace=True)
        self._pruner, self.live = pruner, True
        self._log = None if self._tell is None else SparsityLog(pruner, self._tell)
        self._tell_changes()

    def step(self) -> None:
        """Count one optimizer step, and tell what changed."""
        self.pruner.step()
        self._tell_changes()

    def end(self) -> None:
        """Bake the zeros in and remove the hooks, unless the pruner is to stay."""
        if self.live and self._finalize:
            self._ended = self.pruner.state_dict()  # a finalized pruner tells it no more
            self.pruner.finalize(inplace=True)
            self.live = False

    def state_dict(self) -> dict[str, Any]:
        """Return the pruner's state, of a finalized one too; empty before the first training."""
        return self.pruner.state_dict() if self.live else dict(self._ended)

    def refuse_unfit_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Raise unless the state is whole and its masks are those of the model's zeros."""
        self._new_pruner(model).load_state_dict(state)  # the model isn't touched before prepare()
        for name, mask in state["masks"].items():
            weight = model.get_parameter(name).detach()
            nonzero = int(torch.count_nonzero(weight.masked_fill(mask.to(weight.device), 0)))
            if nonzero:
                raise ValueError(
                    f"Expected zeros where the masks prune; {nonzero} of the pruned entries of "
                    f"{name!r} are not zero. The state belongs to other weights."
                )

    def _tell_changes(self) -> None:
        if self._log is not None:
            self._log.step()

    def _new_pruner(self, model: nn.Module) -> Pruner:
        return Pruner(
            model,
            self.config,
            mask_gradients=self._mask_gradients,
            masks=self._masks,
            keep_zeros=self._keep_zeros,
            optimizer=self._optimizer,
        )


def _refuse_two_pruners(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(isinstance(hook, MaskHook) for hook in module._forward_pre_hooks.values()):
            raise ValueError(
                f"Expected a model that nothing else prunes; the module {name!r} has the hook of "
                f"another pruner. Use one callback with one PruneConfig, or finalize the other "
                f"pruner first."
            )
