"""What is stored sparse, what joint compression adds, and the bytes that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "COMPRESSIONS",
    "OVERHEAD",
    "compress_weights",
    "sparse_bytes",
    "store_sparse",
    "why_dense",
]

#: Names accepted by ``compress``, with the bits of one surviving value.
COMPRESSIONS = {"int8": 8, "int4": 4, "palette4": 4, "palette6": 6, "palette8": 8}

# Two records of 64 bytes, their padding and the longer op description: 140 to 225 bytes, measured.
OVERHEAD = 225


def sparse_bytes(numel: int, survivors: int, bits: int) -> int:
    """Bytes of a sparse tensor: one bit per entry, ``bits`` per survivor, and the records.

    Example:
        >>> sparse_bytes(1024 * 1024, 104858, 16)
        341013
    """
    return -(-numel // 8) + -(-survivors * bits // 8) + OVERHEAD


def why_dense(
    shape: Sequence[int],
    survivors: int,
    itemsize: int,
    *,
    min_sparsity: float | None = None,
    compress: str | None = None,
) -> str | None:
    """The reason to store a tensor dense; None when sparse is the better choice.

    Args:
        shape: of the stored tensor.
        survivors: its nonzero entries.
        itemsize: bytes of one dense entry.
        min_sparsity: fraction of zeros from which on to store sparse; None decides by the bytes.
        compress: the joint compression that will follow, or None.
    """
    numel = 1
    for size in shape:
        numel *= size
    if numel < 10:
        return f"{numel} entries stand in the program itself"
    if sum(size > 1 for size in shape) < 2 and len(shape) < 2:
        return "one-dimensional"
    if min_sparsity is not None:
        if (numel - survivors) / numel >= min_sparsity:
            return None
        return f"{numel - survivors} of {numel} are zero, below min_sparsity={min_sparsity:g}"
    bits = COMPRESSIONS[compress] if compress else 8 * itemsize
    sparse, dense = sparse_bytes(numel, survivors, bits), numel * itemsize
    if sparse < dense:
        return None
    return f"sparse would take {sparse} bytes, dense takes {dense}"


def store_sparse(coremltools: Any, model: Any, names: Sequence[str]) -> Any:
    """A copy of the converted model whose named constants are stored sparse, at threshold 0."""
    optimize = coremltools.optimize.coreml
    exact = optimize.OpThresholdPrunerConfig(
        threshold=0.0, minimum_sparsity_percentile=0.0, weight_threshold=0
    )
    config = optimize.OptimizationConfig(op_name_configs=dict.fromkeys(names, exact))
    return optimize.prune_weights(model, config)


def compress_weights(coremltools: Any, model: Any, names: Sequence[str], kind: str) -> Any:
    """Quantize or palettize the survivors of the named sparse constants; zeros stay zero."""
    optimize = coremltools.optimize.coreml
    if kind.startswith("int"):
        how = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric",
            dtype=kind,
            granularity="per_channel",
            weight_threshold=0,
        )
        apply = optimize.linear_quantize_weights
    else:
        how = optimize.OpPalettizerConfig(
            mode="kmeans", nbits=COMPRESSIONS[kind], weight_threshold=0
        )
        apply = optimize.palettize_weights
    config = optimize.OptimizationConfig(op_name_configs=dict.fromkeys(names, how))
    return apply(model, config, joint_compression=True)
