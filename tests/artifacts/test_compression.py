"""Encodings: by hand, against scipy, and exact round trips of whatever bits there are."""

import json
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_sparsity.artifacts import encodings
from t5x_sparsity.artifacts.compression import choose, find, from_pattern
from t5x_sparsity.artifacts.encodings import CSR, NM, VALUES, Bitmask, Blocks, Dense, from_dict
from t5x_sparsity.artifacts.tensor_files import Reader, Writer
from t5x_sparsity.core import patterns

DTYPES = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int32,
    np.uint8,
]


def bits(x):
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(bits(a), bits(b))


def kept_by_mask(x, kept):
    return np.where(kept, bits(x), 0).view(x.dtype)


@st.composite
def weights(draw, max_ndim=4):
    """(a weight of random bits, its mask): any dtype, NaN and -0 among its values."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=max_ndim)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]))
    kept = rng.random(shape) < density
    x = kept_by_mask(x, kept)
    if dtype.kind != "u" and dtype.kind != "i":
        special = np.array([np.nan, np.inf, -0.0, 0.0]).astype(dtype)
        picked = kept & (rng.random(shape) < 0.3)
        x[picked] = rng.choice(special, picked.sum())
    return x, kept


def group_mask(rng, shape, n, m, axis):
    moved = [k for a, k in enumerate(shape) if a != axis]
    groups = np.zeros((*moved, shape[axis] // m, m), bool)
    groups[..., :n] = True
    groups = rng.permuted(groups, axis=-1)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(*moved, shape[axis]), -1, axis))


@st.composite
def grouped(draw):
    """(a weight, its mask, n, m, axis)."""
    m = draw(st.integers(2, 9))
    n = draw(st.integers(1, m - 1))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] *= m
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = group_mask(rng, shape, n, m, axis)
    x = rng.standard_normal(shape).astype(draw(st.sampled_from([np.float32, np.float16])))
    return kept_by_mask(x, kept), kept, n, m, axis


@st.composite
def blocked(draw):
    """(a weight, its mask, the block), ragged edges included."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    block = tuple(draw(st.integers(1, n)) for n in shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = rng.random([-(-n // b) for n, b in zip(shape, block, strict=True)]) < 0.4
    for axis, b in enumerate(block):
        kept = np.repeat(kept, b, axis=axis)
    kept = kept[tuple(slice(n) for n in shape)]
    return kept_by_mask(rng.standard_normal(shape).astype(np.float32), kept), kept, block


def round_trip(x, kept, encoding):
    arrays = encoding.encode(x, kept)
    assert arrays[VALUES].dtype == x.dtype and arrays[VALUES].flags.c_contiguous
    assert_same_bits(encoding.decode(arrays, x.shape), x)
    assert sum(a.nbytes for a in arrays.values()) == encoding.nbytes(kept, x.itemsize)
    if not isinstance(encoding, Dense):
        positions, values = encoding.stored(arrays, x.shape)
        found = np.zeros(x.size, bool)
        found[positions] = True
        assert_same_bits(x.reshape(-1)[positions], values)
        return found.reshape(x.shape)
    return None


@given(weights())
@settings(max_examples=200, deadline=None)
def test_csr_and_bit_masks_are_exact_and_keep_the_mask(case):
    x, kept = case
    for encoding in (CSR(), Bitmask()):
        np.testing.assert_array_equal(round_trip(x, kept, encoding), kept)


@given(grouped())
@settings(max_examples=150, deadline=None)
def test_n_m_is_exact_and_keeps_the_mask(case):
    x, kept, n, m, axis = case
    encoding = NM(n=n, m=m, axis=axis)
    assert encoding.fits(kept)
    np.testing.assert_array_equal(round_trip(x, kept, encoding), kept)


@given(blocked())
@settings(max_examples=150, deadline=None)
def test_blocks_are_exact_and_keep_the_mask(case):
    x, kept, block = case
    encoding = Blocks(block=block)
    assert encoding.fits(kept)
    np.testing.assert_array_equal(round_trip(x, kept, encoding), kept)


@given(weights(), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_whatever_is_chosen_is_exact_and_no_larger_than_dense(case, exactly, smallest):
    x, kept = case
    encoding = choose(x, kept, exactly=exactly, smallest=smallest)
    found = round_trip(x, kept, encoding)
    assert encoding.nbytes(kept, x.itemsize) <= x.nbytes
    if found is not None and exactly:
        np.testing.assert_array_equal(found, kept)


@given(weights(max_ndim=3))
@settings(max_examples=100, deadline=None)
def test_csr_is_scipys(case):
    x, kept = case
    rows = kept.reshape(-1, kept.shape[-1])
    ours = CSR().encode(x, kept)
    theirs = scipy.sparse.csr_matrix(rows)
    np.testing.assert_array_equal(ours["indices"], theirs.indices)
    np.testing.assert_array_equal(ours["indptr"], theirs.indptr)
    if x.dtype == np.float32:
        loaded = scipy.sparse.csr_matrix(
            (ours[VALUES], ours["indices"].astype(np.int32), ours["indptr"].astype(np.int32)),
            shape=rows.shape,
        )
        np.testing.assert_array_equal(loaded.toarray(), x.reshape(rows.shape))


def test_csr_by_hand():
    x = np.array([[0, 5, 0, 7], [0, 0, 0, 0], [0, 0, 3, 0]], np.float32)
    kept = x != 0
    kept[1, 3] = True  # a weight that has just grown
    arrays = CSR().encode(x, kept)
    assert arrays[VALUES].tolist() == [5, 7, 0, 3]
    assert arrays["indices"].tolist() == [1, 3, 3, 2]
    assert arrays["indptr"].tolist() == [0, 2, 3, 4]
    assert arrays["indices"].dtype == arrays["indptr"].dtype == np.uint8
    # four values of 4 bytes, four indices and four row starts of one
    assert CSR().nbytes(kept, x.itemsize) == 4 * 4 + 4 + 4


def test_index_types_are_the_smallest_that_hold_the_numbers():
    for columns, dtype in ((256, np.uint8), (257, np.uint16)):
        kept = np.zeros((300, columns), bool)
        kept[:, -1] = True
        index = CSR().encode(kept, kept)
        assert index["indices"].dtype == dtype and index["indices"].max() == columns - 1
        assert index["indptr"].dtype == np.uint16 and index["indptr"][-1] == 300
    assert Blocks(block=(1, 1)).encode(kept, kept)["indices"].dtype == np.uint32


def test_two_of_four_by_hand():
    # a kernel [in 8, out 2], 2:4 along in
    x = np.array([[1, 0], [0, 2], [3, 4], [0, 0], [0, 0], [0, 0], [5, 6], [7, 8]], np.float32)
    kept = x != 0
    arrays = NM(n=2, m=4, axis=0).encode(x, kept)
    assert arrays[VALUES].tolist() == [[1, 3, 5, 7], [2, 4, 6, 8]]
    # output 0: 0, 2 | 2, 3; output 1: 1, 2 | 2, 3; the first in the lowest bits
    assert arrays["indices"].tolist() == [0b11_10_10_00, 0b11_10_10_01]
    assert NM(n=2, m=4, axis=0).nbytes(kept, x.itemsize) == 8 * 4 + 2
    assert choose(x, kept) == NM(n=2, m=4, axis=0)


def test_indices_of_three_bits_run_on_over_bytes():
    kept = np.zeros((1, 24), bool)
    kept[0, [5, 8 + 3, 16 + 7]] = True
    index = NM(n=1, m=8, axis=1).encode(kept, kept)
    # 101, 011, 111 from the lowest bit on
    assert index["indices"].tolist() == [0b11_011_101, 0b1]


def test_indices_of_more_than_a_part_are_packed_as_one():
    numbers = np.random.default_rng(0).integers(0, 8, (1 << 20) + 5, dtype=np.uint8)
    packed = encodings._pack_bits(numbers, 3)
    assert packed.size == -(-numbers.size * 3 // 8)
    np.testing.assert_array_equal(encodings._unpack_bits(packed, numbers.size, 3), numbers)


def test_a_group_with_less_than_n_is_filled_up_where_that_is_allowed():
    x = np.array([[0, 0, 0, 9, 0, 1, 2, 0]], np.float32)
    kept, encoding = x != 0, NM(n=2, m=4, axis=1)
    assert not encoding.fits(kept) and encoding.fits(kept, exactly=False)
    arrays = encoding.encode(x, kept)
    assert arrays[VALUES].tolist() == [[0, 9, 1, 2]]
    assert_same_bits(encoding.decode(arrays, x.shape), x)
    pattern = "NByM(n=2, m=4, axis=-1)"
    assert choose(x, kept, exactly=False, pattern=pattern) == encoding
    # looked for, the smallest is taken
    assert choose(x, kept, exactly=False) == NM(n=3, m=8, axis=1)
    # to keep the mask, no position may be added
    assert choose(x, kept, pattern=pattern) == NM(n=3, m=8, axis=1)
    assert not NM(n=1, m=4, axis=1).fits(kept, exactly=False)


def test_blocks_by_hand():
    # 3 x 5 in blocks of 2 x 2: a grid of 2 x 3 with ragged edges
    x = np.zeros((3, 5), np.float32)
    x[0:2, 2:4] = [[1, 2], [3, 4]]
    x[2, 4] = 5
    kept = x != 0
    encoding = Blocks(block=(2, 2))
    arrays = encoding.encode(x, kept)
    assert arrays["indices"].tolist() == [1, 5]
    assert arrays[VALUES].tolist() == [[[1, 2], [3, 4]], [[5, 0], [0, 0]]]
    assert_same_bits(encoding.decode(arrays, x.shape), x)
    assert encoding.nbytes(kept, x.itemsize) == 8 * 4 + 2
    kept[0, 2] = False
    assert not encoding.fits(kept)


def test_a_bit_mask_by_hand():
    x = np.array([[0, 1, 0, 2, 3], [0, 0, 0, 4, 0]], np.float32)
    arrays = Bitmask().encode(x, x != 0)
    assert arrays["mask"].tolist() == [0b00011010, 0b01]
    assert arrays[VALUES].tolist() == [1, 2, 3, 4]


def test_minus_zero_and_nan_payloads_survive():
    x = np.array([[0x80000000, 0, 0x7FC01234, 0xFF800001]], np.uint32).view(np.float32)
    kept = bits(x) != 0
    assert kept.tolist() == [[True, False, True, True]]
    for encoding in (CSR(), Bitmask()):
        assert_same_bits(encoding.decode(encoding.encode(x, kept), x.shape), x)


@pytest.mark.parametrize(
    ("pattern", "shape", "stack_axes", "expected"),
    [
        (patterns.NByM(n=2, m=4), (8, 6), (), NM(n=2, m=4, axis=0)),
        (patterns.NByM(n=1, m=4, axis=-1), (6, 3, 8), (1,), NM(n=1, m=4, axis=2)),
        (patterns.NByM(n=2, m=4), (8, 3, 6), (1,), NM(n=2, m=4, axis=0)),
        (patterns.Block(height=3, width=2), (9, 2, 6), (1,), Blocks(block=(3, 1, 2))),
        (patterns.Block(height=0, width=1), (9, 6), (), Blocks(block=(9, 1))),
        (patterns.Channel(), (2, 6, 8), (0,), Blocks(block=(1, 6, 1))),
        (patterns.Channel(axis=0), (6, 4, 2), (), Blocks(block=(1, 4, 2))),
        (patterns.Unstructured(), (4, 4), (), None),
        (patterns.ConstantFanIn(), (4, 4), (), None),
        ("SomebodysOwn(k=3)", (4, 4), (), None),
        ("NByM(n=4, m=4, axis=-2)", (4, 4), (), None),
        ("NByM(n=2, m=4, axis=-3)", (4, 4), (), None),
        ("not python", (4, 4), (), None),
        ("", (4, 4), (), None),
    ],
)
def test_a_recorded_pattern_says_the_encoding(pattern, shape, stack_axes, expected):
    assert from_pattern(str(pattern), shape, stack_axes) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        patterns.NByM(n=2, m=4),
        patterns.NByM(n=1, m=8, axis=-1),
        patterns.Block(height=4, width=2),
        patterns.Block(height=5, width=3),
        patterns.Channel(),
        patterns.Channel(axis=-2),
        patterns.ConstantFanIn(),
        patterns.Unstructured(),
    ],
    ids=str,
)
@pytest.mark.parametrize("stack_axes", [(), (0,), (1,)])
@pytest.mark.parametrize("is_recorded", [True, False])
def test_masks_of_every_pattern_with_stacked_axes(pattern, stack_axes, is_recorded):
    shape = [24, 48]
    for axis in stack_axes:
        shape.insert(axis, 3)
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(shape).astype(np.float32)
    kept = chosen(pattern, scores, stack_axes)
    x = kept_by_mask(scores, kept)
    name = str(pattern) if is_recorded else ""
    encoding = choose(x, kept, pattern=name, stack_axes=stack_axes)
    np.testing.assert_array_equal(round_trip(x, kept, encoding), kept)
    assert encoding == (from_pattern(str(pattern), shape, stack_axes) or CSR())


def chosen(pattern, scores, stack_axes):
    """A mask of that pattern, 75% sparse where it takes a level."""
    free = [a for a in range(scores.ndim) if a not in stack_axes]
    slices = np.moveaxis(scores, stack_axes, range(len(stack_axes)))
    slices = slices.reshape(-1, *[scores.shape[a] for a in free])
    out = np.stack([chosen_slice(pattern, x) for x in slices])
    out = out.reshape([*(scores.shape[a] for a in stack_axes), *out.shape[1:]])
    return np.ascontiguousarray(np.moveaxis(out, range(len(stack_axes)), stack_axes))


def chosen_slice(pattern, x):
    rng = np.random.default_rng(abs(int(x[0, 0] * 1e6)))
    name = type(pattern).__name__
    if name == "NByM":
        return group_mask(rng, x.shape, pattern.n, pattern.m, pattern.axis % 2)
    if name == "Channel":
        kept = (rng.permutation(x.shape[pattern.axis]) % 4 == 0)[
            (slice(None), None) if pattern.axis == -2 else (None, slice(None))
        ]
        return np.broadcast_to(kept, x.shape)
    if name == "Block":
        h, w = pattern.height, pattern.width
        grid = rng.permutation(-(-x.shape[0] // h) * -(-x.shape[1] // w)) % 4 == 0
        grid = grid.reshape(-(-x.shape[0] // h), -1)
        return np.repeat(np.repeat(grid, h, 0), w, 1)[: x.shape[0], : x.shape[1]]
    if name == "ConstantFanIn":
        return rng.permuted(np.arange(x.shape[0])[:, None].repeat(x.shape[1], 1), axis=0) < 6
    return rng.random(x.shape) < 0.25


def test_a_record_that_does_not_hold_is_skipped():
    kept = np.zeros((16, 8), bool)
    kept[[0, 1, 5, 12]] = True
    x = kept.astype(np.float32)
    for record in ("NByM(n=1, m=4, axis=-2)", "Block(height=2, width=2, pooling='mean')"):
        assert choose(x, kept, pattern=record) == Blocks(block=(1, 8))
    kept[:], kept[::4] = False, True  # 1:4 along axis 0, too
    assert choose(x, kept, pattern="NByM(n=1, m=4, axis=-2)") == NM(n=1, m=4, axis=0)


def test_the_finest_groups_that_hold_are_found():
    rng = np.random.default_rng(0)
    kept = group_mask(rng, (32, 12), 2, 4, 0)
    assert find(kept) == [NM(n=2, m=4, axis=0)]
    assert find(rng.random((32, 32)) < 0.3) == []
    assert find(np.zeros((0, 4), bool)) == []


def test_what_is_not_smaller_stays_dense_or_takes_a_bit_mask():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 300)).astype(np.float16)

    def encoding(density, **kwargs):
        kept = rng.permutation(x.size).reshape(x.shape) < density * x.size
        return choose(kept_by_mask(x, kept), kept, **kwargs)

    # CSR takes 2 + 2 bytes a value, the mask an eighth of a byte a weight
    assert encoding(0.45) == CSR()
    assert encoding(0.55) == Bitmask()
    assert encoding(0.93) == Bitmask()
    assert encoding(0.95) == Dense()
    assert encoding(1.0) == Dense()
    assert encoding(0.45, smallest=True) == Bitmask()
    assert encoding(0.05, smallest=True) == CSR()


@pytest.mark.parametrize(
    ("pattern", "exactly", "density"),
    [("", True, 0.2), ("", False, 0.2), ("", True, 0.49), ("NByM(n=2, m=4, axis=-2)", True, 0.5)],
)
def test_what_it_takes_to_choose_and_encode(pattern, exactly, density):
    """Memory beside the weight and its mask, in the weight's size: no candidate is built."""
    rng = np.random.default_rng(0)
    kept = rng.random((1024, 1024), dtype=np.float32) < density
    if pattern:
        kept = group_mask(rng, kept.shape, 2, 4, 0)
    x = np.where(kept, np.float32(1), np.float32(0))
    tracemalloc.start()
    try:
        encoding = choose(x, kept, exactly=exactly, pattern=pattern)
        chosen = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        encoding.encode(x, kept)
        encoded = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert chosen < 0.5 * x.nbytes and encoded < 1.25 * x.nbytes


def test_bounds_by_hand():
    def bound(encoding, shape, kept):
        return encoding.bound_bytes(shape, kept, 4)

    assert bound(CSR(), (2, 4), 2) == 8 + math.ceil(math.log2(28) / 8)
    # 16 groups of log2(6) bits
    assert bound(NM(n=2, m=4, axis=0), (8, 8), 32) == 128 + math.ceil(16 * math.log2(6) / 8)
    # 2 of 4 blocks
    assert bound(Blocks(block=(2, 4)), (4, 8), 16) == 64 + 1
    assert bound(Dense(), (4, 8), 32) == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(indices=a["indices"] + 200), "rows and columns contradict"),
        (lambda a: a.update(indptr=a["indptr"][:-1]), "rows and columns contradict"),
        (lambda a: a.update(indptr=a["indptr"][::-1]), "rows and columns contradict"),
        (lambda a: a.update(indices=a["indices"] * 0), "one position has several values"),
        (lambda a: a.update(values=a["values"][:-1]), "values for"),
    ],
)
def test_damaged_csr_is_told(change, message):
    x = np.arange(20, dtype=np.float32).reshape(4, 5)
    arrays = CSR().encode(x, x > 7)
    change(arrays)
    with pytest.raises(ValueError, match=message):
        CSR().decode(arrays, x.shape)


def test_damaged_others_are_told():
    x = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    kept = np.zeros((4, 4), bool)
    kept[::2] = True
    cases = [
        (Bitmask(), "mask", lambda a: a[:-1], "mask contradicts"),
        (Bitmask(), "mask", lambda a: a | 1 << 7, "values for"),
        (NM(n=1, m=2, axis=0), "indices", lambda a: a[:-1], "indices contradict"),
        (Blocks(block=(1, 4)), "indices", lambda a: a + 4, "lie outside"),
        (Blocks(block=(1, 4)), "indices", lambda a: a * 0, "several values"),
        (Dense(), "values", lambda a: a[:2], "values contradict"),
    ]
    for encoding, name, change, message in cases:
        arrays = encoding.encode(kept_by_mask(x, kept), kept)
        arrays[name] = change(arrays[name])
        with pytest.raises(ValueError, match=message):
            encoding.decode(arrays, x.shape)
    two = NM(n=2, m=4, axis=0)
    arrays = {VALUES: np.zeros((1, 2), np.float32), "indices": np.zeros(1, np.uint8)}
    with pytest.raises(ValueError, match="several values"):
        two.decode(arrays, (4, 1))
    with pytest.raises(ValueError, match="can't be 2:4 along axis 0"):
        two.decode(arrays, (5, 1))


def test_fields_of_an_encoding_are_checked():
    assert from_dict("nm", {"n": 2, "m": 4, "axis": 0, "more": 1}) == NM(n=2, m=4, axis=0)
    assert from_dict("blocks", {"block": [2, 2]}) == Blocks(block=(2, 2))
    with pytest.raises(ValueError, match="its encoding is 'zip', which is none of"):
        from_dict("zip", {})
    with pytest.raises(ValueError, match="'nm', one of .* is missing"):
        from_dict("nm", {"n": 2})
    with pytest.raises(ValueError, match="said to be 4:4"):
        from_dict("nm", {"n": 4, "m": 4, "axis": 0})
    with pytest.raises(ValueError, match="blocks are said to be"):
        from_dict("blocks", {"block": [0, 2]})


def test_a_file_of_all_dtypes_is_the_librarys(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "x.safetensors"
    dtypes = [*DTYPES, np.bool_, np.int8, np.uint16, np.int16, np.uint32, np.uint64, np.int64]
    arrays = {f"{np.dtype(d)}": (np.arange(3) % 2).astype(d) for d in dtypes}
    arrays |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    with Writer(path) as writer:
        for name, x in arrays.items():
            writer.add(name, x)
        assert not path.exists()
        assert writer.finish({"a": "b"}) == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    reader = Reader(path)
    assert reader.metadata == {"a": "b"} and set(reader.names) == arrays.keys()
    for name, x in arrays.items():
        assert_same_bits(reader.read(name), x)
    # the library has no float8 for NumPy
    with Writer(path, overwrite=True) as writer:
        for name, x in arrays.items():
            if "float8" not in name:
                writer.add(name, x)
        writer.finish({})
    for name, x in load_file(path).items():
        assert_same_bits(x, arrays[name])


def test_every_tensor_starts_at_a_multiple_of_its_item(tmp_path):
    path = tmp_path / "x.safetensors"
    with Writer(path) as writer:
        for i, dtype in enumerate([np.uint8, np.float32, np.uint16, np.float64, np.uint8]):
            writer.add(f"{i}", np.ones(2 * i + 1, dtype))
        writer.finish({})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            assert (8 + length + start) % ((end - start) // entry["shape"][0]) == 0


def test_a_writer_that_does_not_finish_leaves_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(RuntimeError), Writer(path) as writer:
        writer.add("x", np.ones(3))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_a_writer_refuses(tmp_path):
    path = tmp_path / "x.safetensors"
    with Writer(path) as writer:
        writer.add("x", np.ones(3))
        with pytest.raises(ValueError, match="two tensors would be called 'x'"):
            writer.add("x", np.ones(3))
        with pytest.raises(ValueError, match="no dtype for 'y', which is complex128"):
            writer.add("y", np.ones(3, complex))
        writer.finish({})
    with pytest.raises(FileExistsError, match="exists already"):
        Writer(path)
    with pytest.raises(FileExistsError, match="exists already"):
        Writer(tmp_path, overwrite=True)
    with pytest.raises(NotADirectoryError, match="there is no folder"):
        Writer(tmp_path / "no/x.safetensors")


def test_what_a_reader_refuses(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Reader(path)
    with Writer(path) as writer:
        writer.add("x", np.ones(3))
        writer.finish({})
    whole = path.read_bytes()
    for part in (b"", whole[:4], whole[:40], whole[:-1], b"{}" * 20, whole + b"0"):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="no safetensors file, or not a whole one"):
            Reader(path)
