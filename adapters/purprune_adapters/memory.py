"""What a pruner remembers of a weight beside its mask: the dense weight, sums over the steps.

Both are kept up to date around each step of the optimizer, by hooks of it:

    before   the weights become dense again, and their gradients are decayed (StraightThrough);
             statistics gain what this step adds (movement)
    after    the dense weights are remembered, and the masks are applied again
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from purprune import Rule, StraightThrough
from purprune.context import full_precision
from purprune.scores import needs_of
from purprune.statistics import ACCUMULATED, accumulate
from purprune.ste import pull
from purprune_adapters.distributed import is_sharded
from purprune_adapters.hooks import MaskStore

DENSE = "dense"


def follows_optimizer(rule: Rule) -> bool:
    """Tell whether a rule needs to see each step of the optimizer."""
    return rule.regrow is not None or any(stat in ACCUMULATED for stat in needs_of(rule.score))


class Memory:
    """Tensors by ``"<what>.<parameter>"``, for the rules that ask for them; often none."""

    def __init__(self, rules: Mapping[str, Rule], given: Mapping[str, Mapping[str, Any]]) -> None:
        """Find out what the rules need beside the statistics that are given."""
        self.tensors: dict[str, Tensor] = {}
        self._decays = {
            name: float(rule.regrow.decay)
            for name, rule in rules.items()
            if isinstance(rule.regrow, StraightThrough)
        }
        needed = {
            name: [
                s for s in needs_of(rule.score) if s in ACCUMULATED and s not in given.get(name, ())
            ]
            for name, rule in rules.items()
        }
        self._sums = {name: stats for name, stats in needed.items() if stats}

    def __bool__(self) -> bool:
        """Tell whether there is anything to remember."""
        return bool(self._decays or self._sums)

    def items(self) -> Iterator[tuple[str, str, str]]:
        """Yield key, parameter, and what is remembered of it."""
        for name in self._decays:
            yield f"{DENSE}.{name}", name, DENSE
        for name, stats in self._sums.items():
            yield from ((f"{stat}.{name}", name, stat) for stat in stats)

    def at_start(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is remembered before the first step."""
        for _, name, what in self.items():
            if is_sharded(params[name]):
                raise ValueError(
                    f"Expected whole weights for a rule that remembers {what!r}; {name!r} is in "
                    f"shards. Train under DDP, or choose another rule."
                )
        return {
            key: params[name].detach().clone()
            if what == DENSE
            else torch.zeros_like(full_precision(params[name].detach()))
            for key, name, what in self.items()
        }

    def seen_by_masks(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights among which masks choose: dense ones where they are remembered."""
        return {name: self.tensors.get(f"{DENSE}.{name}", param) for name, param in params.items()}

    def stats(self) -> dict[str, dict[str, Tensor]]:
        """Return the sums by parameter."""
        return {
            name: {stat: self.tensors[f"{stat}.{name}"] for stat in stats}
            for name, stats in self._sums.items()
            if f"{stats[0]}.{name}" in self.tensors
        }

    @torch.no_grad()
    def refresh(self, params: Mapping[str, Tensor], store: MaskStore) -> None:
        """Take over what was written to the kept entries since the optimizer's step."""
        for name in self._decays:
            if store.changed(name, params[name]):
                self.tensors[f"{DENSE}.{name}"].copy_(self._dense(name, params[name], store))

    @torch.no_grad()
    def show(self, params: Mapping[str, Tensor]) -> None:
        """Write the dense weights, for new masks to be applied to them."""
        for name in self._decays.keys() & params.keys():
            params[name].copy_(self.tensors[f"{DENSE}.{name}"])

    @torch.no_grad()
    def before_step(self, params: Mapping[str, Tensor], store: MaskStore) -> None:
        """Make the weights dense, decay those that are masked, and add to the sums."""
        for name, stats in self._sums.items():
            sums = {stat: self.tensors[f"{stat}.{name}"] for stat in stats}
            for stat, total in accumulate(sums, params[name], params[name].grad).items():
                self.tensors[f"{stat}.{name}"] = total
        for name, decay in self._decays.items():
            param = params[name]
            param.copy_(self._dense(name, param, store))
            if decay and param.grad is not None:
                param.grad.add_(pull(param, store.mask_for(name, param), decay))

    @torch.no_grad()
    def after_step(self, params: Mapping[str, Tensor], store: MaskStore) -> None:
        """Remember the dense weights, and mask the parameters."""
        for name in self._decays:
            self.tensors[f"{DENSE}.{name}"].copy_(params[name])
            store.apply_(name, params[name])

    def _dense(self, name: str, param: Tensor, store: MaskStore) -> Tensor:
        """Return the kept entries as they are now, and the others as they are remembered."""
        return torch.where(store.mask_for(name, param), param, self.tensors[f"{DENSE}.{name}"])


class MemoryHooks:
    """Keeps a memory up to date around the steps of an optimizer."""

    def __init__(
        self,
        optimizer: Optimizer,
        memory: Memory,
        store: MaskStore,
        params: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Hook the optimizer; ``params`` looks the pruned parameters up by name."""
        self._memory, self._store, self._params = memory, store, params
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @_disable_dynamo
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise ValueError(
                "Expected optimizer.step() without a closure, which would run the model on dense "
                "weights, or add to statistics twice. Call backward() before step()."
            )
        self._memory.before_step(self._params(), self._store)

    @_disable_dynamo
    def _after(self, *_: Any) -> None:
        self._memory.after_step(self._params(), self._store)
