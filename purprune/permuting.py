"""Permuting: networks with their channels in another order, which compute what they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from purprune.errors import SelectionError, near_misses
from purprune.selection import check_params


def inverse(permutation: Tensor) -> Tensor:
    """Return the permutation that undoes one.

    >>> inverse(torch.tensor([2, 0, 1]))
    tensor([1, 2, 0])
    """
    _refuse_no_permutation(permutation)
    return torch.argsort(permutation)


def _refuse_no_permutation(permutation: Tensor) -> None:
    whole = permutation.dim() == 1 and permutation.dtype == torch.int64
    if not whole or permutation.sort().values.tolist() != list(range(len(permutation))):
        raise ValueError(
            f"Expected a permutation, each of 0 to n - 1 once, as int64; got {permutation.dtype} "
            f"of shape {tuple(permutation.shape)}. search_permutation returns one."
        )


@torch.no_grad()
def permute_inputs(
    params: Mapping[str, Tensor],
    consumers: str | Sequence[str],
    permutation: Tensor,
    *,
    producers: Sequence[str],
) -> dict[str, Tensor]:
    """Return ``params`` with the input channels of ``consumers`` in another order, and no new
    function: the outputs of ``producers`` are put into the same order.

    Everything that the channels pass has to be named, as a parameter or as the module that has it:
    all layers that read them (a query, a key and a value projection) as consumers, the layers that
    make them and the norms in between as producers. On a residual stream those are all layers that
    write to it and read from it, with one permutation. Between them may be what treats channels
    alike: activations, dropout, pooling, additions of permuted tensors.

    Args:
        params: parameters and buffers by name, as ``model.state_dict()``.
        consumers: weights, or modules for their ``weight``, whose dim 1 is permuted. After a
            ``Flatten`` dim 1 has several neighbours for each channel, which stay together.
        permutation: int64; the new channel i is the old channel ``permutation[i]``.
        producers: tensors, or modules for all tensors of one or more dims that they have
            themselves, whose dim 0 is permuted.

    Raises:
        SelectionError: a name is unknown, or stands for the same tensor twice.
        ValueError: a tensor has another number of channels, or it is no permutation.

    >>> params = {"0.weight": torch.tensor([[1.0], [2.0]]), "1.weight": torch.tensor([[3.0, 4.0]])}
    >>> permute_inputs(params, "1", torch.tensor([1, 0]), producers=["0"])
    {'0.weight': tensor([[2.],
            [1.]]), '1.weight': tensor([[4., 3.]])}
    """
    check_params(params)
    _refuse_no_permutation(permutation)
    consumers = [consumers] if isinstance(consumers, str) else consumers
    if isinstance(producers, str):
        raise TypeError(f"Expected producers as a list; got {producers!r}. Pass [{producers!r}].")
    read = [name if name in params else f"{name}.weight" for name in consumers]
    written = [found for name in producers for found in _tensors_of(name, params)]
    out = dict(params)
    for names, dim in ((read, 1), (written, 0)):
        for name in _once(names, params):
            out[name] = _permuted(name, out[name], permutation, dim)
    return out


def _tensors_of(name: str, params: Mapping[str, Tensor]) -> list[str]:
    """Return the tensor of that name, or those that the module of that name has itself."""
    if name in params:
        return [name]
    own = [n for n, t in params.items() if n.rpartition(".")[0] == name and t.dim()]
    return own or [name]


def _once(names: Sequence[str], params: Mapping[str, Tensor]) -> Sequence[str]:
    for name in names:
        if name not in params:
            known = [path for n in params for path in (n, n.rpartition(".")[0])]
            raise SelectionError(
                f"Expected names of tensors or modules in params; got {name!r}."
                f"{near_misses(name, known)}"
            )
        if names.count(name) > 1:
            raise SelectionError(f"Expected each tensor once; {name!r} is named twice.")
    return names


def _permuted(name: str, tensor: Tensor, permutation: Tensor, dim: int) -> Tensor:
    """Permute channels along a dim; each may be several neighbours of a consumer."""
    channels = len(permutation)
    size = tensor.shape[dim] if tensor.dim() > dim else 0
    if size == 0 or size % channels or (dim == 0 and size != channels):
        raise ValueError(
            f"Expected {channels} channels along dim {dim} of {name!r}; got shape "
            f"{tuple(tensor.shape)}. Leave out what the channels do not pass; a depthwise "
            f"convolution is a producer."
        )
    each = size // channels
    index = permutation[:, None] * each + torch.arange(each, device=permutation.device)
    return tensor.detach().index_select(dim, index.flatten().to(tensor.device))
