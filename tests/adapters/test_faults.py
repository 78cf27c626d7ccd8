"""A pruner driven in any order, with faults mixed in: it is the pure fold, or nothing happened."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from purprune import (
    NM,
    Block,
    NaNError,
    PolynomialDecay,
    PruneConfig,
    Random,
    Rule,
    apply_masks,
    compute_masks,
)
from purprune_adapters import Pruner, resolve

SCHEDULE = PolynomialDecay([0, 1, 3, 4, 6])
CONFIGS = {
    "from 30 %": Rule(0.8, SCHEDULE, 0.3),
    "blocks and random": PruneConfig()
    .set_module_name("0", Rule(0.6, SCHEDULE, score=Random(1)))
    .set_module_name("2", Rule(0.7, SCHEDULE, pattern=Block((2, -1)))),
    "2:4": Rule(schedule=SCHEDULE, pattern=NM(2, 4)),
    "falling": Rule(0.2, SCHEDULE, 0.8),
    "callable": Rule(schedule=lambda step: min(0.9, step / 8)),
}
FLOOR = {"2.weight": torch.tensor([[False] * 6] * 2 + [[True] * 6] * 2)}
SEEDS = st.integers(0, 3)
REACHED: Counter[Any] = Counter()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (t.dtype, t.detach().clone(memory_format=torch.contiguous_format).numpy().tobytes())
        for name, t in tensors.items()
    }


def damage(state: dict[str, Any], kind: str) -> dict[str, Any]:
    """Damage a copy of a state so that every pruner of any config has to refuse it."""
    state = copy.deepcopy(state)
    name = "2.weight"
    if kind == "no step":
        del state["step"]
    elif kind == "a step of NaN":
        state["step"] = math.nan
    elif kind == "no mask":
        del state["masks"][name]
    elif kind == "a mask of another shape":
        state["masks"][name] = state["masks"][name][:2]
    elif kind == "a mask of ints":
        state["masks"][name] = state["masks"][name].int()
    elif kind == "a flipped entry":
        state["masks"][name][1, 1] ^= True
    elif kind == "half of the config":
        state["config"] = state["config"][: len(state["config"]) // 2]
    return state


DAMAGES = [
    "no step", "a step of NaN", "no mask", "a mask of another shape", "a mask of ints",
    "a flipped entry", "half of the config",
]  # fmt: skip


class Faults(RuleBasedStateMachine):
    """The pruner beside a model of it: params, masks, floor and step, folded purely."""

    @initialize(
        config=st.sampled_from(sorted(CONFIGS)),
        floored=st.booleans(),
        attached=st.booleans(),
        steps=st.sampled_from([None, None, 0, 1, 3, 5, 6]),
    )
    def start(self, config: str, floored: bool, attached: bool, steps: int | None) -> None:
        """Make a pruner; most machines begin some steps after prepare, with two saved states."""
        self.config, self.floor = CONFIGS[config], FLOOR if floored else {}
        self.attached = attached
        self.make(net())
        self.saved: list[tuple[dict[str, Any], dict[str, Tensor], int]] = []
        if steps is not None:
            self.prepare(inplace=True)
            self.save(packed=True)
            self.go_on(range(steps))
            self.save(packed=False)

    def make(self, model: nn.Module) -> None:
        """Make a new pruner, and a new model of it."""
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        attached = self.optimizer if self.attached else None
        self.pruner = Pruner(model, self.config, optimizer=attached, masks=self.floor or None)
        self.names = resolve(model, self.config)
        self.params = {k: v.detach().clone() for k, v in model.named_parameters()}
        self.masks: dict[str, Tensor] = {}
        self.step_count = 0
        self.phase = "new"
        self.loaded = False

    def attempt(self, call: Any, *errors: type[Exception]) -> None:
        """Call what has to fail in a documented way, with one line."""
        with pytest.raises(errors) as caught:
            call()
        REACHED.update((error, self.phase) for error in errors if issubclass(caught.type, error))
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("Expected")

    def fold(self) -> None:
        step, rules, old = self.step_count, self.names.rules.values(), dict(self.masks)
        self.masks |= compute_masks(self.params, step, self.names, prev=old, floor=self.floor)
        if step and any(rule.sparsity_at(step) < rule.sparsity_at(step - 1) for rule in rules):
            self.params = apply_masks(self.params, old)  # what comes back starts at zero
        self.params = apply_masks(self.params, self.masks)

    def masked(self) -> None:
        self.params = apply_masks(self.params, self.masks)

    @property
    def has_nan(self) -> bool:
        return any(bool(p.isnan().any()) for p in self.params.values())

    @precondition(lambda self: self.saved and not self.has_nan)
    @rule(data=st.data())
    def begin_again(self, data: st.DataObject) -> None:
        """Begin with a new model, as a new process does, and load what was saved."""
        self.make(net())
        self.load(data)

    @precondition(lambda self: self.phase == "new")
    @rule(inplace=st.booleans())
    def prepare(self, inplace: bool) -> None:
        if self.pruner._optimizer is not None and not inplace:
            self.attempt(lambda: self.pruner.prepare(inplace=False), ValueError)
            return
        if self.has_nan and not self.loaded:
            self.attempt(lambda: self.pruner.prepare(inplace=inplace), NaNError)
            return
        returned = self.pruner.prepare(inplace=inplace)
        assert (returned is self.model) is inplace
        if not inplace:
            self.model = returned
            self.optimizer = torch.optim.SGD(returned.parameters(), 0.1, momentum=0.9)
        self.phase = "prepared"
        if self.loaded:
            self.masked()
        else:
            self.fold()

    @precondition(lambda self: self.phase != "new")
    @rule()
    def prepare_again(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert self.pruner.prepare() is self.pruner.model
        assert "changes nothing" in str(caught[0].message)

    @rule(seed=SEEDS)
    def train(self, seed: int) -> None:
        """Forward, backward and an optimizer step, whose result the model of the machine takes."""
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        if self.phase == "prepared":
            self.masked()  # the forward pass masks what was written
        self.optimizer.zero_grad()
        out = self.model(x)
        self.check()
        out.square().mean().backward()
        if self.phase == "prepared":
            for name, mask in self.masks.items():
                grad = self.model.get_parameter(name).grad
                assert not bool(grad[~mask].any())
        self.optimizer.step()
        self.params = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        if self.phase == "prepared" and self.pruner._optimizer is not None:
            assert bits(apply_masks(self.params, self.masks)) == bits(self.params)

    @precondition(lambda self: self.phase == "prepared" and not self.has_nan)
    @rule(seeds=st.lists(SEEDS, min_size=1, max_size=3))
    def go_on(self, seeds: Iterable[int]) -> None:
        for seed in seeds:
            self.train(seed)
            self.step()

    @rule()
    def step(self) -> None:
        if self.phase != "prepared":
            self.attempt(self.pruner.step, RuntimeError)
            return
        due = [r for r in self.names.rules.values() if r.changes_at(self.step_count + 1)]
        if self.has_nan and due:
            self.attempt(self.pruner.step, NaNError)
            return
        self.pruner.step()
        self.step_count += 1
        REACHED["step", min(self.step_count, 7)] += 1
        self.masked() if self.has_nan else self.fold()

    @rule(packed=st.booleans())
    def save(self, packed: bool) -> None:
        if self.phase == "finalized":
            self.attempt(self.pruner.state_dict, RuntimeError)
            return
        file = io.BytesIO()
        torch.save(self.pruner.state_dict(packed=packed), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        if state["prepared"]:
            self.saved.append((state, dict(self.masks), self.step_count))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def load_again(self, data: st.DataObject) -> None:
        self.load(data)

    def load(self, data: st.DataObject) -> None:
        state, masks, step = data.draw(st.sampled_from(self.saved))
        if self.phase == "finalized":
            self.attempt(lambda: self.pruner.load_state_dict(state), RuntimeError)
            return
        self.pruner.load_state_dict(state)
        REACHED["load", self.phase] += 1
        self.masks, self.step_count, self.loaded = dict(masks), step, True
        if self.phase == "prepared":
            self.masked()

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), kind=st.sampled_from(DAMAGES))
    def load_damaged(self, data: st.DataObject, kind: str) -> None:
        whole = [state for state, _, _ in self.saved if not state["packed"]]
        if whole:
            state = damage(data.draw(st.sampled_from(whole)), kind)
            self.attempt(lambda: self.pruner.load_state_dict(state), ValueError, RuntimeError)

    @rule(config=st.sampled_from(sorted(CONFIGS)), packed=st.booleans())
    def load_of_another_config(self, config: str, packed: bool) -> None:
        if CONFIGS[config] is self.config:
            return
        other = Pruner(net(), CONFIGS[config])
        other.prepare()
        state = other.state_dict(packed=packed)
        self.attempt(lambda: self.pruner.load_state_dict(state), ValueError, RuntimeError)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy_all(self, how: str) -> None:
        """Go on with a copy of model, optimizer and pruner."""
        whole = (self.model, self.optimizer, self.pruner)
        if how == "pickle" and self.config is not CONFIGS["callable"]:  # no lambda has a pickle
            whole = pickle.loads(pickle.dumps(whole))
        else:
            whole = copy.deepcopy(whole)
        self.model, self.optimizer, self.pruner = whole

    @rule(
        name=st.sampled_from(["0.weight", "2.weight"]),
        at=st.integers(0, 23),
        then=st.sampled_from(["step", "step", "finalize", "prepare", "go on"]),
    )
    def put_nan(self, name: str, at: int, then: str) -> None:
        """Put NaN into a weight, unless there is one, and do what may trip over it."""
        if not self.has_nan:
            self.write(name, at, math.nan)
        self.check()
        if then == "step":
            self.step()
        elif then == "finalize":
            self.finalize(inplace=True)
        elif then == "prepare" and self.phase == "new":
            self.prepare(inplace=True)

    @precondition(lambda self: self.has_nan)
    @rule()
    def take_nan_out(self) -> None:
        for name, param in self.params.items():
            for at in param.isnan().view(-1).nonzero().view(-1).tolist():
                self.write(name, at, 0.25)

    def write(self, name: str, at: int, value: float) -> None:
        with torch.no_grad():
            self.model.get_parameter(name).view(-1)[at] = value
        self.params = {**self.params, name: self.params[name].clone()}
        self.params[name].view(-1)[at] = value

    @rule(inplace=st.booleans())
    def finalize(self, inplace: bool) -> None:
        call = lambda: self.pruner.finalize(inplace=inplace)  # noqa: E731
        if self.phase != "prepared":
            self.attempt(call, RuntimeError)
            return
        if any(bool(self.params[name].isnan().any()) for name in self.masks):
            self.attempt(call, NaNError)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule may not be over
            final = call()
        found = {k: v.detach() for k, v in final.named_parameters()}
        assert bits(found) == bits(apply_masks(self.params, self.masks))
        assert not any(module._forward_pre_hooks for module in final.modules())
        if inplace:
            self.masked()
            self.phase = "finalized"

    @rule()
    def finalize_a_wrong_model(self) -> None:
        wrong = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
        before = bits(dict(wrong.named_parameters()))
        self.attempt(lambda: self.pruner.finalize(wrong, inplace=True), ValueError, RuntimeError)
        assert bits(dict(wrong.named_parameters())) == before

    @rule(step=st.sampled_from([0, 3, None, -1, "x"]))
    def ask(self, step: Any) -> None:
        """Read the report and the plan: nothing changes, and bad steps are refused."""
        report = self.pruner.report()
        assert report.phase == self.phase
        zeros = {row.name: row.weight.zeros for row in report.rows}
        assert zeros == {name: int((self.params[name] == 0).sum()) for name in zeros}
        if step == -1:
            self.attempt(lambda: self.pruner.plan(step), ValueError)
        elif step == "x":
            self.attempt(lambda: self.pruner.plan(step), TypeError)
        elif step is None and self.config is CONFIGS["callable"]:
            self.attempt(lambda: self.pruner.plan(step), ValueError)
        else:
            assert len(self.pruner.plan(step).tensors) == 2

    @invariant()
    def check(self) -> None:
        """Model bits, masks and step are those of the fold, after success and failure alike."""
        if not hasattr(self, "pruner"):
            return
        assert self.pruner.model is self.model
        assert bits(dict(self.model.named_parameters())) == bits(self.params)
        if self.phase != "new":
            assert self.pruner.step_count == self.step_count
            assert bits(dict(self.pruner.masks)) == bits(self.masks)


def test_the_pruner_is_the_pure_fold_in_any_order_of_calls_and_faults():
    """Defends every success against the fold, and every failure against half a change.

    The counts show that the machine gets to the places that matter.
    """
    REACHED.clear()
    examples = min(settings.default.max_examples, 500)
    run_state_machine_as_test(
        Faults, settings=settings(max_examples=examples, stateful_step_count=20)
    )
    for place in (
        (RuntimeError, "new"), (ValueError, "new"), (NaNError, "prepared"),
        (ValueError, "prepared"), (RuntimeError, "finalized"),
    ):  # fmt: skip
        assert REACHED[place], place
    for event in (("load", "new"), ("load", "prepared"), ("step", 1), ("step", 6)):
        assert REACHED[event], event
    print(examples, "machines", sum(REACHED.values()), "events")
