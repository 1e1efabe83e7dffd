"""One sentence per curve, which TensorBoard shows beside it; docs/tensorboard.md has the formulas."""

from __future__ import annotations

from typing import Any

from torch.utils.tensorboard.summary import scalar

DESCRIPTIONS = {
    "moe/load_max_over_ideal": "Tokens of the most used expert over an even share, mean over layers. 1: even.",
    "moe/router_entropy": "Entropy of the routers' probabilities over log E. 1: all equally probable; 0: certain.",
    "moe/dead_expert_fraction": "Share of experts that no token of the step chose.",
    "moe/aux_loss": "Load-balancing loss without its coefficient. 1: even; E/k at most.",
    "moe/expert_similarity": "Mean cosine between the products B A of two experts. 1: copies; 0: nothing in common.",
    "riemannian/gram_condition_max": "Largest condition number of a damped Gram matrix of a factor, over all pairs.",
    "riemannian/update_to_weight": "Norm of the step over the norm of the factors. Above 1e-2 for long: a high rate.",
    "riemannian/preconditioned_over_raw": "Norm of the preconditioned gradient over that of the gradient.",
    "perf/tokens_per_second": "Real tokens of all processes over the slowest one's seconds, since the last report.",
    "perf/step_seconds": "Wall time of a step since the last report, without evaluations and saves.",
    "memory/peak_bytes": "GPU: most that torch had allocated; CPU: largest resident set. Of the largest process.",
    "train/loss": "Mean loss of the steps since the last report, the routers' losses included.",
    "train/grad_norm": "Norm of the gradient before clipping.",
    "train/learning_rate": "Learning rate of the first parameter group.",
    "train/epoch": "Passes over the training rows.",
    "train/num_input_tokens_seen": "Tokens read since step 1, earlier sessions included.",
    "train/mean_token_accuracy": "Share of trained tokens that were the most probable one.",
    "eval/loss": "Loss on the evaluation rows; for language models the mean over all answer tokens.",
    "eval/perplexity": "exp(loss).",
    "eval/mean_token_accuracy": "Share of the answers' tokens that were the most probable one.",
    "eval/exact_match": "Share of written answers that equal the reference.",
    "eval/answered": "Share of written answers in which the pattern found one.",
    "eval/accuracy": "Share of rows whose class was right.",
}
# Those that this package measures itself.
TAGS = tuple(tag for tag in DESCRIPTIONS if not tag.startswith(("train/", "eval/")))
# For tags that are not listed.
PREFIXES = {"train/": "Logged by the trainer while it trains.", "eval/": "A score on the evaluation rows."}


def describe(tag: str) -> str:
    """The sentence of a tag; "" if there is none."""
    return DESCRIPTIONS.get(tag) or next((text for prefix, text in PREFIXES.items() if tag.startswith(prefix)), "")


def add_scalar(writer: Any, tag: str, value: float, step: int | None) -> None:
    """`SummaryWriter.add_scalar`, with the sentence."""
    summary = scalar(tag, value)
    summary.value[0].metadata.summary_description = describe(tag)
    summary.value[0].metadata.plugin_data.plugin_name = "scalars"
    writer.file_writer.add_summary(summary, step)
