"""The optimizers. They know pairs of tagged parameters, and neither adapters nor PEFT."""

from .muon import GateRiemannianMuon
from .riemannian import GateRiemannianAdamW, GateRiemannianSGD

__all__ = ["GateRiemannianAdamW", "GateRiemannianMuon", "GateRiemannianSGD"]
