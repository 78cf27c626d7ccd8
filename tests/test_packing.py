"""Packed masks: the exact inverse, the exact size, and what is refused."""

from __future__ import annotations

import io
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from purprune import Channel, Rule, compute_masks, pack_masks, unpack_masks
from strategies import shapes, views


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Draw a mask of any shape, in any memory layout, expanded ones too."""
    shape = draw(shapes)
    n = math.prod(shape)
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    view = draw(views(mask.reshape(shape)))
    return (
        view.unsqueeze(-1).expand(*shape, draw(st.integers(0, 9))) if draw(st.booleans()) else view
    )


@given(masks())
@example(torch.tensor(False))
@example(torch.ones(0, 3, dtype=torch.bool))
@example(torch.tensor([True, False]).expand(5, 2))
def test_unpacking_is_the_exact_inverse_for_every_shape_and_layout(mask: Tensor):
    """Defends 0-d, empty, ragged and expanded masks, and one bit per entry."""
    kept = mask.clone()
    packed = pack_masks({"a.b": mask})
    assert packed["a.b.bits"].nbytes == math.ceil(mask.numel() / 8)
    [(name, back)] = unpack_masks(packed).items()
    assert name == "a.b"
    assert back.shape == mask.shape
    assert back.is_contiguous()
    assert torch.equal(back, kept)
    assert torch.equal(mask, kept)


@given(st.lists(st.booleans(), max_size=40))
def test_entry_i_is_bit_i_modulo_8_of_byte_i_over_8(entries: list[bool]):
    """Defends the documented order of bits, which other programs read."""
    [bits, _] = pack_masks({"w": torch.tensor(entries, dtype=torch.bool)}).values()
    for i, entry in enumerate(entries):
        assert (int(bits[i // 8]) >> i % 8 & 1) == entry


def test_names_that_end_like_the_keys_are_kept_apart():
    """Defends parameters which are called bits or shape themselves."""
    given = {name: torch.rand(3) > 0.5 for name in ("a", "a.bits", "a.shape", "a.bits.shape", "")}
    back = unpack_masks(pack_masks(given))
    assert list(back) == list(given)
    assert all(torch.equal(back[name], mask) for name, mask in given.items())


def test_torch_save_and_weights_only_carry_packed_masks():
    """Defends plain tensors: no class of ours is in the file."""
    mask = compute_masks({"w": torch.randn(9, 5)}, 0, Rule(0.5, pattern=Channel()))
    file = io.BytesIO()
    torch.save(pack_masks(mask), file)
    file.seek(0)
    assert torch.equal(unpack_masks(torch.load(file, weights_only=True))["w"], mask["w"])


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "transposed"])
def test_packing_takes_the_bits_and_a_few_chunks_of_memory(layout: str):
    """Defends large models: no copy of a mask is made at a byte per entry, nor of a view."""
    n = 2**24
    mask = {
        "contiguous": torch.ones(2**12, 2**12, dtype=torch.bool),
        "expanded": torch.ones(1, 2**12, dtype=torch.bool).expand(2**12, 2**12),
        "transposed": torch.ones(2**12, 2**12, dtype=torch.bool).t(),
    }[layout]
    tracemalloc.start()
    packed = pack_masks({"w": mask})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed["w.bits"].nbytes == n // 8
    assert n // 8 <= peak < n // 8 + 2**22


def test_the_same_bits_are_packed_across_chunks_of_a_view():
    """Defends the border between two chunks."""
    mask = torch.from_numpy(np.random.default_rng(0).random((1031, 1033)) > 0.5).t()
    assert torch.equal(unpack_masks(pack_masks({"w": mask}))["w"], mask)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.pop("w.bits"), r"a pair .*; got 'w\.shape' alone"),
        (lambda p: p.pop("w.shape"), r"a pair .*; got 'w\.bits' alone"),
        (lambda p: p.update(w=torch.ones(1)), r"a pair .*; got 'w' alone"),
        (lambda p: p.update({3: torch.ones(1)}), r"a pair .*; got 3 alone"),
        (lambda p: p.update({"w.bits": p["w.bits"][:1]}), r"2 bytes .* 'w' .*got \(1,\)"),
        (lambda p: p.update({"w.bits": p["w.bits"].char()}), r"2 bytes .* 'w' .*int8"),
        (lambda p: p.update({"w.bits": None}), r"2 bytes .* 'w' .*NoneType"),
        (lambda p: p["w.bits"].fill_(255), "0 behind the last bit of the mask 'w'"),
        (lambda p: p["w.shape"].fill_(2**40), r"bytes of bits for the mask 'w'"),
        (lambda p: p["w.shape"].neg_(), "shape of the mask 'w' .*none below 0"),
        (lambda p: p.update({"w.shape": p["w.shape"].int()}), "shape of the mask 'w'"),
        (lambda p: p.update({"w.shape": 10}), "shape of the mask 'w'"),
    ],
)
def test_damaged_packs_raise_and_name_the_mask(change, says):
    """Defends against masks of a truncated or mixed-up file."""
    packed = pack_masks({"w": torch.ones(10, dtype=torch.bool)})
    change(packed)
    with pytest.raises(ValueError, match=says) as caught:
        unpack_masks(packed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mask", [torch.ones(3), None])
def test_only_bool_tensors_are_packed(mask: object):
    """Defends weights that are passed for masks."""
    with pytest.raises(TypeError, match="Expected a bool mask for 'w'; got"):
        pack_masks({"w": mask})


@pytest.mark.parametrize("name", ["m.shape", "m.bits", "bits.shape", "m.shape.bits", ".bits"])
def test_names_that_end_like_a_key_come_back(name):
    """Defends the round trip of parameters that are called shape or bits."""
    masks = {name: torch.tensor([True, False]), "w": torch.tensor([[False]])}
    back = unpack_masks(pack_masks(masks))
    assert set(back) == set(masks)
    assert all(torch.equal(back[key], masks[key]) for key in masks)
