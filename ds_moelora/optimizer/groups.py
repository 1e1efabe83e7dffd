"""Parameter groups as they are given, and the learning rates of groups while a step runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

ParamGroup = dict[str, Any]


def as_groups(params: Any) -> list[ParamGroup]:
    """What torch accepts (tensors, named tensors or groups, from any iterable) as groups that can be read twice."""
    if isinstance(params, torch.Tensor):
        raise TypeError("params must be an iterable of tensors or of parameter groups, not a single tensor.")
    params = list(params)
    if params and isinstance(params[0], dict):
        return [{**group, "params": as_list(group["params"])} for group in params]
    return [{"params": params}]


def as_list(params: Any) -> list[Any]:
    if isinstance(params, torch.Tensor):
        return [params]
    if isinstance(params, set):
        raise TypeError("the order of a set differs between ranks and runs: pass the parameters as a list.")
    return list(params)


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
