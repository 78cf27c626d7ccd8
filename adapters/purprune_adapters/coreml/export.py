"""Exporting a pruned torch model to a Core ML package, and proving what was exported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .checks import (
    as_inputs,
    check_model,
    check_options,
    check_weights,
    pruned_parameters,
    resolve_target,
)
from .frontends import private_copy
from .interface import Names
from .numeric import NumericalCheck, check_numbers, reference_weights
from .package import Package, folder_bytes
from .paths import destination, staged
from .pipeline import (
    Options,
    convert,
    dense_sizes,
    raise_if_different,
    read_back,
    save,
    sparsify,
    upcast_notes,
    versions,
)
from .progress import stages
from .quiet import load_coremltools
from .report import ExportReport
from .verify import Hashes, raise_if_damaged

__all__ = ["export_coreml"]

_NONE = (None, None)
_NOT_RUN: tuple[NumericalCheck, tuple[str, ...]] = (NumericalCheck("not run"), ())


def export_coreml(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    path: str | os.PathLike[str],
    *,
    masks: Mapping[str, Tensor] | None = None,
    target: Any = "iOS16",
    precision: str = "float16",
    keep_float32: Sequence[str] = (),
    compress: str | None = None,
    min_sparsity: float | None = None,
    frontend: str = "auto",
    inputs: Sequence[Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    strict: bool = True,
    overwrite: bool = False,
    check: bool = True,
    compare_dense: bool = True,
    progress: bool | None = None,
) -> ExportReport:
    """Convert a pruned model, store its zeros as bit masks, read it back and check it.

    The model is converted dense, so batch norm still folds into convolutions. Then exactly the
    constants that hold pruned weights are stored sparse, with threshold 0: no surviving weight is
    lost. The package is saved beside ``path``, read back, checked, and renamed into place; a
    failure leaves what was there. ``model`` is never modified.

    Bytes of a sparse tensor of n entries with k survivors: n / 8 + 2 k in float16, n / 8 + 4 k in
    float32, and about 200 more. Below 6.25 % zeros (3.1 %) it would grow, and stays dense.

    Args:
        model: a finalized model (zeros in its weights) in eval mode.
        example_inputs: what ``model`` is called with; also the data of the numerical check.
        path: ends in ``.mlpackage``, which is added where there is no suffix; ``~`` expands.
        masks: which entries survive (True), by parameter name. None counts every floating-point
            parameter of two or more dimensions that holds a zero as pruned.
        target: "iOS16", "macOS13" or later, or a ``coremltools.target``.
        precision: of stored weights and activations, "float16" or "float32".
        keep_float32: MIL operation types that compute in float32 in a float16 package.
        compress: for iOS18 and later, what the survivors become: "int8", "int4", "palette4",
            "palette6" or "palette8". Only pruned weights that are stored sparse are compressed.
        min_sparsity: fraction of zeros from which on a weight is stored sparse; None stores it
            sparse whenever that is smaller.
        frontend: "auto" takes torch.export, and tracing when that fails; models with an RNN are
            traced first. "export" or "trace" takes that one.
        inputs: ``coremltools.TensorType`` objects, for flexible shapes; implies tracing,
            and can't go with frontend="export".
        input_names, output_names: names in the package, of letters, digits and underscores, each
            for one tensor; None keeps the converter's.
        strict: raise when a weight is missing or lost, when it is scaled by factors that neither a
            batch norm of the model nor a passed check accounts for, or when the numbers differ.
            False reports.
        overwrite: replace an existing Core ML package.
        check: compare the saved program with torch on ``example_inputs``.
        compare_dense: report the size of the same package stored dense.
        progress: show a progress bar; None shows it when stderr is a terminal.

    Returns:
        ExportReport: print it, or use ``as_dict()``.

    Raises:
        ImportError: coremltools is missing.
        TypeError, ValueError: an argument, the model or a mask doesn't fit; nothing was written.
        FileExistsError, FileNotFoundError: ``path`` can't be used.
        ExportError: the conversion failed; holds what coremltools printed.
        VerificationError: strict, and the package isn't the model; ``.report`` tells what.

    Example:
        >>> report = export_coreml(model, torch.rand(1, 1, 28, 28), "net")  # doctest: +SKIP
        >>> report.weight_bytes < 0.45 * report.dense_weight_bytes  # doctest: +SKIP
        True
    """
    coremltools = load_coremltools()
    target = resolve_target(coremltools, target)
    check_options(
        coremltools,
        target,
        precision=precision,
        compress=compress,
        frontend=frontend,
        min_sparsity=min_sparsity,
        keep_float32=keep_float32,
        flexible=inputs is not None,
    )
    names = Names(input_names, output_names)
    check_model(model)
    params = dict(model.named_parameters(remove_duplicate=False))
    pruned = pruned_parameters(params, masks)
    example = as_inputs(example_inputs)
    check_weights(params, precision=precision)
    full = destination(path, overwrite=overwrite)
    options = Options(target, precision, tuple(keep_float32), compress, min_sparsity, frontend)
    with stages(progress, 4 if check else 3) as begin:
        begin("convert")
        copied = private_copy(model)
        dense = convert(coremltools, copied, example, options, names, inputs)
        begin("store sparse")
        weights = {name: tensor.cpu().float() for name, tensor in pruned.items()}
        seen: Hashes = {}
        sparse = sparsify(coremltools, dense.model, copied, weights, options, seen)
        with staged(full, overwrite=overwrite) as fresh:
            save(coremltools, sparse, fresh, names)
            begin("read back")
            package = Package(fresh)
            verification, parts = read_back(package, copied, weights, options, seen)
            result, advice = _NOT_RUN
            if check:
                begin("check numbers")
                reference_weights(copied, parts, precision=precision)
                result, advice = check_numbers(package, copied, example)
                verification = verification.confirmed() if result.passed else verification
            dense_bytes, dense_weight_bytes = dense_sizes(dense.model) if compare_dense else _NONE
            report = ExportReport(
                path=full,
                target=target.name,
                precision=precision,
                frontend=dense.frontend,
                frontend_reason=dense.reason,
                verification=verification,
                check=result,
                package_bytes=folder_bytes(fresh),
                dense_package_bytes=dense_bytes,
                dense_weight_bytes=dense_weight_bytes,
                compress=compress,
                warnings=(*upcast_notes(params), *dense.warnings, *advice),
                versions=versions(),
            )
            if strict:
                raise_if_damaged(verification, report, str(full))
                raise_if_different(report)
    return report
