"""Four data sets in Alpaca form for a small chat model, with logits at the answers' positions only.

MAWPS: word problem to expression and value; GSM8K: word problem to worked answer; `skills`: both of them, OpenBookQA
and BoolQ in equal shares.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..convergence.specialisation import ExpertCounts, mutual_information
from ..expressions import accuracy

IGNORED = -100
# The model's chat template without its system message, which would be a third of a short problem.
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
FILES = {"mawps": ("mawps",), "gsm8k": ("gsm8k",), "skills": ("mawps", "gsm8k", "openbookqa", "boolq")}
TEST_ROWS = {"mawps": 120, "gsm8k": 60, "skills": 30}  # of each file
NEW_TOKENS = {"mawps": 24, "gsm8k": 160}  # where answers are generated; elsewhere a whole answer must be the likeliest
EVALUATION_BATCH = 40


@dataclass
class Examples:
    """Token ids of prompts and answers, and which file each comes from."""

    prompts: list[list[int]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    skills: list[int] = field(default_factory=list)


def read(folder: Path, task: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """All training rows of a task, or its first test rows; of several files equally many of each, in turns.

    Raises:
        ValueError: a file is not there.
    """
    files = []
    for name in FILES[task]:
        path = folder / f"{name}.{split}.jsonl"
        if not path.exists():
            raise ValueError(f"{path} does not exist: pass --data DIR with the data sets (docs/language_model.md).")
        files.append([json.loads(line) for line in path.read_text().splitlines()])
    count = min(map(len, files)) if split == "train" else TEST_ROWS[task]
    found = Examples()
    for rows in zip(*(rows[:count] for rows in files), strict=True):
        for skill, row in enumerate(rows):
            found.prompts.append(tokenizer(PROMPT.format(row["instruction"])).input_ids)
            found.answers.append(tokenizer(row["output"] + END).input_ids)
            found.texts.append(row["output"])
            found.skills.append(skill)
    return found


class Language:
    """A task on a frozen causal language model in bfloat16, for one device and kept by the process."""

    def __init__(self, model: Path, data: Path, task: str, device: str) -> None:
        self.name, self.device = task, device
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        # On a CPU, "sdpa" with a mask takes twice as long as plain products of these lengths.
        attention = "eager" if device == "cpu" else "sdpa"
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation=attention)
        self.base = base.requires_grad_(False).to(device)
        # `logits_to_keep` gives the head a slice, for which torch's product copies the weight (56 MB) once per row.
        self.base.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        self.train = read(data, task, "train", self.tokenizer)
        self.test = read(data, task, "test", self.tokenizer)

    def batch(self, examples: Examples, index: list[int], with_answers: bool = True) -> dict[str, Tensor]:
        """Padded on the left, so that answers stand at the end: ids and mask (n, T), labels (n, longest answer + 1)."""
        rows = [examples.prompts[i] + (examples.answers[i] if with_answers else []) for i in index]
        longest, width = max(map(len, rows)), max(len(examples.answers[i]) for i in index) + 1
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        found = {"input_ids": ids, "attention_mask": mask}
        if with_answers:
            found["labels"] = torch.full((len(rows), width), IGNORED)
            for row, i in enumerate(index):
                answer = torch.tensor(examples.answers[i])
                found["labels"][row, -len(answer) :] = answer
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def test_batches(self) -> list[list[int]]:
        """The test rows by length: in their own order two thirds of the positions are padding."""
        rows = range(len(self.test.answers))
        order = sorted(rows, key=lambda i: len(self.test.prompts[i]) + len(self.test.answers[i]))
        return [order[i : i + EVALUATION_BATCH] for i in rows[::EVALUATION_BATCH]]

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean loss over the answers' tokens (in training with the load-balancing loss), and their logits."""
        output = model(**batch, logits_to_keep=batch["labels"].shape[1])
        return output.loss, output.logits

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Of the test rows: loss per token, and the share of right answers, `test_accuracy`.

        MAWPS: the expression written has the reference's value (and `value_accuracy`: the value written is right).
        GSM8K: the last number is right. Several skills: every token of the answer is the likeliest; and how much the
        chosen experts tell of the skill, `mutual_information` in bits, averaged over layers.
        """
        total, tokens, whole = 0.0, 0, []
        several = len(FILES[self.name]) > 1
        counts = ExpertCounts(model if several else nn.Module(), len(FILES[self.name]))
        with counts:
            for part in self.test_batches():
                batch = self.batch(self.test, part)
                labels = batch["labels"]
                answer = torch.nn.functional.pad(
                    labels[:, 1:] != IGNORED, (batch["input_ids"].shape[1] - labels.shape[1], 1)
                )
                counts.expect(torch.tensor(self.test.skills)[torch.tensor(part)], answer)
                loss, logits = self.forward(model, batch)
                count = int((labels[:, 1:] != IGNORED).sum())
                total, tokens = total + loss.item() * count, tokens + count
                right = (logits.argmax(-1)[:, :-1] == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
                whole += right.all(1).tolist()
        found = {"test_loss": total / tokens}
        if several:
            found["test_accuracy"] = sum(whole) / len(whole)
            if counts.tables:
                found["mutual_information"] = sum(map(mutual_information, counts.tables)) / len(counts.tables)
        else:
            found |= self.scores(self.written(model))
        return found

    def written(self, model: nn.Module) -> list[str]:
        """The test rows' answers by greedy decoding."""
        texts = [""] * len(self.test.answers)
        for part in self.test_batches():
            batch = self.batch(self.test, part, with_answers=False)
            made = model.generate(
                **batch,
                max_new_tokens=NEW_TOKENS[self.name],
                do_sample=False,
                eos_token_id=self.tokenizer.convert_tokens_to_ids(END),
                pad_token_id=self.tokenizer.pad_token_id or 0,
            )
            answers = made[:, batch["input_ids"].shape[1] :]
            for i, text in zip(part, self.tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
                texts[i] = text
        return texts

    def scores(self, texts: list[str]) -> dict[str, float]:
        """Shares of right answers."""
        pairs = list(zip(texts, self.test.texts, strict=True))
        if self.name == "mawps":
            expression, value, _ = accuracy(pairs)
            return {"test_accuracy": expression, "value_accuracy": value}
        right = [last_number(text) is not None and last_number(text) == last_number(wanted) for text, wanted in pairs]
        return {"test_accuracy": sum(right) / len(right)}


def last_number(text: str) -> float | None:
    """The last number of a text; None: there is none."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None


@functools.lru_cache(maxsize=4)
def load(model: Path, data: Path, task: str, device: str) -> Language:
    """A task, kept by the process."""
    return Language(model, data, task, device)
