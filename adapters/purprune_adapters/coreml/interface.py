"""Names of inputs and outputs: checked before the conversion, written into the program after it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Names", "check_features", "rename_features"]

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Words of the MIL language, which no value may be named by.
_RESERVED = frozenset(
    [
        "any",
        "bool",
        "program",
        "func",
        "tensor",
        "list",
        "dict",
        "tuple",
        "true",
        "false",
        "string",
        "bf16",
        "fp16",
        "fp32",
        "fp64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "state",
    ]
)


@dataclass(frozen=True)
class Names:
    """Names that the user gave to inputs and outputs; None keeps the converter's.

    Raises:
        TypeError: not a sequence of texts.
        ValueError: a name that a program can't have, or one name for two features.
    """

    inputs: Sequence[str] | None
    outputs: Sequence[str] | None

    def __post_init__(self) -> None:
        """Check each name, then all together."""
        for what, given in (("input_names", self.inputs), ("output_names", self.outputs)):
            _check_names(what, given)
        both = set(self.inputs or ()) & set(self.outputs or ())
        if both:
            raise ValueError(
                f"Expected input_names and output_names to differ; both hold {_quoted(both)}. "
                "A program can't have an input and an output of one name."
            )


def _check_names(what: str, given: Any) -> None:
    if given is None:
        return
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"Expected {what} as a list of names; got {given!r}.")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"Expected {what} as a list of names; got {name!r} in it.")
        if not _IDENTIFIER.fullmatch(name) or name in _RESERVED:
            raise ValueError(
                f"Expected {what} of letters, digits and underscores that begin with no digit and "
                f"aren't words of the MIL language; got {name!r}."
            )
    twice = {name for name in given if list(given).count(name) > 1}
    if twice:
        raise ValueError(f"Expected {len(given)} different {what}; got {_quoted(twice)} twice.")


def check_features(spec: Any, names: Names) -> None:
    """Raise ValueError when the names don't fit the features of the converted program."""
    inputs, outputs = _features(spec)
    for what, given, there in (
        ("input_names", names.inputs, inputs),
        ("output_names", names.outputs, outputs),
    ):
        if given is None:
            continue
        if len(set(there)) < len(there):
            raise ValueError(
                f"Expected {len(given)} {what} for as many tensors; the model returns one tensor "
                f"twice, so the program has {len(set(there))}: {_quoted(set(there))}. Return it "
                "once."
            )
        if len(given) != len(there):
            raise ValueError(
                f"Expected {len(there)} different {what}, for {_quoted(there)}; got "
                f"{list(given)!r}."
            )
    clash = set(names.inputs or inputs) & set(names.outputs or outputs)
    if clash:
        raise ValueError(
            f"Expected inputs and outputs of different names; both would hold {_quoted(clash)}. "
            "Pass other names; input_names and output_names together settle all of them."
        )


def rename_features(spec: Any, names: Names) -> bool:
    """Rename inputs and outputs in place, all at once, and say whether anything changed.

    A value inside the program that has a wanted name gets another one.
    """
    inputs, outputs = _features(spec)
    new = dict(zip(inputs, names.inputs or inputs, strict=True))
    new |= dict(zip(outputs, names.outputs or outputs, strict=True))
    new = {old: name for old, name in new.items() if old != name}
    if not new:
        return False
    blocks = [b for f in spec.mlProgram.functions.values() for b in _specializations(f)]
    inside = {name for block in blocks for name in _made(block)}
    for taken in sorted((inside - set(new)) & set(new.values())):
        place = 0
        while f"{taken}_inner_{place}" in inside:
            place += 1
        new[taken] = f"{taken}_inner_{place}"
    for feature in (*spec.description.input, *spec.description.output):
        feature.name = new.get(feature.name, feature.name)
    for function in spec.mlProgram.functions.values():
        for given in function.inputs:
            given.name = new.get(given.name, given.name)
    for block in blocks:
        _rename_block(block, new)
    return True


def _features(spec: Any) -> tuple[list[str], list[str]]:
    about = spec.description
    return [one.name for one in about.input], [one.name for one in about.output]


def _specializations(function: Any) -> list[Any]:
    return list(function.block_specializations.values())


def _made(block: Any) -> Iterable[str]:
    """The names of all values that a block makes or is given, those of inner blocks included."""
    yield from (given.name for given in block.inputs)
    for op in block.operations:
        yield from (output.name for output in op.outputs)
        for inner in op.blocks:
            yield from _made(inner)


def _rename_block(block: Any, new: Mapping[str, str]) -> None:
    for given in block.inputs:
        given.name = new.get(given.name, given.name)
    for place, name in enumerate(block.outputs):
        block.outputs[place] = new.get(name, name)
    for op in block.operations:
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = new.get(binding.name, binding.name)
        for output in op.outputs:
            output.name = new.get(output.name, output.name)
        for inner in op.blocks:
            _rename_block(inner, new)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
