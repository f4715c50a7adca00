import math
import sysconfig

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_sparsity import tasks

LENGTHS = {"lm": {"targets": 8}, "prefix_lm": {"inputs": 3, "targets": 5}}
NAMES = ["a.txt", "b.txt", "deep/er/c.txt", "deep/d.txt", "e.txt"]
SIZES = [0, 1, 7, 8, 9, 16, 63, 200]


@pytest.fixture
def folder(tmp_path):
    """A folder of texts of assorted sizes, every text recognisable from any piece of it."""
    root = tmp_path / "some text"
    for i, size in enumerate(SIZES):
        path = root / f"part{i % 3}" / f"file{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([65 + i]) * size)
    (root / "notes.md").write_text("not text for the default pattern")
    return root


def folder_task(*args, **kwargs):
    return seqio.get_mixture_or_task(tasks.text_folder(*args, **kwargs))


def texts(dataset):
    """Each example's ids turned back to bytes, `inputs` before `targets`."""
    out = []
    for example in dataset.as_numpy_iterator():
        ids = np.concatenate([example[key] for key in ("inputs", "targets") if key in example])
        out.append(bytes((ids - 3).astype(np.uint8)))
    return out


def examples(task, objective, split="train", **kwargs):
    kwargs = {"shuffle": False, **kwargs}
    return task.get_dataset(LENGTHS[objective], split=split, **kwargs)


def test_byte_ids_are_those_of_byte_vocabulary(tmp_path):
    text = "def f(x):\n\treturn 'naïve ✓ 𝔘'\r\n\0"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(text.encode())
    task = folder_task(tmp_path)
    dataset = task.get_dataset({"targets": 1000}, split="train", shuffle=False)
    (example,) = dataset.as_numpy_iterator()
    assert example["targets"].dtype == np.int32
    assert example["targets"].tolist() == seqio.ByteVocabulary().encode(text)
    assert task.output_features["targets"].vocabulary == seqio.ByteVocabulary()


def test_bytes_that_are_not_utf8_become_the_replacement_character(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"caf\xe9 noir")
    task = folder_task(tmp_path)
    dataset = task.get_dataset({"targets": 1000}, split="train", shuffle=False)
    assert texts(dataset) == ["caf\ufffd noir".encode()]


@pytest.mark.parametrize("objective", ["lm", "prefix_lm"])
def test_chunks_hold_all_of_the_text_and_only_a_last_one_is_short(folder, objective):
    task = folder_task(folder, objective=objective)
    got = [piece for split in task.splits for piece in texts(examples(task, objective, split))]
    for i, size in enumerate(SIZES):
        letter = bytes([65 + i])
        pieces = sorted(len(piece) for piece in got if letter in piece)
        expected = sorted([8] * (size // 8) + [size % 8] * (size % 8 > 0))
        if objective == "prefix_lm":
            expected = [n for n in expected if n > 1]
        assert pieces == expected, size
        assert all(set(piece) == set(letter) for piece in got if letter in piece)


@pytest.mark.parametrize(
    ("size", "pair"),
    [(1, None), (2, (1, 1)), (3, (1, 2)), (5, (1, 4)), (6, (2, 4)), (7, (2, 5)), (8, (3, 5))],
)
def test_prefix_cuts_a_short_piece_in_proportion(size, pair):
    text = bytes(range(65, 65 + size))
    dataset = tf.data.Dataset.from_tensors({"text": text})
    cut = list(tasks.cut_prefix_lm(dataset, LENGTHS["prefix_lm"]).as_numpy_iterator())
    if pair is None:
        assert cut == []
        return
    ((inputs, targets),) = [(example["inputs"], example["targets"]) for example in cut]
    assert (len(inputs), len(targets)) == pair
    assert bytes((np.concatenate([inputs, targets]) - 3).astype(np.uint8)) == text


# The names of file0.txt to file49.txt whose SHA-256 begins with 8 bytes that 20 divides.
HELD_OUT_OF_50 = {f"file{i}.txt" for i in (1, 34, 38, 47, 49)}


def test_split_depends_on_the_names_in_the_folder_alone(tmp_path):
    held_out = []
    for root in (tmp_path / "x", tmp_path / "y" / "z"):
        root.mkdir(parents=True)
        for i in range(50):
            (root / f"file{i}.txt").write_text(str(root) + str(i))
        source = folder_task(root).source
        split = {
            name: {path.rsplit("/", 1)[1] for path in source.list_shards(name)}
            for name in ("train", "validation")
        }
        assert not split["train"] & split["validation"]
        assert len(split["train"] | split["validation"]) == 50
        held_out.append(split["validation"])
    assert held_out[0] == held_out[1] == HELD_OUT_OF_50


@pytest.mark.parametrize("names", [["a.txt", "b.txt"], ["file34.txt", "file49.txt"]])
def test_few_files_still_give_both_splits(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("words")
    source = folder_task(tmp_path).source
    assert len(source.list_shards("train")) == len(source.list_shards("validation")) == 1
    assert source.list_shards("train") != source.list_shards("validation")


def test_order_depends_on_the_seed_alone_and_changes_by_epoch(folder):
    task = folder_task(folder)

    def first(seed, epochs=2):
        return texts(examples(task, "lm", shuffle=True, seed=seed, num_epochs=epochs))

    once, epoch = first(0), len(first(0, epochs=1))
    assert once == first(0)
    assert once != first(1)
    assert sorted(once) == sorted(2 * first(0, epochs=1))
    assert len(once) == 2 * epoch
    assert texts(examples(task, "lm")) != first(0, epochs=1)


def test_iterator_state_saves_little_and_resumes_exactly(tmp_path):
    kwargs = {"shuffle": True, "seed": 3, "num_epochs": None, "batch_size": 4}

    def fresh():
        return iter(
            seqio.get_dataset(
                "stdlib_lm", {"targets": 64}, seqio.DecoderFeatureConverter(pack=False), **kwargs
            )
        )

    iterator = fresh()
    for _ in range(5):
        next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).save(str(tmp_path / "state"))
    rest = [next(iterator)["decoder_target_tokens"].numpy() for _ in range(5)]
    other = fresh()
    tf.train.Checkpoint(iterator=other).restore(path)
    for batch in rest:
        np.testing.assert_array_equal(next(other)["decoder_target_tokens"].numpy(), batch)
    assert sum(file.stat().st_size for file in tmp_path.glob("state*")) < 4e6


@pytest.mark.parametrize("shards", [2, 3, 16])
def test_shards_part_the_text(folder, shards):
    task = folder_task(folder)
    whole = b"".join(texts(examples(task, "lm")))
    parts = [
        b"".join(texts(examples(task, "lm", shard_info=seqio.ShardInfo(i, shards))))
        for i in range(shards)
    ]
    assert sorted(b"".join(parts)) == sorted(whole)
    assert all(parts)


def test_more_shards_than_files_share_each_file_evenly(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("".join(chr(65 + i) for i in range(26)))
    task = folder_task(tmp_path)
    parts = [
        b"".join(texts(examples(task, "lm", shard_info=seqio.ShardInfo(i, 4)))) for i in range(4)
    ]
    assert parts == [b"ABCDEF", b"GHIJKLM", b"NOPQRS", b"TUVWXYZ"]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("objective", "converter"),
    [
        ("lm", seqio.DecoderFeatureConverter),
        ("prefix_lm", seqio.DecoderFeatureConverter),
        ("prefix_lm", seqio.EncDecFeatureConverter),
    ],
)
def test_feature_converters_of_both_model_families(objective, converter, pack):
    lengths = {"lm": {"targets": 128}, "prefix_lm": {"inputs": 64, "targets": 64}}[objective]
    dataset = seqio.get_dataset(
        f"stdlib_{objective}", lengths, converter(pack=pack), shuffle=True, seed=0, batch_size=64
    )
    batch = next(dataset.as_numpy_iterator())
    tokens = batch["decoder_target_tokens"]
    assert tokens.max() < seqio.ByteVocabulary().vocab_size
    assert not np.isin(tokens, [1, 2]).any()
    if converter is seqio.EncDecFeatureConverter:
        assert batch["encoder_input_tokens"].shape == (64, 64)
    # Less than 3% of what could be text is padding, packed or not.
    assert np.mean(tokens > 0) > 0.97
    assert ("decoder_segment_ids" in batch) == pack
    weighted = batch["decoder_loss_weights"].mean()
    expected = 0.5 if converter is seqio.DecoderFeatureConverter and objective != "lm" else 1.0
    assert weighted == pytest.approx(expected, abs=0.03)


def test_stdlib_is_source_text_without_its_tests():
    source = seqio.get_mixture_or_task("stdlib_lm").source
    root = sysconfig.get_path("stdlib")
    sizes = {}
    for split in ("train", "validation"):
        paths = source.list_shards(split)
        assert all(path.endswith(".py") and path.startswith(root) for path in paths)
        parts = {part for path in paths for part in path[len(root) :].split("/")}
        assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
        sizes[split] = len(paths)
    assert 0.02 < sizes["validation"] / sum(sizes.values()) < 0.08
    assert any(path.endswith("/json/decoder.py") for path in source.list_shards("train"))


def test_import_registers_the_stdlib_tasks():
    assert set(seqio.TaskRegistry.get("stdlib_lm").output_features) == {"targets"}
    assert set(seqio.TaskRegistry.get("stdlib_prefix_lm").output_features) == {"inputs", "targets"}


def test_text_folder_registers_once_under_a_stable_name(folder, monkeypatch):
    name = tasks.text_folder(str(folder))
    task = seqio.get_mixture_or_task(name)
    assert tasks.text_folder(folder) == name
    monkeypatch.chdir(folder.parent)
    assert tasks.text_folder(folder.name) == name
    assert seqio.get_mixture_or_task(name) is task
    assert name.startswith("text_some_text_lm_")
    others = {tasks.text_folder(folder, objective="prefix_lm"), tasks.text_folder(folder, "**/*")}
    assert len({name} | others) == 3


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("**/*.txt", NAMES),
        ("*.txt", ["a.txt", "b.txt", "e.txt"]),
        ("deep/**/*", ["deep/er/c.txt", "deep/d.txt"]),
        ("deep/*", ["deep/d.txt"]),
        ("**/[ab].txt", []),
        ("**/?.txt", NAMES),
        ("**", NAMES),
        ("a.tx", []),
    ],
)
def test_patterns(pattern, matched):
    assert [name for name in NAMES if tasks._glob_regex(pattern).fullmatch(name)] == matched


def test_unigram_by_hand(tmp_path):
    (tmp_path / "file2.txt").write_bytes(b"aaab")
    (tmp_path / "file34.txt").write_bytes(b"ab!")
    # Of 4 + 256 counts, 'a' has 4, 'b' has 2, '!' has 1; file34 is the one held out.
    expected = -(math.log(4 / 260) + math.log(2 / 260) + math.log(1 / 260)) / 3
    task = folder_task(tmp_path)
    assert tasks.byte_unigram_nats(task) == pytest.approx(expected)
    assert tasks.byte_unigram_nats(task.name) == pytest.approx(expected)
    trained_on = -(3 * math.log(4 / 260) + math.log(2 / 260)) / 4
    assert tasks.byte_unigram_nats(task, split="train") == pytest.approx(trained_on)


@pytest.mark.parametrize("objective", ["lm", "prefix_lm"])
def test_unigram_is_over_the_target_bytes_the_pipeline_gives(folder, objective):
    task = folder_task(folder, objective=objective)
    counts = np.ones(256)
    for path in task.source.list_shards("train"):
        with open(path, "rb") as file:
            np.add.at(counts, np.frombuffer(file.read(), np.uint8), 1)
    for split in ("train", "validation"):
        ids = [example["targets"] - 3 for example in examples(task, objective, split)]
        ids = np.concatenate([np.asarray(i) for i in ids])
        expected = -np.log(counts / counts.sum())[ids].mean()
        got = tasks.byte_unigram_nats(task, LENGTHS[objective], split)
        assert got == pytest.approx(expected)


def test_unigram_of_the_stdlib():
    nats = tasks.byte_unigram_nats("stdlib_prefix_lm", {"inputs": 64, "targets": 64})
    assert 3.0 < nats < 3.5


def test_unigram_of_another_task_says_so():
    task = seqio.Task("other", seqio.FunctionDataSource(lambda split, shuffle_files: 0, []), {})
    with pytest.raises(ValueError, match="'other' does not read text files.*'stdlib_lm'"):
        tasks.byte_unigram_nats(task)


def test_missing_or_thin_stdlib_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "gone"))
    source = tasks.TextFiles(tasks._stdlib_files)
    message = "Found 0 Python source files.*gone.*at least 50.*ship no sources.*text_folder"
    with pytest.raises(ValueError, match=message):
        source.list_shards("train")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "os.py").write_text("import sys")
    with pytest.raises(ValueError, match="Found 1 Python source files"):
        source.get_dataset("train")


def test_folder_errors_name_the_binding(tmp_path):
    with pytest.raises(
        ValueError, match="text_folder.path is None, which.*--gin.tasks.text_folder"
    ):
        tasks.text_folder()
    with pytest.raises(ValueError, match="text_folder.path is '.*gone', which is not a folder"):
        tasks.text_folder(tmp_path / "gone")
    (tmp_path / "one.txt").write_text("some")
    (tmp_path / "empty.txt").write_text("")
    message = r"text_folder.pattern '\*\*/\*.txt' matches 1 files.*at least 2 are needed"
    with pytest.raises(ValueError, match=message):
        tasks.text_folder(tmp_path)
    with pytest.raises(ValueError, match=r"pattern '\*.md' matches 0 files"):
        tasks.text_folder(tmp_path, "*.md")
    with pytest.raises(ValueError, match="text_folder.objective is 'mlm'; it must be 'lm' or"):
        tasks.text_folder(tmp_path, objective="mlm")


@pytest.mark.parametrize(
    ("objective", "lengths"),
    [
        ("lm", {"inputs": 8, "targets": 8}),
        ("lm", {"targets": 0}),
        ("lm", None),
        ("prefix_lm", {"targets": 8}),
        ("prefix_lm", {"inputs": 0, "targets": 8}),
    ],
)
def test_lengths_that_do_not_fit_the_objective(objective, lengths):
    task = seqio.get_mixture_or_task(f"stdlib_{objective}")
    message = r"TASK_FEATURE_LENGTHS is \{.*\}; this task needs exactly '.*each at least 1"
    with pytest.raises(ValueError, match=message):
        task.get_dataset(lengths)


def test_unknown_split():
    with pytest.raises(ValueError, match="split is 'test'; a text task has the splits 'train' and"):
        seqio.get_mixture_or_task("stdlib_lm").get_dataset({"targets": 8}, split="test")


GIN = """
from __gin__ import dynamic_registration
from t5x_sparsity import tasks
import builtins

TASK = @tasks.text_folder()
tasks.text_folder.path = {path!r}
builtins.dict.task = %TASK
"""


def test_text_folder_from_gin(folder):
    with gin.unlock_config():
        gin.clear_config()
        gin.parse_config(GIN.format(path=str(folder)))
        assert gin.query_parameter("TASK/macro.value").configurable is not None
        task = gin.get_configurable("builtins.dict")()["task"]
        gin.parse_config(GIN.format(path=str(folder / "gone")))
        with pytest.raises(ValueError, match="text_folder.path is '.*gone', which is not a folder"):
            gin.get_configurable("builtins.dict")()
        gin.clear_config()
    assert task == tasks.text_folder(folder)


@pytest.mark.parametrize("objective", ["lm", "prefix_lm"])
def test_t5x_reads_the_task(folder, objective):
    utils = pytest.importorskip("t5x.utils")
    models = pytest.importorskip("t5x.models")
    model = {"lm": models.DecoderOnlyModel, "prefix_lm": models.EncoderDecoderModel}[objective]
    config = utils.DatasetConfig(
        mixture_or_task_name=tasks.text_folder(folder, objective=objective),
        task_feature_lengths=LENGTHS[objective],
        split="train",
        batch_size=4,
        shuffle=True,
        seed=0,
        use_cached=True,
    )
    assert utils.get_vocabulary(config) == (seqio.ByteVocabulary(), seqio.ByteVocabulary())
    dataset = utils.get_dataset(config, 0, 2, model.FEATURE_CONVERTER_CLS)
    assert next(dataset.as_numpy_iterator())["decoder_target_tokens"].shape[0] == 2
    evals = utils.get_training_eval_datasets(config, 0, 1, 3, model.FEATURE_CONVERTER_CLS)
    assert list(evals) == [config.mixture_or_task_name]
    assert [len(list(dataset)) for dataset in evals.values()] == [3]
