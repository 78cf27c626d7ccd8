"""Hooks: what keeps pruned entries at zero between two calls of the pruner.

The forward pre-hook is a plain object without a reference to the pruner or the model, so that a
deepcopy or a pickle of the model takes its masks along and works by itself.
"""

from __future__ import annotations

import operator
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from purprune.values import FrozenDict
from purprune_adapters.distributed import brought, is_sharded, local
from purprune_adapters.inplace import zero_pruned_


class Seen(NamedTuple):
    """A tensor as it stood at some time: torch counts the writes to it."""

    tensor: weakref.ref[Tensor]
    state: tuple[int, ...]
    trained: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Seen:
        """Remember a tensor as it stands now."""
        return cls(weakref.ref(tensor), state_of(tensor), tensor.requires_grad)

    def is_still(self, tensor: Tensor) -> bool:
        """Tell whether this is the tensor, not written to, thawed or given other memory since."""
        same = self.tensor() is tensor and self.trained is tensor.requires_grad
        return same and self.state == state_of(tensor)


class Masks(FrozenDict[Tensor]):
    """Masks by parameter name, which nobody can set or remove."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as a ``state_dict`` of torch, which ``weights_only=True`` loads."""
        return OrderedDict, (), None, None, iter(self.items())


_KNOWN = ("_clean", "_clean_gradients", "_at_gradient", "_hooked")


class MaskStore:
    """Masks by parameter name, and which parameters are known to be masked as they stand now."""

    def __init__(self, token: str, mask_gradients: bool) -> None:
        """Make an empty store; the token tells the hooks of one pruner from another's."""
        self.token = token
        self.passing: frozenset[str] = frozenset()
        """Parameters whose entries may come back: a copy does not keep what is masked now."""
        self.mask_gradients = mask_gradients
        self.masks: dict[str, Tensor] = {}
        self.whole_gradients: frozenset[str] = frozenset()
        """Parameters whose gradients are not masked, since pruned entries compete by them."""
        self._hooked: dict[str, tuple[weakref.ref[Tensor], Any]] = {}
        self._clean: dict[str, Seen] = {}
        self._clean_gradients: dict[str, Seen] = {}
        self._at_gradient: dict[str, set[tuple[int, ...]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is known of parameters: a copy has parameters of its own.

        Masks that pass would write zeros into a copy, such as an average, that has none there.
        """
        lasting = {name: mask for name, mask in self.masks.items() if name not in self.passing}
        known: dict[str, Any] = {what: {} for what in _KNOWN}
        return {**self.__dict__, **known, "masks": lasting}

    def renew(self, masks: Mapping[str, Tensor]) -> None:
        """Take new masks; what was known of the old ones is forgotten."""
        self.masks.update(masks)
        for name in masks:
            self._clean.pop(name, None)
            self._clean_gradients.pop(name, None)

    def mask_for(self, name: str, tensor: Tensor) -> Tensor:
        """Return the mask where the tensor is, brought there once when the model moved."""
        mask = self.masks[name] = brought(name, self.masks[name], tensor)
        return mask

    def is_for(self, name: str, tensor: Tensor) -> bool:
        """Tell whether to mask this tensor: not one that FSDP gathered from masked shards."""
        mask = self.masks.get(name)
        return mask is not None and (is_sharded(tensor) or not is_sharded(mask))

    def apply_(self, name: str, param: Tensor) -> None:
        """Write zeros into the parameter, and remember that it is clean."""
        self._hook_gradient(name, param)
        write_zeros_(param, self.mask_for(name, param))
        self.is_clean_now(name, param)

    def is_clean_now(self, name: str, param: Tensor) -> None:
        """Remember that the parameter is masked as it stands."""
        if not param.is_inference():  # of these torch does not count the writes
            self._clean[name] = Seen.of(param)

    def mask_gradient_(self, name: str, param: Tensor) -> None:
        """Write zeros into the gradient, and remember it; sparse gradients are left alone."""
        grad = None if name in self.whole_gradients else param.grad
        if grad is not None and self.is_for(name, grad) and grad.layout is torch.strided:
            write_zeros_(grad, self.mask_for(name, grad))
            self._clean_gradients[name] = Seen.of(grad)
            states = self._at_gradient.setdefault(name, set())
            if len(states) < 2:  # which tells as much as more, if nobody asks for long
                states.add(state_of(param))

    def are_as_at_gradient(self, params: Mapping[str, Tensor]) -> bool:
        """Tell whether all gradients since this was asked last came to the weights of now.

        Closures of an optimizer bring gradients to several weights.
        """
        found, self._at_gradient = self._at_gradient, {}
        return bool(found) and all(
            states == {state_of(params[name])} for name, states in found.items()
        )

    def has_masked_gradient(self, name: str, param: Tensor) -> bool:
        """Tell whether the gradient was masked, and nobody wrote to it since."""
        known, grad = self._clean_gradients.get(name), param.grad
        return known is not None and grad is not None and known.is_still(grad)

    def apply_if_changed_(self, name: str, param: Tensor) -> None:
        """Write zeros unless neither the parameter nor its mask changed since the last time."""
        if self.changed(name, param):
            self.apply_(name, param)

    def changed(self, name: str, param: Tensor) -> bool:
        """Tell whether the parameter was written to, thawed, or replaced since it was masked."""
        known = self._clean.get(name)
        return known is None or not known.is_still(param)

    def _hook_gradient(self, name: str, param: Tensor) -> None:
        """Hook the gradient of a parameter that is new here, or that may be trained now."""
        known = self._hooked.get(name)
        if not self.mask_gradients or (known is not None and known[0]() is param):
            return
        if param.requires_grad and param.is_leaf:
            if known is not None:
                known[1].remove()
            hook = GradientHook(self, name)
            handle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._hooked[name] = (weakref.ref(param), handle)

    def release(self) -> None:
        """Remove the gradient hooks."""
        for _, handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()


def state_of(param: Tensor) -> tuple[int, ...]:
    """Return what changes when a parameter is written to, or gets other data."""
    if not is_sharded(param):
        return (param._version, param.data_ptr())
    held = local(param)
    return (param._version, held._version, held.data_ptr())


def write_zeros_(tensor: Tensor, mask: Tensor) -> None:
    """Set the pruned entries of a tensor to zero; of shards each process writes its own."""
    if is_sharded(tensor) and tensor.placements == mask.placements:  # type: ignore[attr-defined]
        zero_pruned_(local(tensor), local(mask))
        torch.autograd.graph.increment_version(tensor)
    else:
        zero_pruned_(tensor, mask)


class MaskHook:
    """A forward pre-hook that masks parameters at and below its module before they are read."""

    def __init__(self, store: MaskStore, paths: Iterable[tuple[str, str]]) -> None:
        """Take pairs of a path from the module to a parameter and the parameter's name."""
        self.store = store
        self.params = tuple((operator.attrgetter(path), name) for path, name in paths)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Mask what changed; while a graph is captured the weights are masked already."""
        if torch.compiler.is_compiling():
            return
        for look_up, name in self.params:
            param = look_up(module)
            # Other tensors stand here under torch.func: they are the caller's, and not written to.
            if isinstance(param, nn.Parameter) and self.store.is_for(name, param):
                self.store.apply_if_changed_(name, param)


class GradientHook:
    """A post-accumulate-grad hook that zeroes the gradients of pruned entries."""

    def __init__(self, store: MaskStore, name: str) -> None:
        """Take the store of masks and the parameter's name."""
        self.store = store
        self.name = name

    def __call__(self, param: Tensor) -> None:
        """Zero the gradient where the mask prunes."""
        self.store.mask_gradient_(self.name, param)


def _watchers(name: str, modules: dict[str, nn.Module]) -> list[str]:
    """Return the modules that may read a parameter: its own, the one above it, and the root.

    The module above is there for those that read a child's weight without calling the child, as
    MultiheadAttention reads ``out_proj.weight``.
    """
    owner = name.rpartition(".")[0]
    above = owner.rpartition(".")[0]
    return [path for path in dict.fromkeys((owner, above, "")) if path in modules]


def add_forward_hooks(model: nn.Module, store: MaskStore, names: Iterable[str]) -> None:
    """Hook every module that may read one of the parameters, under any of its names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(model.get_parameter(name)): name for name in names}
    watched: dict[str, list[tuple[str, str]]] = {}
    for alias, param in model.named_parameters(remove_duplicate=False):
        if (name := first.get(id(param))) is None:
            continue
        for path in _watchers(alias, modules):
            watched.setdefault(path, []).append((alias[len(path) + 1 if path else 0 :], name))
    for path, paths in watched.items():
        # First of all: hooks of others compute the weight, or gather it, from what is masked here.
        modules[path].register_forward_pre_hook(MaskHook(store, paths), prepend=True)


def remove_forward_hooks(model: nn.Module, token: str) -> None:
    """Remove the hooks of one pruner from a model or a copy of it; others' stay."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, MaskHook) and hook.store.token == token:
                del module._forward_pre_hooks[key]
