"""python evaluation.py ASSETS ADAPTER: the perplexity that `lm_eval --tasks say` reports, by plain forward passes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokenizer: object, rows: list[dict[str, str]]) -> float:
    """exp of minus the mean over rows of log p(completion | prompt)."""
    total = 0.0
    for row in rows:
        prompt, completion = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in row)
        tokens = torch.tensor([prompt + completion])
        logp = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        total += float(logp.gather(1, torch.tensor(completion)[:, None]).sum())
    return math.exp(-total / len(rows))


if __name__ == "__main__":
    folder, adapter = sys.argv[1:3]
    rows = [json.loads(line) for line in (Path(folder) / "sft" / "train.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()
    print("\nbase", perplexity(model, tokenizer, rows))
    print("\nadapter", perplexity(PeftModel.from_pretrained(model, adapter).eval(), tokenizer, rows))
