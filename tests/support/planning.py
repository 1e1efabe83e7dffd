"""What a real engine holds, and a model of three linear layers as the planner sees it."""

from __future__ import annotations

from typing import Any

import torch

from ds_moelora.planner.model import Linear, ModelShape

from .expert_parallel import adapted, batches
from .training import engine_config, engine_of, trainable

# tests.support.expert_parallel.Net: 7 -> 5 -> 11 -> 3 with biases, the first two adapted.
NET = ModelShape(
    name="Net",
    hidden_size=7,
    num_blocks=1,
    vocab_size=0,
    attention_width=0,
    base_parameters=7 * 5 + 5 + 5 * 11 + 11 + 11 * 3 + 3,
    largest_parameter=55,
    linears=(Linear("b.0.first", 7, 5, True), Linear("b.0.second", 5, 11, True), Linear("head", 11, 3, False)),
)


def engine_bytes(stage: int, ep_size: int) -> dict[str, int]:
    """On every rank: bytes of trainable weights, fp32 master copies and AdamW's states."""
    module = adapted(ep_size=ep_size, modules_to_save=None)
    engine = engine_of(module, engine_config(stage, "GateRiemannianAdamW", precision="bf16"))
    [[[(x, target)]]] = batches(1, 1, 1)
    engine.backward(engine(x.bfloat16(), target.bfloat16())["loss"])
    engine.step()
    state: dict[torch.Tensor, dict[str, Any]] = engine.basic_optimizer.state
    kept = [t for values in state.values() for t in values.values() if isinstance(t, torch.Tensor) and t.dim() > 0]
    weights = [getattr(p, "ds_tensor", p) for p in trainable(module)]
    found = {"experts and routers": weights, "fp32 master copy": list(state), "optimizer states": kept}
    result = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in found.items()}
    engine.destroy()
    return result
