"""The demo's generated skills for its tiny causal language model: do the experts share the skills out among them?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.demo.base import EOS, base_model
from launch.demo.tasks import SKILLS, split_lines

from .specialisation import ExpertCounts, mutual_information

HELD_OUT_LINES = 64
IGNORED = -100
EVALUATION_BATCH = 64


class Skills:
    """Six skills under names that the base model has not seen; the loss is that of the answers."""

    targets = ("q_proj", "v_proj", "up_proj", "down_proj")

    def __init__(self, examples: int) -> None:
        folder = base_model()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        training, held_out = split_lines(examples // len(SKILLS), HELD_OUT_LINES, seed=0)
        self.train = self._encode(training)
        self.test = self._encode([line for lines in held_out.values() for line in lines])
        self.test_skills = torch.arange(len(SKILLS)).repeat_interleave(HELD_OUT_LINES)
        self.train_size = len(training)

    def _encode(self, lines: list[tuple[str, str]]) -> dict[str, Tensor]:
        texts = [prompt + answer + EOS for prompt, answer in lines]
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        lengths = torch.tensor([len(prompt) for prompt, _ in lines])[:, None]  # one token per byte
        outside = (torch.arange(ids.shape[1]) < lengths) | (mask == 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(outside, IGNORED)}

    def build(self) -> tuple[nn.Module, nn.Module | None]:
        """The base model, and no head."""
        return copy.deepcopy(self.base), None

    def loss(self, model: nn.Module, head: nn.Module | None, index: Tensor) -> Tensor:
        """Mean over the answers' tokens, and the load-balancing loss if the adapter has one."""
        return model(**{name: values[index] for name, values in self.train.items()}).loss

    def evaluate(self, model: nn.Module, head: nn.Module | None) -> dict[str, float]:
        """Of the held-out lines: loss, share of answers that greedy decoding gets right, and mutual information.

        An answer is right if every one of its tokens is the most probable one after the right ones before it. For the
        mutual information count the positions whose next token belongs to the answer (the skill's name is not among
        them); it is the mean over the layers.
        """
        loss, right, index = 0.0, 0, torch.arange(len(self.test_skills))
        with ExpertCounts(model, len(SKILLS)) as counts:
            for part in index.split(EVALUATION_BATCH):
                batch = {name: values[part] for name, values in self.test.items()}
                next_labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
                counts.expect(self.test_skills[part], next_labels != IGNORED)
                output = model(**batch)
                loss += output.loss.item() * len(part) / len(index)
                predicted = output.logits.argmax(-1)
                right += int(((predicted == next_labels) | (next_labels == IGNORED)).all(1).sum())
        information = [mutual_information(table) for table in counts.tables]
        return {
            "test_loss": loss,
            "test_accuracy": right / len(index),
            "mutual_information": sum(information) / len(information),
        }
