"""GateRiemannianAdamW and GateRiemannianSGD: torch's AdamW and SGD on Riemannian-preconditioned gradients.

Per expert, with G_A = A A^T and G_B = B^T B taken before the step (Sun et al., arXiv 2502.15828; Zhang & Pilanci,
arXiv 2402.02347):

    grad_A <- (G_B + d I)^-1 grad_A        grad_B <- grad_B (G_A + d I)^-1        d = max(damping, eps_fp32 * trace)

(both divided by s^2 with `include_scaling`), then the ordinary AdamW / SGD update. The gate scaling of the paper (1/g
or 1/sqrt(g) on the preconditioner of an expert whose gate is g) depends on the token, so the *layer* applies it, in
its backward pass; the optimizer tells the layers which one through the tags of their parameters.

Under ZeRO the gradients are preconditioned inside `step()`, on the slice that each rank owns, after DeepSpeed has
reduced, unscaled and clipped them: `optimizer.sharding.sharded` says how. Parameters without a tag follow torch's
rule exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..pairs import tag_of
from .factors import TaggedFactor, collect_pairs
from .groups import ParamGroup, as_groups, as_tensor, expert_group, scaled_learning_rates
from .kernels.adamw import CompiledAdamW
from .kernels.cpp import Kernels, load_kernels
from .options import DEFAULTS, PairOptions, check_options
from .sharding.sharded import ShardedPreconditioner
from .sharding.zero import GROUP_KEY, Storage, find_storage, is_stage_3
from .step_statistics import StepStatistics


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch wraps `step` of every optimizer class that is instantiated with the step hooks; ours runs them already."""
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step


class _GateRiemannian(torch.optim.Optimizer):
    """What both optimizers share. Stands before torch's class in the method resolution order.

    DeepSpeed replaces `param_groups[i]["params"]`, hides groups while it steps one, and drops empty ones. So the
    parameters that a group was given (`_members`) and its dict (`_known_groups`) are kept by the group's number.
    """

    _base: type[torch.optim.Optimizer]
    _fused_dtypes: frozenset[torch.dtype]  # for which torch's fused kernel is asked for
    statistics: StepStatistics | None = None  # set by who wants to know what the next steps do
    compiled = False
    _kernels: Kernels | None = None
    _update_type: type[CompiledAdamW] | None = None
    _update: CompiledAdamW | None = None

    def _construct(self, params: Any, pair_options: PairOptions, compiled: bool, **torch_options: Any) -> None:
        groups, options = as_groups(params), asdict(pair_options)
        for group in groups or [{}]:
            check_options({**options, **group})
        self._forget_pairs(options)
        self._compile(compiled)
        tensors = [as_tensor(p) for group in groups for p in group["params"]]
        fused = all(p.device.type in ("cpu", "cuda") and p.dtype in self._fused_dtypes for p in tensors) or None
        super().__init__(groups, **torch_options, fused=fused)  # type: ignore[call-arg]
        self.defaults.update(options)
        self._collect()

    def _compile(self, compiled: bool) -> None:
        if not isinstance(compiled, bool):
            raise ValueError(f"compiled={compiled!r} must be true or false.")
        self.compiled, self._kernels = compiled, load_kernels() if compiled else None

    def _forget_pairs(self, options: dict[str, Any]) -> None:
        self._options = options
        self._known_groups: dict[int, ParamGroup] = {}
        self._members: dict[int, list[nn.Parameter]] = {}
        self._factors: list[TaggedFactor] | None = None
        self._trained: list[bool] = []
        self._located: tuple[Any, Storage, ShardedPreconditioner] | None = None

    # -- parameter groups ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As torch's, but some parameters get groups of their own.

        Routers in a group whose `gate_lr_scale` is not 1: a group with that scale. Experts that are spread over ranks
        (`ep_size > 1`): one group per process group with the keys "moe" and "name", as DeepSpeed wants them.
        """
        (given,) = as_groups([param_group])
        given = {**self._options, **given}
        check_options(given)
        splits_routers = "lr_scale" not in given and given["gate_lr_scale"] != 1.0
        parts: dict[tuple[bool, str], list[Any]] = {(False, ""): []}
        for p in given["params"]:
            is_router = splits_routers and (tag_of(as_tensor(p)) or (None, None))[1] == "router"
            shared_by = "" if "moe" in given else expert_group(as_tensor(p))
            parts.setdefault((is_router, shared_by), []).append(p)
        for (is_router, shared_by), members in parts.items():
            if members or not given["params"]:
                extra = {"moe": True, "name": shared_by} if shared_by else {}
                lr_scale = given["gate_lr_scale"] if is_router else 1.0
                group = {"lr_scale": lr_scale, **given, **extra, "params": members, GROUP_KEY: len(self._known_groups)}
                super().add_param_group(group)
                self._known_groups[group[GROUP_KEY]] = group
                self._members[group[GROUP_KEY]] = list(group["params"])
        self._factors = None

    def _collect(self) -> None:
        """Finds the pairs and tells their layers the gate scaling."""
        self._factors = collect_pairs(self._members)
        self._trained = self._requires_grad()
        self._located = None
        for factor in self._factors:
            gate, group = factor.pair.gate, self._known_groups[factor.group]
            if factor.role == "A" and gate is not None:
                gate.gate_scaling, gate.scale_input_grad = group["gate_scaling"], group["scale_input_grad"]

    def _requires_grad(self) -> list[bool]:
        return [p.requires_grad for params in self._members.values() for p in params]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": self.compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict` and on unpickling: the groups are new dicts, with the loaded settings."""
        super().__setstate__(state)
        if not hasattr(self, "_options"):
            self._forget_pairs(dict(DEFAULTS))
            self._compile(self.compiled)
        for index, group in enumerate(self.param_groups):
            for name, value in {**self._options, "lr_scale": 1.0, GROUP_KEY: index}.items():
                group.setdefault(name, value)
            self._known_groups[group[GROUP_KEY]] = group
            self._members.setdefault(group[GROUP_KEY], list(group["params"]))
        self._collect()

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Preconditions the gradients of all pairs in place, then takes torch's step.

        A parameter without a gradient is left alone, as in torch; the other factor of its pair is preconditioned all
        the same.

        Raises:
            ValueError: a closure under ZeRO, a sparse gradient, half a pair, `compiled` without effect.
        """
        taken_over = self._located is not None and self._located[1].sharded
        if self._factors is None or (not taken_over and self._trained != self._requires_grad()):
            self._collect()  # groups were added, or parameters frozen or thawed (which ZeRO does not follow)
        storage, preconditioner = self._locate()
        loss = None
        if closure is not None:
            if storage is not None and storage.sharded:
                raise ValueError(
                    "a closure cannot be evaluated inside a ZeRO step, whose gradients are reduced before it: call "
                    "engine.backward(loss) and engine.step() without a closure."
                )
            with torch.enable_grad():
                loss = closure()
        watched = self.statistics if storage is not None else None
        with torch.no_grad(), scaled_learning_rates(self.param_groups), ExitStack() as until_stepped:
            if storage is not None and preconditioner is not None:
                units = storage.units(self.param_groups)
                preconditioner.watch = None
                if watched is not None:
                    watched.begin(self._factors or [], preconditioner, storage, units)
                if self._update is None or watched is not None:  # what is watched are the preconditioned gradients
                    preconditioner(units, self._damping, self._divisor)
                else:
                    self._update.begin()
                    stepped = preconditioner(units, self._damping, self._divisor, self._update)
                    until_stepped.enter_context(self._update.finished(stepped))
                if watched is not None:
                    watched.after_preconditioning()
            _unhooked(self._base.step)(self)
        if watched is not None:
            watched.end()
        return loss

    def _damping(self, factor: int) -> float:
        assert self._factors is not None
        return self._known_groups[self._factors[factor].group]["damping"]

    def _divisor(self, factor: int) -> float:
        assert self._factors is not None
        tagged = self._factors[factor]
        return tagged.pair.scaling**2 if self._known_groups[tagged.group]["include_scaling"] else 1.0

    def _locate(self) -> tuple[Storage | None, ShardedPreconditioner | None]:
        """Where the parameters are now: DeepSpeed takes them over after the optimizer was built."""
        assert self._factors is not None
        if not self._factors:
            return None, None
        first = self._factors[0]
        held = self._known_groups[first.group]["params"]
        holder = (is_stage_3(first.param) or [id(p) for p in held[:1]], len(self._known_groups))
        if self._located is None or self._located[0] != holder:
            trained = [(p, index) for index, ps in self._members.items() for p in ps if p.requires_grad]
            storage = find_storage([p for p, _ in trained], [index for _, index in trained], self._known_groups)
            position = {id(p): i for i, (p, _) in enumerate(trained)}
            placements = [storage.placement(position[id(f.param)]) for f in self._factors]
            factors = [f.placed(placement) for f, placement in zip(self._factors, placements, strict=True)]
            preconditioner = ShardedPreconditioner(factors, storage.flat, first.param.device, self._kernels)
            self._located = (holder, storage, preconditioner)
            self._update = self._update_type(self, storage) if self._kernels and self._update_type else None
        return self._located[1:]


class GateRiemannianAdamW(_GateRiemannian, torch.optim.AdamW):
    """AdamW on gate-scaled Riemannian-preconditioned gradients (gRAdamW of arXiv 2502.15828), exact under ZeRO.

    `m, v` are the moments of the preconditioned gradient; decoupled weight decay; bias correction; torch's fused
    kernel. Parameters outside LoRA pairs follow `torch.optim.AdamW` exactly.

    Args:
        params: parameters or groups, among them the lora_A and lora_B of at least one tagged pair.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`. The paper uses lr 1e-5.
        damping: d in (G + d I)^-1, raised to eps_fp32 * trace(G) where that is larger.
        gate_scaling: factor on the gradient that reaches an expert's factors, given its gate g: "none" (g), "sqrt"
            (sqrt(g), the paper's choice) or "full" (1).
        scale_input_grad: put the same factor on the gradient into the layer's input, as the published code does.
        gate_lr_scale: factor on the routers' learning rate (paper: 1e-3). Each group's routers become a group of their
            own with the key `lr_scale`, applied inside the step, whatever a scheduler writes into `lr`.

        include_scaling: divide both inverses by s^2, as the metric of s B A demands: the step of s B A then no longer
            depends on how it is split between s and the factors. False, as published, ignores s.


        compiled: have kernels built by GCC do the work on pairs, in one pass with AdamW's (`optimizer.kernels.cpp`):
            float32 on CPUs, CPU offload included; ranks 1, 2, 4, 8, 16; torch does other ranks. Gradients are not
            overwritten.

    The five before the last can be set per parameter group.

    Raises:
        ValueError: no pairs, half a pair, an option out of range, `compiled` without a compiler; at `step()`: see
            there.
    """

    _base = torch.optim.AdamW
    _update_type = CompiledAdamW
    _fused_dtypes = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        gate_scaling: str = "sqrt",
        scale_input_grad: bool = False,
        gate_lr_scale: float = 1.0,
        include_scaling: bool = False,
        compiled: bool = False,
    ) -> None:
        options = PairOptions(
            damping=damping,
            gate_scaling=gate_scaling,
            scale_input_grad=scale_input_grad,
            gate_lr_scale=gate_lr_scale,
            include_scaling=include_scaling,
        )
        self._construct(params, options, compiled, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)


class GateRiemannianSGD(_GateRiemannian, torch.optim.SGD):
    """SGD on gate-scaled Riemannian-preconditioned gradients (gRSGD of arXiv 2502.15828), exact under ZeRO.

    Momentum and coupled weight decay as in `torch.optim.SGD`, which parameters outside LoRA pairs follow exactly.

    Args:
        params: parameters or groups, among them the lora_A and lora_B of at least one tagged pair.
        lr, momentum, weight_decay: as in `torch.optim.SGD`. The paper uses lr 3e-5.
        damping, gate_scaling, scale_input_grad, gate_lr_scale, include_scaling: as in `GateRiemannianAdamW`.
        compiled: as there, but the update itself stays torch's.

    Raises:
        ValueError: no pairs, half a pair, an option out of range, `compiled` without a compiler; at `step()`: see
            there.
    """

    _base = torch.optim.SGD
    # torch 2.13's fused SGD takes wrong steps with bf16 parameters on CPUs, and fails with momentum once a parameter
    # gets its first gradient after the others (tests/optimizer/test_optimizer.py has both cases).
    _fused_dtypes = frozenset()

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        gate_scaling: str = "sqrt",
        scale_input_grad: bool = False,
        gate_lr_scale: float = 1.0,
        include_scaling: bool = False,
        compiled: bool = False,
    ) -> None:
        options = PairOptions(
            damping=damping,
            gate_scaling=gate_scaling,
            scale_input_grad=scale_input_grad,
            gate_lr_scale=gate_lr_scale,
            include_scaling=include_scaling,
        )
        self._construct(params, options, compiled, lr=lr, momentum=momentum, weight_decay=weight_decay)
