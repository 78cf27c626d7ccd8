"""coremltools' own keys: how its dicts and YAML describe a pattern, as it documents them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from purprune.patterns import NM, Block, Channel, Kernel, Pattern, Unstructured
from purprune.values import StrictInt, value

DEFAULT_TARGET = 0.5
"""The target of a rule that names none; coremltools documents the same."""


@value
class CoremltoolsKeys:
    """The flat keys by which coremltools' dicts describe a pattern, with their documented meaning.

    The first number of ``n_m_ratio`` counts zeros, ``block_size`` runs along dim 0, and ``dim``
    belongs to ``n_m_ratio``.
    """

    granularity: Literal["per_scalar", "per_kernel", "per_channel"] = "per_scalar"
    block_size: StrictInt | tuple[StrictInt, ...] = 1
    n_m_ratio: tuple[StrictInt, StrictInt] | None = None
    dim: StrictInt | None = None

    def pattern(self) -> Pattern:
        """Return the pattern that the keys describe."""
        if self.n_m_ratio is not None:
            if self.block_size != 1 or self.granularity != "per_scalar":
                raise ValueError(
                    "expected n_m_ratio alone, or block_size / granularity without it; got "
                    f"n_m_ratio={self.n_m_ratio}, block_size={self.block_size}, "
                    f"granularity={self.granularity!r}."
                )
            return NM(*self.n_m_ratio, dim=1 if self.dim is None else self.dim)
        if self.granularity == "per_scalar":
            return Unstructured() if self.block_size == 1 else Block(self.block_size)
        if not isinstance(self.block_size, int):
            raise ValueError(
                f"expected a whole block_size with granularity={self.granularity!r}; "
                f"got {self.block_size}."
            )
        named = Channel if self.granularity == "per_channel" else Kernel
        return named(size=self.block_size)


PATTERN_KEYS = ("granularity", "block_size", "n_m_ratio", "dim")


def fold_coremltools_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Fold coremltools' flat keys into ``pattern``, and ``scheduler`` into ``schedule``."""
    if "scheduler" in keys:
        if "schedule" in keys:
            raise ValueError("expected schedule or scheduler; got both.")
        keys["schedule"] = keys.pop("scheduler")
    flat = {key: keys.pop(key) for key in PATTERN_KEYS if key in keys}
    if not flat:
        return keys
    if "pattern" in keys:
        raise ValueError(f"expected pattern or {', '.join(flat)}; got both.")
    _refuse_idle_dim(flat)
    if flat.get("n_m_ratio") is not None and keys.get("target_sparsity") == DEFAULT_TARGET:
        del keys["target_sparsity"]  # coremltools writes its default here and ignores it
    return {**keys, "pattern": CoremltoolsKeys(**flat).pattern()}


def _refuse_idle_dim(flat: Mapping[str, Any]) -> None:
    """Raise for a dim without n_m_ratio, which would count for nothing."""
    if flat.get("dim") is None or flat.get("n_m_ratio") is not None:
        return
    if flat["dim"] == 1 and "n_m_ratio" in flat:
        return  # coremltools writes out both of its defaults
    raise ValueError(
        f"expected dim with n_m_ratio only, as coremltools documents it; got dim={flat['dim']} "
        "without. For channels along a dim give pattern=Channel(dim=...), in a dict "
        "{'unit': {'kind': 'channel', 'dim': ...}}."
    )
