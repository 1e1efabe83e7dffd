"""Reading data files and telling their layout.

`load_rows` gives a `datasets.Dataset`, or a stream; `launch.data.formats` brings its rows into the shape that a task's
trainer expects, and `launch.data.sources` mixes several data sets.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import datasets
from datasets import DatasetDict, IterableDataset, IterableDatasetDict

from launch.checks.errors import UserError
from launch.checks.flags import RunArguments
from launch.data.columns import Rows

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
# A text file's rows are its paragraphs: lines would lack what stands before them.
OPTIONS = {"text": {"sample_by": "paragraph"}}
ON_DISK = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder
Splits = DatasetDict | IterableDatasetDict
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NULL_FIRST = re.compile(rb"(\xef\xbb\xbf)?\s*\[?\s*null\b")
HEAD_BYTES = 1 << 16
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

    Raises:
        UserError: nothing there, unreadable, no such split, or no rows.
    """
    found = _load(name, flag, config, pictures, streaming)
    if split is None:
        split = next((s for s in EVAL_SPLITS if s in found), None)
    if split not in found:
        raise UserError(f"{flag} {name} has no split {split!r}; it has: {', '.join(map(str, found))}.")
    rows = found[split]
    if next(iter(rows), None) is None:
        raise UserError(f"{flag} {name}: split {split!r} is empty.")
    return rows if limit is None else rows.take(limit)


def _load(name: str, flag: str, config: str | None, pictures: bool, streaming: bool) -> Splits:
    """Every split of a dataset, wherever it is."""
    path = Path(name).expanduser()
    # Not path.is_file(), which raises for a name that is too long for a path.
    if os.path.isfile(path):
        return _load_files({"train": [path]}, flag, name, streaming)
    if os.path.isdir(path):
        return _load_folder(path, flag, pictures, streaming)
    if path.suffix in BUILDERS or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise UserError(f"{flag} {name}: there is no such file or folder (working directory: {Path.cwd()}).")
    try:
        return datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # the hub client's exceptions have no common base narrower than this
        raise UserError(
            f"{flag} {name} is no local file or folder, and could not be loaded from the hub: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _load_folder(folder: Path, flag: str, pictures: bool, streaming: bool) -> Splits:
    """Data files of a folder; a file belongs to the split in its name (`boolq.test.jsonl`), else to train."""
    if any((folder / name).is_file() for name in ON_DISK):
        return _load_from_disk(folder, flag, streaming)
    files = sorted(p for p in folder.rglob("*") if p.suffix in BUILDERS and p.is_file())
    if pictures and any(p.suffix.lower() in PICTURES for p in folder.rglob("*")):
        try:
            return datasets.load_dataset("imagefolder", data_dir=str(folder.absolute()), streaming=streaming)
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            raise UserError(f"{flag} {folder} holds no pictures that can be read: {_first_line(error)}") from error
    if not files:
        raise UserError(f"{flag} {folder}: the folder has no {', '.join(BUILDERS)} file.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = file.stem.replace("-", ".").replace("_", ".").split(".")
        split = next((s for s in EVAL_SPLITS if s in words), "train")
        splits.setdefault(split, []).append(file)
    return _load_files(splits, flag, str(folder), streaming)


def _load_from_disk(folder: Path, flag: str, streaming: bool) -> Splits:
    """What `Dataset.save_to_disk` (one split, taken for train) or `DatasetDict.save_to_disk` has written."""
    try:
        found = datasets.load_from_disk(str(folder))
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"{flag} {folder} could not be read: {_first_line(error)}") from error
    splits = found if isinstance(found, DatasetDict) else DatasetDict(train=found)
    if not streaming:
        return splits
    return IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in splits.items()})


def _load_files(splits: dict[str, list[Path]], flag: str, name: str, streaming: bool) -> Splits:
    files = [file for group in splits.values() for file in group]
    kinds = {BUILDERS.get(file.suffix) for file in files}
    if None in kinds:
        unknown = next(file for file in files if file.suffix not in BUILDERS)
        raise UserError(f"{flag} {unknown}: {unknown.suffix or 'no suffix'} is not read; use {', '.join(BUILDERS)}.")
    if len(kinds) > 1:
        raise UserError(f"{flag} {name} mixes kinds of files ({', '.join(sorted(map(str, kinds)))}); keep one kind.")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{flag} {file} is empty.")
        if BUILDERS[file.suffix] == "json":
            _refuse_null_rows(file, flag)
    kind = str(kinds.pop())
    paths = {split: [str(file.absolute()) for file in group] for split, group in splits.items()}
    try:
        return datasets.load_dataset(kind, data_files=paths, streaming=streaming, **OPTIONS.get(kind, {}))
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"{flag} {name} could not be read: {_first_line(error.__cause__ or error)}") from error


def _refuse_null_rows(file: Path, flag: str) -> None:
    """pyarrow 26 crashes (SIGSEGV, so that nothing could be said) where the first row that it is given is null."""
    with file.open("rb") as lines:
        if NULL_FIRST.match(lines.read(HEAD_BYTES)):
            raise UserError(f"{flag} {file}: its first row is null; remove it.")
        lines.seek(0)
        for number, line in enumerate(lines, 1) if file.suffix == ".jsonl" else ():
            if line.strip() == b"null":
                raise UserError(f"{flag} {file}: line {number} is null; remove it.")


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
    assert not isinstance(train, IterableDataset)  # launch.checks.preflight
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
