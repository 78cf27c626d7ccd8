"""What the read-back of a package found, per pruned parameter and in all."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["ParameterRecord", "Verification"]


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
        reason: why something is dense, or why it may not have been found.
        unexplained: why factors between torch and package may not be right; empty when there are
            none, or when a batch norm of the model or the numerical check accounts for them.
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
    unexplained: str = ""

    @property
    def found(self) -> bool:
        """Whether the package holds the parameter."""
        return bool(self.mil_names)

    @property
    def problem(self) -> str:
        """What is wrong, in words; empty when nothing is."""
        if not self.found:
            return f"not found in the package ({self.reason})"
        counts = (("lost", self.dropped), ("revived", self.revived), ("changed", self.wrong))
        said = [f"{count} of {self.entries} entries {word}" for word, count in counts if count]
        return ", ".join([*said, self.unexplained] if self.unexplained else said)

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
        """One line per parameter that is missing or differs; one for all where none is there."""
        if len(self.rows) > 1 and not any(row.found for row in self.rows):
            reasons = dict.fromkeys(row.reason for row in self.rows)
            if len(reasons) == 1:
                return (
                    f"none of the {len(self.rows)} pruned parameters is in the package, which was "
                    f"made of another network or of other weights ({next(iter(reasons))})",
                )
        return tuple(f"'{row.name}': {row.problem}" for row in self.rows if row.problem)

    @property
    def ok(self) -> bool:
        """Every pruned parameter was found, none lost a weight, and no factor is unexplained."""
        return not self.problems

    def confirmed(self) -> Verification:
        """The same after a passed numerical check, which accounts for unexplained factors."""
        rows = (
            replace(row, matched=f"{row.matched}, confirmed by the numerical check", unexplained="")
            if row.unexplained
            else row
            for row in self.rows
        )
        return replace(self, rows=tuple(rows))

    def as_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return {
            "ok": self.ok,
            "problems": list(self.problems),
            "weight_bytes": self.weight_bytes,
            "weight_bytes_dense": self.weight_bytes_dense,
            "parameters": [row.as_dict() for row in self.rows],
        }
