"""LoRA on the stacked experts of a MoE base model: PEFT's `target_parameters`.

PEFT wraps a parameter (E, in, out) or (E, out, in) in a `ParamWrapper`; those of one module are nested.
Its lora_A is (E r, in), expert e's rows are e r ... e r + r - 1; its lora_B is (out, E r), expert e's columns are
e, e + E, e + 2 E, ... `check_layout` asks the installed PEFT whether that is so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..pairs import GateSettings

NAME = "ds_moelora"  # of `experts_forward` in ALL_EXPERTS_FUNCTIONS


def factors(wrapper: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A as (E, r, in) and B as (E, out, r): views of PEFT's parameters."""
    A, B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    E, r = wrapper.num_experts, wrapper.r[adapter]
    return A.reshape(E, r, -1), B.reshape(-1, r, E).permute(2, 0, 1)


@functools.cache
def check_layout() -> None:
    """Compares `factors` with the weights that PEFT computes from a small layer's.

    Raises:
        ValueError: they differ.
    """
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3, 5, 4))
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        wrapper = ParamWrapper(module, "probe", parameter_name="weight", config=config, r=2, lora_alpha=2)
    A, B = factors(wrapper, "probe")
    found, ours = wrapper.get_delta_weight("probe"), B @ A
    if not any(found.shape == w.shape and torch.allclose(found, w, atol=1e-5) for w in (ours, ours.mT)):
        raise ValueError(
            f"PEFT {metadata.version('peft')} keeps the factors of stacked experts in another layout than 0.18 to "
            "0.22: install one of these, or leave out target_parameters."
        )


def wrap_parameter(config: Any, adapter_name: str, target: nn.Module, parameter_name: str) -> nn.Module | None:
    """PEFT's LoRA on a stacked parameter, for `MoELoRAConfig.target_parameters`.

    Args:
        config: a `MoELoRAConfig`, whose r, lora_alpha and scaling hold. target: the module, or a wrapper around it, or
            the wrapper that already adapts the parameter, which then takes the further adapter.

    Returns:
        The new wrapper; None if `target` took it.
    """
    plain = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.scaling == "rslora",
        init_lora_weights=config.init_lora_weights is not False,
        inference_mode=config.inference_mode,
    )
    options: Any = {"r": config.r, "lora_alpha": config.lora_alpha, "config": plain}
    if isinstance(target, ParamWrapper) and target.parameter_name == parameter_name:
        target.update_layer(adapter_name, **options)
        return None
    return ParamWrapper(target, adapter_name, parameter_name=parameter_name, **options)


def check_auto_ep(engine: Any) -> None:
    """DeepSpeed's AutoEP looks for stacked parameters, does not see those that PEFT has wrapped, and goes on.

    Raises:
        ValueError: it is switched on, and a stack of experts has LoRA.
    """
    enabled = getattr(getattr(getattr(engine, "_config", None), "expert_parallel_config", None), "enabled", False)
    if enabled and any(
        isinstance(module, ParamWrapper) and module.num_experts > 1 for module in engine.module.modules()
    ):
        raise ValueError(
            'the DeepSpeed config has "expert_parallel" (AutoEP), which does not spread experts that have LoRA '
            "(target_parameters). Leave it out, and use ZeRO stage 3, which shards the experts' weights."
        )


def gate_of(base: nn.Module) -> GateSettings | None:
    """The gate settings of an experts module that `use_lora_experts` has set up; None for others."""
    return vars(base).get("lora_gate")


def use_lora_experts(model: nn.Module) -> int:
    """Has every experts module that PEFT's LoRA adapts computed by `experts_forward`, which never makes B_e A_e.

    Call it before the optimizer is built: it is what makes `gate_scaling` apply to the base's experts.

    Args:
        model: from `get_peft_model` or `PeftModel.from_pretrained`, with `target_parameters`.

    Returns:
        The number of experts modules.

    Raises:
        ValueError: there is none, or one that cannot be computed so; nothing has been changed then.
    """
    found: dict[Any, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            found.setdefault(module.get_base_layer(), name)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no LoRA on stacked experts: pass LoraConfig(target_parameters=[...])."
        )
    check_layout()
    for base, name in found.items():
        if problem := _problem(base):
            raise ValueError(f"{name}: {problem}. Leave use_lora_experts out: PEFT's own function will do.")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    for base in found:
        base.config._experts_implementation = NAME
        base.lora_gate = gate_of(base) or GateSettings()
    wrappers: list[Any] = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    for module in wrappers:
        for linear in module.lora_A.values():
            if (pair := getattr(linear.weight, "lora_pair", None)) is not None:
                pair.gate = gate_of(module.get_base_layer())
    return len(found)


def _problem(base: Any) -> str:
    """Why `experts_forward` cannot compute a module; empty if it can."""
    weights = [getattr(base, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")]
    if not hasattr(base, "has_gate") or not hasattr(getattr(base, "config", None), "_experts_implementation"):
        return f"{type(base).__name__} is not one of the experts that transformers computes by ALL_EXPERTS_FUNCTIONS"
    if not all(w is None or (w.is_floating_point() and w.element_size() > 1) for w in weights) or hasattr(
        base, "parametrizations"
    ):
        return "its weights are quantized"
    if any(w is not None and w.requires_grad for w in weights):
        return "its weights are trained themselves"
    if getattr(base, "_is_expert_parallel", False):
        return "transformers has spread its experts over processes"
    return ""


def activate_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """`ParamWrapper._activate_lora`, which adds B_e A_e to the weights: not where `experts_forward` has them."""

    @contextmanager
    def activate(self: Any, active_adapters: list[str]) -> Iterator[None]:
        base = self.get_base_layer()
        if gate_of(base) is None or base.config._experts_implementation != NAME:
            with original(self, active_adapters):
                yield
            return
        active = vars(base).setdefault("_active_lora", {})
        active[self.parameter_name] = [(self, adapter) for adapter in active_adapters if adapter in self.lora_A]
        for _, adapter in active[self.parameter_name]:
            for factor in (self.lora_A[adapter].weight, self.lora_B[adapter].weight):
                if hasattr(factor, "ds_id"):  # ZeRO-3: nobody calls the `nn.Linear` that it belongs to
                    import deepspeed

                    deepspeed.zero.register_external_parameter(base, factor)
        try:
            yield
        finally:
            del active[self.parameter_name]

    return activate


def _low_rank(base: Any, name: str, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The active adapters' factors of a parameter, stacked: (E, R, in) and, scaled, (E, R, out)."""
    ins, outs = [], []
    for wrapper, adapter in vars(base).get("_active_lora", {}).get(name, ()):
        A, B = factors(wrapper, adapter)
        A, B = A.to(weight.dtype), B.to(weight.dtype).mT
        # PEFT before 0.19 takes (E, out, in) for (E, in, out).
        swapped = base.is_transposed == getattr(wrapper, "_did_swap_in_out_features", False)
        ins.append(B if swapped else A)
        outs.append((A if swapped else B) * wrapper.scaling[adapter])
    if not ins:
        return None
    A, B = (factor[0] if len(factor) == 1 else torch.cat(factor, 1) for factor in (ins, outs))
    if padding := -A.shape[1] % (16 // A.element_size()):  # for `_by_torch`
        A, B = F.pad(A, (0, 0, 0, padding)), F.pad(B, (0, 0, 0, padding))
    return A.contiguous(), B.contiguous()


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The chosen experts of a transformers experts module, and their LoRA, as grouped products over sorted rows.

        y_t = sum_e g_te (down_e(act(gate_up_e(x_t)))),      each of both linear maps  W_e x + b_e + s B_e (A_e x)

    The gradient that reaches A_e and B_e has the factor h of `GateSettings` in place of g; the gradient into
    `hidden_states` has g still, or h with `scale_input_grad`; that into the gates is exact. So rows carry the gradient
    without any gate, which A_e and B_e multiply by h, and the entrance by g.

    Args:
        hidden_states: (T, d). top_k_index, top_k_weights: (T, k), the base's experts and its gates.

    Returns:
        (T, d).
    """
    if not vars(self).get("_active_lora"):
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    k = top_k_index.shape[1]
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    bounds = torch.arange(1, self.num_experts + 1, device=expert.device)
    ends = torch.searchsorted(expert, bounds).to(torch.int32)  # no wait for the device
    token, back = order // k, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    settings, gates = gate_of(self) or GateSettings(), top_k_weights.detach()
    h = _gradient_factor(gates, settings)
    factor = h.reshape(-1)[order].unsqueeze(-1)

    def linear(rows: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)
        low_rank = _low_rank(self, name, weight) or (None, None)
        rows = rows.to(weight.dtype)
        bias = getattr(self, name + "_bias")[expert] if self.has_bias else None
        out = _GroupedLinear.apply(rows, weight, *low_rank, ends, factor, self.is_transposed)
        return out if bias is None else out + bias

    rows = _Enter.apply(hidden_states, token, back, h if settings.scale_input_grad else gates)
    rows = linear(rows, "gate_up_proj" if self.has_gate else "up_proj")
    rows = linear(self._apply_gate(rows) if self.has_gate else self.act_fn(rows), "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)
    return _Leave.apply(rows, top_k_weights, token, back).to(hidden_states.dtype)


def _gradient_factor(gates: Tensor, settings: GateSettings) -> Tensor:
    """h of the table in `GateSettings`."""
    if settings.gate_scaling == "none":
        return gates
    return gates.sign() * gates.abs().sqrt() if settings.gate_scaling == "sqrt" else torch.ones_like(gates)


def _combine(rows: Tensor, weights: Tensor, back: Tensor) -> Tensor:
    """(N, d) sorted rows, (T, k) weights -> (T, d): the weighted sum of every token's rows, which lie at `back`."""
    rows = rows[back].view(*weights.shape, -1)
    if weights.dtype == rows.dtype:
        return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
    return (rows * weights.unsqueeze(-1)).sum(1)


class _Enter(torch.autograd.Function):
    """Every token's row for each of its experts; their gradients are summed with `weights`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, back: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(back, weights)
        ctx.dtype = x.dtype
        return x[token]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        back, weights = ctx.saved_tensors
        return _combine(dy, weights, back).to(ctx.dtype), None, None, None


class _Leave(torch.autograd.Function):
    """The sum of every token's rows, weighted by its gates; the gradient into the rows is without the gates."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, token: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, token, back)
        return _combine(rows, gates, back)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        rows, gates, token, back = ctx.saved_tensors
        dy, dgates = dy.to(rows.dtype)[token], None
        if ctx.needs_input_grad[1]:
            dgates = torch.bmm(dy.unsqueeze(1), rows.unsqueeze(2)).view(-1)[back].view(gates.shape).to(gates.dtype)
        return dy, dgates, None, None


class _GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert, times W_e + B_e^T A_e of their expert.

    x: (N, in). W: (E, out, in), or (E, in, out) if transposed; frozen. A: (E, R, in), B: (E, R, out) or None.
    ends: (E,) one past each expert's last row. factor: (N, 1), on the gradient of A and B alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        ends: Tensor,
        factor: Tensor,
        transposed: bool,
    ) -> Tensor:
        y = _grouped(x, W if transposed else W.mT, ends)
        p = None
        if A is not None and B is not None:
            p = _grouped(x, A.mT, ends)
            y += _grouped(p, B, ends)
        ctx.save_for_backward(x if p is not None else None, W, A, B, ends, factor, p)
        ctx.transposed = transposed
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, A, B, ends, factor, p = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _grouped(dy, W.mT if ctx.transposed else W, ends) if ctx.needs_input_grad[0] else None
        if p is None:
            return dx, None, None, None, None, None, None
        q = _grouped(dy, B.mT, ends)
        if dx is not None:
            dx += _grouped(q, A, ends)
        dA = dB = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            q, p = (q * factor).to(q.dtype), (p * factor).to(p.dtype)
            dA, dB = _grouped_outer(q, x, ends), _grouped_outer(p, dy, ends)
        return dx, None, dA, dB, None, None, None


@torch.compiler.disable
@functools.cache
def _has_grouped_mm(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's own grouped product knows these operands."""
    if not hasattr(F, "grouped_mm"):
        return False
    x, ends = torch.ones(8, 8, device=device, dtype=dtype), torch.tensor([8], dtype=torch.int32, device=device)
    try:
        F.grouped_mm(x, x[None], offs=ends)
        F.grouped_mm(x.mT, x, offs=ends)
    except (RuntimeError, ValueError):
        return False
    return True


def _by_torch(x: Tensor, *widths: int) -> bool:
    """Whether torch's own grouped product takes the operands: rows of a multiple of 16 bytes, of a dtype it knows."""
    aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:  # the compiler knows no other
        return False
    return aligned and _has_grouped_mm(x.device.type, x.dtype)


def _grouped(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """(N, a), (E, a, b) -> (N, b): every row times the matrix of its expert."""
    if _by_torch(x, *W.shape[1:]):
        return F.grouped_mm(x, W, offs=ends)
    out, start = x.new_empty(len(x), W.shape[2]), 0
    for e, end in enumerate(ends.tolist()):
        if start < end:
            torch.mm(x[start:end], W[e], out=out[start:end])
        start = end
    return out


def _grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """(N, a), (N, b) -> (E, a, b): x^T y of every expert's rows."""
    if _by_torch(x, x.shape[1], y.shape[1]):
        return F.grouped_mm(x.mT, y, offs=ends)
    out, start = x.new_zeros(len(ends), x.shape[1], y.shape[1]), 0
    for e, end in enumerate(ends.tolist()):
        if start < end:
            torch.mm(x[start:end].mT, y[start:end], out=out[e])
        start = end
    return out
