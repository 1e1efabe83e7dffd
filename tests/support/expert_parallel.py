"""Training runs of one small adapted model in any topology, and the weights and gradients of all its experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ds_moelora
from ds_moelora import MoELoRAConfig, data_only, gather_experts

from .training import OPTIMIZERS

IN_FEATURES = 7


class Net(nn.Module):
    """7 -> 5 -> 11 -> 3 on (tokens, 7), or (batch, length, 7); returns {"loss": ...} like a model of transformers."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 5), nn.Linear(5, 11), nn.Linear(11, 3)
        self.checkpointing = checkpointing

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh()

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        run = checkpoint(self.body, x, use_reentrant=False) if self.checkpointing else self.body(x)
        return {"loss": F.mse_loss(self.head(run), target, reduction="sum") / 6}


def adapted(ep_size: int = 1, checkpointing: bool = False, aux: float = 0.1, **fields: Any) -> PeftModel:
    """4 experts of rank 3, two of them chosen; the head is trained as well. B away from zero."""
    torch.manual_seed(0)
    config = {
        "r": 3,
        "num_experts": 4,
        "top_k": 2,
        "target_modules": ["first", "second"],
        "modules_to_save": ["head"],
        "init_lora_weights": False,
        "router_aux_loss_coef": aux,
        "ep_size": ep_size,
        **fields,
    }
    return get_peft_model(Net(checkpointing), MoELoRAConfig(**config))


def batches(steps: int, accumulate: int, ranks: int, how: str = "even", seed: int = 1) -> list[Any]:
    """Data by step, micro-batch and rank. "uneven": rank i has 6 - 2i tokens; "one expert": all tokens alike."""
    generator = torch.Generator().manual_seed(seed)

    def one(rank: int) -> tuple[Tensor, Tensor]:
        tokens = max(6 - 2 * rank, 0) if how == "uneven" else 6
        x, target = (torch.randn(tokens, n, generator=generator) for n in (IN_FEATURES, 3))
        if how == "one expert":  # nearly equal tokens choose the same experts: the others get none
            x = x * 1e-3 + torch.ones(IN_FEATURES)
        return x, target

    return [[[one(rank) for rank in range(ranks)] for _ in range(accumulate)] for _ in range(steps)]


def one_step(engine: Any) -> None:
    """On this process's own first batch."""
    x, target = batches(1, 1, dist.get_world_size())[0][0][dist.get_rank()]
    engine.backward(engine(x, target)["loss"])
    engine.step()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter, with all experts, by the names of ep_size=1; on rank 0, {} elsewhere."""
    whole = {name: tensor for name, tensor in gather_experts(model).items() if ".initial_" not in name}
    if dist.get_rank() != 0:
        return {}
    own = {n: p.detach().clone().float() for n, p in model.named_parameters() if p.requires_grad and ".shard." not in n}
    return {**own, **{name: tensor.float() for name, tensor in whole.items()}}


def whole_gradients(engine: Any) -> dict[str, Tensor]:
    """As `whole_weights`, of the gradients that a stage-0 engine has reduced."""
    model = engine.module
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.copy_(p.grad)
    found = whole_weights(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(saved[n])
    return found


def run(
    config: dict[str, Any],
    steps: int = 10,
    how: str = "even",
    model: dict[str, Any] | None = None,
    client: bool = False,
    load: str | None = None,
    save: str | None = None,
    export: str | None = None,
    start: int = 0,
    gradients: bool = False,
) -> dict[str, Any]:
    """On every rank: trains; mean loss of every micro-batch, final whole weights (rank 0), and what was asked for.

    Args:
        config: DeepSpeed's. how: see `batches`. model: arguments of `adapted`.
        client: our optimizer is built from the parameters and handed over. start, load: steps and checkpoint before.
        save: an engine checkpoint at the end. export: `save_pretrained` there. gradients: those of the first step.
    """
    import deepspeed

    module = adapted(**(model or {}))
    trained = [p for p in module.parameters() if p.requires_grad]
    if load:  # what was trained must come from the checkpoint
        with torch.no_grad():
            for p in trained:
                p.mul_(1.5)
    config = copy.deepcopy(config)
    options: dict[str, Any] = {"model_parameters": trained}
    if client:
        kind = config.pop("optimizer")["type"]
        options = {"optimizer": getattr(ds_moelora, kind)(trained, **OPTIMIZERS[kind])}
    engine, *_ = deepspeed.initialize(model=module, config=config, **options)
    if load:
        with data_only():
            path, _ = engine.load_checkpoint(load)
        assert path is not None
    result: dict[str, Any] = {"losses": [], "first": whole_weights(engine.module)}
    dtype = next(engine.module.parameters()).dtype
    for micro_batches in batches(steps, config["gradient_accumulation_steps"], dist.get_world_size(), how)[start:]:
        for by_rank in micro_batches:
            x, target = by_rank[dist.get_rank()]
            loss = engine(x.to(dtype), target.to(dtype))["loss"]
            engine.backward(loss)
            if gradients and engine.is_gradient_accumulation_boundary() and "gradients" not in result:
                result["gradients"] = whole_gradients(engine)
            engine.step()
            mean = loss.detach().float().clone()
            dist.all_reduce(mean)
            result["losses"].append(mean.item() / dist.get_world_size())
    result["weights"] = whole_weights(engine.module)
    result["basic"] = type(engine.basic_optimizer).__name__
    if save:
        engine.save_checkpoint(save)
    if export:
        engine.module.save_pretrained(export)
        assert (Path(export) / "adapter_model.safetensors").is_file()
    engine.destroy()
    return result
