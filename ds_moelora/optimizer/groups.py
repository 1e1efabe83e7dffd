"""Parameter groups: what optimizers add to torch's options, and the learning rates of groups while a step runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..pairs import GATE_SCALINGS

ParamGroup = dict[str, Any]


def check_options(group: ParamGroup) -> None:
    """Checks the options of a group that are not torch's.

    Raises:
        ValueError: a value out of range; the message names the value, the bound and the remedy.
    """
    for name in group.keys() & {"damping", "gate_lr_scale", "aux_lr"}:
        value = group[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}={value!r} must be a finite number >= 0; the papers use damping=1e-6.")
    if group["gate_scaling"] not in GATE_SCALINGS:
        choices = ", ".join(map(repr, GATE_SCALINGS))
        raise ValueError(f"gate_scaling={group['gate_scaling']!r} is unknown; choose one of {choices}.")
    for name in group.keys() & {"scale_input_grad", "include_scaling"}:
        if not isinstance(group[name], bool):
            raise ValueError(f"{name}={group[name]!r} must be true or false.")
    if "aux_lr" in group:
        _check_spectral(group["lr"], group["momentum"], group["weight_decay"])


def _check_spectral(lr: float, momentum: float, weight_decay: float) -> None:
    if not lr > 0:
        raise ValueError(
            f"lr={lr!r} must be above 0, as other parameters' rates are multiples of it (aux_lr / lr): give the rate "
            "to be reached, and start from 0 by a scheduler."
        )
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r} must be from 0 to below 1; the default is 0.95.")
    if not lr * weight_decay < 1:
        raise ValueError(f"weight_decay={weight_decay!r} times lr={lr!r} must be below 1: each step keeps the rest.")


def as_groups(params: Any) -> list[ParamGroup]:
    """What torch accepts (tensors, named tensors or groups, from any iterable) as groups that can be read twice."""
    if isinstance(params, (torch.Tensor, set)):
        raise TypeError("params must be a list or another ordered iterable of tensors or of parameter groups.")
    params = list(params)
    if not params or not isinstance(params[0], dict):
        return [{"params": params}]
    single = [{**g, "params": [g["params"]]} if isinstance(g["params"], torch.Tensor) else g for g in params]
    return [{**group, **as_groups(group["params"])[0]} for group in single]


def as_tensor(param: Any) -> nn.Parameter:
    """Of a parameter or a (name, parameter)."""
    return param[1] if isinstance(param, tuple) else param


def expert_group_name(param: nn.Parameter) -> str:
    """DeepSpeed's name of the group that shares an expert's parameter; "" for parameters that all ranks have."""
    return "" if getattr(param, "allreduce", True) else getattr(param, "group_name", "")


@contextmanager
def scaled_learning_rates(param_groups: list[ParamGroup]) -> Iterator[None]:
    """`lr * lr_scale` while the step runs. Schedulers, which overwrite `lr`, never see the product."""
    original = [group["lr"] for group in param_groups]
    for group in param_groups:
        if group["lr_scale"] != 1.0:
            group["lr"] = group["lr"] * group["lr_scale"]
    try:
        yield
    finally:
        for group, lr in zip(param_groups, original, strict=True):
            group["lr"] = lr
