"""Reading a saved package back and comparing every pruned parameter with the torch model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
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
from .storage import why_dense

__all__ = ["ParameterRecord", "Verification", "verify_coreml"]

#: Hashes of torch weights that were computed before: see ``Index.seen``.
Hashes = dict[tuple[int, int, str], int]


@dataclass(frozen=True)
class ParameterRecord:
    """What the saved package holds of one pruned parameter. All counts are entries, as ints.

    Attributes:
        name: the torch name.
        shape: the torch shape.
        mil_names: the names of the stored tensors; empty when none was found.
        matched: how they were recognised: "as is", "transposed", "scaled per output channel ...".
        storage: "dense", "sparse", "sparse + int8", ...; several joined by "/".
        dtype: the type after decoding.
        entries: entries of the parameter.
        zeros_torch: its zeros in torch.
        zeros_stored: its zeros in the package.
        dropped: survivors lost; must be 0.
        revived: pruned entries that aren't zero in the package; must be 0.
        wrong: surviving entries whose stored value is another one; must be 0.
        underflowed: survivors too small for the stored type.
        rounded_to_zero: survivors that the quantizer or palette made zero.
        scaled_to_zero: survivors of channels that a folded batch norm multiplies by zero.
        bytes_stored: bytes of the weight file that it takes, masks included.
        bytes_dense: bytes that it would take dense.
        max_relative_error: largest difference over the largest magnitude; 0.0 is exact up to the
            rounding to ``dtype``.
        shared_with: other parameters stored in the same bytes.
        reason: why something is dense, or why it wasn't found.
    """

    name: str
    shape: tuple[int, ...]
    mil_names: tuple[str, ...]
    matched: str
    storage: str
    dtype: str
    entries: int
    zeros_torch: int
    zeros_stored: int
    dropped: int
    revived: int
    wrong: int
    underflowed: int
    rounded_to_zero: int
    scaled_to_zero: int
    bytes_stored: int
    bytes_dense: int
    max_relative_error: float
    shared_with: tuple[str, ...] = ()
    reason: str = ""

    @property
    def found(self) -> bool:
        """Whether the package holds the parameter."""
        return bool(self.mil_names)

    @property
    def problem(self) -> str:
        """What is wrong, in words; empty when nothing is."""
        if not self.found:
            return "" if len(self.shape) < 2 else "not found in the package"
        counts = (("lost", self.dropped), ("revived", self.revived), ("changed", self.wrong))
        said = [f"{count} of {self.entries} entries {word}" for word, count in counts if count]
        return ", ".join(said)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {**plain, "found": self.found, "problem": self.problem}


@dataclass(frozen=True)
class Verification:
    """The result of reading a package back.

    Attributes:
        rows: one record per pruned parameter.
        weight_bytes: bytes of all stored weights, shared ones once.
        weight_bytes_dense: bytes of the same weights stored dense.
    """

    rows: tuple[ParameterRecord, ...]
    weight_bytes: int
    weight_bytes_dense: int

    @property
    def problems(self) -> tuple[str, ...]:
        """One line per parameter that is missing or differs."""
        return tuple(f"'{row.name}': {row.problem}" for row in self.rows if row.problem)

    @property
    def ok(self) -> bool:
        """Every pruned parameter was found, and none lost a weight."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return {
            "ok": self.ok,
            "problems": list(self.problems),
            "weight_bytes": self.weight_bytes,
            "weight_bytes_dense": self.weight_bytes_dense,
            "parameters": [row.as_dict() for row in self.rows],
        }


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
        model_or_params: the finalized model, or its parameters by name. Only a model tells which
            batch norm was folded into which weight.
        masks: which entries survive (True), by parameter name; None counts every floating-point
            parameter of two or more dimensions that holds a zero as pruned.
        strict: raise when a parameter is missing or lost a weight.

    Returns:
        Verification: a record per pruned parameter.

    Raises:
        VerificationError: strict, and something is missing or differs; carries ``.report``.
        ValueError: nothing is pruned, or a mask doesn't fit.

    Example:
        >>> verify_coreml("net.mlpackage", model).ok  # doctest: +SKIP
        True
    """
    if isinstance(model_or_params, nn.Module):
        params: dict[str, Tensor] = dict(model_or_params.named_parameters(remove_duplicate=False))
        scales = batch_norm_scales(model_or_params)
    else:
        params, scales = dict(model_or_params), {}
    check_weights(params)
    pruned = pruned_parameters(params, masks)
    result, _ = verify(Package(package_path(path)), pruned, scales)
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


def match(
    stored: Iterable[Stored],
    weights: Mapping[str, Tensor],
    scales: Mapping[str, NDArray[Any]],
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
    scales: Mapping[str, NDArray[Any]],
    others: Mapping[str, Tensor] | None = None,
    *,
    min_sparsity: float | None = None,
    compress: str | None = None,
    seen: Hashes | None = None,
) -> tuple[Verification, dict[str, list[Part]]]:
    """Match every pruned weight and describe what was found; ``others`` are matched only."""
    stored = package.stored()
    parts = match(stored, {**weights, **(others or {})}, scales, seen)
    rows = tuple(
        _record(name, weight, parts, min_sparsity=min_sparsity, compress=compress)
        for name, weight in weights.items()
    )
    blobs: dict[tuple[str, Any], int] = {}
    for one in stored:
        blobs |= one.blobs
    dense = sum({tuple(s.blobs): s.numel * np.dtype(s.dtype).itemsize for s in stored}.values())
    return Verification(rows, sum(blobs.values()), dense), parts


def _record(
    name: str,
    weight: Tensor,
    parts: Mapping[str, list[Part]],
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
        reasons = ["no stored tensor holds its values"]
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
