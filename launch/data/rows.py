"""Finding a data set (a file, a folder, the hub) and its splits.

`load_rows` gives a `datasets.Dataset`, or a stream; `launch.data.causal` and its siblings bring its rows into the shape
that a task's trainer expects, and `launch.data.sources` mixes several data sets.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
from datasets import DatasetDict, IterableDatasetDict

from launch.checks.errors import UserError
from launch.checks.flags import RunArguments
from launch.data.files import READERS, read_files
from launch.data.values import Rows, user_error

SUFFIXES = (*READERS, ".parquet")
ON_DISK = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
EVAL_SPLITS = ("validation", "test", "dev", "train")


def load_rows(
    name: str,
    flag: str,
    split: str | None,
    config: str | None = None,
    limit: int | None = None,
    pictures: bool = False,
    streaming: bool = False,
) -> Rows:
    """Rows of a local file, a local folder or a dataset on the hub.

    Args:
        name: path or hub id.
        flag: the flag that said so, for messages.
        split: split to take; None: the first of validation, test, dev, train that there is.
        config: configuration of a hub dataset.
        limit: take the first `limit` rows only.
        pictures: a folder with pictures in it is read as such: one folder per class, or a metadata file.
        streaming: give an `IterableDataset`, whose rows are read when they are asked for.
    """
    path, where = Path(name).expanduser(), f"{flag} {name}"
    if config is not None and os.path.exists(path):
        raise UserError(f"--dataset_config {config} has no effect: {name} is a local data set, not one from the hub.")
    try:
        # Not path.is_file(), which raises for a name that is too long for a path.
        if os.path.isfile(path):
            found: Any = {"train": [path]}
        elif os.path.isdir(path):
            found = _folder(path, flag, pictures, streaming)
        elif path.suffix in SUFFIXES or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
            raise UserError(f"{where}: there is no such file or folder (working directory: {Path.cwd()}).")
        else:
            where += " is no local file or folder, and"
            found = datasets.load_dataset(name, config, streaming=streaming)
        if split is None:
            split = next((known for known in EVAL_SPLITS if known in found), None)
        if split not in found:
            raise UserError(f"{flag} {name} has no split {split!r}; it has: {', '.join(map(str, found))}.")
        rows = _read(found[split], flag, name, streaming) if isinstance(found[split], list) else found[split]
        first = next(iter(rows), None)
    except Exception as error:  # the exceptions of datasets and of the hub's client have no common base
        raise user_error(error, where) from error
    if first is None:
        raise UserError(f"{flag} {name}: split {split!r} is empty.")
    return rows if limit is None else rows.take(limit)


def _folder(folder: Path, flag: str, pictures: bool, streaming: bool) -> Any:
    """The splits of a folder; a file belongs to the split in its name (`boolq.test.jsonl`), else to train."""
    if any((folder / name).is_file() for name in ON_DISK):
        stored = datasets.load_from_disk(str(folder))
        splits = stored if isinstance(stored, DatasetDict) else DatasetDict(train=stored)
        if not streaming:
            return splits
        return IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in splits.items()})
    if pictures and any(p.suffix.lower() in PICTURES for p in folder.rglob("*")):
        return datasets.load_dataset("imagefolder", data_dir=str(folder.absolute()), streaming=streaming)
    files: dict[str, list[Path]] = {}
    for file in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
        words = file.stem.replace("-", ".").replace("_", ".").split(".")
        files.setdefault(next((s for s in EVAL_SPLITS if s in words), "train"), []).append(file)
    if not files:
        raise UserError(f"{flag} {folder}: the folder has no {', '.join(SUFFIXES)} file.")
    return files


def _read(files: list[Path], flag: str, name: str, streaming: bool) -> Rows:
    kinds = {".jsonl" if file.suffix == ".json" else file.suffix for file in files}
    for kind in kinds - {*SUFFIXES}:
        raise UserError(f"{flag} {name}: {kind or 'no suffix'} is not read; use {', '.join(SUFFIXES)}.")
    if len(kinds) > 1:
        raise UserError(f"{flag} {name} mixes kinds of files ({', '.join(sorted(kinds))}); keep one kind.")
    if kinds != {".parquet"}:
        return read_files(files, flag, streaming)
    paths = [str(file.absolute()) for file in files]
    return datasets.load_dataset("parquet", data_files=paths, split="train", streaming=streaming)


def load_splits(run: RunArguments, seed: int, number: int = 0) -> tuple[Rows, Rows | None]:
    """The training rows of data set `number`, and the rows of it that `--eval_fraction` sets aside."""
    train = load_rows(
        run.dataset_name[number],
        "--dataset_name",
        run.dataset_split,
        run.dataset_config,
        run.max_train_samples,
        pictures=run.task.startswith("image-"),
        streaming=run.streaming,
    )
    if not run.eval_fraction:
        return train, None
    count = round(len(train) * run.eval_fraction)
    if not 1 <= count < len(train):
        raise UserError(f"--eval_fraction {run.eval_fraction} of {len(train)} rows leaves one of the two sets empty.")
    parts = train.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def load_evaluation(run: RunArguments) -> Rows | None:
    """The rows of `--eval_dataset_name`, None without it; never streamed."""
    if run.eval_dataset_name is None:
        return None
    return load_rows(
        run.eval_dataset_name,
        "--eval_dataset_name",
        run.eval_dataset_split,
        run.dataset_config if run.eval_dataset_name in run.dataset_name else None,
        run.max_eval_samples,
        pictures=run.task.startswith("image-"),
    )
