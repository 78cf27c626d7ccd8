"""Reading a saved Core ML package on any system: the program and its stored weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constexpr import BITS, DECODERS, NUMPY_TYPES, unpack
from .layouts import count_nonzero
from .paths import is_package
from .quiet import load_coremltools, quiet

__all__ = ["Package", "Stored", "folder_bytes"]

Array = NDArray[Any]

# Each record in weight.bin starts with these 64 bytes; the data stands at "offset".
_RECORD = np.dtype(
    [("sentinel", "<u4"), ("dtype", "<u4"), ("size", "<u8"), ("offset", "<u8"), ("rest", "V40")]
)
_SENTINEL = 0xDEADBEEF

# Decoded weights are looked at several times; up to so many bytes are kept.
_KEPT = 256 * 2**20


def folder_bytes(folder: Path) -> int:
    """The sizes of all files below ``folder``, added up (bytes)."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _element_type(value: Any) -> str:
    tensor = value.type.tensorType
    name: str = (
        type(tensor)
        .DESCRIPTOR.fields_by_name["dataType"]
        .enum_type.values_by_number[tensor.dataType]
        .name
    )
    return name


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(d.constant.size) for d in value.type.tensorType.dimensions)


@dataclass(frozen=True)
class Stored:
    """One weight as the program sees it, whatever it is stored as.

    Attributes:
        name: the MIL name of the value.
        shape: its shape after decoding.
        dtype: ``"float16"`` or ``"float32"``, the type after decoding.
        kind: ``"dense"``, ``"sparse"``, ``"int8"``, ``"sparse + int8"``, ``"sparse + palette4"``...
        blobs: bytes by place in the weight file; tensors may share a place. Weights that stand in
            the program itself (fewer than 10 entries) have the place ``("program", name)``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    blobs: Mapping[tuple[str, Any], int]
    package: Package = field(repr=False, compare=False)

    @property
    def numel(self) -> int:
        """Entries, as an int."""
        return math.prod(self.shape)

    @property
    def sparse(self) -> bool:
        """Whether zeros are stored as a bit mask."""
        return self.kind.startswith("sparse")

    @property
    def lossy(self) -> bool:
        """Whether values were quantized or palettized."""
        return self.kind not in ("dense", "sparse")

    @property
    def nonzeros(self) -> int:
        """Decoded values that aren't zero, counted once."""
        counts = self.package.nonzeros
        if self.name not in counts:
            counts[self.name] = count_nonzero(self.array())
        return counts[self.name]

    def array(self) -> Array:
        """The decoded values."""
        return np.asarray(self.package.constant(self.name))

    def mask(self) -> Array:
        """Where the package holds a value: the bit mask if there is one, else the nonzeros."""
        if not self.sparse:
            return np.asarray(self.array() != 0)
        op = self.package.producers[self.name]
        arguments = self.package.arguments(op)
        if "shape" not in arguments:
            return np.asarray(arguments["mask"]).astype(bool)
        bits = unpack(arguments["mask"], self.numel, 1)
        return np.asarray(bits.reshape(self.shape), dtype=bool)


class Package:
    """A saved ``.mlpackage`` with an ML program in it, read without the Core ML runtime.

    Attributes:
        path: the package's folder.
        spec: the protobuf specification.
        block: the main function's operations.
        producers: the op that makes each constant, by the constant's name.
        nonzeros: counts of ``Stored.nonzeros``, kept.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the specification; weights are read when they are asked for.

        Raises:
            FileNotFoundError: there is no Core ML package.
            ValueError: it holds something else than an ML program.
        """
        self.path = Path(path).expanduser()
        if not is_package(self.path):
            raise FileNotFoundError(
                f"Expected a Core ML package; '{self.path}' has no Manifest.json and "
                "Data/com.apple.CoreML."
            )
        coremltools = load_coremltools()
        with quiet():
            self.spec: Any = coremltools.utils.load_spec(str(self.path))
        if self.spec.WhichOneof("Type") != "mlProgram":
            raise ValueError(
                f"Expected an ML program; '{self.path}' holds a "
                f"{self.spec.WhichOneof('Type')}. Convert for iOS16 or later."
            )
        function = self.spec.mlProgram.functions["main"]
        self.block: Any = function.block_specializations[function.opset]
        self._files: dict[str, Array] = {}
        self.nonzeros: dict[str, int] = {}
        self._decoded: dict[str, Array] = {}
        self._room = _KEPT
        self.producers: dict[str, Any] = {
            output.name: op
            for op in self.operations()
            if op.type == "const" or op.type in DECODERS
            for output in op.outputs
        }

    @property
    def input_names(self) -> list[str]:
        """The names of the program's inputs, in order."""
        return [feature.name for feature in self.spec.description.input]

    @property
    def fixed_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs that have one; those with flexible dims are left out."""
        return {
            feature.name: tuple(feature.type.multiArrayType.shape)
            for feature in self.spec.description.input
            if feature.type.WhichOneof("Type") == "multiArrayType"
            and feature.type.multiArrayType.WhichOneof("ShapeFlexibility") is None
        }

    @property
    def output_names(self) -> list[str]:
        """The names of the program's outputs, in order."""
        return list(self.block.outputs)

    def operations(self, block: Any = None) -> Iterator[Any]:
        """Every operation, those of nested blocks (loops, branches) included."""
        for op in (self.block if block is None else block).operations:
            yield op
            for inner in op.blocks:
                yield from self.operations(inner)

    def stored(self) -> list[Stored]:
        """Every floating-point tensor constant that the program uses, decoded lazily."""
        used = {
            binding.name
            for op in self.operations()
            if op.type not in DECODERS
            for argument in op.inputs.values()
            for binding in argument.arguments
        } | set(self.output_names)
        found = []
        for name, op in self.producers.items():
            types = {o.name: o for o in op.outputs}
            dtype = NUMPY_TYPES.get(_element_type(types[name]), np.bool_)
            shape = _shape(types[name])
            if name in used and shape and dtype in (np.float16, np.float32):
                found.append(
                    Stored(name, shape, dtype.__name__, _kind(self, op), self._blobs(op), self)
                )
        return found

    def constant(self, name: str) -> Any:
        """The decoded value of a constant: an array, or a str for text.

        Raises:
            KeyError: the program has no constant of that name.
        """
        if name in self._decoded:
            return self._decoded[name]
        op = self.producers[name]
        if op.type == "const":
            return self.value(op.attributes["val"])
        place = [output.name for output in op.outputs].index(name)
        array = DECODERS[op.type](self.arguments(op))[place]
        if self._room >= array.nbytes:
            self._room -= array.nbytes
            self._decoded[name] = array
        return array

    def arguments(self, op: Any) -> dict[str, Array]:
        """The decoded arguments of a ``constexpr_*`` op."""
        found = {k: self.value(v) for k, v in op.attributes.items() if k != "name"}
        for key, argument in op.inputs.items():
            binding = argument.arguments[0]
            found[key] = self.constant(binding.name) if binding.name else self.value(binding.value)
        return found

    def value(self, value: Any) -> Any:
        """Decode a MIL value: an array, or a str for text."""
        kind, shape = _element_type(value), _shape(value)
        if value.WhichOneof("value") == "blobFileValue":
            raw = self._blob(value.blobFileValue.fileName, int(value.blobFileValue.offset))
        else:
            tensor = value.immediateValue.tensor
            if kind == "STRING":
                texts = list(tensor.strings.values)
                return texts if shape else texts[0]
            which = tensor.WhichOneof("value")
            content: Any = getattr(tensor, which).values if which else []
            if which != "bytes":
                dtype = NUMPY_TYPES[kind]
                return np.array(list(content), dtype=dtype).reshape(shape)
            raw = np.frombuffer(content, dtype=np.uint8)
        if kind in BITS:
            bits, signed = BITS[kind]
            return unpack(raw, int(np.prod(shape)), bits, signed=signed).reshape(shape)
        return raw.view(NUMPY_TYPES[kind]).reshape(shape)

    def _blob(self, file: str, offset: int) -> Array:
        name = file.removeprefix("@model_path/")
        if name not in self._files:
            full = self.path / "Data" / "com.apple.CoreML" / name
            self._files[name] = np.memmap(full, dtype=np.uint8, mode="r")
        data = self._files[name]
        record = data[offset : offset + _RECORD.itemsize].view(_RECORD)[0]
        if int(record["sentinel"]) != _SENTINEL:
            raise ValueError(f"'{self.path}' is damaged: no weight record at {name}:{offset}.")
        start = int(record["offset"])
        return np.asarray(data[start : start + int(record["size"])])

    def _blobs(self, op: Any) -> dict[tuple[str, Any], int]:
        """The places of everything that a constant is decoded from, with their bytes."""
        values = [v for k, v in op.attributes.items() if k != "name"]
        found: dict[tuple[str, Any], int] = {}
        for argument in op.inputs.values():
            binding = argument.arguments[0]
            if binding.name:
                found |= self._blobs(self.producers[binding.name])
            else:
                values.append(binding.value)
        for value in values:
            if value.WhichOneof("value") == "blobFileValue":
                place = value.blobFileValue
                size = self._blob(place.fileName, int(place.offset)).nbytes
                found[(place.fileName, int(place.offset))] = size
            elif _element_type(value) in NUMPY_TYPES and op.type == "const":
                found[("program", op.outputs[0].name)] = value.immediateValue.ByteSize()
        return found


_DATA = ("indices", "indices_nonzero_data", "data", "nonzero_data", "quantized_data")


def _kind(package: Package, op: Any) -> str:
    """How a constant is stored, in words."""
    if op.type == "const":
        return "dense"
    inputs = {key: argument.arguments[0] for key, argument in op.inputs.items()}
    if op.type == "constexpr_sparse_to_dense":
        inner = package.producers.get(inputs["nonzero_data"].name) if inputs else None
        deeper = inner is not None and inner.type != "const"
        return f"sparse + {_kind(package, inner)}" if deeper else "sparse"
    for key in _DATA:
        if key in op.attributes:
            word = _element_type(op.attributes[key])
        elif key in inputs:
            name = inputs[key].name
            values = package.producers[name].attributes["val"] if name else inputs[key].value
            word = _element_type(values)
        else:
            continue
        return word.lower().replace("uint", "palette") if "lut" in op.type else word.lower()
    return str(op.type).removeprefix("constexpr_")
