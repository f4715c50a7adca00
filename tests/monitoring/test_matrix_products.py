"""Products counted by hand: which weight takes part, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_sparsity.monitoring.matrix_products import count_products


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


X = shape(4, 8)
W = {"w": shape(8, 16)}
ONCE = 2 * 4 * 8 * 16


def looped(w, x):
    def body(x, k):
        return jnp.tanh(x @ k), None

    # layers stacked along axis 1, as T5X has them
    return jax.lax.scan(body, x, jnp.moveaxis(w["s"], 1, 0))[0]


def carried(w, x):
    """A weight that stays, one that is carried on and so changes, and one that is cut up."""

    def body(state, k):
        x, c = state
        return (x @ w["w"] @ c @ k, 2 * c), x

    return jax.lax.scan(body, (x, w["c"]), w["s"])[0][0]


@jax.custom_vjp
def project(x, w):
    return x @ w


project.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g, g))


@pytest.mark.parametrize(
    "fn, weights, of_weights, others",
    [
        (lambda w, x: x @ w["w"], W, {"w": ONCE}, 0),
        (lambda w, x: (x @ w["w"].astype(jnp.bfloat16)).sum(), W, {"w": ONCE}, 0),
        (lambda w, x: x @ (0.5 * w["w"]).reshape(8, 4, 4)[:, :2].reshape(8, 8), W,
         {"w": ONCE / 2}, 0),
        (lambda w, x: jax.jit(lambda a, b: b @ a)(w["w"], x), W, {"w": ONCE}, 0),
        (jax.checkpoint(lambda w, x: x @ w["w"]), W, {"w": ONCE}, 0),
        (lambda w, x: project(x, w["w"]), W, {"w": ONCE}, 0),
        (lambda w, x: jnp.einsum("ab,bc->ca", x, w["w"]), W, {"w": ONCE}, 0),
        # a loop of three layers
        (looped, {"s": shape(8, 3, 8)}, {"s": 3 * 2 * 4 * 8 * 8}, 0),
        (carried, {"w": shape(8, 8), "c": shape(8, 8), "s": shape(3, 8, 8)},
         {"w": 3 * ONCE / 2, "c": 0, "s": 3 * ONCE / 2}, 3 * ONCE / 2),
        # attention's products have no weight; a scale that activations are multiplied by is none
        (lambda w, x: (x * w["b"]) @ (x * w["b"]).T, {"b": shape(8)}, {"b": 0}, 2 * 4 * 4 * 8),
        # a look-up, as an index and as a product
        (lambda w, x: w["w"][jnp.arange(4)], W, {"w": 0}, 0),
        (lambda w, x: (jnp.arange(4)[:, None] == jnp.arange(8)).astype(jnp.float32) @ w["w"], W,
         {"w": 0}, 0),
        (lambda w, x: jnp.asarray(np.eye(8)[:4], jnp.float32) @ w["w"], W, {"w": 0}, 0),
        # tied: the same weight looks up, which is free, and gives the logits
        (lambda w, x: w["w"][jnp.arange(4)] @ w["w"].T, W, {"w": ONCE}, 0),
        # side by side
        (lambda w, x: x @ jnp.concatenate([w["a"], w["b"]], 1),
         {"a": shape(8, 4), "b": shape(8, 12)}, {"a": ONCE / 4, "b": ONCE * 3 / 4}, 0),
        # the larger branch
        (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w["w"], lambda: x[:, :1] @ w["w"][:1]),
         W, {"w": ONCE}, 0),
        (lambda w, x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w["q"], x),
         {"q": shape(8, 8)}, {"q": 2 * 4 * 8 * 8}, 0),
        (lambda w, x: jax.lax.conv(x.reshape(1, 2, 4, 4), w["k"], (1, 1), "SAME"),
         {"k": shape(3, 2, 5, 5)}, {"k": 2 * 3 * 16 * 2 * 25}, 0),
    ],
)  # fmt: skip
def test_products_by_hand(fn, weights, of_weights, others):
    found = count_products(fn, weights, X)
    assert found.of_weights == of_weights and found.others == others
    assert found.total == sum(of_weights.values()) + others


def test_nested_weights_have_paths():
    weights = {"mlp": {"wi": shape(8, 16), "wo": shape(16, 8)}}
    found = count_products(
        lambda w, x: jax.nn.gelu(x @ w["mlp"]["wi"]) @ w["mlp"]["wo"], weights, X
    )
    assert found.of_weights == {"mlp/wi": ONCE, "mlp/wo": ONCE}
