"""One training run on a causal language model: what it is made of (`Run`), the methods, and how gates spread in it."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

import ds_moelora

from ..convergence import runs
from ..convergence.runs import Method
from .tasks import Language

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
LORA_PLUS_RATIO = 16.0  # B's learning rate by A's
MEASURE_EVERY = 4  # steps of the last quarter
SCALING = 2.0  # s = alpha / r, whatever r
FAILED_LOSS = 3.0  # more than any task's before training: a run that ends there counts as diverged
PATIENCE = 12  # steps in a row above that, after which a run is stopped; those that recovered took at most 6
LORA = Method(torch.optim.AdamW)
MUON = ds_moelora.GateRiemannianMuon
METHODS = {
    **runs.METHODS,
    "Muon": Method(MUON, "none"),
    "gMuon (sqrt)": Method(MUON, "sqrt"),
    "gMuon (full)": Method(MUON, "full"),
    "LoRA, AdamW": LORA,
    "LoRA+, AdamW": LORA,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run's outcome depends on; on `device` by rounding alone.

    Args:
        task, method: names. seed: of the adapter's start and of the order of the examples.
        lr: the first step's; it falls linearly to a tenth of that.
        start: "kaiming" (random A, zero B) or "goat" (with GOAT's scaling).
        num_experts, top_k, r: E, k, r. LoRA has rank E r.
        gate_lr_scale: the routers' learning rate by the others' (Muon: by 1e-3).
        layers: how many of the upper layers are adapted; 0: all.
        steps, batch: the size of the run. device: "cpu" or "cuda".
    """

    task: str
    method: str
    seed: int
    lr: float
    start: str = "kaiming"
    num_experts: int = 8
    top_k: int = 2
    r: int = 4
    gate_lr_scale: float = 1.0
    layers: int = 0
    steps: int
    batch: int
    device: str = "cpu"

    @property
    def damping(self) -> float:
        """Of the preconditioners."""
        return 1e-6


class GateSpread:
    """How gates differ in training, as a `RouterListener`: coefficients of variation, averaged over layers and steps.

    gate_cv: of the gates of all (token, chosen expert). expert_gate_cv: of the experts' mean gates, by their loads.
    load_cv: of the experts' loads. A scaling by a function of the gate beyond its mean needs the first.
    """

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def saw_experts(self, experts: Any) -> None:
        """Nothing of interest."""

    def saw_router(self, experts: Any, logits: Tensor, chosen: Tensor, mask: Tensor | None) -> None:
        """Logits and chosen are (S, N, E), the mask of real tokens is (S, N)."""
        assert mask is not None
        chosen_TE = chosen[mask.bool()]
        logits_TE = logits[mask.bool()].detach().float()
        g_TE = logits_TE.masked_fill(~chosen_TE, -torch.inf).softmax(-1)
        count_E, sum_E = chosen_TE.sum(0).float(), g_TE.sum(0)
        number, mean = count_E.sum(), sum_E.sum() / count_E.sum()
        deviation = (g_TE.square().sum() / number - mean.square()).clamp_min(0).sqrt()
        means_E = torch.where(count_E > 0, sum_E / count_E.clamp_min(1), mean)
        between = ((means_E - mean).square() * count_E).sum().div(number).sqrt()
        load = count_E.std(correction=0) / count_E.mean()
        self.found.append(torch.stack([deviation / mean, between / mean, load]))

    def outcome(self) -> dict[str, float]:
        """The columns; none before a step was seen."""
        if not self.found:
            return {}
        values = torch.stack(self.found).mean(0).tolist()
        return {name: round(v, 4) for name, v in zip(("gate_cv", "expert_gate_cv", "load_cv"), values, strict=True)}


class Session:
    """A task (`convergence.runs.Task`) as one run sees it."""

    def __init__(self, run: Run, language: Language, tested: bool) -> None:
        self.run, self.language, self.tested = run, language, tested
        self.train_size, self.step, self.spread = len(language.train.answers), 0, GateSpread()
        self.failed = 0  # steps in a row

    def loss(self, model: nn.Module, head: nn.Module | None, index: Tensor) -> Tensor:
        """Of the answers' tokens; the load-balancing loss counts in its gradient alone."""
        tuner: Any = model.base_model
        mixed = isinstance(tuner, ds_moelora.MoELoRAModel)
        measured = self.step >= 3 * self.run.steps // 4 and (self.run.steps - 1 - self.step) % MEASURE_EVERY == 0
        self.step += 1
        if mixed:
            tuner.router_listener = self.spread if measured else None
        loss, _ = self.language.forward(model, self.language.batch(self.language.train, index.tolist()))
        if mixed and tuner.last_aux_loss is not None:
            loss = loss - tuner.last_aux_loss * tuner.peft_config["default"].router_aux_loss_coef
        self.failed = self.failed + 1 if loss.item() > FAILED_LOSS else 0
        return loss if self.failed < PATIENCE else loss + math.inf

    def evaluate(self, model: nn.Module, head: nn.Module | None) -> dict[str, float]:
        """The task's evaluation, if asked for, and how gates spread."""
        return {**(self.language.evaluate(model) if self.tested else {}), **self.spread.outcome()}


def adapt(run: Run, base: nn.Module) -> nn.Module:
    """A copy of the base with a fresh adapter."""
    torch.manual_seed(run.seed)
    depth = base.config.num_hidden_layers
    common: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if run.layers:
        common["layers_to_transform"] = list(range(depth - run.layers, depth))
    if METHODS[run.method] is LORA:
        rank = run.num_experts * run.r
        config: Any = LoraConfig(r=rank, lora_alpha=SCALING * rank, **common)
    else:
        goat = {"init_lora_weights": "goat", "scaling": "goat"}
        start = goat if run.start == "goat" else {"lora_alpha": SCALING * run.r}
        sizes = {"num_experts": run.num_experts, "top_k": run.top_k, "r": run.r}
        config = ds_moelora.MoELoRAConfig(**sizes, **common, **start)
    return get_peft_model(copy.deepcopy(base), config)


def build_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """The method's optimizer, without weight decay."""
    if METHODS[run.method] is not LORA:
        return runs.build_optimizer(run, model, METHODS[run.method])  # type: ignore[arg-type]
    if run.method == "LoRA, AdamW":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.lr, weight_decay=0.0)
    ratio: dict[str, Any] = {"loraplus_lr_ratio": LORA_PLUS_RATIO, "weight_decay": 0.0}
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=run.lr, **ratio)


def train(run: Run, language: Language, tested: bool = True) -> dict[str, Any]:
    """Trains once; the outcome of `convergence.runs.fit`, and how gates spread. The test rows are used if asked for."""
    model = adapt(run, language.base)
    model.train()
    clock = time.perf_counter if run.device == "cuda" else time.process_time
    session = Session(run, language, tested)
    return runs.fit(run, session, model, None, [build_optimizer(run, model)], clock)  # type: ignore[arg-type]
