"""The optimizers. They know pairs of tagged parameters, and neither adapters nor PEFT."""

from .riemannian import GateRiemannianAdamW, GateRiemannianSGD

__all__ = ["GateRiemannianAdamW", "GateRiemannianSGD"]
