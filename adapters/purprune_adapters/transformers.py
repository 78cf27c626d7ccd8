"""Pruning in a ``transformers.Trainer``; needs ``pip install "purprune[transformers]"``."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from purprune import PruneConfig, Rule
from purprune_adapters.extras import install_hint
from purprune_adapters.pruner import Pruner
from purprune_adapters.trackers import Record, totals
from purprune_adapters.trainers import PrunedTraining

try:
    from accelerate.utils import extract_model_from_parallel
    from transformers import (
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(install_hint("transformers with accelerate", "transformers")) from error

STATE_NAME = "pruner.pt"
"""The file of the pruner's state in the folder of a checkpoint."""


class PruningCallback(TrainerCallback):  # type: ignore[misc]  # the base is not followed
    """Prunes the model of a ``transformers.Trainer`` while it trains.

    One step of the schedule is one optimizer step, whatever the gradient accumulation is; a step
    that mixed precision skipped is not counted. Every log entry gets ``sparsity``, the zeros among
    the pruned parameters, and ``scheduled_sparsity``, what is in force. Every checkpoint gets
    :data:`STATE_NAME`, and ``train(resume_from_checkpoint=...)`` goes on from it. With
    ``load_best_model_at_end`` the masks of the best checkpoint come back with its weights.

    Args:
        config: a :class:`purprune.PruneConfig`, a :class:`purprune.Rule` for all supported
            modules, or a dict.
        mask_gradients: False leaves the gradients of pruned entries as they are.
        masks: masks by parameter name that hold at every step, for a model that was pruned before.
        keep_zeros: True takes as ``masks`` the zeros that the pruned parameters have when the
            training begins. A resumed one takes the masks that hold from its checkpoint instead.
        finalize: True bakes the zeros in when the training ends, and removes the hooks; a later
            ``train()`` goes on with the masks. False leaves the pruner on the model.
        resume_from_checkpoint: the folder that ``train(resume_from_checkpoint=...)`` gets, which
            no callback is told. Needed where it is not ``checkpoint-<step>`` in ``output_dir``.
        tell: called with a record whenever the masks are new, as by a
            :class:`purprune_adapters.trackers.SparsityLog`.

    Raises:
        ConfigError: the config is impossible.

    ``train()`` raises SelectionError when a selector matches nothing in the model or a mask
    is given for a parameter without a rule, ConfigError when a mask does not fit, and ValueError
    when the pruner's state of a checkpoint is missing, damaged or of other weights.
    """

    def __init__(
        self,
        config: PruneConfig | Rule | Mapping[str, Any],
        *,
        mask_gradients: bool = True,
        masks: Mapping[str, Tensor] | None = None,
        keep_zeros: bool = False,
        finalize: bool = True,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
        tell: Callable[[Record], object] | None = None,
    ) -> None:
        """Check the config; the pruner is made when the training begins."""
        self._training = PrunedTraining(
            config,
            mask_gradients=mask_gradients,
            masks=masks,
            keep_zeros=keep_zeros,
            finalize=finalize,
            tell=tell,
        )
        self._resume_from = resume_from_checkpoint

    @property
    def pruner(self) -> Pruner:
        """The pruner of the training that runs, or that ran last."""
        return self._training.pruner

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Prune the model; when a training is resumed, from the state in its checkpoint."""
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "Expected a model whose parameters are whole; FSDP and DeepSpeed shard them, which "
                "the pruner does not support. Use DDP, or prune before or after the training."
            )
        model = _plain(model)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._training.follow(model, [] if inner is None else [inner])
        loaded = self._read(self._resumed_folder(args, state), model) if state.global_step else None
        self._training.begin(model, loaded)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Count the step, while the gradients are there for scores that need them."""
        if not getattr(optimizer, "step_was_skipped", False):  # accelerate's, not torch's
            self._training.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Add the sparsity to the entry, for the callbacks after this one and in the history."""
        if self._training.live:
            found = totals(self.pruner.report())
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the state into the checkpoint; a search's folders are not known, nor resumed."""
        if args.should_save and not state.is_hyper_param_search:
            _write(self._training.state_dict(), _folder(args, state))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Take the best checkpoint's masks where its weights came back, and finalize."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None:
            model = _plain(model)
            self._training.begin(model, self._read(Path(best), model))
        self._training.end()

    def _resumed_folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Return the folder in which the pruner's state of the resumed step is to be found."""
        if self._resume_from is not None:
            return Path(self._resume_from)
        given = Path(args.resume_from_checkpoint or "")
        return given if (given / STATE_NAME).is_file() else _folder(args, state)

    def _read(self, folder: Path, model: nn.Module) -> dict[str, Any]:
        path = folder / STATE_NAME
        if not path.is_file():
            raise ValueError(
                f"Expected the pruner's state in {path}; there is no such file. "
                f"Where the checkpoint is in another folder, tell the callback too: "
                f"PruningCallback(..., resume_from_checkpoint=folder). To prune a model that was "
                f"trained without pruning, load its weights and start a new training."
            )
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"Expected the pruner's state in {path}; the file is damaged ({error}). Use "
                f"another checkpoint."
            ) from error
        try:
            self._training.refuse_unfit_state(model, state)
        except ValueError as error:
            raise ValueError(f"The pruner's state in {path} does not fit: {error}") from error
        return state


def _plain(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of DDP and torch.compile, which rename parameters."""
    plain: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return plain


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _write(state: dict[str, Any], folder: Path) -> None:
    """Write the file under another name first: a killed process leaves all of it or nothing."""
    unfinished = folder / f"{STATE_NAME}.unfinished"
    torch.save(state, unfinished)
    unfinished.replace(folder / STATE_NAME)
