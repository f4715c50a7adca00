"""Times the plain and the mask-update train step against the dense one, on the host in use.

    python benchmarks/steps.py --devices=1
    python benchmarks/steps.py --devices=4
    python benchmarks/steps.py --methods=rigl,magnitude,snfs,magnitude_ste,top_kast

Methods are gin files of gin/sparsity, with their defaults but for the steps of mask updates. Dense
and sparse trainers take their steps in turn, so that a drift of the machine's speed hits all alike.
Prints medians and ratios, and what the compiled steps gather between devices.
"""

import os
import re
import statistics
import sys
import time
from pathlib import Path

from absl import app, flags

_DEVICES = flags.DEFINE_integer("devices", 1, "CPU devices, all model-parallel.")
_METHODS = flags.DEFINE_list("methods", ["rigl"], "Gin files of gin/sparsity.")
_BINDINGS = flags.DEFINE_multi_string("binding", [], "Gin bindings of all methods.")
_D_MODEL = flags.DEFINE_integer("d_model", 256, "Width; d_ff is four times that.")
_LAYERS = flags.DEFINE_integer("layers", 2, "Encoder layers, and as many decoder layers.")
_BATCH = flags.DEFINE_integer("batch", 8, "Sequences a batch.")
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens a sequence.")
_STEPS = flags.DEFINE_integer("steps", 30, "Steps a trainer.")
_PERIOD = flags.DEFINE_integer("period", 5, "Steps from one mask update to the next.")

FEATURES = (
    "encoder_input_tokens",
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
)
COLLECTIVE = re.compile(r" (all-gather|all-to-all|collective-permute)(?:-start)?\(")


def config_of(method: str):
    """The configuration that the method's gin file makes."""
    import gin

    import __main__ as script
    import t5x_sparsity as ts
    from t5x_sparsity import host

    script.train = host.train_lib.train  # which gin files bind
    gin.clear_config()
    gin.add_config_file_search_path(str(Path(__file__).parents[1] / "gin"))
    gin.configurable(script.train)
    text = Path(__file__).parents[1].joinpath("gin/sparsity", f"{method}.gin").read_text()
    macros = {
        "TRAIN_STEPS": 10**6,
        "MASK_UPDATE_BEGIN": _PERIOD.value,
        "MASK_UPDATE_END": 10**6 - 1,
        "MASK_UPDATE_PERIOD": _PERIOD.value,
    }
    gin.parse_config(text)
    gin.parse_config([f"{k} = {v}" for k, v in macros.items() if k in text])
    gin.parse_config(_BINDINGS.value)
    return gin.get_configurable(ts.SparsityConfig)()


def make_trainer(method: str | None):
    """A trainer on a T5 1.1 under AdamW; None is the host's own, dense."""
    import jax
    import numpy as np
    import seqio
    from jax.sharding import Mesh

    import t5x_sparsity as ts
    from t5x_sparsity import host

    class ModelParallel(host.partitioning.PjitPartitioner):
        @property
        def mesh(self):
            return Mesh(np.array(jax.devices()).reshape(1, -1), ("data", "model"))

    config = host.network.T5Config(
        vocab_size=512,
        dtype="float32",
        emb_dim=_D_MODEL.value,
        num_heads=4,
        num_encoder_layers=_LAYERS.value,
        num_decoder_layers=_LAYERS.value,
        head_dim=64,
        mlp_dim=4 * _D_MODEL.value,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )
    optimizer = host.optimizers.adamw(1e-3)
    vocabulary = seqio.ByteVocabulary()
    model = host.models.EncoderDecoderModel(
        host.network.Transformer(config), vocabulary, vocabulary, optimizer
    )
    partitioner = ModelParallel(num_partitions=_DEVICES.value)
    arguments = (
        optimizer,
        model.get_initial_variables,
        {k: (_BATCH.value, _LENGTH.value) for k in FEATURES},
        partitioner,
    )
    if method is None:
        initializer = host.TrainStateInitializer(*arguments)
        make = host.Trainer
    else:
        initializer = ts.SparseTrainStateInitializer(*arguments, config=config_of(method))

        def make(**kwargs):
            return ts.sparse_trainer(host.Trainer, **kwargs)

    return make(
        model=model,
        train_state=initializer.from_scratch(jax.random.PRNGKey(0)),
        partitioner=partitioner,
        eval_names=[],
        summary_dir=None,
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(1),
        learning_rate_fn=lambda step: 1e-3,
        num_microbatches=None,
    )


def steps_of(trainer) -> dict:
    if hasattr(trainer, "train_step_variants"):
        return trainer.train_step_variants()
    return {"plain": trainer._partitioned_train_step}


def main(_) -> None:
    import jax
    import numpy as np
    from tabulate import tabulate

    from t5x_sparsity import host

    rng = np.random.RandomState(0)
    shape = (_BATCH.value, _LENGTH.value)
    batch = {k: rng.randint(3, 250, shape).astype("int32") for k in FEATURES[:3]}
    batch[FEATURES[3]] = np.ones(shape, "int32")

    runs = {}
    for name in (None, *_METHODS.value):
        trainer = make_trainer(name)
        compiled, seconds, gathers = {}, {}, {}
        for kind, step in steps_of(trainer).items():
            tick = time.perf_counter()
            lowered = step.lower(trainer.train_state, batch)
            text = lowered.compile().as_text()
            seconds[kind] = time.perf_counter() - tick
            gathers[kind] = len(COLLECTIVE.findall(text))
            compiled[kind] = []
        runs[name or "dense"] = (trainer, compiled, seconds, gathers)
    for i in range(-2, _STEPS.value):  # two steps to warm up, each kind once
        for trainer, times, _, _ in runs.values():
            update = "update" in times and (i == -1 or (i >= 0 and i % _PERIOD.value == 0))
            step = steps_of(trainer)["update" if update else "plain"]
            state = trainer.train_state
            tick = time.perf_counter()
            state, _ = step(state, batch)
            jax.block_until_ready(state)
            took = time.perf_counter() - tick
            trainer.train_state = state
            if i >= 0:
                times["update" if update else "plain"].append(took)
    dense = statistics.median(runs["dense"][1]["plain"])
    dense_compile = runs["dense"][2]["plain"]
    rows = []
    for name, (trainer, times, seconds, gathers) in runs.items():
        for kind, taken in times.items():
            median = statistics.median(taken)
            rows.append(
                (name, kind, median, median / dense, seconds[kind] / dense_compile, gathers[kind])
            )
        trainer.close()
    weights = sum(x.size for x in jax.tree.leaves(runs["dense"][0].train_state.params))
    print(f"{host.NAME} host, {weights / 1e6:.1f}M weights, {_DEVICES.value} CPU devices")
    headers = ("run", "step", "seconds", "x dense", "compile, x dense", "gathers")
    print(tabulate(rows, headers=headers, floatfmt=("", "", ".4f", ".3f", ".2f", "d")))


def _devices(argv) -> int:
    """The flag, before jax is imported."""
    return next((int(a.split("=")[1]) for a in argv if a.startswith("--devices=")), 1)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={_devices(sys.argv)}"
    )
    app.run(main)
