"""Pruning in a Lightning ``Trainer``; needs ``pip install "purprune[lightning]"``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from purprune import PruneConfig, Rule
from purprune_adapters.extras import install_hint
from purprune_adapters.pruner import Pruner
from purprune_adapters.trackers import Record, totals
from purprune_adapters.trainers import PrunedTraining

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import (
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
    )
except ImportError as error:
    raise ImportError(install_hint("lightning", "lightning")) from error


class PruningCallback(Callback):  # type: ignore[misc]  # the base is not followed
    """Prunes a LightningModule while a Lightning ``Trainer`` fits it.

    One step of the schedule is one optimizer step, whatever ``accumulate_grad_batches`` is; a step
    that mixed precision skipped is not counted. Of several optimizers the first that holds a
    pruned parameter counts. ``sparsity``, the zeros among the pruned parameters, and
    ``scheduled_sparsity``, what is in force, are logged. Step and masks are in every checkpoint,
    and ``fit(ckpt_path=...)`` goes on from there.

    Args:
        config: a :class:`purprune.PruneConfig`, a :class:`purprune.Rule` for all supported
            modules, or a dict. Names are those of the LightningModule, such as ``"net.0"``.
        mask_gradients: False leaves the gradients of pruned entries as they are.
        masks: masks by parameter name that hold at every step, for a model that was pruned before.
        keep_zeros: True takes as ``masks`` the zeros that the pruned parameters have when the
            fit starts. A resumed one takes the masks that hold from its checkpoint instead.
        finalize: True bakes the zeros in when the fit ends, and removes the hooks; a later
            ``fit()`` goes on with the masks. False leaves the pruner on the model.
        tell: called with a record whenever the masks are new, as by a
            :class:`purprune_adapters.trackers.SparsityLog`.

    Raises:
        ConfigError: the config is impossible.

    ``fit()`` raises SelectionError when a selector matches nothing in the model or a mask
    is given for a parameter without a rule, ConfigError when a mask does not fit, and ValueError
    when the pruner's state of a checkpoint is missing or damaged.
    """

    def __init__(
        self,
        config: PruneConfig | Rule | Mapping[str, Any],
        *,
        mask_gradients: bool = True,
        masks: Mapping[str, Tensor] | None = None,
        keep_zeros: bool = False,
        finalize: bool = True,
        tell: Callable[[Record], object] | None = None,
    ) -> None:
        """Check the config; the pruner is made when the fit starts."""
        self._training = PrunedTraining(
            config,
            mask_gradients=mask_gradients,
            masks=masks,
            keep_zeros=keep_zeros,
            finalize=finalize,
            tell=tell,
        )
        self._loaded: dict[str, Any] | None = None
        self._handle: Any = None
        self._logged: tuple[Mapping[str, float], dict[str, float]] = ({}, {})

    @property
    def pruner(self) -> Pruner:
        """The pruner of the fit that runs, or that ran last."""
        return self._training.pruner

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what a test or a validation loaded; the checkpoint of this call comes after."""
        self._loaded = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the model before anything runs it; its weights are loaded already."""
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"Expected a model whose parameters are whole; {type(trainer.strategy).__name__} "
                f"shards them, which the pruner does not support. Use DDP, or prune before or "
                f"after the fit."
            )
        if trainer.ckpt_path and not self._loaded:
            raise ValueError(
                f"Expected the pruner's state in {trainer.ckpt_path}; the checkpoint has none. To "
                f"prune a model that was trained without pruning, load its weights and fit without "
                f"ckpt_path."
            )
        self._training.follow(pl_module, trainer.optimizers)
        self._begin(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizer; a tuner may have replaced it, and loaded a state, by now."""
        self._training.follow(pl_module, trainer.optimizers)
        self._begin(pl_module)
        self._unfollow()
        if (optimizer := self._counted(trainer.optimizers)) is not None:
            self._handle = optimizer.register_step_post_hook(self._after_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the sparsity; weights are read where the schedule moved only."""
        in_force = self.pruner.sparsity_at(self.pruner.step_count)
        if self._logged[0] != in_force:
            self._logged = (in_force, totals(self.pruner.report()))
        self.log_dict(self._logged[1])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize, after all callbacks had their say about the weights."""
        self._unfollow()
        self._training.end()

    def state_dict(self) -> dict[str, Any]:
        """Return step, masks and config; empty before the first fit."""
        return self._training.state_dict()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state until the fit starts; masks in force follow the loaded weights at once."""
        self._loaded = checkpoint["callbacks"].get(self.state_key)
        if self._loaded and self._training.live and self.pruner.model is pl_module:
            self.pruner.load_state_dict(self._loaded)

    def _begin(self, pl_module: LightningModule) -> None:
        loaded, self._loaded = self._loaded, None
        self._training.begin(pl_module, loaded)

    def _after_step(self, *_: Any) -> None:
        self._training.step()

    def _unfollow(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _counted(self, optimizers: Sequence[Optimizer]) -> Optimizer | None:
        """Return the first optimizer that holds a pruned parameter, or the first at all."""
        pruned = {id(self.pruner.model.get_parameter(name)) for name in self.pruner.masks}
        for optimizer in optimizers:
            if any(id(p) in pruned for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        return next(iter(optimizers), None)
