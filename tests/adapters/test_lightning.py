"""The callback for Lightning: steps, zeros, bits, checkpoints, and clear errors."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import run_recipe
from torch import Tensor, nn

from purprune import (
    Block,
    PolynomialDecay,
    PruneConfig,
    RigL,
    Rule,
    SelectionError,
    StraightThrough,
)
from purprune_adapters import Pruner

pytest.importorskip("lightning")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

STEPS = 6
RULE = Rule(0.75, PolynomialDecay([1, 3, 5]), 0.25, Block((1, 2)))
RULES = {
    "blocks": RULE,
    "taylor": Rule(0.75, PolynomialDecay([1, 3, 5]), score="taylor"),
    "RigL": Rule(0.75, regrow=RigL(every=2, end_step=6)),
}
CONFIG = PruneConfig().set_module_name("body.*", RULE)


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 2)


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) for module in model.modules()
    ) + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())  # fmt: skip


def batches(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 2, 8, generator=torch.Generator().manual_seed(1))
    return [(rows, torch.tensor([i % 4, (i + 1) % 4])) for i, rows in enumerate(x)]


def make_net(dropout: float = 0.2, optimizer: str = "AdamW", manual: bool = False) -> Any:
    from lightning.pytorch import LightningModule

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = (nn.Linear(8, 16), nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, 4))
            self.body = nn.Sequential(*layers)
            self.other = nn.Linear(4, 4)
            self.automatic_optimization = not manual
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                self.seen.append(zeros(self.body))
            return self.other(self.body(x))

        def training_step(self, batch: Any, _: int) -> Tensor | None:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            if not manual:
                return loss
            self.manual_backward(loss)
            for one in self.optimizers():
                one.step()
                one.zero_grad()
            return None

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("score", self(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            make = getattr(torch.optim, optimizer)
            if manual:
                return make(self.other.parameters(), 0.05), make(self.body.parameters(), 0.05)
            return make(self.parameters(), 0.05)

    return Net()


def pruning(config: Any = CONFIG, **options: Any) -> Any:
    from purprune_adapters.lightning import PruningCallback

    return PruningCallback(config, **options)


def trainer_for(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    from lightning.pytorch import Trainer, seed_everything

    seed_everything(7, verbose=False)
    defaults = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
    }
    return Trainer(default_root_dir=folder, callbacks=callbacks, **{**defaults, **options})


def checkpoints(folder: Path, **options: Any) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint(folder, "{step}", save_top_k=-1, **options)


def fit(trainer: Any, model: Any, **options: Any) -> None:
    train = torch.utils.data.DataLoader(batches(), batch_size=None)
    val = torch.utils.data.DataLoader(batches(2), batch_size=None)
    trainer.fit(model, train, val, **options)


def bits(model: nn.Module, pruner: Pruner) -> dict[str, bytes]:
    tensors = dict(model.named_parameters())
    tensors |= {f"mask of {name}": mask for name, mask in pruner.masks.items()}
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors.items()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_fit_leaves_the_bits_of_a_loop_by_hand(tmp_path, accumulation, optimizer, rule):
    """Defends that a step is an optimizer step, zeros in every forward, and nothing added."""
    config = PruneConfig().set_module_name("body.*", rule)
    callback, fitted = pruning(config), make_net(0.0, optimizer)
    trainer = trainer_for(
        tmp_path, [callback], accumulate_grad_batches=accumulation, limit_val_batches=0
    )
    fit(trainer, fitted)

    model, data = make_net(0.0, optimizer), batches()
    by_hand = model.configure_optimizers()
    pruner = Pruner(model, config, optimizer=by_hand if rule.regrow is not None else None)
    pruner.prepare(inplace=True)
    for step in range(STEPS):
        by_hand.zero_grad()
        for part in range(accumulation):
            (model.training_step(data[step * accumulation + part], 0) / accumulation).backward()
        by_hand.step()
        pruner.step()
    assert callback.pruner.step_count == trainer.global_step == STEPS
    assert fitted.seen == model.seen
    assert bits(fitted, callback.pruner) == bits(model, pruner)
    assert hooks(fitted) == 0
    assert callback.pruner.report().phase == "finalized"


def test_a_resumed_fit_ends_with_the_bits_of_the_one_that_never_stopped(tmp_path):
    """Defends ckpt_path with AdamW and validation; and the file is plain for torch."""

    def run(path: Path | None = None, **options: Any) -> tuple[Any, Any]:
        callback, model = pruning(), make_net(0.0)
        options |= {"limit_train_batches": 3, "check_val_every_n_epoch": 1}
        callbacks = [callback, *options.pop("callbacks", [])]
        trainer = trainer_for(tmp_path, callbacks, **options)
        fit(trainer, model, ckpt_path=path and str(path), weights_only=True)
        return callback, model

    saving = checkpoints(tmp_path, save_on_train_epoch_end=True)
    whole, first = run(callbacks=[saving], enable_checkpointing=True)
    path = tmp_path / "step=3.ckpt"
    assert torch.load(path, weights_only=True)["callbacks"]["PruningCallback"]["step"] == 3
    resumed, second = run(path)
    assert bits(second, resumed.pruner) == bits(first, whole.pruner)
    assert resumed.pruner.report() == whole.pruner.report()
    assert len(first.seen) == 1 + 6 + 4, "for sanity, three batches twice, two of validation each"
    assert second.seen == first.seen[-5:]


def test_a_checkpoint_without_a_fitting_state_is_refused(tmp_path):
    """Defends clear errors: the state is missing, there are weights only, or masks are damaged."""
    epochs = {"limit_train_batches": STEPS, "max_epochs": 1, "max_steps": -1}
    trainer = trainer_for(tmp_path, [pruning()], **epochs)
    fit(trainer, make_net())
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    whole = torch.load(path, weights_only=True)

    def resume(changed: dict[str, Any], **options: Any) -> None:
        torch.save(changed, path)
        model = make_net()
        trainer = trainer_for(tmp_path, [pruning(**options)], **epochs)
        try:
            fit(trainer, model, ckpt_path=str(path))
        finally:
            assert not hooks(model)

    for changed in ({**whole, "callbacks": {}}, {k: whole[k] for k in whole if k != "callbacks"}):
        with pytest.raises(ValueError, match=r"saved\.ckpt; the checkpoint has none"):
            resume(changed)
    state = whole["callbacks"]["PruningCallback"]
    masks = {name: torch.ones_like(mask) for name, mask in state["masks"].items()}
    with pytest.raises(ValueError, match="damaged"):
        resume({**whole, "callbacks": {"PruningCallback": {**state, "masks": masks}}})
    with pytest.raises(ValueError, match="target_sparsity"):
        resume(whole, config={"global_config": {"target_sparsity": 0.1}})
    resume(whole)


def test_a_later_fit_goes_on_with_the_masks(tmp_path):
    """Defends a plain model after fit(), and no weight that comes back in the next fit()."""
    callback, model = pruning(), make_net()
    trainer = trainer_for(
        tmp_path, [callback], limit_train_batches=STEPS, max_epochs=1, max_steps=-1
    )
    fit(trainer, model)
    assert not hooks(model)
    ended = zeros(model)
    masks = dict(callback.pruner.masks)
    model.seen.clear()
    trainer.fit_loop.max_epochs = 2
    fit(trainer, model)
    assert callback.pruner.step_count == trainer.global_step == 2 * STEPS
    assert set(model.seen) == {ended}
    assert all(torch.equal(callback.pruner.masks[name], mask) for name, mask in masks.items())
    other = make_net()
    fit(trainer_for(tmp_path, [callback]), other)
    assert callback.pruner.step_count == STEPS, "another model starts at step 0"


@pytest.mark.parametrize("way", ["masks", "keep_zeros"])
@pytest.mark.parametrize("target", [0.5, 0.9])
def test_what_a_model_was_pruned_of_stays_pruned_through_fits_and_a_resume(tmp_path, way, target):
    """Defends masks= and keep_zeros with a schedule from 0, in the state and after the end."""

    def sparse() -> Any:
        model = make_net(0.0)
        for layer in (model.body[0], model.body[3]):
            layer.weight.data.view(-1, 4)[:, 1:] = 0
        return model

    given = {f"body.{i}.weight": sparse().body[i].weight != 0 for i in (0, 3)}
    config = PruneConfig().set_module_name("body.*", Rule(target, PolynomialDecay([1, 3, 5])))

    def run(epochs: int, path: Path | None = None) -> tuple[Any, Any, Any]:
        callback = pruning(config, **({"masks": given} if way == "masks" else {"keep_zeros": True}))
        model = sparse()
        trainer = trainer_for(
            tmp_path, [callback], limit_train_batches=3, max_epochs=epochs, max_steps=-1
        )
        fit(trainer, model, ckpt_path=path and str(path), weights_only=True)
        for name, mask in given.items():
            assert not model.get_parameter(name)[~mask].any(), name
        assert min(model.seen) >= 144, "three of four of 192 entries, at every step"
        return callback, model, trainer

    with pytest.warns(UserWarning, match="before the schedule's end"):
        ended, _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    floor = torch.load(tmp_path / "ended.ckpt", weights_only=True)["callbacks"]["PruningCallback"][
        "floor"
    ]
    assert all(torch.equal(floor[name], mask) for name, mask in given.items())
    resumed, model, _ = run(2, tmp_path / "ended.ckpt")
    whole, other, _ = run(2)
    assert ended.pruner.step_count == 3
    assert bits(model, resumed.pruner) == bits(other, whole.pruner)
    assert zeros(model.body) == max(144, int(128 * target) + int(64 * target))


def test_weights_that_are_loaded_bring_their_masks(tmp_path):
    """Defends a pruner that stays: a test of an older checkpoint is a test of that checkpoint."""
    callback, model = pruning(finalize=False), make_net()
    model.test_step = model.validation_step
    saving = checkpoints(tmp_path, every_n_train_steps=1)
    trainer = trainer_for(tmp_path, [callback, saving], enable_checkpointing=True)
    fit(trainer, model)
    pruner = callback.pruner
    assert hooks(model)
    model.seen.clear()
    path = tmp_path / "step=2.ckpt"
    loader = torch.utils.data.DataLoader(batches(2), batch_size=None)
    trainer.test(model, loader, ckpt_path=str(path), verbose=False)
    saved = torch.load(path, weights_only=True)
    assert set(model.seen) == {sum(int((~m).sum()) for m in pruner.masks.values())}
    for name, weight in saved["state_dict"].items():
        assert torch.equal(model.state_dict()[name], weight)
    assert callback.pruner is pruner
    assert pruner.step_count == 2


def test_the_step_of_the_schedule_is_that_of_the_optimizer_that_holds_the_weights(tmp_path):
    """Defends manual optimization with two optimizers, of which one trains what is pruned."""
    callback, model = pruning(), make_net(manual=True)
    trainer = trainer_for(tmp_path, [callback], max_steps=2 * STEPS)
    fit(trainer, model)
    assert trainer.global_step == 2 * STEPS, "Lightning counts both"
    assert callback.pruner.step_count == STEPS
    assert callback.pruner.report().total.zeros == 144


def test_a_skipped_optimizer_step_is_not_counted(tmp_path):
    """Defends mixed precision: where the scaler finds an overflow, no weight and no mask moves."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1e30, backoff_factor=1e-15)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    callback, model = pruning(), make_net()
    model.backward = lambda loss: (loss * 1e10).backward()  # 1e40 is inf, once
    trainer = trainer_for(tmp_path, [callback], accelerator="cpu", plugins=[precision])
    fit(trainer, model)
    assert trainer.global_step == STEPS, "Lightning counts what was skipped"
    assert callback.pruner.step_count == STEPS - 1


def test_the_sparsity_is_logged(tmp_path):
    """Defends pl_module.log: every logger gets the zeros of the pruned parameters by step."""
    from lightning.pytorch.loggers.logger import DummyLogger

    class Recorder(DummyLogger):
        rows: list[tuple[int, float]] = []  # noqa: RUF012

        def log_metrics(self, metrics, step=None):
            if "sparsity" in metrics:
                self.rows.append((step, metrics["sparsity"]))

    model = make_net()
    trainer = trainer_for(tmp_path, [pruning()], logger=Recorder(), accumulate_grad_batches=2)
    fit(trainer, model)
    assert [step for step, _ in Recorder.rows] == list(range(STEPS))
    assert [share for _, share in Recorder.rows] == pytest.approx(
        [48 / 192, 48 / 192, 132 / 192, 132 / 192, 0.75, 0.75]
    )
    assert trainer.callback_metrics["sparsity"] == 0.75
    assert trainer.callback_metrics["scheduled_sparsity"] == 0.75


def test_changes_of_masks_are_told_from_step_0_on(tmp_path):
    """Defends the records of a log in a trainer: one per update, counts that add up."""
    told: list[dict[str, Any]] = []
    trainer = trainer_for(tmp_path, [pruning(tell=told.append)])
    fit(trainer, make_net())
    assert [record["step"] for record in told] == [0, 1, 3, 5]
    assert sum(record["newly_pruned"] for record in told) == told[-1]["pruned_by_mask"] == 144


@pytest.mark.parametrize("given", ["compiled", "ddp"])
def test_names_are_those_of_the_module_when_it_is_wrapped(tmp_path, given):
    """Defends names under torch.compile and DDP, of one process."""
    callback, model = pruning(), make_net(0.0)
    fitted = torch.compile(model, backend="eager") if given == "compiled" else model
    options = {"limit_val_batches": 0, "devices": 1, "use_distributed_sampler": False}
    strategy = "ddp" if given == "ddp" else "auto"
    trainer = trainer_for(tmp_path, [callback], strategy=strategy, **options)
    fit(trainer, fitted)
    assert sorted(callback.pruner.masks) == ["body.0.weight", "body.3.weight"]
    assert callback.pruner.report().total.zeros == 144
    alone = pruning()
    other = make_net(0.0)
    fit(trainer_for(tmp_path, [alone], **options), other)
    assert bits(model, callback.pruner) == bits(other, alone.pruner)


def test_what_cannot_be_pruned_is_refused_before_the_first_step(tmp_path):
    """Defends errors: two callbacks, another pruner, a config that matches nothing, no fit yet."""
    with pytest.raises(RuntimeError, match="Expected a training that began"):
        _ = pruning().pruner
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer_for(tmp_path, [pruning(), pruning()])
    model = make_net()
    Pruner(model, Rule(0.5)).prepare(inplace=True)
    with pytest.raises(ValueError, match="one callback with one PruneConfig"):
        fit(trainer_for(tmp_path, [pruning()]), model)
    model = make_net()
    with pytest.raises(SelectionError, match=r"bdy\.\*"):
        fit(trainer_for(tmp_path, [pruning({"module_name_configs": {"bdy.*": {}}})]), model)
    assert not hooks(model)


def test_the_recipe_of_the_documentation_runs():
    """Defends docs/trainers.md: its code, and what it asserts."""
    run_recipe("trainers.md", "Lightning")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    """Defends the way out where the extra is not installed."""
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "purprune_adapters.lightning", raising=False)
    with pytest.raises(ImportError, match=r"purprune\[lightning\]"):
        importlib.import_module("purprune_adapters.lightning")


def test_rules_with_dense_weights_are_refused_where_training_runs_inside_of_the_step(tmp_path):
    """Defends the weights against Lightning's closures, which run the model in optimizer.step()."""
    config = PruneConfig().set_module_name("body.*", Rule(0.5, regrow=StraightThrough()))
    with pytest.raises(ValueError, match="without a closure"):
        fit(trainer_for(tmp_path, [pruning(config)], limit_val_batches=0), make_net())
