"""Experts spread over ranks: the same losses, gradients and weights as with all experts on every rank."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moelora.expert_parallel.exchange import Exchanged
from ds_moelora.expert_parallel.gather import Gathered, Gathers
from ds_moelora.mixture.dense import DENSE
from ds_moelora.mixture.fused import FUSED
from ds_moelora.mixture.grouped import GROUPED
from ds_moelora.mixture.mixture import mix
from ds_moelora.mixture.operands import Operands, Products
from ds_moelora.mixture.routing import route
from ds_moelora.pairs import GATE_SCALINGS, GateSettings

from ..support.expert_parallel import run
from ..support.ranks import run_on_ranks
from ..support.training import deviation, engine_config

pytestmark = pytest.mark.dist

# The same fp32 sums in another order; 10 steps of Adam, whose first is nearly a sign. Seen: below 4e-6.
TOLERANCE = 1e-5


def compare(found: dict[str, Any], wanted: dict[str, Any], what: str) -> float:
    return deviation(found[what], {name: w.double() for name, w in wanted[what].items()})


def loss_deviation(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    pairs = zip(found["losses"], wanted["losses"], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize(
    ("kind", "stage", "world", "ep_size"),
    [
        *(("GateRiemannianAdamW", stage, 2, 2) for stage in (0, 1, 2)),
        *((kind, stage, 2, 2) for kind in ("GateRiemannianSGD", "AdamW") for stage in (0, 2)),
        *(("GateRiemannianMuon", stage, 2, 2) for stage in (1, 2)),
        ("GateRiemannianAdamW", 2, 4, 2),
        ("GateRiemannianSGD", 1, 4, 4),
        ("GateRiemannianAdamW", 0, 4, 2),
    ],
)
def test_equals_all_experts_everywhere(
    kind: str, stage: int, world: int, ep_size: int, report: Callable[[str, str], None]
) -> None:
    """Everything on at once: clipping, accumulation, checkpointing, uneven batches, the load-balancing loss."""
    config = engine_config(stage, kind, clip=1.0, accumulate=2)
    fields = {"checkpointing": True}
    wanted = run_on_ranks(world, run, config=config, how="uneven", model=fields)[0]
    for dispatch, compute in (("weights", "dense"), ("tokens", "grouped")):
        model = {**fields, "ep_size": ep_size, "ep_dispatch": dispatch, "expert_compute": compute}
        found = run_on_ranks(world, run, config=config, how="uneven", model=model)[0]
        assert compare(found, wanted, "first") == 0
        weights, losses = compare(found, wanted, "weights"), loss_deviation(found, wanted)
        report(
            "Expert parallelism after 10 steps (maximum relative deviation from ep_size=1)",
            f"{kind:20s} stage {stage} world {world} ep {ep_size} {dispatch:7s} {compute:7s}: "
            f"weights {weights:.1e}, losses {losses:.1e}",
        )
        assert found["basic"] == kind
        assert max(weights, losses) < TOLERANCE


@pytest.mark.parametrize("how", ["uneven", "one expert"])
def test_settings_one_by_one(how: str) -> None:
    """Without clipping and accumulation; also: experts that get no token, and a rank without any."""
    config = engine_config(0, "GateRiemannianSGD")
    wanted = run_on_ranks(4, run, config=config, how=how, gradients=True)[0]
    ways = [("weights", "dense", 4), ("weights", "grouped", 2), ("tokens", "dense", 2), ("tokens", "grouped", 4)]
    for dispatch, compute, ep_size in ways:
        model = {"ep_dispatch": dispatch, "expert_compute": compute, "ep_size": ep_size}
        found = run_on_ranks(4, run, config=config, how=how, gradients=True, model=model)[0]
        # Gradients after DeepSpeed's reduction: their scale must be that of ep_size=1.
        assert compare(found, wanted, "gradients") < TOLERANCE
        assert compare(found, wanted, "weights") < TOLERANCE
        assert loss_deviation(found, wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("GateRiemannianSGD", 0), ("GateRiemannianAdamW", 1), ("GateRiemannianSGD", 2), ("GateRiemannianMuon", 2)],
)
def test_client_optimizer(kind: str, stage: int) -> None:
    """Our optimizers split the experts off into groups as DeepSpeed wants them."""
    config = {**engine_config(stage, kind, clip=1.0), "zero_force_ds_cpu_optimizer": False}
    wanted = run_on_ranks(2, run, config=config, client=True)[0]
    found = run_on_ranks(2, run, config=config, client=True, model={"ep_size": 2})[0]
    assert compare(found, wanted, "weights") < TOLERANCE


@pytest.mark.parametrize(("stage", "dispatch"), [(1, "weights"), (2, "tokens")])
def test_bf16(stage: int, dispatch: str) -> None:
    """Half precision: no further from fp32 than ep_size=1 in half precision is (times 2: another rounding)."""
    exact = run_on_ranks(2, run, config=engine_config(stage, "GateRiemannianSGD", clip=1.0))[0]
    config = engine_config(stage, "GateRiemannianSGD", clip=1.0, precision="bf16")
    usual = run_on_ranks(2, run, config=config)[0]
    found = run_on_ranks(2, run, config=config, model={"ep_size": 2, "ep_dispatch": dispatch})[0]
    assert compare(found, exact, "weights") < 2 * compare(usual, exact, "weights")
    assert loss_deviation(found, exact) < 2 * loss_deviation(usual, exact)


def test_clipping_is_active_and_its_norm_is_the_whole_one() -> None:
    """Otherwise the table above would not say anything about clipping."""
    free, clipped = (
        run_on_ranks(2, run, config=engine_config(0, "GateRiemannianSGD", clip=clip), model={"ep_size": 2})[0]
        for clip in (0.0, 1.0)
    )
    assert compare(clipped, free, "weights") > 1e-3


def layer(
    dispatch: str, gate_scaling: str, scale_input_grad: bool, grouped: bool, inplace: bool, counts: list[int]
) -> dict[str, Tensor]:
    """On every rank: output and gradients of one sharded layer, beside those of the whole one on the same tokens."""
    E, I, O, R, k, s = 8, 5, 6, 3, 3, 0.7
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    whole_A, whole_B, W = (torch.randn(E, n, R, generator=generator, dtype=torch.float64) for n in (I, O, I))
    xs = [torch.randn(n, I, generator=generator, dtype=torch.float64) for n in counts]
    dys = [torch.randn(n, O, generator=generator, dtype=torch.float64) for n in counts]
    settings = GateSettings(gate_scaling, scale_input_grad)
    here = GROUPED if grouped else DENSE if gate_scaling == "none" else FUSED
    per_rank = E // world
    mine = slice(rank * per_rank, (rank + 1) * per_rank)

    def mixture(x: Tensor, dy: Tensor, A: Tensor, B: Tensor, sharded: bool) -> dict[str, Tensor]:
        leaves = [x.clone(), A.clone(), B.clone(), W[:, :, 0].clone()]
        x, A, B, router = (leaf.requires_grad_() for leaf in leaves)
        gates = route(x @ router.t(), k)
        rest = {"x": x, "scaling": s, "gates": gates, "settings": settings}
        operands = Operands(lora_A=A, lora_B=B, **rest)
        products: Products = DENSE
        base = torch.zeros(len(x), O, dtype=x.dtype)
        if sharded and dispatch == "weights":
            products = Gathered(SimpleNamespace(lora_A=A, lora_B=B, group=dist.group.WORLD), Gathers(), here)
            operands = products.operands(x.dtype, **rest)
        elif sharded:
            products = Exchanged(dist.group.WORLD, here)
        y = mix(operands, base, inplace=inplace and sharded, products=products).y
        (y * dy).sum().backward()
        return {"y": y.detach(), "dx": x.grad, "dA": A.grad, "dB": B.grad, "drouter": router.grad}

    found = mixture(xs[rank], dys[rank], whole_A[mine], whole_B[mine], True)
    wanted = [mixture(x, dy, whole_A, whole_B, False) for x, dy in zip(xs, dys, strict=True)]
    expected = {name: wanted[rank][name] for name in ("y", "dx", "drouter")}
    expected |= {name: sum(w[name] for w in wanted)[mine] for name in ("dA", "dB")}
    return {name: (found[name] - value).abs().max() if value.numel() else 0.0 for name, value in expected.items()}


@pytest.mark.parametrize("dispatch", ["weights", "tokens"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("gate_scaling", GATE_SCALINGS)
def test_layer_gradients(dispatch: str, grouped: bool, gate_scaling: str) -> None:
    """float64; dA and dB are sums over the tokens of all ranks. Uneven, one rank without tokens, no tokens at all."""
    for counts in ([5, 3, 0, 9], [0, 0, 0, 0], [1, 0, 0, 0]):
        for scale_input_grad in (False, True):
            for found in run_on_ranks(
                4,
                layer,
                dispatch=dispatch,
                gate_scaling=gate_scaling,
                scale_input_grad=scale_input_grad,
                grouped=grouped,
                inplace=scale_input_grad,
                counts=counts,
            ):
                assert max(float(v) for v in found.values()) < 1e-12, found
