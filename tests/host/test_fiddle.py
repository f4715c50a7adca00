"""T5X's fiddle configurations, made sparse."""

import sys
import types

import gin
import inprocess_runs
import numpy as np
import pytest
import tiny_t5

import t5x_sparsity as ts
from t5x_sparsity import host
from t5x_sparsity.core import packing

pytestmark = tiny_t5.t5x_only

STEPS = 4


@pytest.fixture
def example(monkeypatch):
    """The example. The package t5 registers its tasks when imported, and it is a large one."""
    for name in ("t5", "t5.data", "t5.data.mixtures", "t5.data.tasks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.syspath_prepend(str(tiny_t5.ROOT / "examples"))
    import t5x_fiddle_rigl

    return t5x_fiddle_rigl


def shrink(run):
    """A model and a task that take seconds, set as --fdl_set does."""
    import fiddle as fdl
    import seqio

    net = run.model.module.config
    net.emb_dim = net.mlp_dim = 32
    net.num_heads = net.num_encoder_layers = net.num_decoder_layers = 1
    net.head_dim, net.vocab_size, net.dtype = 16, tiny_t5.VOCAB, "float32"
    run.model.input_vocabulary = fdl.Config(seqio.ByteVocabulary)
    run.model.output_vocabulary = fdl.Config(seqio.ByteVocabulary)
    features = ("inputs", "targets")
    for name in ("train_dataset_cfg", "train_eval_dataset_cfg"):
        data = getattr(run, name)
        data.mixture_or_task_name = inprocess_runs.task(features)
        data.task_feature_lengths = dict.fromkeys(features, inprocess_runs.LENGTH)
        data.batch_size, data.use_cached, data.pack = inprocess_runs.BATCH, False, False
    run.infer_eval_dataset_cfg = None
    run.eval_steps, run.eval_period, run.random_seed = 1, 2, 0
    run.checkpoint_cfg.save.period = 2
    # T5X on CPU would split the model over all of the devices
    run.partitioner = fdl.Config(tiny_t5.MeshPartitioner)
    return run


def trained(run):
    """The leaves after a run, started as t5x/main.py starts it."""
    import fiddle as fdl
    from t5x import config_utils

    start = fdl.build(fdl.cast(fdl.Partial, config_utils.prepare_to_summarize(run)))
    return tiny_t5.leaves(start()[1])


def kept(leaves):
    prefix = "state/sparsity/masks/"
    stored = {k[len(prefix) :]: v for k, v in leaves.items() if k.startswith(prefix)}
    return {
        p: np.asarray(packing.unpack(v, leaves[f"target/{p}"].shape)) for p, v in stored.items()
    }


@pytest.mark.slow
def test_the_example_trains_sparse_and_resumes(example, tmp_path):
    run = shrink(example.small_c4_rigl(str(tmp_path), 0.75, train_steps=2, period=1))
    before = kept(trained(run))
    run = shrink(example.small_c4_rigl(str(tmp_path), 0.75, train_steps=STEPS, period=1))
    leaves = trained(run)
    after = kept(leaves)
    assert int(leaves["state/step"]) == STEPS
    for path, mask in after.items():
        assert mask.sum() == before[path].sum()
        assert (leaves[f"target/{path}"][~mask] == 0).all()
    total = sum(m.size for m in after.values())
    assert sum(m.sum() for m in after.values()) == pytest.approx(total / 4, abs=len(after))
    assert any((after[p] != before[p]).any() for p in after)
    # the run's record of its configuration has the sparsity, too
    text = (tmp_path / "fiddle_config.txt").read_text()
    assert "SparsityConfig" in text and "sparsity=0.75" in text
    # what is set from the command line reaches it
    run.train_state_initializer_cls.config.sparsity = 0.5
    with pytest.raises(ValueError, match="holds a run with other rules of sparsity"):
        trained(run)


@pytest.mark.slow
def test_a_finetune_configuration_starts_from_a_dense_checkpoint(example, tmp_path):
    from t5x.fiddle_configs.examples import t5_1_1

    dense = shrink(t5_1_1.small_c4_pretrain())
    dense.model_dir, dense.total_steps = str(tmp_path / "dense"), 2
    weights = trained(dense)
    run = shrink(t5_1_1.small_wmt_finetune())
    run.model_dir, run.total_steps = str(tmp_path / "sparse"), 2
    run.checkpoint_cfg.restore.path = str(tmp_path / "dense/checkpoint_2")
    config = ts.SparsityConfig(algorithm=ts.Static(), sparsity=0.5)
    ts.make_sparse(run, config, from_dense_checkpoint=True)
    leaves = trained(run)
    assert int(leaves["state/step"]) == 2
    for path, mask in kept(leaves).items():
        weight = weights[f"target/{path}"]
        np.testing.assert_array_equal(leaves[f"target/{path}"], np.where(mask, weight, 0))
        assert np.abs(weight[mask]).min() >= np.abs(weight[~mask]).max()


def test_the_example_is_what_the_include_binds(example):
    import fiddle as fdl

    run = example.small_c4_rigl("/a/run", 0.9, train_steps=1000)
    with tiny_t5.gin_script() as parse:
        parse("include 'sparsity/rigl.gin'\nTRAIN_STEPS = 1000\nSPARSITY = 0.9")
        include = gin.get_configurable(ts.SparsityConfig)()
    assert fdl.build(run.train_state_initializer_cls.config) == include


def test_the_trainer_keeps_what_the_run_sets(example):
    import fiddle as fdl
    from t5x.fiddle_configs.examples import t5_1_1

    dense = t5_1_1.small_c4_pretrain()
    dense.trainer_cls.num_microbatches = 4
    dense.model_dir = "/a/run"
    before = fdl.ordered_arguments(dense.trainer_cls)
    ts.make_sparse(dense, fdl.Config(ts.SparsityConfig, algorithm=fdl.Config(ts.Static)))
    after = fdl.ordered_arguments(dense.trainer_cls)
    assert after.pop("base") is host.Trainer and after == before
    # a plain class does, too
    other = t5_1_1.small_c4_pretrain()
    other.model_dir, other.trainer_cls = "/a/run", host.Trainer
    ts.make_sparse(other, ts.SparsityConfig(algorithm=ts.Static()))
    assert other.trainer_cls.base is host.Trainer
    initializer = fdl.build(other.train_state_initializer_cls)
    assert initializer.keywords["model_dir"] == "/a/run"
    # one object, so that --fdl_set=checkpoint_cfg.restore.path=... is seen by both
    assert other.train_state_initializer_cls.checkpoint_cfg is other.checkpoint_cfg


CONFIG = ts.SparsityConfig(algorithm=ts.Static())


def test_what_is_no_train_configuration_is_named(example):
    from t5x.fiddle_configs.examples import t5_1_1

    evaluation = t5_1_1.small_wmt_eval()
    with pytest.raises(ValueError, match=r"T5X's train\(\), .* got one of t5x.eval.evaluate"):
        ts.make_sparse(evaluation, CONFIG)
    with pytest.raises(ValueError, match="got 'train'. Evaluation and inference read a sparse"):
        ts.make_sparse("train", CONFIG)


def test_a_missing_model_dir_says_how_to_set_it(example):
    from t5x.fiddle_configs.examples import t5_1_1

    with pytest.raises(ValueError, match=r"model_dir isn't set. Set it before make_sparse: .*fdl_"):
        ts.make_sparse(t5_1_1.small_c4_pretrain(), CONFIG)


def test_sparse_twice_is_refused(example):
    with pytest.raises(ValueError, match="is sparse already; call make_sparse once"):
        ts.make_sparse(example.small_c4_rigl("/a/run"), CONFIG)


def test_another_initializer_is_not_thrown_away(example):
    import fiddle as fdl
    from t5x.fiddle_configs.examples import t5_1_1

    run = t5_1_1.small_c4_pretrain()
    run.model_dir = "/a/run"
    run.train_state_initializer_cls = fdl.Partial(types.SimpleNamespace)
    with pytest.raises(ValueError, match="is one of types.SimpleNamespace, whose place Sparse"):
        ts.make_sparse(run, CONFIG)


def test_a_dense_start_needs_a_checkpoint(example):
    from t5x.fiddle_configs.examples import t5_1_1

    run = t5_1_1.small_c4_pretrain()
    run.model_dir = "/a/run"
    with pytest.raises(ValueError, match="needs checkpoint_cfg.restore.path, the dense checkpoint"):
        ts.make_sparse(run, CONFIG, from_dense_checkpoint=True)
