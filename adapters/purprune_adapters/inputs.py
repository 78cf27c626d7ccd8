"""What a layer's weight is multiplied with: its inputs as rows of features, summed up by hooks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from purprune import ConfigError, SelectionError
from purprune_adapters.distributed import is_sharded

INPUT_STATS = ("input_norm", "hessian")
"""The statistics that are sums over inputs."""

Rows = Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]


class Layer(NamedTuple):
    """A weight that is multiplied with rows of features."""

    name: str
    weight: Tensor
    module: nn.Module
    transposed: bool
    """Whether inputs are along dim 0, as in transformers' Conv1D."""
    groups: int
    """So many parts of the outputs see inputs of their own."""
    rows: Rows
    """From the arguments of the module's forward to (groups, samples, features)."""
    squares: Rows
    """From the same to the sum of squares of each feature, (groups, features), in float64."""


def layers_of(model: nn.Module, names: Iterable[str]) -> list[Layer]:
    """Return the layers that own weights.

    Raises:
        SelectionError: some are of no kind whose inputs a hook sees; names them all.
    """
    found = {name: _layer(model, name) for name in names}
    if unseen := [name for name, layer in found.items() if layer is None]:
        owned = itertools.groupby(unseen, partial(_owner, model))
        shown = "; ".join(f"{', '.join(map(repr, names))} of {owner}" for owner, names in owned)
        calls = "".join(f".set_module_name({one!r}, None)" for one in _selectors(unseen, found))
        raise SelectionError(
            f"Expected weights of Linear, Conv1d, Conv2d, Conv3d, transformers' Conv1D or the "
            f"in_proj of attention; got {shown}: no hook sees their inputs. Leave them dense by "
            f"PruneConfig().set_global(rule){calls}; compute_masks and a Pruner prune them too, by "
            f"a score without inputs."
        )
    return [layer for layer in found.values() if layer is not None]


def _selectors(unseen: list[str], names: Collection[str]) -> list[str]:
    """Return one glob for all, where it is for no other, or else each name."""
    glob = f"*.{unseen[0].split('.')[-2]}" if "." in unseen[0] else "*"
    one_for_all = [name for name in names if fnmatchcase(name, f"{glob}.*")] == unseen
    return [glob] if one_for_all and len(unseen) > 1 else unseen


def _owner(model: nn.Module, name: str) -> str:
    path = name.rpartition(".")[0]
    above = model.get_submodule(path.rpartition(".")[0])
    if isinstance(above, nn.MultiheadAttention):
        return f"{type(above).__name__}, which reads them itself"
    return type(model.get_submodule(path)).__name__


def _layer(model: nn.Module, name: str) -> Layer | None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    weight: Tensor = getattr(module, leaf)
    above = model.get_submodule(path.rpartition(".")[0])
    if is_sharded(weight):
        raise SelectionError(
            f"Expected whole weights; {name!r} is in shards. Collect its inputs before "
            f"fully_shard, or on one process."
        )

    def make(transposed: bool, rows: Rows) -> Layer:
        return Layer(name, weight, module, transposed, 1, rows, partial(_squares, rows))

    if isinstance(module, nn.MultiheadAttention) and leaf == "in_proj_weight":
        return make(False, partial(_attention_rows, name))
    read_above = isinstance(above, nn.MultiheadAttention)  # which never calls its out_proj
    if leaf == "weight" and not read_above:
        if isinstance(module, nn.Linear):
            return make(False, _linear_rows)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found = partial(_conv_rows, module), partial(_conv_squares, module)
            return Layer(name, weight, module, False, module.groups, *found)
        if _is_transposed_linear(module):
            return make(True, _linear_rows)
    return None


def with_outputs_first(layer: Layer, tensor: Tensor) -> Tensor:
    """Return a tensor of the weight's shape with outputs along dim 0; and back again."""
    return tensor.T if layer.transposed else tensor


def _is_transposed_linear(module: nn.Module) -> bool:
    utils = sys.modules.get("transformers.pytorch_utils")  # not imported: not used
    return utils is not None and isinstance(module, utils.Conv1D)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first argument of a forward, which may be given by its name."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found.detach()


def _linear_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    x = _first(args, kwargs)
    return x.reshape(1, -1, x.shape[-1])


def _attention_rows(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    given = [*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs)][:3]
    if any(x is not given[0] for x in given):
        raise SelectionError(
            f"Expected self-attention, where {name!r} sees one input; got a query, a key and a "
            f"value that differ. Set {name!r} to None, or give it a score without inputs."
        )
    return _linear_rows((given[0],), {})


def _conv_rows(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """Return the patches of an input, features in the order of ``weight.flatten(1)``."""
    x, dims = _first(args, kwargs), len(conv.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    for d in range(dims):
        extent = conv.dilation[d] * (conv.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, extent, conv.stride[d])[..., :: conv.dilation[d]]
    # (batch, channels, *places, *kernel) -> (groups, batch * places, channels / groups * kernel)
    x = x.reshape(len(x), conv.groups, -1, *x.shape[2:]).movedim(1, 0)
    x = x.movedim(2, 2 + dims)
    patches: Tensor = x.flatten(2 + dims).flatten(1, 1 + dims)
    return patches


def _squares(rows: Rows, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return _wide(rows(args, kwargs)).square().sum(1)


def _conv_squares(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """Return the sums over patches, of which the batch's are summed before they are made."""
    x, dims = _first(args, kwargs), len(conv.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    return _conv_rows(conv, (_wide(x).square().sum(0, keepdim=True),), {}).sum(1)


class InputSums:
    """Sums over the inputs of layers, while their modules run."""

    def __init__(self, layers: Collection[Layer], needs: Mapping[str, Collection[str]]) -> None:
        """Take the layers, and which of :data:`INPUT_STATS` each needs, by name."""
        self._layers = [layer for layer in layers if set(needs[layer.name]) & set(INPUT_STATS)]
        self._needs = needs
        self._sums: dict[str, dict[str, Tensor]] = {}
        for layer in self._layers:
            if layer.groups > 1 and "hessian" in needs[layer.name]:
                raise SelectionError(
                    f"Expected layers with one Hessian; {layer.name!r} has groups={layer.groups}, "
                    f"each with inputs of its own. Set it to None, or use a score of input norms."
                )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Add up what the modules see; the hooks are gone afterwards, whatever happens."""
        handles = [
            layer.module.register_forward_pre_hook(partial(self._add, layer), with_kwargs=True)
            for layer in self._layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        sums = self._sums.setdefault(layer.name, {})
        for stat in set(self._needs[layer.name]) & set(INPUT_STATS):
            norm = stat == "input_norm"
            found = layer.squares(args, kwargs) if norm else _products(layer.rows(args, kwargs))
            sums[stat] = sums[stat] + found if stat in sums else found

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return the statistics by name; raise for a layer that saw no input."""
        for layer in self._layers:
            if layer.name not in self._sums:
                raise ConfigError(
                    f"Expected batches that reach {layer.name!r}; its module was never called. "
                    f"Set it to None, or pass forward= with a call that uses it."
                )
        return {
            layer.name: {
                stat: _norm(layer, found) if stat == "input_norm" else found
                for stat, found in sorted(self._sums[layer.name].items())
            }
            for layer in self._layers
        }


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _products(rows: Tensor) -> Tensor:
    """Return the sum of x x^T; products in float32 or better, sums of batches in float64."""
    x = rows[0] if rows.itemsize >= 4 else rows[0].float()
    return _wide(x.T @ x)


def _norm(layer: Layer, squares: Tensor) -> Tensor:
    """Return the norms in the shape in which scores read them."""
    norm, shape = squares.sqrt(), layer.weight.shape
    if layer.transposed:
        return norm.view(-1, 1)
    if layer.groups == 1:
        return norm.view(shape[1:])
    return norm.repeat_interleave(shape[0] // layer.groups, dim=0).view(shape)
