"""The parameters that rules are for, looked up in a model, and their masks at a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from purprune import PruneConfig, Rule
from purprune.updating import updated
from purprune_adapters.checkpoint import Held
from purprune_adapters.distributed import brought, computing, not_finite, reshard
from purprune_adapters.memory import Memory


class Targets:
    """The parameters of a model that rules are for, by name."""

    def __init__(self, model: nn.Module, rules: Mapping[str, Rule]) -> None:
        """Remember which module has each parameter."""
        self.model = model
        self.rules = rules
        paths = {name: name.rpartition(".") for name in rules}
        self._owners = {
            name: (model.get_submodule(path), leaf) for name, (path, _, leaf) in paths.items()
        }

    def params(self) -> dict[str, Tensor]:
        """Look the parameters up in their modules: ``load_state_dict(assign=True)`` renews them."""
        reshard(self.model)
        return {name: getattr(owner, leaf) for name, (owner, leaf) in self._owners.items()}

    def updated(
        self,
        step: int,
        names: Iterable[str],
        held: Held,
        memory: Memory,
        stats: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the next masks of some of the parameters, from these as they are now."""
        found = self.params()
        params = {name: found[name] for name in names}
        masks, floor = (
            {name: brought(name, given[name], params[name]) for name in params if name in given}
            for given in (held.masks, held.floor)
        )
        sums = memory.stats()
        return updated(
            computing(params),
            not_finite,
            memory.seen_by_masks(params),
            masks,
            step,
            PruneConfig(module_name_configs={name: self.rules[name] for name in params}),
            floor=floor,
            grads={name: param.grad for name, param in params.items()},
            stats={
                name: {**sums.get(name, {}), **stats.get(name, {})}
                for name in params
                if name in sums or name in stats
            },
        )
