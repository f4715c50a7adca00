"""Text tasks over bytes: the Python standard library's own sources, or any folder of text files.

Importing this module registers two seqio tasks; their files are found and read on first use:

    stdlib_lm          feature `targets`: for decoder-only models
    stdlib_prefix_lm   features `inputs`, `targets`: for encoder-decoder models

`text_folder` registers the same kind of task over a folder. Each file is cut into consecutive
chunks as long as TASK_FEATURE_LENGTHS says, so all text is used and only a file's last can be
short: packing gains almost nothing. A chunk may end inside a character, and no EOS is added. About
one file in twenty is held out as the split `validation`, chosen by a hash of its name within the
folder.
"""

import functools
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

VOCABULARY = seqio.ByteVocabulary()
_FIRST_BYTE_ID = 3  # ByteVocabulary keeps 0, 1 and 2 for padding, EOS and unknown

_HELD_OUT_ONE_IN = 20
_MIN_STDLIB_FILES = 50
_NOT_STDLIB_TEXT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)

# Chunks are drawn from this many files in turn, then shuffled among this many examples. Both
# are kept small, since what they hold goes into every checkpoint of the dataset's state.
_FILES_IN_TURN = 32
_SHUFFLE_BUFFER = 4096

_NO_STDLIB = (
    "Found {count} Python source files in the standard library folder {folder!r}; the stdlib_* "
    "tasks need at least {least}. Some distributions of Python ship no sources: use one that "
    "does, or name a folder of your own with MIXTURE_OR_TASK_NAME = @tasks.text_folder()."
)
_NO_FOLDER = (
    "text_folder.path is {path!r}, which is not a folder. Name the folder that holds the text, for "
    "example --gin.tasks.text_folder.path=\"'/data/books'\"."
)
_NO_FILES = (
    "text_folder.path is {path!r}, where text_folder.pattern {pattern!r} matches {count} files "
    "with text in them; at least 2 are needed, one to train on and one to validate on. Change "
    "the pattern ('*' stays within a folder, '**/' crosses folders) or name another folder."
)
_BAD_OBJECTIVE = "text_folder.objective is {objective!r}; it must be 'lm' or 'prefix_lm'."
_NO_SPLIT = "DatasetConfig.split is {split!r}; a text task has the splits 'train' and 'validation'."
_BAD_LENGTHS = (
    "TASK_FEATURE_LENGTHS is {lengths!r}; this task needs exactly {features}, each at least 1. "
    "The tasks '..._lm' have 'targets' alone (decoder-only models), the tasks '..._prefix_lm' "
    "have 'inputs' and 'targets' (encoder-decoder models)."
)
_NO_TEXT = (
    "Task {name!r} does not read text files: a unigram baseline is known only for 'stdlib_lm', "
    "'stdlib_prefix_lm' and tasks made by text_folder."
)


def _name_hash(name: str) -> int:
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16], 16)


def _is_local(path: str) -> bool:
    return "://" not in path


def _files(
    root: str, is_wanted: Callable[[str], Any], skipped: Set[str] = frozenset()
) -> dict[str, str]:
    """Maps the name of each wanted file below `root` to its path; `skipped` names folders."""
    files = {}
    for folder, subfolders, names in os.walk(root) if _is_local(root) else tf.io.gfile.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            # Empty files give no examples. Elsewhere, asking would take one call per file.
            if is_wanted(relative) and (not _is_local(root) or os.path.getsize(path)):
                files[relative] = path
    return files


def _stdlib_files() -> dict[str, str]:
    root = sysconfig.get_path("stdlib")
    files = _files(root, lambda name: name.endswith(".py"), _NOT_STDLIB_TEXT)
    if len(files) < _MIN_STDLIB_FILES:
        raise ValueError(_NO_STDLIB.format(count=len(files), folder=root, least=_MIN_STDLIB_FILES))
    return files


def _glob_regex(pattern: str) -> re.Pattern[str]:
    # pathlib can't match '**' against a name before Python 3.13, and can't list gs:// at all.
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(wild.get(piece) or re.escape(piece) for piece in pieces))


def _folder_files(path: str, pattern: str) -> dict[str, str]:
    if not tf.io.gfile.isdir(path):
        raise ValueError(_NO_FOLDER.format(path=path))
    files = _files(path, _glob_regex(pattern).fullmatch)
    if len(files) < 2:
        raise ValueError(_NO_FILES.format(path=path, pattern=pattern, count=len(files)))
    return files


class TextFiles(seqio.DataSource):
    """A seqio source of whole text files, each as `{"text": UTF-8 bytes}`.

    `find_files` is called once, on first use, and maps names to paths. What is not UTF-8 in a
    file is read as U+FFFD. Files come in the order of their names' hashes, so that the first
    examples of a split are a fair sample of it, or shuffled. Every split has at least one file.
    With more shards than files, each shard gets its part of every file.
    """

    def __init__(self, find_files: Callable[[], Mapping[str, str]]):
        # The number of examples is left unsaid: seqio would cache so small a source, and then
        # write all of its text into every checkpoint of the dataset's state.
        super().__init__(splits=("train", "validation"))
        self._find_files = find_files

    @functools.cached_property
    def _paths(self) -> dict[str, list[str]]:
        files = self._find_files()
        names = sorted(files, key=lambda name: (_name_hash(name), name))
        held_out = {name for name in names if _name_hash(name) % _HELD_OUT_ONE_IN == 0}
        if not held_out or len(held_out) == len(names):
            held_out = {names[0]}
        return {
            "train": [files[name] for name in names if name not in held_out],
            "validation": [files[name] for name in names if name in held_out],
        }

    # Any number of shards is served here, none by dropping examples later.
    supports_arbitrary_sharding = True

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the paths of the files of `split`."""
        if split not in self.splits:
            raise ValueError(_NO_SPLIT.format(split=split))
        return tuple(self._paths[split])

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused,
    ) -> tf.data.Dataset:
        """Returns the files of `split`, or one shard's part of them."""
        paths = self.list_shards(split)
        index, shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        share_files = shards > len(paths)

        def read(path: tf.Tensor) -> dict[str, tf.Tensor]:
            text = tf.strings.unicode_transcode(
                tf.io.read_file(path), "UTF-8", "UTF-8", errors="replace"
            )
            if share_files:
                size = tf.strings.length(text)
                start, end = size * index // shards, size * (index + 1) // shards
                text = tf.strings.substr(text, start, end - start)
            return {"text": text}

        dataset = tf.data.Dataset.from_tensor_slices(list(paths))
        if not share_files:
            dataset = dataset.shard(shards, index)
        if shuffle:
            dataset = dataset.shuffle(len(paths), seed=seed)
        return dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE)


def _lengths(given: Mapping[str, int] | None, features: Sequence[str]) -> list[int]:
    given = dict(given or {})
    if set(given) != set(features) or any(not given[name] or given[name] < 1 for name in features):
        needed = " and ".join(repr(name) for name in features)
        raise ValueError(_BAD_LENGTHS.format(lengths=given, features=needed))
    return [given[name] for name in features]


def _cut(dataset: tf.data.Dataset, size: int, chunk: Callable) -> tf.data.Dataset:
    """Maps `chunk` over consecutive pieces of `size` byte ids, drawn from several files in turn."""

    def pieces(example: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        text = example["text"]

        def piece(start: tf.Tensor):
            piece_bytes = tf.strings.substr(text, start, tf.cast(size, start.dtype))
            ids = tf.cast(tf.io.decode_raw(piece_bytes, tf.uint8), tf.int32) + _FIRST_BYTE_ID
            return chunk(ids)

        end = tf.cast(tf.strings.length(text), tf.int64)
        return tf.data.Dataset.range(0, end, size).map(piece)

    return dataset.interleave(pieces, cycle_length=_FILES_IN_TURN)


def cut_lm(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """Cuts `text` into `targets`, int32 of sequence_length["targets"] or, at the end, fewer."""
    (size,) = _lengths(sequence_length, ("targets",))
    return _cut(dataset, size, lambda ids: {"targets": ids})


def cut_prefix_lm(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """Cuts `text` into pairs of `inputs` and the `targets` that follow them, both int32.

    A file's last, shorter piece is cut in the same proportion, neither part empty; a last
    piece of a single byte is left out.
    """
    inputs, targets = _lengths(sequence_length, ("inputs", "targets"))
    size = inputs + targets

    def pair(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        length = tf.size(ids)
        at = tf.clip_by_value(length * inputs // size, 1, tf.maximum(length - 1, 1))
        return {"inputs": ids[:at], "targets": ids[at:]}

    return _cut(dataset, size, pair).filter(lambda example: tf.size(example["targets"]) > 0)


# objective -> features, what cuts the text to them
_OBJECTIVES = {"lm": (("targets",), cut_lm), "prefix_lm": (("inputs", "targets"), cut_prefix_lm)}


def _task(name: str, find_files: Callable[[], Mapping[str, str]], objective: str) -> seqio.Task:
    """Registers a task, or returns the one of that name."""
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    features, cut = _OBJECTIVES[objective]
    return seqio.TaskRegistry.add(
        name,
        source=TextFiles(find_files),
        output_features=dict.fromkeys(features, seqio.Feature(VOCABULARY, add_eos=False)),
        preprocessors=[cut],
        shuffle_buffer_size=_SHUFFLE_BUFFER,
    )


for _objective in _OBJECTIVES:
    _task(f"stdlib_{_objective}", _stdlib_files, _objective)


def text_folder(path: str | None = None, pattern: str = "**/*.txt", objective: str = "lm") -> str:
    """Registers a task over the text files of a folder and returns its name, for seqio and gin.

    Args:
      path: the folder, local or one that tf.io.gfile can list.
      pattern: which files, by their names within the folder. `*` and `?` stay within one folder,
        `**/` stands for any number of folders, none included.
      objective: 'lm' (feature `targets`) or 'prefix_lm' (features `inputs`, `targets`).

    Returns:
      the task's name: the same arguments give the same task, and the same name in every run.

    Raises:
      ValueError: no such folder, fewer than two files with text in it, or another objective.
    """
    if not path:
        raise ValueError(_NO_FOLDER.format(path=path))
    if objective not in _OBJECTIVES:
        raise ValueError(_BAD_OBJECTIVE.format(objective=objective))
    path = os.fspath(path)
    if _is_local(path):
        path = os.path.abspath(os.path.expanduser(path))
    label = re.sub(r"\W+", "_", os.path.basename(path.rstrip("/")), flags=re.ASCII)
    name = f"text_{label}_{objective}_{_name_hash(path + ' ' + pattern):016x}"[:-8]
    task = _task(name, functools.partial(_folder_files, path, pattern), objective)
    task.source.list_shards("train")  # a bad folder is told of here, not once training starts
    # The name, not the task: T5X takes a seqio.Task object for one of AirIO's and fails on it.
    return name


def byte_unigram_nats(
    task_or_name: seqio.Task | str,
    task_feature_lengths: Mapping[str, int] | None = None,
    split: str = "validation",
) -> float:
    """Returns the cross entropy, in nats per byte, of a unigram model: what any model must beat.

    The model is the frequencies of the bytes in split `train`, one added to each of the 256
    counts; the mean is over the target bytes of all of `split`.

    Args:
      task_or_name: a task of this module, or its name.
      task_feature_lengths: tells inputs from targets for a prefix objective; without it every
        byte counts as a target.
      split: 'train' or 'validation'.

    Raises:
      ValueError: for a task that does not read text files, or lengths that do not fit it.
    """
    task = task_or_name
    if isinstance(task, str):
        task = seqio.get_mixture_or_task(task)
    if not isinstance(getattr(task, "source", None), TextFiles):
        raise ValueError(_NO_TEXT.format(name=task.name))

    def texts(split: str) -> Iterable[np.ndarray]:
        for example in task.source.get_dataset(split, shuffle=False).as_numpy_iterator():
            yield np.frombuffer(example["text"], np.uint8)

    targets = texts(split)
    if task_feature_lengths is not None:
        examples = task.get_dataset(task_feature_lengths, split=split, shuffle=False)
        targets = (x["targets"] - _FIRST_BYTE_ID for x in examples.as_numpy_iterator())
    train = _byte_counts(texts("train")) + 1
    held_out = _byte_counts(targets)
    log_probability = np.log(train / train.sum())
    return float(-(held_out * log_probability).sum() / held_out.sum())


def _byte_counts(texts: Iterable[np.ndarray]) -> np.ndarray:
    """Counts of byte values, int64 [256]."""
    return sum((np.bincount(text, minlength=256) for text in texts), np.zeros(256, np.int64))
