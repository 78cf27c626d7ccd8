"""The stages of an export, each a function from values to values."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ExportError, VerificationError
from .frontends import Converted, convert_dense, flatten
from .interface import Names, check_features, rename_features
from .matching import Part
from .package import Package, folder_bytes
from .quiet import quiet
from .records import Verification
from .report import ExportReport
from .storage import compress_weights, store_sparse, why_dense
from .verify import Hashes, batch_norm_scales, match, matrices, verify

__all__ = [
    "Options",
    "convert",
    "dense_sizes",
    "raise_if_different",
    "read_back",
    "save",
    "sparsify",
    "upcast_notes",
    "versions",
]

# Written beside a model that comes straight from torch.export; Core ML doesn't read it.
_DEBUG_MAP = "executorch_debug_handle_mapping.json"


@dataclass(frozen=True)
class Options:
    """The checked options of an export; ``export_coreml`` documents them."""

    target: Any
    precision: str
    keep_float32: tuple[str, ...]
    compress: str | None
    min_sparsity: float | None
    frontend: str


def upcast_notes(params: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A note when the model isn't float32, because a float32 copy is exported."""
    kinds = {
        str(p.dtype).removeprefix("torch.")
        for p in params.values()
        if p.is_floating_point() and p.dtype != torch.float32
    }
    words = " and ".join(sorted(kinds))
    return (f"the model holds {words} weights; a float32 copy was exported",) if kinds else ()


def _precision(coremltools: Any, options: Options) -> Any:
    if options.precision == "float32":
        return coremltools.precision.FLOAT32
    if not options.keep_float32:
        return coremltools.precision.FLOAT16
    keep = frozenset(options.keep_float32)
    return coremltools.transform.FP16ComputePrecision(op_selector=lambda op: op.op_type not in keep)


def convert(
    coremltools: Any,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    options: Options,
    names: Names,
    types: Sequence[Any] | None,
) -> Converted:
    """Run the model once, then convert it dense."""
    with torch.no_grad(), quiet() as captured:
        try:
            outputs = flatten(model(*inputs))
        except Exception as error:
            raise ExportError(
                f"The model does not run on example_inputs: {type(error).__name__}: {error}\n"
                f"{captured.tail()}"
            ) from error
    for what, given, count in (
        ("input_names", names.inputs, len(inputs)),
        ("output_names", names.outputs, len(outputs)),
    ):
        if given is not None and len(given) != count:
            raise ValueError(f"Expected {count} different {what}; got {list(given)!r}.")
    if not outputs:
        raise ExportError("Expected a model that returns tensors; it returns none.")
    dense = convert_dense(
        coremltools,
        model,
        inputs,
        outputs,
        frontend=options.frontend,
        target=options.target,
        precision=_precision(coremltools, options),
        types=list(types) if types is not None else None,
        input_names=names.inputs,
    )
    check_features(dense.model.get_spec(), names)
    return dense


def sparsify(
    coremltools: Any,
    dense: Any,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    options: Options,
    seen: Hashes,
) -> Any:
    """Store the constants that hold pruned weights sparse, where that pays, and compress them."""
    stored = Package(dense.package_path).stored()
    chosen: dict[str, None] = {}
    for parts in match(stored, weights, batch_norm_scales(model), seen).values():
        for part in parts:
            one = part.stored
            why = why_dense(
                one.shape,
                one.nonzeros,
                np.dtype(one.dtype).itemsize,
                min_sparsity=options.min_sparsity,
                compress=options.compress,
            )
            if why is None:
                chosen[one.name] = None
    if not chosen:
        return dense
    with quiet() as captured:
        try:
            sparse = store_sparse(coremltools, dense, list(chosen))
            if options.compress is None:
                return sparse
            return compress_weights(coremltools, sparse, _sparse_names(sparse), options.compress)
        except Exception as error:
            raise ExportError(
                f"coremltools could not store the weights sparse: {type(error).__name__}: "
                f"{error}\n{captured.tail()}"
            ) from error


def _sparse_names(model: Any) -> list[str]:
    """The outputs of all sparse constants, those of nested blocks included."""

    def walk(block: Any) -> list[str]:
        found = []
        for op in block.operations:
            if op.type == "constexpr_sparse_to_dense":
                found.append(op.outputs[0].name)
            for inner in op.blocks:
                found += walk(inner)
        return found

    function = model.get_spec().mlProgram.functions["main"]
    return walk(function.block_specializations[function.opset])


def save(coremltools: Any, model: Any, path: Path, names: Names) -> None:
    """Rename inputs and outputs where asked, and write the package."""
    with quiet() as captured:
        try:
            spec = model.get_spec()
            if rename_features(spec, names):
                model = coremltools.models.MLModel(
                    spec, weights_dir=model.weights_dir, skip_model_load=True
                )
            model.save(str(path))
            (path / _DEBUG_MAP).unlink(missing_ok=True)
        except Exception as error:
            raise ExportError(
                f"coremltools could not write the package: {type(error).__name__}: {error}\n"
                f"{captured.tail()}"
            ) from error


def read_back(
    package: Package,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    options: Options,
    seen: Hashes,
) -> tuple[Verification, dict[str, list[Part]]]:
    """Verify the pruned weights; find the others too, so that the numbers compare tightly."""
    others = matrices(dict(model.named_parameters(remove_duplicate=False)), weights)
    return verify(
        package,
        weights,
        batch_norm_scales(model),
        others,
        min_sparsity=options.min_sparsity,
        compress=options.compress,
        seen=seen,
    )


def dense_sizes(dense: Any) -> tuple[int, int]:
    """Bytes of the dense package and of its weights."""
    package = Package(dense.package_path)
    blobs: dict[tuple[str, Any], int] = {}
    for one in package.stored():
        blobs |= one.blobs
    # Some metadata is added to the specification after it was put down there.
    on_disk = package.path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    extra = dense.get_spec().ByteSize() - on_disk.stat().st_size
    return folder_bytes(package.path) + extra, sum(blobs.values())


def versions() -> dict[str, str]:
    """The versions that made the package; a package without metadata is left out."""
    found = {}
    for name in ("torch", "coremltools", "purprune"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def raise_if_different(report: ExportReport) -> None:
    """Raise a ``VerificationError`` when the saved program computes something else."""
    check = report.check
    if check.failed:
        narrow = (
            " Constants beyond 65,504, such as variances of norms, are inf in float16: try "
            "precision='float32'."
        )
        raise VerificationError(
            f"Expected '{report.path}' to compute what the model computes; in float32 arithmetic "
            f"the largest error is {check.error:.3g} of the output's scale, and "
            f"{check.tolerance:g} is allowed. The error's .report has the details; strict=False "
            f"returns it instead.{narrow if report.precision == 'float16' else ''}",
            report,
        )
