"""Who sets the gate scaling of a layer, for how long, and what happens if two want to."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from ds_moelora import GateRiemannianAdamW, GateRiemannianSGD
from ds_moelora.pairs import GateSettings, LoraPair, tag_pair

from ..support.ranks import run_on_ranks


class Gated(nn.Module):
    """Pairs with a gate each; the layer keeps its pair, as MoE-LoRA's do."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.pairs = [LoraPair(f"layers.{i}", 2, 3, gate=GateSettings()) for i in range(layers)]
        self.factors = nn.ParameterList(torch.randn(2, n, 3) for _ in range(layers) for n in (4, 5))
        self.tag()

    def tag(self) -> None:
        for i, pair in enumerate(self.pairs):
            tag_pair(pair, self.factors[2 * i], self.factors[2 * i + 1])

    def settings(self) -> list[tuple[str, bool]]:
        gates = [pair.gate for pair in self.pairs]
        return [(gate.gate_scaling, gate.scale_input_grad) for gate in gates if gate is not None]

    def groups(self, *scalings: str) -> list[dict[str, Any]]:
        return [
            {"params": list(self.factors[2 * i : 2 * i + 2]), "gate_scaling": scaling}
            for i, scaling in enumerate(scalings)
        ]


NONE, SQRT, FULL = ("none", False), ("sqrt", False), ("full", False)


def test_each_group_has_its_own_setting_while_the_optimizer_lives() -> None:
    model = Gated()
    optimizer = GateRiemannianAdamW(model.groups("full", "none"), scale_input_grad=True)
    assert model.settings() == [("full", True), ("none", True)]
    del optimizer
    gc.collect()
    assert model.settings() == [NONE, NONE]


def test_release_restores_what_the_layer_had_before() -> None:
    model = Gated()
    gate = model.pairs[0].gate
    assert gate is not None
    gate.gate_scaling = "full"
    optimizer = GateRiemannianSGD(model.parameters(), lr=0.1)
    assert model.settings() == [SQRT, SQRT]
    del optimizer
    gc.collect()
    assert model.settings() == [FULL, NONE]


def test_a_step_keeps_nothing_alive() -> None:
    """Released by reference counting alone: nothing that the optimizer builds refers back to it."""
    model = Gated()
    gc.disable()
    try:
        optimizer = GateRiemannianAdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        del optimizer
        assert model.settings() == [NONE, NONE]
    finally:
        gc.enable()


def test_two_optimizers_that_agree() -> None:
    """The layers are released with the second one."""
    model = Gated()
    first, second = (GateRiemannianAdamW(model.parameters()) for _ in range(2))
    del first
    gc.collect()
    assert model.settings() == [SQRT, SQRT]
    del second
    gc.collect()
    assert model.settings() == [NONE, NONE]


def test_two_optimizers_that_disagree() -> None:
    model = Gated()
    first = GateRiemannianAdamW(model.groups("sqrt"))
    message = r"layers\.0: GateRiemannianSGD asks for gate_scaling='full'.*GateRiemannianAdamW.*'sqrt'.*Delete that"
    with pytest.raises(ValueError, match=message):
        GateRiemannianSGD(model.groups("full", "none")[::-1], lr=0.1)
    gc.collect()
    assert model.settings() == [SQRT, NONE]  # nothing of the refused one is left
    del first
    second = GateRiemannianSGD(model.groups("full", "none"), lr=0.1)
    assert model.settings() == [FULL, NONE]
    assert second.param_groups[0]["gate_scaling"] == "full"


def test_garbage_does_not_disagree() -> None:
    """An optimizer in a reference cycle, as schedulers make them, is no living one."""
    model = Gated()
    gc.disable()
    try:
        first = GateRiemannianAdamW(model.parameters())
        first.itself = first
        del first
        second = GateRiemannianAdamW(model.parameters(), gate_scaling="full")
    finally:
        gc.enable()
    assert model.settings() == [FULL, FULL]
    assert second is not None


def test_loading_a_state_takes_its_setting() -> None:
    model, other = Gated(), Gated()
    saved = io.BytesIO()
    torch.save(GateRiemannianAdamW(other.parameters(), gate_scaling="full").state_dict(), saved)
    saved.seek(0)
    optimizer = GateRiemannianAdamW(model.parameters())
    optimizer.load_state_dict(torch.load(saved, weights_only=True))
    assert model.settings() == [FULL, FULL]
    del optimizer
    gc.collect()
    assert model.settings() == [NONE, NONE]


def test_a_frozen_layer_is_not_held() -> None:
    model = Gated()
    optimizer = GateRiemannianAdamW(model.parameters())
    for p in model.factors[:2]:
        p.requires_grad = False
    optimizer.step()
    assert model.settings() == [NONE, SQRT]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_has_its_own_setting(duplicate: Any) -> None:
    model = Gated()
    optimizer = GateRiemannianAdamW(model.parameters())
    copied = duplicate(model)
    assert copied.settings() == [NONE, NONE]
    copied.tag()
    other = GateRiemannianAdamW(copied.parameters(), gate_scaling="full")  # not the copied one's layers
    assert (model.settings(), copied.settings()) == ([SQRT] * 2, [FULL] * 2)
    del optimizer, other
    gc.collect()
    assert model.settings() == copied.settings() == [NONE, NONE]


def test_an_unpickled_optimizer_holds_the_layers_that_came_with_it() -> None:
    model = Gated()
    restored, optimizer = pickle.loads(pickle.dumps((model, GateRiemannianAdamW(model.parameters()))))
    assert restored.settings() == [SQRT, SQRT]
    del optimizer
    gc.collect()
    assert restored.settings() == [NONE, NONE]


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Gated(3)
    with caplog.at_level(logging.INFO, logger="ds_moelora"):
        optimizer = GateRiemannianAdamW(model.groups("sqrt", "sqrt", "none"))
        optimizer.load_state_dict(optimizer.state_dict())
        GateRiemannianAdamW(Gated().parameters(), gate_scaling="none")  # changes nothing
    assert [record.getMessage() for record in caplog.records] == [
        "GateRiemannianAdamW sets the gradients of its mixture layers until it is released: 2 at gate_scaling='sqrt', "
        "1 at gate_scaling='none'."
    ]


def build_on_rank() -> int:
    """On every rank: how many lines are logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_moelora")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    GateRiemannianAdamW(Gated().parameters())
    logger.removeHandler(handler)
    return len(lines)


@pytest.mark.dist
def test_it_is_said_by_one_rank() -> None:
    assert run_on_ranks(2, build_on_rank) == [1, 0]
