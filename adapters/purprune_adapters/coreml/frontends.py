"""From a torch module to a dense Core ML model, by torch.export or by tracing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExportError
from .quiet import Captured, quiet

__all__ = ["BATCH_NORMS", "Converted", "convert_dense", "flatten", "private_copy"]

_METADATA = "_COREML_/"

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Converted:
    """A dense Core ML model and the way it was made.

    Attributes:
        model: the ``MLModel``; its package lies in a temporary folder.
        frontend: "torch.export", "torch.jit.trace" or "torch.export, core decompositions".
        reason: why that one.
        warnings: what the user should know about it.
    """

    model: Any
    frontend: str
    reason: str
    warnings: tuple[str, ...]


def flatten(outputs: Any) -> list[Tensor]:
    """The tensors of a nested output, depth first; what else it holds, like texts, is left out."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, str | bytes):  # each letter is a text again
        return []
    if isinstance(outputs, dict):
        outputs = outputs.values()
    if isinstance(outputs, tuple | list) or hasattr(outputs, "__iter__"):
        return [tensor for one in outputs for tensor in flatten(one)]
    return []


def private_copy(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU, in eval mode, without coremltools' pruning metadata."""
    copied = copy.deepcopy(model).cpu().float().eval()
    for module in copied.modules():
        for name in [n for n, _ in module.named_buffers(recurse=False) if n.startswith(_METADATA)]:
            delattr(module, name)
    # Attention layers take a fused path, which no converter knows, when nothing needs gradients.
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied


class _Flat(nn.Module):
    """The model with its outputs flattened.

    As a submodule, an RNN is traced with constant sizes; at the top it isn't, and fails to convert.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        outputs = flatten(self.model(*inputs))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    # torch 2.7 is strict by default, and then gives up after eight models of a class in a process.
    return torch.export.export(model, inputs, strict=False).run_decompositions({})


def _export_core(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.export.export(model, inputs, strict=False).run_decompositions()


def _trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.jit.trace(  # type: ignore[no-untyped-call]
        _Flat(model).eval(), inputs, check_trace=False
    )


_WAYS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Any]] = {
    "torch.export": _export,
    "torch.jit.trace": _trace,
    "torch.export, core decompositions": _export_core,
}


def _plan(model: nn.Module, frontend: str, *, flexible: bool) -> tuple[list[str], str]:
    """The ways to try, and the reason for the first."""
    export, trace, core = _WAYS
    if frontend == "export":
        return [export, core], "frontend='export'"
    if frontend == "trace":
        return [trace], "frontend='trace'"
    if flexible:
        return [trace], "inputs= was given, which only tracing takes"
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            where = f"'{name}'" if name else "the model"
            return [trace, core], f"{where} is of type {type(module).__name__}: tracing comes first"
    return [export, trace, core], "the default"


def input_types(
    coremltools: Any, model: nn.Module, inputs: Sequence[Tensor], names: Sequence[str] | None
) -> list[Any]:
    """One ``ct.TensorType`` per input, named like the arguments of ``forward``."""
    import numpy as np

    if names is None:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.signature(model.forward).parameters.values()
        named = [p.name for p in signature if p.kind in kinds]
        names = named if len(named) >= len(inputs) else [f"input_{i}" for i in range(len(inputs))]
    return [
        coremltools.TensorType(
            name=name,
            shape=tuple(one.shape),
            dtype=np.float32 if one.is_floating_point() else np.int32,
        )
        for name, one in zip(names, inputs, strict=False)
    ]


def convert_dense(
    coremltools: Any,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    outputs: Sequence[Tensor],
    *,
    frontend: str,
    target: Any,
    precision: Any,
    types: list[Any] | None,
    input_names: Sequence[str] | None,
) -> Converted:
    """Convert a private copy to a dense ML program.

    Raises:
        ExportError: no way worked; tells why of each, with the captured text.
    """
    import numpy as np

    ways, reason = _plan(model, frontend, flexible=types is not None)
    floats = all(one.is_floating_point() for one in outputs)
    options: dict[str, Any] = {
        "minimum_deployment_target": target,
        "compute_precision": precision,
        "skip_model_load": True,
    }
    if floats:  # without a type, outputs become float16 for iOS16 and later
        options["outputs"] = [coremltools.TensorType(dtype=np.float32) for _ in outputs]
    failures: list[str] = []
    notes: list[str] = []
    if _folds_wrongly(model):
        options["pass_pipeline"] = _without_folding(coremltools)
        notes.append(
            "batch norm was left unfolded: coremltools folds it wrongly into transposed "
            "convolutions with groups"
        )
    for way in ways:
        extra = dict(options)
        if way == "torch.jit.trace":
            extra["inputs"] = types or input_types(coremltools, model, inputs, input_names)
        with quiet() as captured, torch.enable_grad():
            try:
                made = coremltools.convert(_WAYS[way](model, inputs), **extra)
            except Exception as error:
                failures.append(_failure(way, error, captured))
                continue
        if failures:
            reason = f"{failures[0].splitlines()[0]}; it was tried first ({reason})"
        return Converted(made, way, reason, (*notes, *_notes(captured)))
    raise ExportError("coremltools could not convert the model.\n" + "\n".join(failures))


def _folds_wrongly(model: nn.Module) -> bool:
    """Whether coremltools' fold of batch norm may mix up channels.

    It takes the channels of a transposed convolution with groups in another order (9.0).
    """
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    modules = list(model.modules())
    grouped = any(isinstance(m, transposed) and m.groups > 1 for m in modules)
    return grouped and any(isinstance(m, BATCH_NORMS) for m in modules)


def _without_folding(coremltools: Any) -> Any:
    pipeline = coremltools.PassPipeline.DEFAULT
    pipeline.remove_passes({"common::fuse_conv_batchnorm"})
    return pipeline


def _failure(way: str, error: Exception, captured: Captured) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{way} failed: {type(error).__name__}: {first}"
    return f"{text}\n{captured.tail(12)}"


def _inside_torch(filename: str) -> bool:
    """torch's own layers check shapes while they are traced, which is harmless."""
    return Path(torch.__file__).parent in Path(filename).parents


def _notes(captured: Captured) -> tuple[str, ...]:
    """Warnings of the tracer that change what the program computes."""
    return tuple(
        dict.fromkeys(
            f"the tracer says: {str(w.message).splitlines()[0]}"
            for w in captured.warnings
            if w.category.__name__ == "TracerWarning" and not _inside_torch(w.filename)
        )
    )
