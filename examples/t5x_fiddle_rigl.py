r"""T5X's own fiddle configuration of T5 1.1 small on C4, made sparse with RigL.

(RigL: Evci et al. 2020, arXiv:1911.11134.) For T5X, on accelerators; it needs the package t5, whose
task reads C4 by TensorFlow Datasets. From the folder of this file:

    python -m t5x.main --run_mode=train \
      --fdl_config='t5x_fiddle_rigl.small_c4_rigl(model_dir="gs://bucket/rigl", sparsity=0.9)'

`model_dir` and `train_steps` are arguments, since more than one part of the configuration has them;
anything else can be set as usual, such as --fdl_set=train_dataset_cfg.batch_size=128 or
--fdl_set=train_state_initializer_cls.config.distribution='"er"'.

Mask updates end at three quarters of `train_steps`; see gin/sparsity/rigl.gin for what each setting
means.
"""

import fiddle as fdl
from t5x.fiddle_configs.examples import t5_1_1

import t5x_sparsity as ts


def small_c4_rigl(
    model_dir: str, sparsity: float = 0.8, train_steps: int = 10_000, period: int = 100
) -> fdl.Buildable:
    """T5X's `small_c4_pretrain`, sparse."""
    run = t5_1_1.small_c4_pretrain()
    run.model_dir = model_dir
    run.total_steps = train_steps
    ts.make_sparse(run, rigl(sparsity, train_steps, period))
    return run


def rigl(sparsity: float, train_steps: int, period: int) -> fdl.Buildable:
    """What 'sparsity/rigl.gin' binds."""
    return fdl.Config(
        ts.SparsityConfig,
        algorithm=fdl.Config(
            ts.RigL,
            updates=fdl.Config(
                ts.Periodic, begin=0, end=0.75, period=period, total_steps=train_steps
            ),
            drop_fraction=fdl.Config(ts.Cosine, initial=0.3, final=0.0),
        ),
        sparsity=sparsity,
        distribution="erk",
    )
