"""The same training run twice: through a DeepSpeed engine on real ranks, and whole, in float64, without it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moelora.optimizer.reference import ReferenceAdamW, ReferenceMuon, ReferenceSGD

from .mixture import SHAPES, Stack, batches

# AdamW's eps is far above its default: an element whose first gradients happen to be near zero otherwise turns rounding
# into a step of size lr. With eps=1e-6, 3 of 24 draws of data deviate by more than 1e-5 from float64, up to 1.2e-4, at
# any stage and without DeepSpeed; plain torch AdamW on the same data by up to 6e-5. With 1e-3 all stay below 3e-6.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "GateRiemannianAdamW": {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-3, "weight_decay": 0.1, "damping": 1e-4},
    "GateRiemannianSGD": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "damping": 1e-4},
    "GateRiemannianMuon": {
        "lr": 1e-2,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "damping": 1e-4,
        "aux_lr": 3e-3,
        "aux_betas": [0.9, 0.99],
        "aux_eps": 1e-3,
    },
    # What a user would have without this package: the yardstick where half precision limits everybody.
    "AdamW": {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-3, "weight_decay": 0.1, "torch_adam": True},
    # DeepSpeed's name for AdamW, too; with a usual eps: the yardstick for SGD, whose plain steps would be tiny here.
    "Adam": {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1, "torch_adam": True},
}
PLAIN = {"GateRiemannianAdamW": "AdamW", "GateRiemannianSGD": "Adam", "GateRiemannianMuon": "Adam"}
SHARDED = list(PLAIN)
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def engine_config(
    stage: int, kind: str, clip: float = 0.0, accumulate: int = 1, precision: str = "fp32", **zero: Any
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "optimizer": {"type": kind, "params": dict(OPTIMIZERS[kind])},
        "zero_optimization": {
            "stage": stage,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
            **zero,
        },
        "steps_per_print": 10**9,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "fp16":
        # High enough that the first steps overflow and are skipped, low enough that most are not.
        config[precision].update(initial_scale_power=18, hysteresis=1)
    return config


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def engine_of(module: nn.Module, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine for what a model trains."""
    import deepspeed

    return deepspeed.initialize(model=module, model_parameters=trainable(module), config=config)[0]


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": trainable(model)}]


def loraplus_groups(model: nn.Module) -> list[dict[str, Any]]:
    """A, B and the rest in groups of their own, as LoRA+ has them: every pair lies in two groups."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if "lora_B" in n], "weight_decay": 0.0},
        {"params": [p for n, p in named if "lora_" not in n]},
        {"params": [p for n, p in named if "lora_A" in n]},
    ]


def scattered_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Every other parameter in the first group, in reverse order."""
    params = [p for p in model.parameters() if p.requires_grad][::-1]
    return [{"params": params[::2]}, {"params": params[1::2]}]


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter whole, gathered if DeepSpeed partitions it."""
    import deepspeed

    weights = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if hasattr(p, "_z3_optimizer"):
            weights[name] = deepspeed.utils.safe_get_full_fp32_param(p).float().reshape(p.ds_shape)
        else:  # not DeepSpeed's master weights: its mapping to them is wrong with round-robin gradients
            weights[name] = p.detach().float()
        weights[name] = weights[name].clone()
    return weights


class Traffic:
    """Records the bytes that leave this process in every collective inside the optimizer's step.

    Of an all-reduce, twice its (n - 1) / n-th part, as on a ring.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls: list[list[float]] = []
        self.step, optimizer.step = optimizer.step, self.watched  # type: ignore[method-assign]

    def watched(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append([])
        all_reduce, all_to_all = dist.all_reduce, dist.all_to_all_single

        def reduced(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            n = dist.get_world_size(group)
            self.calls[-1].append(2 * (n - 1) / n * tensor.nbytes)
            return all_reduce(tensor, *args, group=group, **kwargs)

        def exchanged(received: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls[-1].append(sent.nbytes)  # nothing is sent to oneself
            return all_to_all(received, sent, *args, **kwargs)

        with mock.patch.multiple(dist, all_reduce=reduced, all_to_all_single=exchanged):
            return self.step(*args, **kwargs)


@contextmanager
def accelerator_answers(fp16: bool) -> Iterator[None]:
    """DeepSpeed asks its accelerator whether it knows fp16, which a CPU says that has AVX-512-FP16. torch computes in
    fp16 on any CPU, so that what DeepSpeed and the optimizers do with it can be tested on any.
    """
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(get_accelerator(), "is_fp16_supported", return_value=fp16):
        yield


def run_engine(
    config: dict[str, Any],
    model: Callable[[], nn.Module] = lambda: Stack(SHAPES),
    groups: Callable[[nn.Module], list[dict[str, Any]]] = one_group,
    steps: int = 10,
    seed: int = 1,
    fp16: bool | None = True,
) -> dict[str, Any]:
    """On every rank: trains with `deepspeed.initialize(config)`; final weights, losses, gradient norms and traffic.

    fp16 is run whatever the CPU; `fp16`: what DeepSpeed's accelerator answers, None: its own answer.
    """
    import deepspeed

    import ds_moelora  # noqa: F401  registers the optimizers

    module = model()
    with accelerator_answers(fp16) if fp16 is not None else nullcontext():
        engine, *_ = deepspeed.initialize(model=module, model_parameters=groups(module), config=copy.deepcopy(config))
    traffic = Traffic(engine.basic_optimizer)
    losses, norms, skipped = [], [], []
    dtype = next(engine.module.parameters()).dtype
    for micro_batches in batches(steps, config["gradient_accumulation_steps"], dist.get_world_size(), seed=seed):
        for by_rank in micro_batches:
            x, target = by_rank[dist.get_rank()]
            loss = engine(x.to(dtype), target.to(dtype))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm() or math.nan))
        skipped.append(engine.skipped_steps > sum(skipped))
    result = {
        "weights": full_weights(engine.module),
        "losses": losses,
        "norms": norms,
        "skipped": skipped,
        "traffic": traffic.calls,
        "basic": type(engine.basic_optimizer).__name__,
        "wrapper": type(engine.optimizer).__name__,
    }
    engine.destroy()
    return result


@functools.lru_cache(32)  # the stages of one setting have one reference
def run_reference(
    kind: str,
    world: int,
    model: Callable[[], nn.Module] = lambda: Stack(SHAPES),
    groups: Callable[[nn.Module], list[dict[str, Any]]] = one_group,
    steps: int = 10,
    accumulate: int = 1,
    clip: float = 0.0,
    precision: str = "fp32",
    seed: int = 1,
    skipped: tuple[bool, ...] = (),
    **more: Any,
) -> dict[str, Any]:
    """The same training whole, in float64: gradients averaged over ranks and micro-batches, then clipped.

    `precision` rounds weights at the start and data, as a half-precision engine sees them; `skipped` steps do nothing;
    `more` are options of the optimizer.
    """
    module = model().to(PRECISION[precision]).double()
    options = {**{k: v for k, v in OPTIMIZERS[kind].items() if k != "torch_adam"}, **more}
    classes: dict[str, Any] = {
        "GateRiemannianAdamW": ReferenceAdamW,
        "GateRiemannianSGD": ReferenceSGD,
        "GateRiemannianMuon": ReferenceMuon,
        "AdamW": torch.optim.AdamW,
        "Adam": torch.optim.AdamW,
    }
    optimizer = classes[kind](groups(module), **options)
    params = [p for p in module.parameters() if p.requires_grad]
    norms = []
    for step, micro_batches in enumerate(batches(steps, accumulate, world, seed=seed)):
        if any(skipped[step : step + 1]):
            norms.append(math.inf)
            continue
        module.zero_grad()
        for by_rank in micro_batches:
            for x, target in by_rank:
                x, target = (t.to(PRECISION[precision]).double() for t in (x, target))
                (module(x, target) / (world * accumulate)).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]).item())
        if clip:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    start = {n: p.detach().to(PRECISION[precision]).double() for n, p in model().named_parameters() if n in trained}
    return {"weights": {n: p.detach() for n, p in trained.items()}, "norms": norms, "start": start}


def deviation(weights: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest over the parameters of max|w - w_ref| / max|w_ref|."""
    assert weights.keys() == reference.keys()
    return max(
        ((weights[name].double() - w).abs().max() / w.abs().max().clamp_min(1e-9)).item()
        for name, w in reference.items()
    )
