"""Hashes, layouts and packed bits: small pure functions against slow oracles."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from purprune_adapters.coreml.constexpr import DECODERS, unpack
from purprune_adapters.coreml.layouts import count_nonzero, fingerprint, layouts, same, splits
from purprune_adapters.coreml.storage import sparse_bytes, why_dense

floats = hnp.arrays(
    st.sampled_from([np.float16, np.float32]),
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
    elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 6e-8, -3.0]),
)


@given(floats, st.randoms())
def test_the_hash_ignores_order_and_zeros_and_nothing_else(values, random):
    """A permutation hashes alike; a changed, added or doubled value doesn't."""
    flat = values.ravel().tolist()
    shuffled = [*flat, 0.0, -0.0]
    random.shuffle(shuffled)
    assert fingerprint(values) == fingerprint(np.array(shuffled, dtype=values.dtype))
    more = np.array([*flat, 0.25], dtype=values.dtype)
    assert fingerprint(values) != fingerprint(more)
    twice = np.array([*flat, 0.25, 0.25], dtype=values.dtype)
    assert fingerprint(more) != fingerprint(twice)
    assert fingerprint(np.zeros_like(values)) == 0
    assert count_nonzero(values) == np.count_nonzero(values)


def test_the_hash_is_the_same_across_chunks():
    """Long tensors are hashed piecewise."""
    for dtype in (np.float16, np.float32):
        values = np.random.default_rng(0).standard_normal(200_001).astype(dtype)
        assert fingerprint(values) == fingerprint(values[::-1].copy())
        assert fingerprint(values) != fingerprint(np.abs(values))


@given(hnp.array_shapes(min_dims=1, max_dims=4, max_side=8))
def test_every_layout_is_undone_by_its_inverse(shape):
    """What is found in another order can be put back into torch's."""
    weight = np.arange(np.prod(shape)).reshape(shape)
    seen = set()
    for layout in layouts(shape):
        stored = layout.apply(weight)
        assert np.array_equal(layout.undo(stored.ravel(), shape), weight)
        seen.add(stored.tobytes())
    assert weight.tobytes() in seen
    assert all(
        weight.transpose(p).tobytes() in seen for p in itertools.permutations(range(weight.ndim))
    )


@pytest.mark.parametrize("rows", [6, 8, 12, 5])
def test_splits_cover_all_rows_once(rows):
    """No row of a stacked weight goes unchecked."""
    for _, cuts in splits(rows):
        assert [r for cut in cuts for r in range(rows)[cut]] == list(range(rows))
    assert bool(list(splits(5))) is False


def test_same_compares_values_in_flat_order():
    """Equal sizes are needed, and every value."""
    a = np.arange(2000.0)
    assert same(a.reshape(20, 100), a.reshape(100, 20))
    b = a.copy()
    b[1999] = -1
    assert not same(a, b)
    assert not same(a, a[:-1])


@given(st.sampled_from([1, 2, 3, 4, 6]), st.lists(st.integers(0, 63), max_size=40), st.booleans())
def test_packed_integers_are_read_back(bits, values, signed):
    """Against packing by hand, low bit first."""
    values = [v % (1 << bits) for v in values]
    stream = [v >> i & 1 for v in values for i in range(bits)]
    packed = np.packbits(np.array(stream, dtype=np.uint8), bitorder="little")
    signed = signed and bits > 1
    wanted = [v - (1 << bits) if signed and v >> (bits - 1) else v for v in values]
    assert unpack(packed, len(values), bits, signed=signed).tolist() == wanted


def test_quantized_and_palettized_weights_are_decoded_as_documented():
    """scale * (data - offset) by blocks; look-up by groups; the old and the new sparse form."""
    data = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=np.int8)
    scale = np.array([[1, 10], [100, 1000]], dtype=np.float32)
    (dense,) = DECODERS["constexpr_blockwise_shift_scale"](
        {"data": data, "scale": scale, "offset": np.ones_like(scale, dtype=np.int8)}
    )
    assert dense.tolist() == [[0, 1, 20, 30], [400, 500, 6000, 7000]]
    lut = np.array([[[10.0], [20.0]], [[30.0], [40.0]]], dtype=np.float16).reshape(2, 1, 2, 1)
    indices = np.array([[0, 1], [1, 1]], dtype=np.uint8)
    (dense,) = DECODERS["constexpr_lut_to_dense"]({"indices": indices, "lut": lut})
    assert dense.tolist() == [[10, 20], [40, 40]]
    mask, values = np.array([[0, 1], [1, 0]], dtype=np.uint8), np.array([3.0, 4.0])
    (new,) = DECODERS["constexpr_sparse_to_dense"]({"mask": mask, "nonzero_data": values})
    packed = np.array([0b0110], dtype=np.uint8)
    old_form = {"mask": packed, "nonzero_data": values, "shape": np.array([2, 2])}
    (old,) = DECODERS["constexpr_sparse_to_dense"](old_form)
    assert new.tolist() == old.tolist() == [[0, 3], [4, 0]]
    old_quantized = {
        "quantized_data": data,
        "scale": np.array([1.0, 2.0], dtype=np.float32),
        "zero_point": np.array([0, 1], dtype=np.int8),
        "axis": np.array(0),
    }
    (dense,) = DECODERS["constexpr_affine_dequantize"](old_quantized)
    assert dense.tolist() == [[1, 2, 3, 4], [8, 10, 12, 14]]


def test_the_rule_of_the_smaller_size_is_the_formula():
    """Break-even at 1/16 for float16 and 1/32 for float32, plus the records."""
    n = 1 << 20
    for itemsize in (2, 4):
        even = n - n // (8 * itemsize)
        assert why_dense((1024, 1024), even, itemsize)
        assert why_dense((1024, 1024), even - 200, itemsize) is None
    assert sparse_bytes(n, n // 10, 16) == pytest.approx(340_796, abs=300)
    assert why_dense((3, 3), 0, 2) == "9 entries stand in the program itself"
    assert why_dense((4096,), 0, 2) == "one-dimensional"
    assert why_dense((64, 64), 4096, 2, compress="int4") is None
