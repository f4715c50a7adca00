"""Every algorithm, over every pattern, through train steps, against a reference in plain numpy."""

import jax
import pytest
from algorithm_runs import ALGORITHMS, Case, case_of, programs, programs_of, run, types_of
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import t5x_sparsity as ts
from t5x_sparsity.core.plan import STACKED_AXES
from t5x_sparsity.core.train_step import init_state, train_step


@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=3)
@example(seed=0, unit=8)
@given(seed=st.integers(0, 1000), unit=st.sampled_from([1, 2, 8]))  # of 1: ties everywhere
def test_contract(name, seed, unit):
    case = case_of(name)
    assert set(case.plan) == (set() if name == "dense" else set(case.shapes))
    swapped = run(case, programs(name), seed, unit)
    grows = isinstance(case.algorithm, ts.algorithms.DropAndGrow)
    assert bool(swapped) == grows


SMALL_SHAPES = {
    (4, 8): None,
    (8, 3): None,
    (2, 4, 6): ("layers", "embed", "mlp"),
    (4, 3, 5): ("embed", "heads", "mlp"),
    (4, 2, 8): ("embed", "layers", "mlp"),
    (3, 8, 2, 2): ("expert", "embed", "layers", "mlp"),
}
FAMILIES = ("granet", "magnitude", "snfs", "top_kast", "acdc", "mest", "global_magnitude")


@pytest.mark.slow
@settings(max_examples=5, phases=[Phase.generate])  # an example costs its compilation
@given(
    name=st.sampled_from(FAMILIES),
    shape=st.sampled_from(sorted(SMALL_SHAPES)),
    pattern=st.sampled_from(
        [ts.Unstructured(), ts.NByM(n=1, m=4), ts.Block(height=2, width=2), ts.Channel(axis=-2)]
    ),
    level=st.sampled_from([0.0, 0.5, 0.875]),
    seed=st.integers(0, 1000),
)
def test_shapes_patterns_and_levels(name, shape, pattern, level, seed):
    names = SMALL_SHAPES[shape]
    free = [n for n, a in zip(shape, names or shape, strict=True) if a not in STACKED_AXES]
    if isinstance(pattern, ts.NByM) and free[-2] % 4:
        pattern = ts.Unstructured()
    case = Case.of(ALGORITHMS[name], {"w": shape}, {"w": pattern}, {"w": names}, level)
    run(case, programs_of(case), seed)


def test_every_algorithm_has_a_row():
    named = [getattr(ts.algorithms, name) for name in ts.__all__ if hasattr(ts.algorithms, name)]
    classes = {x for x in named if isinstance(x, type) and issubclass(x, ts.Algorithm)}
    classes.remove(ts.Algorithm)
    assert {type(x) for x in ALGORITHMS.values()} == classes


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "dense"])
def test_types_stay(name):
    case = case_of(name)
    plan = {p: layer for p, layer in case.plan.items() if p in ("fan_in", "mean", "stack")}

    def typed(dtype):
        return {p: jax.ShapeDtypeStruct(layer.shape, dtype) for p, layer in plan.items()}

    def steps(weights, grads, count):
        state = init_state(case.config, plan, weights)
        found = [(state, weights)]
        for updates_masks in (True, False):
            result = train_step(
                plan,
                state,
                step=count,
                weights=weights,
                grads=grads,
                optimizer_state={"nu": weights},
                gradient_step=lambda w, g, s: (
                    {p: x - g[p].astype(x.dtype) for p, x in w.items()},
                    s,
                ),
                updates_masks=updates_masks,
            )
            found.append((result.state, result.weights))
        return found

    for weights, grads in (("bfloat16", "float32"), ("float32", "bfloat16"), ("float16",) * 2):
        with jax.numpy_dtype_promotion("strict"):
            count = jax.ShapeDtypeStruct((), "int32")
            before, *after = jax.eval_shape(steps, typed(weights), typed(grads), count)
        for found in after:
            assert types_of(found) == types_of(before)
