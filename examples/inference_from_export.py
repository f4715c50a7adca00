"""Inference from an export, with dense arrays and with BCOO, compared and timed.

    python -m t5x_sparsity.train --gin_file=examples/rigl_stdlib.gin
    t5x-sparsity export /tmp/rigl_stdlib model.safetensors --format=compressed
    python examples/inference_from_export.py model.safetensors

It runs the embedded host's decoder: once as it is, its weights dense arrays, and once with every
sparse kernel a BCOO of jax.experimental.sparse, from the same file. It prints by how much the
logits differ, since sums run in another order, and both times. `--products` times single products
of T5 1.1 base's size instead, at several sparsities, next to SciPy's CSR; it needs no file.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from flax import linen as nn
from jax.experimental import sparse

from t5x_sparsity.artifacts.export import load_export
from t5x_sparsity.embedded import layers, network


def decoder(params, activations):
    """The model that these parameters are of; what shapes don't say is T5 1.1's."""
    weights = params["decoder"]
    vocab_size, emb_dim = weights["token_embedder"]["embedding"].shape
    heads = weights["relpos_bias"]["rel_embedding"].shape[0]
    first = weights["layers_0"]
    config = network.TransformerConfig(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_layers=sum(name.startswith("layers_") for name in weights),
        num_heads=heads,
        head_dim=first["self_attention"]["query"]["kernel"].shape[1] // heads,
        mlp_dim=first["mlp"]["wo"]["kernel"].shape[0],
        mlp_activations=activations,
        logits_via_embedding="logits_dense" not in weights,
    )
    return network.DecoderWrapper(config)


def sparse_product(next_function, args, kwargs, context):
    """Takes a layer's kernel as BCOO, where it is one; all else is left as it is."""
    if not isinstance(context.module, layers.Dense):
        return next_function(*args, **kwargs)
    kernel = context.module.get_variable("params", "kernel")
    if not isinstance(kernel, sparse.BCOO):
        return next_function(*args, **kwargs)
    (x,) = args
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def median_ms(function, *args, repeats=20):
    """Median time of a call, in milliseconds, after one that compiles."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def compare(path, batch, length, activations):
    """Runs the model both ways; returns both logits and both times in milliseconds."""
    forms = {form: load_export(path, form) for form in ("arrays", "bcoo")}
    model = decoder(forms["arrays"], activations)
    # this file's own bytes, as seqio's ByteVocabulary has them: 3 for the ids before the bytes
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32) + 3
    targets = np.resize(text, (batch, length))
    inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]

    @jax.jit
    def forward(params):
        with nn.intercept_methods(sparse_product):
            return model.apply({"params": params}, inputs, targets, enable_dropout=False)

    forms = {form: jax.device_put(params) for form, params in forms.items()}
    logits = [np.asarray(forward(params)) for params in forms.values()]
    return *logits, *(median_ms(forward, params) for params in forms.values())


def products(inputs=768, outputs=2048, tokens=(1, 256), levels=(0.5, 0.8, 0.9, 0.95, 0.99)):
    """Rows of a table: one product x [tokens, inputs] by w [inputs, outputs], in milliseconds."""
    rng = np.random.default_rng(0)
    dense, rows = jax.jit(lambda x, w: x @ w), []
    for count in tokens:
        x = rng.standard_normal((count, inputs), dtype=np.float32)
        for level in levels:
            w = rng.standard_normal((inputs, outputs), dtype=np.float32)
            w[rng.random(w.shape) < level] = 0
            bcoo = sparse.BCOO.fromdense(jnp.asarray(w))
            csr, turned = scipy.sparse.csr_matrix(w.T), np.ascontiguousarray(x.T)
            times = (
                median_ms(dense, jnp.asarray(x), jnp.asarray(w)),
                median_ms(dense, jnp.asarray(x), bcoo, repeats=5),
                median_ms(lambda a, b: a @ b, csr, turned),
            )
            rows.append((count, f"{level:.0%}", *(f"{t:.2f}" for t in times)))
    return rows


def main(argv=None):
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("export", nargs="?", help="a file of t5x-sparsity export")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="of an example, in bytes")
    parser.add_argument("--activations", nargs="+", default=("gelu", "linear"))
    parser.add_argument("--products", action="store_true", help="time single products instead")
    values = parser.parse_args(argv)
    if values.products == (values.export is not None):
        parser.error("give an export, or --products, and not both")
    if values.products:
        headers = ("tokens", "sparsity", "dense, ms", "BCOO, ms", "SciPy CSR, ms")
        for row in (headers, *products()):
            print("".join(f"{cell:>15}" for cell in row))
        return
    try:
        dense, bcoo, dense_ms, bcoo_ms = compare(
            values.export, values.batch, values.length, values.activations
        )
    except (OSError, ValueError) as e:
        parser.error(str(e))
    same = np.mean(dense.argmax(-1) == bcoo.argmax(-1))
    print(f"logits: {'x'.join(map(str, dense.shape))}, magnitude up to {np.abs(dense).max():.4g}")
    print(f"largest difference: {np.abs(dense - bcoo).max():.2g}; same best byte: {same:.2%}")
    print(f"a forward pass: dense {dense_ms:.2f} ms, BCOO {bcoo_ms:.2f} ms")


if __name__ == "__main__":
    main()
