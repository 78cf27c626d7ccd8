"""Does the saved program compute what the torch model computes? Checked without Apple hardware."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .evaluate import MisfitError, NonFinite, Run, UnknownOpError, run
from .frontends import flatten
from .matching import Part
from .package import Package
from .quiet import load_coremltools, quiet

__all__ = ["TOLERANCE", "NumericalCheck", "check_numbers", "reference_weights"]

#: Largest error allowed, as a fraction of the largest magnitude of the output. The stored weights
#: are put into both sides, so what is left is the order of float32 sums (about 1e-6) and single
#: roundings to float16 of biases and folded constants (2**-11 = 4.9e-4 each).
TOLERANCE = 1e-3


@dataclass(frozen=True)
class NumericalCheck:
    """The saved program against the torch model, on the example inputs.

    Attributes:
        status: "passed", "failed", "not run" or "not checked: ...".
        error: largest absolute difference in float32 arithmetic, over ``scale``.
        scale: largest magnitude of the torch outputs.
        tolerance: what ``error`` is allowed to be.
        declared_error: the same in the declared precision, rounded after every operation.
        declared_nonfinite: entries of the outputs that are inf or NaN there, but not in torch.
        predict: what Core ML itself said; runs on macOS only.
    """

    status: str
    error: float | None = None
    scale: float | None = None
    tolerance: float = TOLERANCE
    declared_error: float | None = None
    declared_nonfinite: int = 0
    predict: str = "not run (needs macOS)"

    @property
    def passed(self) -> bool:
        """Whether something was compared, and agreed."""
        return self.status == "passed"

    @property
    def failed(self) -> bool:
        """Whether the program computes something else."""
        return self.status.startswith("failed")

    def as_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return asdict(self)


def reference_weights(
    model: nn.Module, parts: Mapping[str, Sequence[Part]], *, precision: str
) -> None:
    """Write into ``model`` (a private copy) the values that the package stores, in place.

    Weights that were found get their stored values, without the folded scale; everything else is
    rounded to the package's precision, except what was folded or stays in float32. Weights whose
    factors nothing explains stay as they are, so that the check of these factors is independent.
    """
    exempt = {p.norm for found in parts.values() for p in found if p.norm}
    for name, found in parts.items():
        if any(p.norm or p.stored.dtype == "float32" for p in found):
            exempt.add(name.rpartition(".")[0])
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            if stored := parts.get(name):
                if any(p.unexplained for p in stored):
                    continue  # a factor read off rounded values would blur a whole channel
                if all(p.exact for p in stored):
                    tensor.copy_(tensor.to(getattr(torch, stored[0].stored.dtype)).float())
                    continue
                for p in stored:
                    old = tensor[p.rows].detach().numpy()
                    tensor[p.rows] = torch.from_numpy(np.array(p.restored(old)))
            elif precision == "float16" and name.rpartition(".")[0] not in exempt:
                tensor.copy_(tensor.half().float())


def check_numbers(
    package: Package, model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[NumericalCheck, tuple[str, ...]]:
    """Compare the program with a model that holds its weights.

    Returns:
        The result, and warnings about the declared precision.
    """
    with torch.no_grad(), quiet():
        wanted = flatten(model(*inputs))
    try:
        constants: dict[str, object] = {}
        plain = run(package, inputs, compute="float32", constants=constants)
        if len(plain.outputs) != len(wanted):
            words = f"{len(plain.outputs)} outputs in the package, {len(wanted)} in torch"
            return NumericalCheck(f"not checked: {words}"), ()
        error, scale = _compare(plain, wanted)
        declared = run(package, inputs, compute="declared", constants=constants)
    except UnknownOpError as unknown:
        return NumericalCheck(f"not checked: op {unknown.op}"), (str(unknown),)
    except MisfitError as misfit:
        return NumericalCheck(f"not checked: {misfit}"), ()
    rough, _ = _compare(declared, wanted)
    bad = sum(
        int((~torch.isfinite(got) & torch.isfinite(want)).sum())
        for got, want in zip(declared.outputs.values(), wanted, strict=True)
    )
    predict, said = _predict(package, inputs, wanted)
    warnings = [_advice(declared.nonfinite, bad)] if bad else []
    status = _blank(wanted) or "passed"
    if error > TOLERANCE and not status.endswith("NaN"):
        status = "failed: the package computes something else"
    check = NumericalCheck(status, error, scale, TOLERANCE, rough, bad, predict)
    return check, (*warnings, *said)


def _blank(wanted: Sequence[Tensor]) -> str:
    """Why the outputs of torch can't tell one program from another; empty when they can."""
    flat = torch.cat([one.detach().reshape(-1).double() for one in wanted])
    if bool((torch.isfinite(flat) & (flat != 0)).any()):
        return ""
    if not bool(torch.isfinite(flat).all()):
        return f"not checked: torch's own outputs are {'NaN' if flat.isnan().any() else 'inf'}"
    return "not checked: the model's outputs are all zero on example_inputs"


def _compare(got: Run, wanted: Sequence[Tensor]) -> tuple[float, float]:
    """The largest error over the scale of its output, and the largest scale."""
    worst, largest = 0.0, 0.0
    for one, want in zip(got.outputs.values(), wanted, strict=True):
        if one.numel() != want.numel():
            raise MisfitError(f"shapes differ: {tuple(one.shape)} and {tuple(want.shape)}")
        one, want = one.reshape(want.shape).double(), want.double()
        equal = (one == want) | (one.isnan() & want.isnan())
        finite = want[torch.isfinite(want)]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        error = (one - want).abs().masked_fill(equal, 0.0).nan_to_num(nan=float("inf"))
        top = float(error.max()) if error.numel() else 0.0
        worst = max(worst, top / scale if scale else (float("inf") if top else 0.0))
        largest = max(largest, scale)
    return worst, largest


def _advice(where: NonFinite | None, count: int) -> str:
    """What to do about inf or NaN in the declared precision."""
    if where is None:
        return f"in the declared precision {count} outputs are inf or NaN; try precision='float32'"
    keep = [f for f in where.feeders if f in ("softmax", "exp", "reduce_sum", "pow", "mul", "sqrt")]
    names = ", ".join(repr(name) for name in dict.fromkeys([*keep, where.op]))
    names += "," if len(keep) == 0 else ""
    return (
        f"in the declared precision {count} outputs are inf or NaN; the first comes from op "
        f"{where.op} ('{where.name}', {where.count} entries). keep_float32=({names}) keeps it in "
        "float32"
    )


def _predict(
    package: Package, inputs: tuple[Tensor, ...], wanted: Sequence[Tensor]
) -> tuple[str, tuple[str, ...]]:
    """Let Core ML itself compute, where it can."""
    if sys.platform != "darwin":
        return "not run (needs macOS)", ()
    coremltools = load_coremltools()
    feed = {
        name: one.numpy().astype(np.float32 if one.is_floating_point() else np.int32)
        for name, one in zip(package.input_names, inputs, strict=True)
    }
    try:
        with quiet():
            said = coremltools.models.MLModel(str(package.path)).predict(feed)
        got = Run({n: torch.from_numpy(np.asarray(said[n])) for n in package.output_names}, None)
        error, _ = _compare(got, wanted)
    except Exception as problem:
        return f"failed: {problem}", (f"Core ML could not predict: {problem}",)
    rough = (f"Core ML's own outputs differ by {error:.2g} of the scale",) if error > 0.05 else ()
    return f"largest error {error:.2g} of the scale", rough
