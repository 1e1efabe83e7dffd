"""SFTTrainer's preparation of rows, with a count of what `max_length` cuts off, and a check of packing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import IterableDataset
from transformers import TrainerCallback
from trl import SFTTrainer

from launch.checks.errors import UserError
from launch.data.values import Rows

# Half a document each: enough for any attention pattern, little enough for any model.
PROBE_LENGTH = 16
# Documents that do not see each other give equal logits; rounding in kernels whose work depends on values does not
# reach this share of the largest, what leaks through attention exceeds it even in a model with random weights.
PROBE_TOLERANCE = 1e-4


@dataclass
class Truncation:
    """What was cut so that rows fit into `max_length`.

    Args:
        max_length: tokens; None: no bound. rows, tokens: as tokenised.
        rows_cut: rows longer than `max_length`. rows_dropped: rows of which no trained token is left.
        tokens_cut: tokens that are not read, those of dropped rows included.
        streamed: the numbers are those of the rows read so far.
    """

    max_length: int | None
    rows: int = 0
    tokens: int = 0
    rows_cut: int = 0
    rows_dropped: int = 0
    tokens_cut: int = 0
    streamed: bool = False

    def count(self, rows: Rows, sign: int) -> Rows:
        """Adds rows as tokenised (`sign` 1) and takes off rows as kept (-1): what remains was cut.

        A stream is counted when it is read: use what is returned.
        """

        def add(lengths: list[int]) -> None:
            if sign == 1:
                self.rows, self.tokens = self.rows + len(lengths), self.tokens + sum(lengths)
                self.rows_cut += sum(self.max_length is not None and n > self.max_length for n in lengths)
            self.rows_dropped += sign * len(lengths)
            self.tokens_cut += sign * sum(lengths)

        def add_row(row: dict[str, Any]) -> dict[str, Any]:
            add([len(row["input_ids"])])
            return row

        if isinstance(rows, IterableDataset):
            return rows.map(add_row)
        for batch in rows.with_format("arrow").iter(1000):
            add(pc.list_value_length(batch["input_ids"]).to_pylist())
        return rows

    def report(self, name: str) -> str:
        """One line for people."""
        if not self.rows_cut:
            return f"{name}: none of {self.rows:,} rows is longer than {self.max_length} tokens"
        return (
            f"{name}: {self.rows_cut:,} of {self.rows:,} rows are longer than {self.max_length} tokens; "
            f"{self.tokens_cut:,} of {self.tokens:,} tokens are cut, and {self.rows_dropped:,} rows without an answer "
            "are dropped"
        )


class CountingTrainer(SFTTrainer):
    """SFTTrainer that counts what it cuts, in `truncation`: a `Truncation` per data set ("train", "eval").

    TRL tokenises, cuts, drops and packs in one method, which leaves alone what an earlier call has done. It is called
    for each of these by itself, so that rows can be counted in between. A stream is counted while it is read.
    """

    truncation: Mapping[str, Truncation] = MappingProxyType({})  # of pictures and text nothing is cut

    def _prepare_dataset(
        self,
        dataset: Rows,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Rows:
        def prepare(rows: Rows, pack: bool = False, **changes: Any) -> Rows:
            changed = copy.copy(args)
            for name, value in changes.items():
                setattr(changed, name, value)
            return super(CountingTrainer, self)._prepare_dataset(
                rows, processing_class, changed, pack, formatting_func, dataset_name
            )

        tokens = prepare(dataset, max_length=None, shuffle_dataset=False)
        splits = packing and args.packing_strategy == "bfd_split"  # nothing is cut: a long row goes on in another pack
        count = Truncation(None if splits else args.max_length, streamed=isinstance(tokens, IterableDataset))
        self.truncation = {**self.truncation, dataset_name: count}
        tokens = count.count(tokens, 1)
        kept = count.count(tokens if splits else prepare(tokens, shuffle_dataset=False), -1)
        if not packing and not args.shuffle_dataset:
            return kept
        return prepare(kept, packing, **({} if packing else {"max_length": None}))


class PackingGuard(TrainerCallback):
    """Stops the run before its first step if the documents of a pack see each other.

    TRL packs without an attention mask and marks documents by their positions. Attention made by transformers' mask
    functions and its flash attention keep to that, whatever the implementation; a model with an attention (or a state
    or convolution over time) of its own need not. The base model therefore reads two packs whose second document is
    the same: its logits must not depend on the first.
    """

    def __init__(self, trainer: SFTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        leak = packed_leak(self.trainer)
        if leak > PROBE_TOLERANCE:
            raise UserError(
                f"--packing: in this model a packed row changes with the rows before it in its pack (logits by "
                f"{leak:.1e} of the largest). Leave out --packing."
            )


@torch.no_grad()
def packed_leak(trainer: SFTTrainer) -> float:
    """How much the logits of a document depend on another one in its pack: largest change over largest logit."""
    vocabulary = trainer.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary, (3, PROBE_LENGTH), generator=generator).tolist()
    model, training = trainer.model, trainer.model.training
    model.eval()
    seen = []
    with model.disable_adapter():
        for document in (first, other):
            row = {"input_ids": document + second, "seq_lengths": [PROBE_LENGTH, PROBE_LENGTH]}
            batch = trainer._prepare_inputs(trainer.data_collator([row]))
            batch.pop("labels")
            seen.append(model(**batch, use_cache=False).logits[0, PROBE_LENGTH:].float())
    model.train(training)
    return ((seen[0] - seen[1]).abs().max() / seen[0].abs().max()).item()
