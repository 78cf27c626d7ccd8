"""The callback for transformers.Trainer: steps, zeros, bits, checkpoints, and clear errors."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import run_recipe
from torch import Tensor, nn

from purprune import (
    NM,
    Block,
    PolynomialDecay,
    PruneConfig,
    RigL,
    Rule,
    SelectionError,
    StraightThrough,
)
from purprune_adapters import Pruner

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 6
RULE = Rule(0.75, PolynomialDecay([1, 3, 5]), 0.25, Block((1, 2)))
RULES = {
    "blocks": RULE,
    "taylor": Rule(0.75, PolynomialDecay([1, 3, 5]), score="taylor"),
    "movement": Rule(0.75, PolynomialDecay([1, 3, 5]), score="movement"),
    "RigL": Rule(0.75, regrow=RigL(every=2, end_step=6)),
    "SR-STE": Rule(pattern=NM(2, 4), regrow=StraightThrough(decay=0.01)),
}
CONFIG = PruneConfig().set_module_name("body.*", RULE)


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(8, 16), nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, 4))
        self.body = nn.Sequential(*layers)
        self.seen: list[int] = []

    def forward(
        self, x: Tensor, labels: Tensor, num_items_in_batch: object = None
    ) -> dict[str, Tensor]:
        logits = self.body(x)
        if not torch.compiler.is_compiling():
            self.seen.append(zeros(self))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 2)


def examples(count: int = 16) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": torch.tensor(i % 4)} for i, row in enumerate(x)]


def trainer_for(folder: Path, callbacks: list[Any], model: nn.Module | None = None, **options: Any):
    from transformers import PrinterCallback, Trainer, TrainingArguments

    extra = {key: options.pop(key) for key in ("train_dataset", "model_init") if key in options}
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_steps": 3,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    if "model_init" not in extra:
        extra["model"] = Net(0.2) if model is None else model
    trainer = Trainer(
        args=TrainingArguments(str(folder), **{**defaults, **options}),
        eval_dataset=examples(4),
        callbacks=callbacks,
        **{"train_dataset": examples(), **extra},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def pruning(config: Any = CONFIG, **options: Any):
    from purprune_adapters.transformers import PruningCallback

    return PruningCallback(config, **options)


def bits(model: nn.Module, pruner: Pruner) -> dict[str, bytes]:
    tensors = dict(model.named_parameters())
    tensors |= {f"mask of {name}": mask for name, mask in pruner.masks.items()}
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors.items()}


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) for module in model.modules()
    ) + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_training_leaves_the_bits_of_a_loop_by_hand(tmp_path, accumulation, rule):
    """Defends that a step is an optimizer step, zeros in every forward, and nothing added."""
    config = PruneConfig().set_module_name("body.*", rule)
    callback = pruning(config)
    trainer = trainer_for(
        tmp_path,
        [callback],
        Net(),
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        optim="sgd",
    )
    trainer.train()

    model, data = Net(), examples()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    follows = rule.regrow is not None or rule is RULES["movement"]
    pruner = Pruner(model, config, optimizer=optimizer if follows else None)
    pruner.prepare(inplace=True)
    for step in range(STEPS):
        for part in range(accumulation):
            first = (step * accumulation + part) * 2 % 16
            rows = data[first : first + 2]
            batch = {key: torch.stack([row[key] for row in rows]) for key in ("x", "labels")}
            (model(**batch)["loss"] / accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert callback.pruner.step_count == pruner.step_count == STEPS
    assert trainer.model.seen == model.seen
    if rule is RULE:
        assert len(set(model.seen)) == 3, "the initial sparsity, one between, the target"
    assert bits(trainer.model, callback.pruner) == bits(model, pruner)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    )


def texts() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 16, (16, 6), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_a_resumed_gpt2_ends_with_the_bits_of_the_one_that_never_stopped(tmp_path):
    """Defends resume_from_checkpoint with dropout, AdamW, tied embeddings, and a moved folder."""
    config = PruneConfig().set_module_type("Conv1D", RULE)
    options: dict[str, Any] = {"train_dataset": texts(), "gradient_accumulation_steps": 2}

    whole = pruning(config)
    first = trainer_for(tmp_path / "run", [whole], gpt2(), **options)
    first.train()
    assert whole.pruner.report().total.zeros > 0
    names = sorted(path.name for path in (tmp_path / "run/checkpoint-3").glob("pruner*"))
    assert names == ["pruner.pt"], "nothing unfinished is left"

    resumed = pruning(config)
    second = trainer_for(tmp_path / "run", [resumed], gpt2(), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert bits(second.model, resumed.pruner) == bits(first.model, whole.pruner)
    assert resumed.pruner.report() == whole.pruner.report()

    moved = shutil.copytree(tmp_path / "run/checkpoint-3", tmp_path / "moved")
    elsewhere = pruning(config, resume_from_checkpoint=moved)
    third = trainer_for(tmp_path / "new", [elsewhere], gpt2(), **options)
    third.train(resume_from_checkpoint=str(moved))
    assert bits(third.model, elsewhere.pruner) == bits(first.model, whole.pruner)


def test_a_checkpoint_without_a_fitting_state_is_refused(tmp_path):
    """Defends clear errors: the state is missing, damaged, of other weights, or of a new config."""
    trainer_for(tmp_path, [pruning()]).train()
    file = tmp_path / "checkpoint-3" / "pruner.pt"
    whole = file.read_bytes()

    def resume(config: Any = CONFIG) -> nn.Module:
        trainer = trainer_for(tmp_path, [pruning(config)])
        try:
            trainer.train(resume_from_checkpoint=str(file.parent))
        finally:
            assert not hooks(trainer.model)
        return trainer.model

    file.unlink()
    with pytest.raises(ValueError, match=r"no such file.*resume_from_checkpoint=folder"):
        resume()
    for content in (whole[: len(whole) // 2], b"", b"no state"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"pruner\.pt; the file is damaged"):
            resume()
    state = torch.load(tmp_path / "checkpoint-6" / "pruner.pt")
    state["masks"] = {name: mask.roll(2, 0) for name, mask in state["masks"].items()}
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"are not zero. The state belongs to other weights"):
        resume()
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"pruner\.pt does not fit: .*target_sparsity"):
        resume(Rule(0.5))
    resume()


def test_the_best_model_comes_back_with_its_own_masks(tmp_path):
    """Defends load_best_model_at_end, with save_only_model: weights and masks of one checkpoint."""
    callback = pruning()
    losses = iter([0.5, 0.1, 0.9])
    trainer = trainer_for(
        tmp_path,
        [callback],
        load_best_model_at_end=True,
        save_only_model=True,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="eval_score",
        greater_is_better=False,
    )
    trainer.compute_metrics = lambda _: {"score": next(losses)}
    with pytest.warns(UserWarning, match="before the schedule's end"):
        trainer.train()
    best = torch.load(tmp_path / "checkpoint-4" / "pruner.pt")
    assert callback.pruner.step_count == best["step"] == 4
    for name, mask in best["masks"].items():
        assert torch.equal(callback.pruner.masks[name], mask)
        assert torch.equal(trainer.model.get_parameter(name) != 0, mask), name
    assert not hooks(trainer.model)


def test_a_later_training_goes_on_with_the_masks(tmp_path):
    """Defends a plain model after train(), and no weight that comes back in the next train()."""
    callback = pruning()
    trainer = trainer_for(tmp_path, [callback], save_strategy="no")
    trainer.train()
    assert hooks(trainer.model) == 0
    assert callback.pruner.report().phase == "finalized"
    assert callback.pruner.step_count == STEPS
    masks = dict(callback.pruner.masks)
    ended = zeros(trainer.model)

    trainer.model.seen.clear()
    trainer.train()
    assert callback.pruner.step_count == 2 * STEPS
    assert set(trainer.model.seen) == {ended}
    assert all(torch.equal(callback.pruner.masks[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("way", ["masks", "keep_zeros"])
@pytest.mark.parametrize("target", [0.5, 0.9])
def test_what_a_model_was_pruned_of_stays_pruned_through_trainings_and_a_resume(
    tmp_path, way, target
):
    """Defends masks= and keep_zeros with a schedule from 0, in the state and after the end."""

    def sparse() -> Net:
        model = Net(0.2)
        for layer in (model.body[0], model.body[3]):
            layer.weight.data.view(-1, 4)[:, 1:] = 0
        return model

    given = {f"body.{i}.weight": sparse().body[i].weight != 0 for i in (0, 3)}
    config = PruneConfig().set_module_name("body.*", Rule(target, PolynomialDecay([1, 3, 5])))

    def run(**options: Any) -> tuple[Any, Any]:
        callback = pruning(config, **({"masks": given} if way == "masks" else {"keep_zeros": True}))
        trainer = trainer_for(tmp_path, [callback], sparse())
        trainer.train(**options)
        assert_kept(trainer.model)
        assert min(trainer.model.seen) >= 144, "three of four of 192 entries, at every step"
        assert zeros(trainer.model) == max(144, int(128 * target) + int(64 * target))
        return trainer, callback

    def assert_kept(model: nn.Module) -> None:
        for name, mask in given.items():
            assert not model.get_parameter(name)[~mask].any(), name

    first, whole = run()
    second, resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert bits(second.model, resumed.pruner) == bits(first.model, whole.pruner)
    second.train()
    assert_kept(second.model)
    floor = torch.load(tmp_path / "checkpoint-6" / "pruner.pt")["floor"]
    assert all(torch.equal(floor[name], mask) for name, mask in given.items())


def test_a_new_model_of_model_init_starts_at_step_0(tmp_path):
    """Defends that masks never move to another model."""
    callback = pruning()
    trainer = trainer_for(tmp_path, [callback], model_init=lambda: Net(0.2), save_strategy="no")
    trainer.train()
    first = bits(trainer.model, callback.pruner)
    trainer.train()
    assert callback.pruner.step_count == STEPS
    assert bits(trainer.model, callback.pruner) == first


def test_the_pruner_can_stay_on_the_model(tmp_path):
    """Defends finalize=False: hooks stay, and a second train() goes on with the same pruner."""
    callback = pruning(finalize=False)
    trainer = trainer_for(tmp_path, [callback], save_strategy="no")
    trainer.train()
    pruner = callback.pruner
    assert pruner.report().phase == "prepared"
    trainer.train()
    assert callback.pruner is pruner
    assert pruner.step_count == 2 * STEPS
    assert not hooks(pruner.finalize())


def test_every_log_entry_tells_the_sparsity(tmp_path):
    """Defends the history, and what callbacks after this one are given; evaluation included."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, float]] = []

        def on_log(self, args, state, control, logs=None, **_):
            self.logs.append(dict(logs))

    recorder = Recorder()
    trainer = trainer_for(
        tmp_path, [pruning(), recorder], eval_strategy="steps", eval_steps=3, save_strategy="no"
    )
    trainer.train()
    expected = [count / 192 for count in trainer.model.seen]
    history = [entry["sparsity"] for entry in trainer.state.log_history]
    assert history == [entry["sparsity"] for entry in recorder.logs]
    assert all("scheduled_sparsity" in entry for entry in recorder.logs)
    assert sorted(set(history)) == sorted({*expected[1:], 0.75})
    assert any("eval_loss" in entry for entry in recorder.logs)
    trainer.evaluate()
    assert "sparsity" not in recorder.logs[-1], "the pruner is finalized"


def test_changes_of_masks_are_told_from_step_0_on(tmp_path):
    """Defends the records of a log in a trainer: one per update, counts that add up."""
    told: list[dict[str, Any]] = []
    trainer_for(tmp_path, [pruning(tell=told.append)], save_strategy="no").train()
    assert [record["step"] for record in told] == [0, 1, 3, 5]
    assert sum(record["newly_pruned"] for record in told) == told[-1]["pruned_by_mask"] == 144


@pytest.mark.parametrize("given", ["torch_compile", "compiled by the user"])
def test_names_are_those_of_the_plain_model_under_torch_compile(tmp_path, given):
    """Defends names without _orig_mod, and zeros in a captured graph."""
    model: Any = Net()
    options: dict[str, Any] = {"save_strategy": "no"}
    if given == "torch_compile":
        options |= {"torch_compile": True, "torch_compile_backend": "eager"}
    else:
        options |= {"label_names": ["labels"], "remove_unused_columns": False}
        model = torch.compile(model, backend="eager")
    callback = pruning()
    trainer_for(tmp_path, [callback], model, **options).train()
    assert sorted(callback.pruner.masks) == ["body.0.weight", "body.3.weight"]
    assert callback.pruner.report().total.zeros == 144


def test_a_skipped_optimizer_step_is_not_counted(tmp_path, monkeypatch):
    """Defends mixed precision: where the scaler finds an overflow, no weight and no mask moves."""
    from accelerate.optimizer import AcceleratedOptimizer

    calls, step = [], AcceleratedOptimizer.step

    def sometimes(self, closure=None):
        calls.append(len(calls))
        self._is_overflow = len(calls) in (2, 3)
        if not self._is_overflow:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", sometimes)
    callback = pruning()
    trainer = trainer_for(tmp_path, [callback], save_strategy="no")
    with pytest.warns(UserWarning, match="before the schedule's end"):
        trainer.train()
    assert trainer.state.global_step == len(calls) == STEPS
    assert callback.pruner.step_count == STEPS - 2


def test_what_cannot_be_pruned_is_refused_before_the_first_step(tmp_path):
    """Defends errors: two callbacks, a config that matches nothing, shards, no training yet."""
    with pytest.raises(RuntimeError, match="Expected a training that began"):
        _ = pruning().pruner
    trainer = trainer_for(tmp_path, [pruning(), pruning()])
    with pytest.raises(ValueError, match="one callback with one PruneConfig"):
        trainer.train()
    trainer = trainer_for(tmp_path, [pruning({"module_name_configs": {"bdy.*": {}}})])
    with pytest.raises(SelectionError, match=r"bdy\.\*"):
        trainer.train()
    assert not hooks(trainer.model)
    trainer = trainer_for(tmp_path, [pruning()])
    trainer.args.fsdp = True
    callback = trainer.callback_handler.callbacks[-1]
    with pytest.raises(ValueError, match="FSDP and DeepSpeed"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_the_recipe_of_the_documentation_runs():
    """Defends docs/trainers.md: its code, and what it asserts."""
    run_recipe("trainers.md", "transformers")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    """Defends the way out where the extra is not installed."""
    monkeypatch.setitem(sys.modules, "accelerate.utils", None)
    monkeypatch.delitem(sys.modules, "purprune_adapters.transformers", raising=False)
    with pytest.raises(ImportError, match=r"purprune\[transformers\]"):
        importlib.import_module("purprune_adapters.transformers")
