"""Exports and `load_export`: every pattern, dtype and form, and whatever a file can lack."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import checkpoint_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import sparse
from safetensors.numpy import load_file, save_file

from t5x_sparsity.artifacts.encodings import CSR, NM, Bitmask, Blocks, Dense, from_dict
from t5x_sparsity.artifacts.export import ExportError, export, load_export
from t5x_sparsity.artifacts.tensor_files import Reader, Writer
from t5x_sparsity.embedded import network

ROOT = Path(__file__).resolve().parents[2]


def checkpoint(weights, kept=None, record=None, step=7):
    """kept: path -> bool mask."""
    leaves = {f"target/{path}": x for path, x in weights.items()}
    leaves |= {
        f"state/sparsity/masks/{path}": checkpoint_files.pack(mask, None)
        for path, mask in (kept or {}).items()
    }
    return checkpoint_files.in_memory(leaves, record, step)


def same_bits(a, b):
    kind = f"u{b.dtype.itemsize}"
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(kind), b.view(kind))


def encoding(exported):
    return from_dict(exported["encoding"], exported)


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def grouped(shape, n, m, axis):
    counts = np.random.default_rng(1).random(shape)
    moved = np.moveaxis(counts, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    kept = groups.argsort(axis=-1).argsort(axis=-1) < n
    return np.ascontiguousarray(np.moveaxis(kept.reshape(moved.shape), -1, axis))


def record_of(pattern="Unstructured()", algorithm="RigL", stack_axes=()):
    return {"pattern": pattern, "algorithm": algorithm, "stack_axes": list(stack_axes)}


@pytest.fixture(scope="module")
def model():
    """(weights, masks, record) of a model with one of each."""
    rng = np.random.default_rng(3)
    kept = {
        "decoder/csr/kernel": rng.random((24, 40)) < 0.2,
        "decoder/half/kernel": rng.random((24, 40)) < 0.2,
        "decoder/nm/kernel": grouped((16, 24), 2, 4, 0),
        "decoder/blocks/kernel": np.kron(rng.random((6, 5)) < 0.3, np.ones((4, 8), bool)) > 0,
        "decoder/channels/kernel": np.broadcast_to(np.arange(16) % 4 == 0, (24, 16)),
        "decoder/scanned/kernel": grouped((16, 3, 8), 1, 4, 0),
        "decoder/experts/kernel": rng.random((4, 24, 16)) < 0.1,
        "decoder/most/kernel": rng.random((24, 40)) < 0.7,
        "decoder/nearly/kernel": np.arange(960).reshape(24, 40) > 5,
        "decoder/whole/kernel": np.ones((16, 16), bool),
    }
    weights = {p: np.where(m, random(m.shape), np.float32(0)) for p, m in kept.items()}
    half = weights["decoder/half/kernel"].astype(ml_dtypes.bfloat16)
    weights["decoder/half/kernel"] = half
    # what has just grown is 0, and a NaN is a value
    csr = weights["decoder/csr/kernel"]
    csr[tuple(i[:3] for i in np.nonzero(kept["decoder/csr/kernel"]))] = [0, -0.0, np.nan]
    weights |= {
        "decoder/norm/scale": np.zeros(24, np.float32),
        "decoder/dense/kernel": random((24, 8)),
        "decoder/steps": np.array(3, np.int32),
    }
    record = {p: record_of() for p in kept}
    record["decoder/nm/kernel"] = record_of("NByM(n=2, m=4, axis=-2)", "SRSTE")
    record["decoder/scanned/kernel"] = record_of("NByM(n=1, m=4, axis=-2)", stack_axes=[1])
    record["decoder/experts/kernel"] = record_of(stack_axes=[0])
    return weights, kept, record


def test_a_dense_export_needs_only_safetensors(tmp_path, model):
    weights, kept, record = model
    path = tmp_path / "x.safetensors"
    done = export(checkpoint(*model), path)
    loaded = load_file(path)
    assert loaded.keys() == weights.keys()
    for p, x in weights.items():
        assert same_bits(loaded[p], x), p
    for p, mask in kept.items():
        assert not np.any(loaded[p].view(f"u{loaded[p].itemsize}")[~mask])
    assert done["file_bytes"] == path.stat().st_size and done["step"] == 7
    metadata = Reader(path).metadata
    assert metadata["format"] == "t5x_sparsity.dense" and metadata["version"] == "1"
    assert metadata["step"] == "7" and metadata["producer"].startswith("t5x_sparsity ")
    said = json.loads(metadata["weights"])
    assert said["decoder/nm/kernel"]["sparsity"] == 0.5
    assert said["decoder/nm/kernel"]["algorithm"] == "SRSTE"
    assert said["decoder/csr/kernel"]["kept"] == kept["decoder/csr/kernel"].sum()
    assert said["decoder/norm/scale"]["sparsity"] == 0
    assert all(w["encoding"] == "dense" for w in said.values())


def test_a_compressed_export_is_exact_in_every_encoding(tmp_path, model):
    weights, kept, _ = model
    path = tmp_path / "x.safetensors"
    done = {w["path"]: w for w in export(checkpoint(*model), path, format="compressed")["weights"]}
    loaded = load_export(path, flat=True)
    assert list(loaded) == list(weights)
    for p, x in weights.items():
        assert same_bits(loaded[p], x), p
    encodings = {p.split("/")[1]: encoding(w) for p, w in done.items()}
    assert encodings == {
        "csr": CSR(),
        "half": CSR(),
        "nm": NM(n=2, m=4, axis=0),
        "blocks": Blocks(block=(4, 8)),
        "channels": Blocks(block=(24, 1)),
        "scanned": NM(n=1, m=4, axis=0),
        "experts": CSR(),
        "most": CSR(),
        "nearly": Dense(),
        "whole": Dense(),
        "norm": Dense(),
        "dense": Dense(),
        "steps": Dense(),
    }
    assert all(w["exported_bytes"] <= w["dense_bytes"] for w in done.values())
    # by hand: 192 values of 4 bytes and as many indices of 2 bits
    assert done["decoder/nm/kernel"]["exported_bytes"] == 192 * 4 + 192 // 4
    tensors = load_file(path)
    assert sum(x.nbytes for x in tensors.values()) == sum(
        w["exported_bytes"] for w in done.values()
    )
    assert tensors["decoder/nm/kernel.values"].shape == (24, 8)
    found = load_export(path, "masks", flat=True)
    assert found.keys() == kept.keys() - {"decoder/nearly/kernel"}
    for p, mask in found.items():
        np.testing.assert_array_equal(mask, kept[p], err_msg=p)
    assert done["decoder/nearly/kernel"]["note"] == (
        "stays dense, as no encoding is smaller; its mask isn't exported"
    )
    assert [p for p, w in done.items() if w["note"]] == ["decoder/nearly/kernel"]


def test_smallest_takes_bit_masks(tmp_path, model):
    weights, _, _ = model
    path = tmp_path / "x.safetensors"
    plain = export(checkpoint(*model), path, format="compressed")
    small = export(checkpoint(*model), path, format="compressed", smallest=True, overwrite=True)
    kinds = {w["path"].split("/")[1]: encoding(w) for w in small["weights"]}
    assert kinds["csr"] == kinds["most"] == Bitmask() and kinds["nm"] == NM(n=2, m=4, axis=0)
    for a, b in zip(plain["weights"], small["weights"], strict=True):
        assert b["exported_bytes"] <= a["exported_bytes"]
        assert b["exported_bytes"] >= b["bound_bytes"]
    for p, x in load_export(path, flat=True).items():
        assert same_bits(x, weights[p]), p


@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_as_bcoo(tmp_path, model, form):
    weights, kept, _ = model
    path = tmp_path / "x.safetensors"
    export(checkpoint(*model), path, format=form)
    loaded = load_export(path, "bcoo", flat=True)
    for p, x in weights.items():
        if p in kept and not kept[p].all() and (form == "dense" or "nearly" not in p):
            bcoo = loaded[p]
            assert isinstance(bcoo, sparse.BCOO) and bcoo.shape == x.shape
            # of what is kept, zeros are told from what is pruned in a compressed file alone
            nonzero = np.count_nonzero(x)
            assert bcoo.nse == (kept[p].sum() if form == "compressed" else nonzero)
            assert bcoo.indices_sorted and bcoo.unique_indices
            flat = np.ravel_multi_index(np.asarray(bcoo.indices).T, x.shape)
            assert (np.diff(flat) > 0).all()
            whole = np.zeros(x.size, x.dtype)
            whole[flat] = bcoo.data
            if form == "compressed":
                assert same_bits(whole.reshape(x.shape), x)
            np.testing.assert_array_equal(whole.reshape(x.shape), x)
        else:
            assert same_bits(loaded[p], x)
    nm = loaded["decoder/nm/kernel"]
    x = jnp.asarray(random((5, 16)))
    np.testing.assert_allclose(x @ nm, x @ weights["decoder/nm/kernel"], rtol=1e-5, atol=1e-5)
    if form == "compressed":  # a layer, an expert
        one = loaded["decoder/experts/kernel"][1]
        np.testing.assert_array_equal(one.todense(), weights["decoder/experts/kernel"][1])


def test_it_is_nested_as_parameters_are(tmp_path, model):
    path = tmp_path / "x.safetensors"
    export(checkpoint(*model), path)
    tree = load_export(path)
    assert tree.keys() == {"decoder"} and tree["decoder"]["norm"].keys() == {"scale"}
    assert same_bits(tree["decoder"]["dense"]["kernel"], model[0]["decoder/dense/kernel"])


def test_of_a_dense_export_masks_are_not_known(tmp_path, model):
    path = tmp_path / "x.safetensors"
    weights, kept, record = model
    only = {"decoder/csr/kernel": weights["decoder/csr/kernel"]}
    mask = {"decoder/csr/kernel": kept["decoder/csr/kernel"]}
    export(checkpoint(only, mask), path)
    with pytest.raises(ValueError, match="has no masks: export with --format compressed"):
        load_export(path, "masks")
    export(checkpoint(only), path, format="compressed", overwrite=True)
    with pytest.raises(ValueError, match="none of the weights in it had one to keep; export sp"):
        load_export(path, "masks")
    # the checkpoint has masks, but not of what is included
    export(checkpoint(*model), path, format="compressed", include="norm", overwrite=True)
    with pytest.raises(ValueError, match="none of the weights in it had one to keep; export sp"):
        load_export(path, "masks")


def test_dtypes(tmp_path, model):
    weights, kept, _ = model
    path = tmp_path / "x.safetensors"
    export(checkpoint(*model), path, format="compressed", dtype="bfloat16")
    for p, x in load_export(path, flat=True).items():
        expected = weights[p] if p == "decoder/steps" else weights[p].astype(ml_dtypes.bfloat16)
        assert same_bits(x, expected), p
    # what becomes 0 is kept as 0
    tiny = {"a": np.where(kept["decoder/csr/kernel"], np.float32(1e-9), np.float32(0))}
    mask = {"a": kept["decoder/csr/kernel"]}
    export(checkpoint(tiny, mask), path, format="compressed", dtype="float16", overwrite=True)
    assert not load_export(path, flat=True)["a"].any()
    np.testing.assert_array_equal(load_export(path, "masks", flat=True)["a"], mask["a"])
    large = {"a": np.array([[1.0, -7e4]], np.float32)}
    with pytest.raises(ExportError, match="a has values that float16 can't hold: .* 7e\\+04"):
        export(checkpoint(large), tmp_path / "y.safetensors", dtype="float16")
    infinite = {"a": np.array([[np.inf, np.nan]], np.float32)}
    export(checkpoint(infinite), path, dtype="float16", overwrite=True)
    np.testing.assert_array_equal(load_export(path)["a"], infinite["a"])
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16])
def test_weights_of_other_dtypes(tmp_path, dtype):
    kept = np.random.default_rng(0).random((32, 64)) < 0.1
    weights = {"a": np.where(kept, random((32, 64)).astype(dtype), np.zeros((), dtype))}
    path = tmp_path / "x.safetensors"
    done = export(checkpoint(weights, {"a": kept}), path, format="compressed")
    assert encoding(done["weights"][0]) == CSR()
    assert same_bits(load_export(path)["a"], weights["a"])


def test_include(tmp_path, model):
    path = tmp_path / "x.safetensors"
    export(checkpoint(*model), path, include="nm|csr")
    assert load_export(path, flat=True).keys() == {"decoder/nm/kernel", "decoder/csr/kernel"}


def test_without_masks_zeros_are_found(tmp_path, model):
    weights, _, record = model
    path = tmp_path / "x.safetensors"
    done = export(checkpoint(weights), path, format="compressed")
    kinds = {w["path"].split("/")[1]: encoding(w) for w in done["weights"]}
    assert kinds["nm"] == NM(n=2, m=4, axis=0) and kinds["channels"] == Blocks(block=(24, 1))
    assert kinds["most"] == CSR()  # as inspect: any zero of a matrix counts
    assert kinds["nearly"] == kinds["norm"] == Dense()  # nothing is smaller; no matrix
    assert not any(w["mask"] for w in done["weights"])
    # the -0.0 of a weight just grown can't be told from a pruned one's
    assert {w["path"]: w["note"] for w in done["weights"] if w["note"]} == {
        "decoder/csr/kernel": "1 of its pruned zeros are -0.0; their sign isn't kept"
    }
    for p, x in load_export(path, flat=True).items():
        np.testing.assert_array_equal(x, weights[p], err_msg=p)
        assert same_bits(x, weights[p]) or "csr" in p


def test_what_a_mask_prunes_but_is_not_zero_is_exported(tmp_path):
    weights = {"a": random((16, 16)), "b": random((16, 16))}
    kept = {"a": random((16, 16), seed=1) > 1, "b": np.ones((16, 16), bool)}
    weights["a"][~kept["a"]] = 0
    weights["a"][tuple(i[:2] for i in np.nonzero(~kept["a"]))] = [-1, 3]
    path = tmp_path / "x.safetensors"
    done = export(checkpoint(weights, kept), path, format="compressed")
    assert done["weights"][0]["note"] == "2 weights that its mask prunes aren't 0; it isn't kept"
    assert same_bits(load_export(path)["a"], weights["a"])
    assert load_export(path, "masks").keys() == {"b"}


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_a_weight_pruned_by_multiplication(tmp_path, dtype, has_mask):
    kept = np.random.default_rng(0).random((64, 64)) < 0.2
    x = random((64, 64)).astype(dtype) * kept.astype(dtype)
    assert not np.array_equal(x.view(f"u{x.itemsize}") != 0, kept)  # half of its zeros are -0.0
    signed = np.count_nonzero(np.signbit(x) & ~kept)
    path = tmp_path / "x.safetensors"
    many = checkpoint({"a": x}, {"a": kept} if has_mask else None)
    (done,) = export(many, path, format="compressed")["weights"]
    if dtype != ml_dtypes.float8_e5m2:
        assert encoding(done) == CSR() and done["exported_bytes"] < 0.5 * x.nbytes
    assert done["kept"] == kept.sum() and done["mask"] == has_mask
    assert done["note"] == f"{signed:,} of its pruned zeros are -0.0; their sign isn't kept"
    np.testing.assert_array_equal(load_export(path)["a"], x)
    bcoo = load_export(path, "bcoo")["a"]
    np.testing.assert_array_equal(
        np.ravel_multi_index(bcoo.indices.T, x.shape), np.flatnonzero(kept)
    )
    # a dense file has the checkpoint's bits
    (done,) = export(many, path, overwrite=True)["weights"]
    assert same_bits(load_export(path)["a"], x) and done["kept"] == kept.sum() and not done["note"]
    assert load_export(path, "bcoo")["a"].nse == kept.sum()


def test_the_command_needs_no_host(tmp_path):
    kept = np.random.default_rng(0).random((16, 16)) < 0.2
    leaves = {"state/step": np.int32(7), "target/a": np.where(kept, random((16, 16)), 0)}
    folder = checkpoint_files.write("orbax", tmp_path / "checkpoint_7", leaves)
    code = """if True:
        import sys
        from t5x_sparsity import cli
        assert cli.main(sys.argv[1:]) == 0
        hosts = ("tensorflow", "seqio", "t5x.", "t5x_sparsity.host", "t5x_sparsity.embedded")
        found = [name for name in sys.modules if name.startswith(hosts)]
        assert not found, found
    """
    out = tmp_path / "x.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, "export", folder, out],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"T5X_SPARSITY_HOST": "nonsense"},
    )
    assert done.returncode == 0, done.stderr
    assert f"Wrote {out}" in done.stdout


def test_empty_and_odd_shapes(tmp_path):
    weights = {
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
        "zero": np.zeros((8, 16), np.float32),
        "one": np.ones((1, 1), np.float32),
        "vector": np.zeros(16, np.float32),
    }
    kept = {"zero": np.zeros((8, 16), bool), "vector": np.zeros(16, bool)}
    path = tmp_path / "x.safetensors"
    for form in ("dense", "compressed"):
        export(checkpoint(weights, kept), path, format=form, overwrite=True)
        for p, x in load_export(path).items():
            assert same_bits(x, weights[p]), p
        assert load_export(path, "bcoo")["zero"].nse == 0


def test_one_weight_at_a_time_is_in_memory(tmp_path):
    size = 1 << 20
    one = random((1024, size // 1024))
    kept = random(one.shape, seed=1) > 1.3
    weights = {f"w{i}": np.where(kept, one, 0) for i in range(12)}
    many = checkpoint(weights, dict.fromkeys(weights, kept))
    tracemalloc.start()
    try:
        for form, most in (("dense", 2), ("compressed", 1.5)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            export(many, tmp_path / f"{form}.safetensors", format=form)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < most * one.nbytes, (form, peak / one.nbytes)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "zip"}, "format must be one of dense, compressed, got 'zip'"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"include": "("}, "include is not a regular expression"),
        ({"include": "nothing"}, "'nothing', is found in no weight's path; these are decoder/csr"),
    ],
)
def test_what_export_refuses(tmp_path, model, arguments, message):
    with pytest.raises(ExportError, match=message.replace("(", r"\(")):
        export(checkpoint(*model), tmp_path / "x.safetensors", **arguments)
    assert not list(tmp_path.iterdir())


def test_two_tensors_of_one_name(tmp_path):
    kept = {"a": np.arange(64).reshape(8, 8) == 9}
    weights = {"a": kept["a"].astype(np.float32), "a.values": random((3,))}
    with pytest.raises(ValueError, match="two tensors would be called 'a.values'"):
        export(checkpoint(weights, kept), tmp_path / "x.safetensors", format="compressed")
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_old_file(tmp_path, model):
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    with pytest.raises(FileExistsError):
        export(checkpoint(*model), path)
    large = {"a": random((2, 2)), "b": np.array([[1e30]], np.float32)}
    with pytest.raises(ExportError):
        export(checkpoint(large), path, dtype="float16", overwrite=True)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [path.name]


def rewritten(path, change):
    """The file with other metadata, or with other tensors."""
    reader = Reader(path)
    tensors, metadata = {n: reader.read(n) for n in reader.names}, dict(reader.metadata)
    weights = json.loads(metadata["weights"])
    change(tensors, metadata, weights)
    metadata.setdefault("weights", json.dumps(weights))
    if metadata["weights"] == reader.metadata["weights"]:
        metadata["weights"] = json.dumps(weights)
    with Writer(path, overwrite=True) as writer:
        for name, x in tensors.items():
            writer.add(name, x)
        writer.finish(metadata)


CSR_PATH = "decoder/csr/kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m, w: m.update(version="2"), "version '2', but this .* reads versions up to 1"),
        (lambda t, m, w: m.update(version="x"), "version 'x'"),
        (lambda t, m, w: m.update(format="t5x_sparsity.tiles"), "'t5x_sparsity.tiles', version"),
        (lambda t, m, w: m.pop("format"), "was not written by t5x-sparsity export"),
        (lambda t, m, w: m.update(weights="{"), "damaged: it doesn't say which weights"),
        (lambda t, m, w: m.update(weights="[]"), "damaged: it doesn't say which weights"),
        (lambda t, m, w: w[CSR_PATH].pop("shape"), "damaged: it doesn't say which weights"),
        (lambda t, m, w: w[CSR_PATH].update(shape=[40, 24]), f"damaged: weight '{CSR_PATH}'"),
        (lambda t, m, w: w[CSR_PATH].update(shape="x"), f"damaged: weight '{CSR_PATH}'"),
        (lambda t, m, w: w[CSR_PATH].update(encoding="zip"), "'zip', which is none of"),
        (lambda t, m, w: w[CSR_PATH].update(dtype="int8"), "its dtype is float32, not int8"),
        (lambda t, m, w: t.pop(f"{CSR_PATH}.indptr"), f"damaged: weight '{CSR_PATH}'"),
        (lambda t, m, w: t.pop(f"{CSR_PATH}.values"), f"damaged: weight '{CSR_PATH}'"),
        (lambda t, m, w: t.pop("decoder/norm/scale"), "damaged: weight 'decoder/norm/scale'"),
        (lambda t, m, w: t[f"{CSR_PATH}.indices"].fill(39), "one position has several values"),
    ],
)
def test_damaged_files_are_told(tmp_path, model, change, message):
    path = tmp_path / "x.safetensors"
    export(checkpoint(*model), path, format="compressed")
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as error:
        load_export(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_exports_are_told(tmp_path, model):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_export(path)
    save_file({"a": np.ones(3)}, path)
    with pytest.raises(ValueError, match=r"not written by .*safetensors.numpy.load_file reads it"):
        load_export(path)
    export(checkpoint(*model), path, overwrite=True)
    whole = path.read_bytes()
    for part in (b"", b"text", whole[:100], whole[:-1]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="no safetensors file, or not a whole one"):
            load_export(path)
    with pytest.raises(ValueError, match="as_ must be one of arrays, bcoo, masks, got 'csr'"):
        load_export(path, "csr")


@pytest.fixture(scope="module")
def example():
    path = ROOT / "examples/inference_from_export.py"
    spec = importlib.util.spec_from_file_location("inference_from_export", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small_decoder():
    """(config, weights, masks) of a decoder whose kernels are 80% sparse."""
    config = network.TransformerConfig(
        vocab_size=384,
        emb_dim=32,
        num_heads=4,
        head_dim=16,
        num_layers=1,
        mlp_dim=48,
        mlp_activations=("gelu", "linear"),
    )
    tokens = jnp.ones((1, 8), jnp.int32)
    init = network.DecoderWrapper(config).init(
        jax.random.key(0), tokens, tokens, enable_dropout=False
    )
    flat = jax.tree_util.tree_flatten_with_path(init["params"])[0]
    weights = {jax.tree_util.keystr(k, simple=True, separator="/"): np.array(x) for k, x in flat}
    rng = np.random.default_rng(0)
    kept = {p: rng.random(x.shape) < 0.2 for p, x in weights.items() if "/layers_" in p}
    kept = {p: m for p, m in kept.items() if p.endswith("kernel")}
    for p, mask in kept.items():
        weights[p][~mask] = 0
    return config, weights, kept


@pytest.mark.slow
def test_the_example_infers_what_the_dense_model_does(tmp_path, example, small_decoder):
    config, weights, kept = small_decoder
    path = tmp_path / "x.safetensors"
    export(checkpoint(weights, kept), path, format="compressed")
    assert example.decoder(load_export(path), ("gelu", "linear")).config == config
    dense, bcoo, dense_ms, bcoo_ms = example.compare(path, 2, 16, ("gelu", "linear"))
    assert dense.shape == (2, 16, 384) and dense_ms > 0 and bcoo_ms > 0
    np.testing.assert_allclose(dense, bcoo, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(dense, bcoo)  # other sums: the sparse products did run
    # and it is the model of the checkpoint
    tree = load_export(path)
    text = np.frombuffer(Path(example.__file__).read_bytes(), np.uint8).astype(np.int32) + 3
    targets = np.resize(text, (2, 16))
    inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    model = network.DecoderWrapper(config)
    expected = model.apply({"params": tree}, inputs, targets, enable_dropout=False)
    np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-5)


def test_the_example_prints_what_the_page_says(tmp_path, example, small_decoder, capsys):
    path = tmp_path / "x.safetensors"
    export(checkpoint(*small_decoder[1:]), path)
    example.main([str(path), "--batch=1", "--length=8"])
    out = capsys.readouterr().out
    assert "largest difference:" in out and "a forward pass: dense" in out
    rows = example.products(16, 24, tokens=(2,), levels=(0.5,))
    assert len(rows) == 1 and rows[0][:2] == (2, "50%")
    with pytest.raises(SystemExit):
        example.main([])


def test_the_reader_of_the_page_reads_what_we_write(tmp_path, model):
    page = (ROOT / "docs/export.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (source,) = (b for b in blocks if "def read" in b)
    scope = {}
    exec(compile(source, "docs/export.md", "exec"), scope)
    weights, kept, _ = model
    path = tmp_path / "x.safetensors"
    for form in ("dense", "compressed"):
        only = {p: x for p, x in weights.items() if "half" not in p}
        export(checkpoint(only, kept, model[2]), path, format=form, overwrite=True)
        read = scope["read"](path)
        assert {"decoder/csr/kernel", "decoder/experts/kernel", "decoder/steps"} <= read.keys()
        assert len(read) == len(only) - (4 if form == "compressed" else 0)
        for p, x in read.items():
            assert same_bits(x, weights[p]), p
