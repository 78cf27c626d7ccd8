"""Reading a saved package back and comparing every pruned parameter with the torch model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .checks import check_weights, pruned_parameters
from .errors import VerificationError
from .frontends import BATCH_NORMS
from .matching import Index, Part, find
from .package import Package, Stored
from .paths import package_path
from .records import ParameterRecord, Verification
from .storage import why_dense

__all__ = ["raise_if_damaged", "verify", "verify_coreml"]

#: Hashes of torch weights that were computed before: see ``Index.seen``.
Hashes = dict[tuple[int, int, str], int]
#: The factor per channel of each batch norm, by its name.
Scales = Mapping[str, NDArray[Any]]

_UNEXPLAINED = "scaled by factors that nothing in the model explains"
_NO_MODEL = (
    "scaled by factors that the parameters alone don't explain; pass the model, which names its "
    "batch norms"
)


def verify_coreml(
    path: str | os.PathLike[str],
    model_or_params: nn.Module | Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    *,
    strict: bool = True,
) -> Verification:
    """Read a saved package back and compare its weights with the pruned model, on any system.

    Args:
        path: the ``.mlpackage``.
        model_or_params: the finalized model, or its parameters by name. Only a model tells the
            factors of a folded batch norm; without it, a folded weight is reported as a problem.
        masks: which entries survive (True), by parameter name; None counts every floating-point
            parameter of two or more dimensions that holds a zero as pruned.
        strict: raise when a parameter is missing, lost a weight, or is scaled by factors that no
            batch norm of the model has.

    Returns:
        Verification: a record per pruned parameter.

    Raises:
        VerificationError: strict, and something is missing or differs; carries ``.report``.
        ValueError: nothing is pruned, or a mask doesn't fit.
        TypeError: the model comes first.

    Example:
        >>> verify_coreml("net.mlpackage", model).ok  # doctest: +SKIP
        True
    """
    if isinstance(model_or_params, str | os.PathLike) or isinstance(path, nn.Module | Mapping):
        raise TypeError(
            f"Expected verify_coreml(path, model); got {type(path).__name__} and "
            f"{type(model_or_params).__name__}. The path comes first."
        )
    if isinstance(model_or_params, nn.Module):
        params: dict[str, Tensor] = dict(model_or_params.named_parameters(remove_duplicate=False))
        scales: Scales | None = batch_norm_scales(model_or_params)
    else:
        params, scales = dict(model_or_params), None
    check_weights(params)
    pruned = pruned_parameters(params, masks)
    # A bias or a norm's weight may be folded; the weights of the layers tell into which.
    small = any(tensor.ndim < 2 for tensor in pruned.values())
    result, _ = verify(
        Package(package_path(path)), pruned, scales, matrices(params, pruned) if small else None
    )
    if strict:
        raise_if_damaged(result, result, str(path))
    return result


def raise_if_damaged(result: Verification, report: Any, path: str) -> None:
    """Raise a ``VerificationError`` that lists what is missing or differs."""
    if not result.ok:
        raise VerificationError(
            f"Expected '{path}' to hold every surviving weight; "
            + "; ".join(result.problems)
            + ". The error's .report has the details; strict=False returns it instead.",
            report,
        )


def batch_norm_scales(model: nn.Module) -> dict[str, NDArray[Any]]:
    """The factor per channel, gamma / sqrt(var + eps), of every batch norm in eval mode."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.running_var is not None:
            scale = torch.rsqrt(module.running_var.detach().double() + module.eps)
            if module.weight is not None:
                scale = scale * module.weight.detach().double()
            found[name] = scale.float().cpu().numpy()
    return found


def matrices(params: Mapping[str, Tensor], without: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point parameters of two or more dimensions, but for those in ``without``."""
    return {
        name: tensor.detach()
        for name, tensor in params.items()
        if name not in without and tensor.ndim >= 2 and tensor.is_floating_point()
    }


def match(
    stored: Iterable[Stored],
    weights: Mapping[str, Tensor],
    scales: Scales,
    seen: Hashes | None = None,
) -> dict[str, list[Part]]:
    """The parts of each weight; exact ones first, so that no near match takes their place."""
    index = Index(list(stored), scales, seen={} if seen is None else seen)
    found: dict[str, list[Part]] = {}
    by_tensor: dict[tuple[int, ...], str] = {}  # tied parameters are searched once
    for exact in (True, False):
        for name, weight in weights.items():
            if found.get(name):
                continue
            key = (weight.data_ptr(), *weight.shape, *weight.stride())
            first = by_tensor.setdefault(key, name)
            if first != name:
                found[name] = found[first]
            else:
                found[name] = find(index, weight.detach().cpu().float(), exact=exact)
    return found


def verify(
    package: Package,
    weights: Mapping[str, Tensor],
    scales: Scales | None,
    others: Mapping[str, Tensor] | None = None,
    *,
    min_sparsity: float | None = None,
    compress: str | None = None,
    seen: Hashes | None = None,
) -> tuple[Verification, dict[str, list[Part]]]:
    """Match every pruned weight and describe what was found; ``others`` are matched only.

    Without a model there are no ``scales`` (None).
    """
    stored = package.stored()
    parts = match(stored, {**weights, **(others or {})}, scales or {}, seen)
    words = _NO_MODEL if scales is None else _UNEXPLAINED
    rows = []
    for name, weight in weights.items():
        why = "" if parts[name] else _absent(name, weight, parts, scales or {})
        row = _record(name, weight, parts, why, min_sparsity=min_sparsity, compress=compress)
        free = any(part.unexplained for part in parts[name])
        rows.append(replace(row, unexplained=words if free else ""))
    blobs: dict[tuple[str, Any], int] = {}
    for one in stored:
        blobs |= one.blobs
    dense = sum({tuple(s.blobs): s.numel * np.dtype(s.dtype).itemsize for s in stored}.values())
    return Verification(tuple(rows), sum(blobs.values()), dense), parts


def _absent(name: str, weight: Tensor, parts: Mapping[str, list[Part]], scales: Scales) -> str:
    """Why a parameter may not be found, and what to do."""
    module = name.rpartition(".")[0]
    way_out = "leave it out of masks"
    into = sorted(
        f"'{other.rpartition('.')[0]}'"
        for other, theirs in parts.items()
        if any(part.norm == module for part in theirs)
    )
    if module in scales and into:
        where = " and ".join(into)
        return f"folded into layer {where}, where it can't be read back; {way_out}"
    if weight.ndim < 2:
        norms = {
            f"'{part.norm}'"
            for other, theirs in parts.items()
            if other.rpartition(".")[0] == module
            for part in theirs
            if part.norm
        }
        if norms:
            return f"merged with batch norm {' and '.join(sorted(norms))} into one bias; {way_out}"
        return f"the converter may have merged it with another constant; {way_out}"
    return f"no stored tensor holds its values: the forward pass may not use it; {way_out}"


def _record(
    name: str,
    weight: Tensor,
    parts: Mapping[str, list[Part]],
    absent: str,
    *,
    min_sparsity: float | None,
    compress: str | None,
) -> ParameterRecord:
    mine = parts[name]
    # A weight may be stored several times; one full copy tells the counts of entries.
    copy = list({(p.rows.start, p.rows.stop): p for p in reversed(mine)}.values())
    stored = {p.stored.name: p.stored for p in mine}
    blobs: dict[tuple[str, Any], int] = {}
    for one in stored.values():
        blobs |= one.blobs
    others = tuple(
        other
        for other, theirs in parts.items()
        if other != name and {p.stored.name for p in theirs} & set(stored)
    )
    gone = {
        key: sum(getattr(p, key) for p in copy)
        for key in ("dropped", "revived", "underflowed", "rounded_to_zero", "scaled_to_zero")
    }
    reasons = [
        why_dense(
            s.shape,
            s.nonzeros,
            np.dtype(s.dtype).itemsize,
            min_sparsity=min_sparsity,
            compress=compress,
        )
        or "sparse would be smaller; this package wasn't made so"
        for s in stored.values()
        if not s.sparse
    ]
    if not mine:
        reasons = [absent]
    return ParameterRecord(
        name=name,
        shape=tuple(weight.shape),
        mil_names=tuple(stored),
        matched=" / ".join(dict.fromkeys(p.how for p in mine)),
        storage=" / ".join(dict.fromkeys(s.kind for s in stored.values())) or "not found",
        dtype=" / ".join(dict.fromkeys(s.dtype for s in stored.values())),
        entries=weight.numel(),
        zeros_torch=weight.numel() - int(torch.count_nonzero(weight)),
        zeros_stored=sum(p.stored.numel - p.stored.nonzeros for p in copy),
        wrong=sum(p.wrong for p in copy),
        bytes_stored=sum(blobs.values()),
        bytes_dense=sum(s.numel * np.dtype(s.dtype).itemsize for s in stored.values()),
        max_relative_error=max((p.max_error for p in mine), default=0.0),
        shared_with=others,
        reason="; ".join(dict.fromkeys(reasons)),
        **gone,
    )
