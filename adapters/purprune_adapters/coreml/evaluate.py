"""Evaluating a saved ML program with torch operations, on any system."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import as_inputs
from .constexpr import DECODERS
from .ops import OPS, Args
from .package import Package
from .paths import package_path

__all__ = ["NonFinite", "Run", "UnknownOpError", "evaluate_coreml", "run"]


class UnknownOpError(NotImplementedError):
    """The evaluator doesn't know an operation; ``.op`` is its MIL type."""

    def __init__(self, op: str, detail: str = "") -> None:
        """Name the operation; ``detail`` says what of it is unknown."""
        super().__init__(f"the evaluator does not know op {op}{detail}")
        self.op = op


class MisfitError(ValueError):
    """Inputs or outputs of the program don't correspond to those of the model."""


@dataclass(frozen=True)
class NonFinite:
    """The first operation that made inf or NaN of finite inputs.

    Attributes:
        op: its MIL type.
        name: the name of its output.
        feeders: the MIL types of the operations that fed it, casts left out.
        count: how many entries.
    """

    op: str
    name: str
    feeders: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Run:
    """The outputs of a program, and the first place where numbers stopped being finite."""

    outputs: dict[str, Tensor]
    nonfinite: NonFinite | None


def evaluate_coreml(
    path: str | os.PathLike[str],
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    compute: str = "float32",
) -> dict[str, Tensor]:
    """Compute the outputs of a saved package with torch.

    This runs the saved program and its stored weights, not Core ML: it tells what the package
    computes, not how a device rounds, or how fast.

    Args:
        path: the ``.mlpackage``.
        inputs: tensors in the order of the program's inputs, or by name.
        compute: "float32" computes everything in float32; "declared" rounds the output of every
            operation to the type that the program declares for it.

    Returns:
        The outputs by name; floats as float32, integers as int64.

    Raises:
        UnknownOpError: the program holds an operation that isn't implemented here.
        ValueError: unknown ``compute``.
        MisfitError: a ValueError, when inputs don't fit.

    Example:
        >>> evaluate_coreml("net.mlpackage", torch.rand(1, 1, 28, 28))  # doctest: +SKIP
        {'log_softmax': tensor([[...]])}
    """
    if not isinstance(inputs, Mapping):
        inputs = as_inputs(inputs)
    return run(Package(package_path(path)), inputs, compute=compute).outputs


def run(
    package: Package,
    inputs: Sequence[Tensor] | Mapping[str, Tensor],
    *,
    compute: str,
    constants: dict[str, Any] | None = None,
) -> Run:
    """``evaluate_coreml`` for a package that was read, with the first non-finite place.

    Decoded constants are kept in ``constants``, for another run of the same package.
    """
    if compute not in ("float32", "declared"):
        raise ValueError(f"Expected compute to be 'float32' or 'declared'; got {compute!r}.")
    names = package.input_names
    if not isinstance(inputs, Mapping):
        inputs = dict(zip(names, inputs, strict=False)) if len(inputs) == len(names) else {}
    if set(inputs) != set(names):
        raise MisfitError(f"Expected inputs {names}; got {sorted(inputs)} (or another number).")
    for name, shape in package.fixed_shapes.items():
        if tuple(inputs[name].shape) != shape:
            raise MisfitError(
                f"Expected {name!r} of shape {shape}; got {tuple(inputs[name].shape)}. The package "
                f"was exported for one shape: run one after the other, or export with inputs=."
            )
    values = {
        name: one.float() if one.is_floating_point() else one.long() for name, one in inputs.items()
    }
    constants = {} if constants is None else constants
    machine = _Machine(package, values, constants, declared=compute == "declared")
    with torch.no_grad():
        machine.block(package.block)
    return Run({name: machine.get(name) for name in package.output_names}, machine.nonfinite)


def _tensor(value: Any) -> Any:
    """A decoded constant as torch holds it here: float32, int64 or bool; text stays text."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    array = np.asarray(value)
    if array.dtype == np.bool_:
        return torch.from_numpy(array.copy())
    if array.dtype == np.float16:  # torch converts faster
        return torch.from_numpy(np.array(array)).float()
    to = np.float32 if array.dtype.kind == "f" else np.int64
    return torch.from_numpy(array.astype(to))


class _Machine:
    """Runs the operations of a program in order."""

    def __init__(
        self,
        package: Package,
        values: dict[str, Any],
        constants: dict[str, Any],
        *,
        declared: bool,
    ) -> None:
        self.package = package
        self.values = values
        self.constants = constants
        self.declared = declared
        self.makers: dict[str, Any] = {}
        self.nonfinite: NonFinite | None = None
        self._control: dict[str, Callable[[Any], list[Any]]] = {
            "while_loop": self._while_loop,
            "cond": self._cond,
        }

    def get(self, name: str) -> Any:
        """A value by name; constants are decoded when they are first used."""
        if name in self.values:
            return self.values[name]
        if name not in self.constants:
            self.constants[name] = _tensor(self.package.constant(name))
        return self.constants[name]

    def block(self, block: Any) -> list[Any]:
        """Run a block and return its outputs."""
        for op in block.operations:
            if op.type != "const" and op.type not in DECODERS:
                self._run(op)
        return [self.get(name) for name in block.outputs]

    def _run(self, op: Any) -> None:
        if op.type in self._control:
            results = self._control[op.type](op)
        elif op.type in OPS:
            arguments = self._arguments(op)
            try:
                results = OPS[op.type](arguments)
            except NotImplementedError as error:
                raise UnknownOpError(op.type, f" ({error})") from error
            results = list(results) if isinstance(results, tuple) else [results]
        else:
            raise UnknownOpError(op.type)
        for output, result in zip(op.outputs, results, strict=False):
            self.values[output.name] = self._rounded(output, result)
            self.makers[output.name] = op
        if self.declared and self.nonfinite is None and op.type not in self._control:
            self._look(op)

    def _arguments(self, op: Any) -> Args:
        found = Args()
        for key, argument in op.inputs.items():
            bound = [
                self.get(b.name) if b.name else _tensor(self.package.value(b.value))
                for b in argument.arguments
            ]
            found[key] = bound if key == "values" or len(bound) != 1 else bound[0]
        return found

    def _rounded(self, output: Any, result: Any) -> Any:
        tensor = output.type.tensorType
        kinds = type(tensor).DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number
        if not self.declared or kinds[tensor.dataType].name != "FLOAT16":
            return result
        return result.half().float()

    def _look(self, op: Any) -> None:
        """Remember the first operation whose finite inputs gave inf or NaN."""
        made = [self.values[o.name] for o in op.outputs if o.name in self.values]
        count = sum(int((~torch.isfinite(v)).sum()) for v in made if v.is_floating_point())
        if not count:
            return
        fed = [b.name for a in op.inputs.values() for b in a.arguments if b.name]
        for name in fed:
            value = self.get(name)
            if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                return
        feeders = dict.fromkeys(t for name in fed for t in self._feeder(name))
        self.nonfinite = NonFinite(op.type, op.outputs[0].name, tuple(feeders), count)

    def _feeder(self, name: str) -> list[str]:
        op = self.makers.get(name)
        if op is None:
            return []
        if op.type == "cast":
            return self._feeder(op.inputs["x"].arguments[0].name)
        return [op.type]

    def _inner(self, block: Any, state: Sequence[Any]) -> list[Any]:
        for given, value in zip(block.inputs, state, strict=True):
            self.values[given.name] = value
        return self.block(block)

    def _while_loop(self, op: Any) -> list[Any]:
        state = [self.get(b.name) for b in op.inputs["loop_vars"].arguments]
        condition, body = op.blocks
        while bool(self._inner(condition, state)[0]):
            state = self._inner(body, state)
        return state

    def _cond(self, op: Any) -> list[Any]:
        chosen = self.get(op.inputs["pred"].arguments[0].name)
        return self.block(op.blocks[0 if bool(chosen) else 1])
