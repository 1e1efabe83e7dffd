"""One training step (`Workload`), and one way to spread it over its GPUs (`Choice`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# fp32 numbers per parameter that the optimizer keeps beside the master copy.
OPTIMIZER_STATES = {"adamw": 2, "sgd": 0, "sgd-momentum": 1}
COMPUTES = ("dense", "grouped")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run: ZeRO stage, ranks that share the experts, and what moves between these ("" with ep_size 1)."""

    stage: int
    ep_size: int = 1
    dispatch: str = ""

    def __str__(self) -> str:
        return f"stage {self.stage}, ep_size {self.ep_size}" + (f", {self.dispatch}" if self.dispatch else "")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step: every GPU takes `micro_batch` sequences of `sequence_length` tokens, once.

    Args:
        num_experts: E. rank: r of one expert. top_k: k.
        gpus: N. gpus_per_node: GPUs that the faster links join; at most N are used.
        dtype: of parameters, gradients and activations. base_bytes: bytes per element of the frozen base model (0.5
            for 4 bits); None: as dtype.
        optimizer: "adamw", "sgd" or "sgd-momentum".
        checkpointing: gradient checkpointing of every block.
        expert_compute: "dense" (the products of "fused" too, which "auto" is on GPUs) or "grouped".
        riemannian: GateRiemannianAdamW or GateRiemannianSGD; False: the plain optimizer.

    Raises:
        ValueError: a value out of range.
    """

    num_experts: int
    rank: int
    top_k: int = 2
    gpus: int
    gpus_per_node: int = 8
    micro_batch: int = 1
    sequence_length: int = 4096
    dtype: str = "bf16"
    base_bytes: float | None = None
    optimizer: str = "adamw"
    checkpointing: bool = True
    expert_compute: str = "dense"
    riemannian: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name}={value!r} must be an integer >= 1.")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} is larger than num_experts={self.num_experts}; lower top_k or raise num_experts."
            )
        if self.gpus % self.node_size:
            raise ValueError(
                f"gpus={self.gpus} is not a multiple of gpus_per_node={self.gpus_per_node}: use whole nodes, e.g. "
                f"{self.gpus // self.node_size * self.node_size}, or another gpus_per_node."
            )
        known = {"dtype": DTYPE_BYTES, "optimizer": OPTIMIZER_STATES, "expert_compute": COMPUTES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(values)}.")
        if self.base_bytes is not None and not (math.isfinite(self.base_bytes) and self.base_bytes > 0):
            raise ValueError(f"base_bytes={self.base_bytes} must be > 0; 2 for bf16, 0.5 for 4 bits.")

    @property
    def node_size(self) -> int:
        """GPUs of one node that take part."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def tokens(self) -> int:
        """T, per GPU and step."""
        return self.micro_batch * self.sequence_length

    @property
    def size(self) -> int:
        """b, bytes per element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def base_size(self) -> float:
        """Bytes per element of the base model."""
        return self.size if self.base_bytes is None else self.base_bytes
