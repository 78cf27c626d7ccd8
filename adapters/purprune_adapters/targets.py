"""The parameters that rules are for, looked up in a model, and their masks at a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from purprune import PruneConfig, Rule
from purprune_adapters.distributed import brought, masks_at, reshard


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

    def masks_at(
        self,
        step: int,
        names: Iterable[str],
        prev: Mapping[str, Tensor],
        floor: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the masks of some of the parameters, computed from them as they are now."""
        found = self.params()
        params = {name: found[name] for name in names}
        before, lowest = (
            {name: brought(name, masks[name], params[name]) for name in params if name in masks}
            for masks in (prev, floor)
        )
        return masks_at(
            params,
            step,
            PruneConfig(module_name_configs={name: self.rules[name] for name in params}),
            prev=before,
            floor=lowest,
            grads={name: param.grad for name, param in params.items()},
        )
