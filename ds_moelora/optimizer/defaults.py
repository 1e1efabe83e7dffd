"""Default learning rates and damping: one table for the library's constructors, the launcher and docs/choosing.md.

The rest of a run's defaults (r, num_experts, top_k, the coefficient of the balance loss) are `MoELoRAConfig`'s, which
the launcher's flags are made of.
"""

from __future__ import annotations

DAMPING = 1e-6  # docs/convergence.md: AdamW is indifferent up to 1e-2, SGD gets worse from 1e-2 on

# Peak rates at s = lora_alpha / r = 2, E = 8, k = 2, as docs/language_model.md measured them (SmolLM2-135M on MAWPS;
# the best of a ladder, rounded). MoELoRAConfig's own r and lora_alpha have that s; with another, lr * s is what counts.
#   AdamW, GateRiemannianAdamW   3.2e-3 is the best of both; a third of it keeps nine tenths of the gain
#   GateRiemannianMuon           1.8e-2
#   GateRiemannianSGD            1e-2 (gate_scaling "none" and "sqrt"; "full" diverged there with one seed of three)
#   SGD                          0.18; at 0.32 it diverged, hence the lower one of two near it
# Models of billions of parameters want less (docs/choosing.md).
LEARNING_RATES = {
    "AdamW": 3e-3,
    "GateRiemannianAdamW": 3e-3,
    "SGD": 1e-1,
    "GateRiemannianSGD": 1e-2,
    "GateRiemannianMuon": 2e-2,
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
