"""Evaluation of language that does not depend on batches: every token weighs alike."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from launch.data.metrics import token_scores


class TokenScores(Trainer):
    """A Trainer whose evaluation weighs every token alike, whatever batches and ranks the rows come in.

    transformers takes the mean over batches of each batch's mean, which changes with the batch size. Here the sums of
    rows are gathered and added up; rows that fill up the last batch of several ranks `gather_for_metrics` drops.
    A subclass calls `count_tokens` for each batch. `eval_loss`, `eval_perplexity`, `eval_mean_token_accuracy` and
    `eval_tokens` are `launch.data.metrics.token_scores`.
    """

    _sums: list[torch.Tensor]

    def count_tokens(self, outputs: Any) -> None:
        """Takes in one batch.

        Args:
            outputs: of TRL's fused head: `log_probs`, `is_top1`, `label_mask`, (B, N) each, zero where no label is.
        """
        parts = (-outputs.log_probs, outputs.is_top1, outputs.label_mask)
        sums_B3 = torch.stack([part.double().sum(-1) for part in parts], -1)
        self._sums.append(self.accelerator.gather_for_metrics(sums_B3).sum(0))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._sums = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, right, tokens = torch.stack(self._sums).sum(0).tolist()
        scores = token_scores(nll, right, tokens)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output
