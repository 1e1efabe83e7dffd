"""Default learning rates and damping: one table for the library's constructors, the launcher and docs/choosing.md.

The rest of a run's defaults (r, num_experts, top_k, the coefficient of the balance loss) are `MoELoRAConfig`'s, which
the launcher's flags are made of.
"""

from __future__ import annotations

DAMPING = 1e-6  # docs/convergence.md: AdamW is indifferent up to 1e-2, SGD gets worse from 1e-2 on

# Peak rates with r = 4 to 8, E = 8, k = 2, lora_alpha = 16. Where they are from:
#   AdamW, GateRiemannianAdamW   docs/real_run.md: SmolLM2-135M on MAWPS; a tenth of the best on one layer of an encoder
#                                (docs/convergence.md: 0.01 to 0.02), where both have the same best rate
#   SGD, GateRiemannianSGD       docs/convergence.md, OpenBookQA, k = 2: 1 and 0.56; SGD's best rates differ by a factor
#                                of 10 between data sets, so try others
#   GateRiemannianMuon           not measured; the spectral norm by which one step may move an expert's product
LEARNING_RATES = {
    "AdamW": 1e-3,
    "GateRiemannianAdamW": 1e-3,
    "SGD": 1.0,
    "GateRiemannianSGD": 0.5,
    "GateRiemannianMuon": 1e-2,
}
OTHERS = 1e-4


def default_learning_rate(optimizer: str) -> float:
    """The rate of an optimizer by the name that a DeepSpeed config or `--optim` gives it; OTHERS if it has none here.

    Names of variants ("adamw_torch", "FusedAdam", "sgd") stand for AdamW and SGD.
    """
    if optimizer in LEARNING_RATES:
        return LEARNING_RATES[optimizer]
    name = optimizer.lower()
    if "adam" in name and "mini" not in name:
        return LEARNING_RATES["AdamW"]
    return LEARNING_RATES["SGD"] if name == "sgd" else OTHERS
