"""What inspect names is what export stores: one finder serves both."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_sparsity.artifacts import structure
from t5x_sparsity.artifacts.compression import choose, find
from t5x_sparsity.artifacts.encodings import CSR, NM, Blocks
from t5x_sparsity.artifacts.found_patterns import PatternFinder
from t5x_sparsity.artifacts.structure import KeptBits, slices_of
from t5x_sparsity.core.matrix_axes import matrix_axes


def inspected(kept, stack_axes=(), names=None):
    axes = matrix_axes(kept.ndim, stack_axes, names)
    finder = PatternFinder(axes)
    for bits in slices_of(kept, stack_axes):
        one = KeptBits(bits.shape, len(axes.outputs))
        one.add(bits.mask())
        finder.add(one)
    return SimpleNamespace(**finder.result(), axes=axes)


@st.composite
def masks(draw):
    """(a mask of the whole weight, its stacked axes, names of its axes)."""
    kind = draw(st.sampled_from(["groups", "groups", "blocks", "channels", "unstructured"]))
    m = draw(st.integers(2, 32))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    is_attention = draw(st.booleans())
    shape = [draw(st.integers(2, 6)) for _ in range(3 if is_attention else 2)]
    axis = draw(st.integers(0, len(shape) - 1))
    if kind == "groups":
        shape[axis] = m * draw(st.integers(2, 3))
    stacks = draw(st.integers(0, 2))

    def one():
        if kind == "groups":
            n = draw(st.integers(1, m - 1)) if m < 4 else m // 4
            others = [k for a, k in enumerate(shape) if a != axis]
            groups = np.zeros((*others, shape[axis] // m, m), bool)
            groups[..., :n] = True
            groups = rng.permuted(groups, axis=-1).reshape(*others, shape[axis])
            return np.moveaxis(groups, -1, axis)
        lengths = [1] * len(shape)
        if kind == "blocks":
            lengths = block
        if kind == "channels":
            lengths = [1 if a == axis else k for a, k in enumerate(shape)]
        mask = rng.random([-(-k // n) for k, n in zip(shape, lengths, strict=True)]) < 0.4
        for a, n in enumerate(lengths):
            mask = np.repeat(mask, n, axis=a)
        return mask[tuple(slice(k) for k in shape)]

    block = [draw(st.integers(1, k)) for k in shape]
    kept = one() if not stacks else np.stack([one() for _ in range(stacks)], axis=1)
    names = ["embed", "heads", "kv"] if is_attention else ["embed", "mlp"]
    if stacks:
        names.insert(1, "layers")
    return kept, (1,) if stacks else (), names


@given(masks())
@settings(max_examples=300, deadline=None)
def test_inspect_and_export_name_the_same_pattern(case):
    kept, stack_axes, names = case
    found, encodings = inspected(kept, stack_axes, names), find(kept, stack_axes=stack_axes)
    if found.kept in (0, found.size):
        return
    free = [a for a in range(kept.ndim) if a not in stack_axes]
    groups = {e.axis: (e.n, e.m) for e in encodings if isinstance(e, NM)}
    # one group as long as the rows or columns is a constant fan-in or fan-out
    for axis in list(groups):
        is_input = axis in found.axes.inputs
        way = found.axes.inputs if is_input else found.axes.outputs
        if 2 * groups[axis][1] > math.prod(kept.shape[a] for a in way):
            assert found.fan_in if is_input else found.fan_out
            del groups[axis]
    assert groups == found.groups
    (block,) = [e.block for e in encodings if isinstance(e, Blocks)] or [(1,) * kept.ndim]
    block = tuple(block[a] for a in free)
    if found.channels:
        assert "whole channels" in found.pattern
    elif found.block is not None:
        assert found.block == block and f"blocks {'x'.join(map(str, block))}" in found.pattern
    else:
        assert "blocks" not in found.pattern
    for encoding in encodings:
        assert encoding.fits(kept)


def test_any_m_up_to_32_is_stored_as_groups_of_it():
    rng = np.random.default_rng(0)
    for m in range(2, 33):
        for axis in (0, 1):
            groups = rng.permuted(np.arange(m) < 1 + m // 3, axis=-1)[None, None]
            groups = rng.permuted(np.broadcast_to(groups, (12, 3, m)), axis=-1).reshape(12, 3 * m)
            kept = groups.T if axis == 0 else groups
            x = np.where(kept, np.float32(1), np.float32(0))
            assert find(kept)[0] == NM(n=1 + m // 3, m=m, axis=axis)
            assert choose(x, kept) == NM(n=1 + m // 3, m=m, axis=axis)
            way = "inputs" if axis == 0 else "outputs"
            assert inspected(kept).pattern.startswith(f"{1 + m // 3}:{m} along {way}")


def test_an_unrecorded_one_of_three_along_heads_and_along_the_embedding():
    rng = np.random.default_rng(0)
    groups = rng.permuted(np.broadcast_to(np.arange(3) == 0, (5, 7, 2, 3)), axis=-1)
    along_kv = groups.reshape(5, 7, 6)
    names = ["embed", "heads", "kv"]
    for axes, axis, pattern in (
        ((0, 1, 2), 2, "1:3 along outputs"),
        ((0, 2, 1), 1, "1:3 along axis 1"),
        ((2, 0, 1), 0, "1:3 along inputs"),
    ):
        kept = along_kv.transpose(*axes)
        assert find(kept) == [NM(n=1, m=3, axis=axis)]
        assert inspected(kept, names=names).pattern.split("; ")[0] == pattern


@pytest.mark.parametrize("stack_axes", [(), (0,), (1,), (0, 2)])
def test_slices_of_a_weight(stack_axes):
    kept = np.random.default_rng(0).random((2, 3, 4, 5)) < 0.5
    moved = np.moveaxis(kept, stack_axes, range(len(stack_axes)))
    expected = moved.reshape(-1, *moved.shape[len(stack_axes) :])
    for bits, mask in zip(slices_of(kept, stack_axes), expected, strict=True):
        np.testing.assert_array_equal(bits.mask(), mask)


def test_bands_make_no_difference(monkeypatch):
    rng = np.random.default_rng(0)
    kept = np.kron(rng.random((8, 6)) < 0.4, np.ones((3, 5), bool)) > 0
    whole = find(kept)
    monkeypatch.setattr(structure, "_BAND", 16)
    assert find(kept) == whole == [Blocks(block=(3, 5))]
    assert find(rng.random((64, 48)) < 0.3) == [] and CSR().fits(kept)
