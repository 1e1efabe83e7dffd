"""DeepSpeed's private attributes are read in one module, where a missing one gives an error that names versions."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ds_moelora
from ds_moelora.optimizer.sharding import zero
from ds_moelora.optimizer.sharding.zero import find_storage

ROOT = Path(ds_moelora.__file__).parent
ONE_MODULE = ROOT / "optimizer" / "sharding" / "zero.py"
CHECKED = "expert parallelism's one module; check_deepspeed names what is missing"
ENUM = "Python's, of an enum; add_peft_type checks what comes out"
HOOK = "PEFT's, for tuners to override; `make compat` runs with and without"
EXPERTS = "of transformers' experts interface; modules without it are refused"
# (file, attribute) that other modules read, and why that is right.
ALLOWED = {
    ("tuner/start/base_weight.py", "ds_shape"): "a fallback stands beside it",
    ("tuner/targets.py", "ds_shape"): "as above",
    ("tuner/router.py", "_current_graph_task_id"): "torch's, as its own checkpointing asks for it",
    ("tuner/tags.py", "ds_shape"): "as above; without it the shape is (0,), and tagging refuses the layer",
    ("expert_parallel/groups.py", "_create_expert_and_data_parallel"): CHECKED,
    ("expert_parallel/groups.py", "_get_expert_parallel_group_dict"): CHECKED,
    ("expert_parallel/groups.py", "_get_expert_data_parallel_group"): CHECKED,
    ("checkpoint/elastic.py", "gradient_accumulation_steps"): "a public method of the engine",
    ("checkpoint/run_state.py", "gradient_accumulation_steps"): "a public method of the engine",
    ("checkpoint/run_state.py", "_last_lr"): "of torch's and DeepSpeed's schedulers; only where it is there",
    ("expert_parallel/gather.py", "_current_graph_task_id"): "torch's, as its own checkpointing asks for it",
    ("monitoring/engine.py", "enabled"): "a public attribute of the engine's monitor",
    ("monitoring/engine.py", "gradient_accumulation_steps"): "a public method of the engine",
    ("tuner/base_experts.py", "_config"): "DeepSpeed's, for a refusal; absent ones mean no AutoEP",
    ("tuner/base_experts.py", "enabled"): "of DeepSpeed's AutoEP config, likewise",
    ("tuner/base_experts.py", "_experts_implementation"): EXPERTS,
    ("tuner/base_experts.py", "_is_expert_parallel"): EXPERTS,
    ("tuner/base_experts.py", "ds_id"): "a mark of ZeRO-3's; without it factors are whole",
    ("tuner/start/from_lora.py", "ds_shape"): "a mark of ZeRO-3's; without it factors are whole",
    ("tuner/base_experts.py", "_did_swap_in_out_features"): "PEFT's; check_layout compares the layout with PEFT's own",
    ("tuner/older_peft.py", "_remap_adapter_state_dict_for_load"): HOOK,
    ("tuner/older_peft.py", "_remove_adapter_name_from_key"): HOOK,
    ("tuner/older_peft.py", "_get_adapter_state_dict"): HOOK,
    ("patches.py", "_name_"): ENUM,
    ("patches.py", "_value_"): ENUM,
    ("patches.py", "_sort_order_"): ENUM,
    ("patches.py", "_member_map_"): ENUM,
    ("patches.py", "_value2member_map_"): ENUM,
    ("patches.py", "_member_names_"): ENUM,
}
BY_NAME = ("getattr", "hasattr", "setattr", "delattr", "_read")
# Where DeepSpeed's optimizers, and what they hang on parameters, are defined.
DEEPSPEED_SOURCES = (
    "runtime/base_optimizer.py",
    "runtime/bf16_optimizer.py",
    "runtime/fp16/unfused_optimizer.py",
    "runtime/zero/partition_parameters.py",
    "runtime/zero/stage3.py",
    "runtime/zero/stage_1_and_2.py",
    "utils/mixed_precision_linkage.py",
)


def accesses(path: Path) -> Iterator[tuple[str, ast.AST, ast.AST | None]]:
    """(name, node, owner) of every attribute access, `getattr("name")` and the like."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.attr, node, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value, node, owner


def is_own(owner: ast.AST | None) -> bool:
    """self, cls or super(): the class's own attributes."""
    if isinstance(owner, ast.Call):
        owner = owner.func
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls", "super")


def is_private(name: str) -> bool:
    if name in ("_asdict", "_replace", "ds_moelora"):  # public methods of named tuples; `torch.ops.ds_moelora`
        return False
    return name.startswith("ds_") or (name.startswith("_") and not name.startswith("__"))


def read_in_one_module() -> set[str]:
    """What `optimizer/sharding/zero.py` asks DeepSpeed for: by `_read`, or by `hasattr` where presence is a mark."""
    return {name for name, node, _ in accesses(ONE_MODULE) if isinstance(node, ast.Call)}


def deepspeed_names() -> set[str]:
    """Attributes that DeepSpeed's optimizers set, on themselves or on parameters, and nobody else is known to have."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    names = set()
    for source in DEEPSPEED_SOURCES:
        for name, node, _ in accesses(Path(spec.origin).parent / source):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(name)
    ours = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
                ours.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                ours.add(node.target.id)
            elif isinstance(node, ast.FunctionDef):
                ours.add(node.name)
    return names - ours - torch_names()


def torch_names() -> set[str]:
    """DeepSpeed replaces some of torch's functions while a model is built, and sets what torch's classes have too."""
    layer = nn.Linear(1, 1)
    owners = (torch, nn, nn.functional, torch.distributed, layer, layer.weight, torch.optim.AdamW([layer.weight]))
    return {name for owner in owners for name in dir(owner)}


def test_only_one_module_reads_deepspeed_attributes() -> None:
    theirs, torchs = deepspeed_names() | read_in_one_module(), torch_names()
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in ROOT.rglob("*.py")
        if path != ONE_MODULE
        for name, _, owner in accesses(path)
        if not is_own(owner) and name not in torchs and (is_private(name) or name in theirs)
    }
    assert found == set(ALLOWED)


def test_the_module_reads_them_through_the_function_with_the_error() -> None:
    theirs = deepspeed_names() - torch_names()
    for name, node, owner in accesses(ONE_MODULE):
        if isinstance(node, ast.Attribute) and not is_own(owner):
            assert not is_private(name), name
            assert name not in theirs, name


# -- what happens if one is missing: small stand-ins for what DeepSpeed's optimizers leave behind --------------------


def stage_3() -> tuple[nn.Parameter, list[Any]]:
    """The one trained parameter, (3, 4), empty while it is partitioned; and what the optimizer holds."""
    param = nn.Parameter(torch.empty(0))
    partition = nn.Parameter(torch.zeros(12))
    optimizer = SimpleNamespace(
        get_param_id=id,
        grad_position={id(param): [0, 0, 12]},
        fp32_partitioned_groups_flat=[partition],
        offload_optimizer=False,
        partial_offload=1.0,
    )
    vars(param).update(_z3_optimizer=optimizer, ds_numel=12, ds_process_group="group")
    return param, [partition]


def stages_1_and_2() -> tuple[nn.Parameter, list[Any]]:
    param = nn.Parameter(torch.zeros(3, 4))
    vars(param).update(_hp_mapping=None, _dp_group="group")
    return param, [nn.Parameter(torch.zeros(12))]


def unfused() -> tuple[nn.Parameter, list[Any]]:
    """FP16_UnfusedOptimizer leaves no mark on the parameter: only copies of its shape in the optimizer's groups."""
    return nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16)), [nn.Parameter(torch.zeros(3, 4))]


def locate(param: nn.Parameter, held: list[Any]) -> Any:
    storage = find_storage([param], [0], {0: {"params": held}})
    return storage, storage.placement(0)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins' groups are no process groups."""
    monkeypatch.setattr(zero.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(zero.dist, "get_world_size", lambda group: 1)


REMOVALS: list[tuple[Callable[[], Any], str]] = [
    (stages_1_and_2, "_hp_mapping"),
    (stages_1_and_2, "_dp_group"),
    (stage_3, "_z3_optimizer"),
    (stage_3, "ds_numel"),
    (stage_3, "ds_process_group"),
    (stage_3, "_z3_optimizer.fp32_partitioned_groups_flat"),
    (stage_3, "_z3_optimizer.get_param_id"),
    (stage_3, "_z3_optimizer.grad_position"),
    (stage_3, "_z3_optimizer.offload_optimizer"),
    (stage_3, "_z3_optimizer.partial_offload"),
]


def message_of(param: nn.Parameter, held: list[Any], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(zero.metadata, "version", lambda package: f"99.0 of {package}")
    with pytest.raises(ValueError, match="DeepSpeed here") as error:
        locate(param, held)
    return str(error.value)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("make", "storage"),
    [
        (stages_1_and_2, zero.ZeroPartitionStorage),
        (stage_3, zero.ZeroStage3Storage),
        (unfused, zero.WholeStorage),
    ],
)
def test_stand_ins_are_complete(make: Callable[[], Any], storage: type) -> None:
    found, placement = locate(*make())
    assert type(found) is storage
    assert placement.numel == placement.partition == 12


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("make", "path"), REMOVALS)
def test_a_missing_attribute_names_the_versions(
    make: Callable[[], Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    param, held = make()
    *inner, name = path.split(".")
    owner = getattr(param, inner[0]) if inner else param
    delattr(owner, name)
    message = message_of(param, held, monkeypatch)
    assert f"DeepSpeed here: 99.0 of deepspeed; tested: {zero.TESTED_VERSIONS}." in message
    # The two marks by which an optimizer is recognised cannot be named: without them it is an unknown one.
    assert repr(name) in message or name in ("_hp_mapping", "_z3_optimizer")


# Presence is a mark, or a default stands beside it; tests/checkpoint/test_elastic.py meets all of them on real engines
# (the first two: tests/optimizer/test_guard.py).
MARKS = {
    "_config",
    "optimizer_name",
    "ds_id",
    "sub_group_to_group_id",
    "swap_optimizer",
    "params_in_nvme_and_cpu",
    "ds_secondary_tensor",
    "_is_gradient_accumulation_boundary",
}
PARTITIONED = ("ds_shape", "ds_tensor", "ds_status")


@pytest.mark.parametrize("name", PARTITIONED)
def test_a_missing_attribute_of_a_partitioned_parameter_names_the_versions(name: str) -> None:
    param = nn.Parameter(torch.zeros(12))
    vars(param).update(ds_id=0, ds_shape=(3, 4), ds_tensor=torch.zeros(12), ds_status=SimpleNamespace(name="GONE"))
    placement = zero.Placement(numel=12, unit=0, partition=12)
    zero.write_parameter(param, torch.arange(12.0), placement)
    assert param.ds_tensor.tolist() == list(range(12))
    assert zero.whole_shape(param) == (3, 4)
    delattr(param, name)
    with pytest.raises(ValueError, match=f"no '{name}'.*DeepSpeed here"):
        zero.write_parameter(param, torch.zeros(*zero.whole_shape(param)).view(-1), placement)


def test_every_attribute_that_is_read_is_removed_above() -> None:
    assert read_in_one_module() == {path.split(".")[-1] for _, path in REMOVALS} | MARKS | set(PARTITIONED)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("make", "change"),
    [
        (stage_3, lambda param, held: param._z3_optimizer.grad_position.clear()),
        (stages_1_and_2, lambda param, held: held.append(nn.Parameter(torch.zeros(3)))),
        (stages_1_and_2, lambda param, held: held.__setitem__(0, nn.Parameter(torch.zeros(13)))),
        (unfused, lambda param, held: held.__setitem__(0, nn.Parameter(torch.zeros(12)))),
        (unfused, lambda param, held: held.clear()),
    ],
    ids=["position unknown", "two tensors in a group", "not a view of the flat buffer", "flat copy", "no copy"],
)
def test_an_attribute_that_means_something_else_names_the_versions(
    make: Callable[[], Any], change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    param, held = make()
    change(param, held)
    assert "99.0 of deepspeed" in message_of(param, held, monkeypatch)


@pytest.mark.usefixtures("one_rank")
def test_twin_flow_offload_is_refused() -> None:
    """offload_optimizer.ratio below 1: DeepSpeed would step a part of the parameters with torch's AdamW."""
    param, held = stage_3()
    vars(param._z3_optimizer).update(offload_optimizer=True, partial_offload=0.5)
    with pytest.raises(ValueError, match=r"ratio is 0\.5"):
        locate(param, held)
