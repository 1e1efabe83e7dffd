"""Adapters and checkpoints of experts that are spread over ranks, the ways into DeepSpeed, and what is refused."""

from __future__ import annotations

import contextlib
import functools
import json
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, peft_model
from safetensors.torch import load_file

from ds_moelora import MoELoRAConfig
from ds_moelora.expert_parallel.shard import ShardedExperts
from ds_moelora.tuner.files import tensor_file

from ..support.expert_parallel import IN_FEATURES, Net, adapted, batches, run, whole_weights
from ..support.ranks import RankPool, run_on_ranks
from ..support.training import engine_config

pytestmark = pytest.mark.dist

CONFIG = engine_config(2, "GateRiemannianAdamW", clip=1.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An adapter written by two ranks that hold two experts each, and what they trained."""
    path = tmp_path_factory.mktemp("saved")
    return path, run_on_ranks(2, run, config=CONFIG, steps=3, model={"ep_size": 2}, export=str(path))[0]


def test_one_complete_file(saved: tuple[Path, dict[str, Any]]) -> None:
    path, result = saved
    tensors = load_file(path / "adapter_model.safetensors")
    layer = "base_model.model.first.moelora_experts."
    assert tensors[layer + "lora_A"].shape == (4, IN_FEATURES, 3)
    trained = {name.replace(".default", "").replace(".modules_to_save", ""): w for name, w in result["weights"].items()}
    assert tensors.keys() == trained.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, trained[name]), name
    written = json.loads((path / "adapter_config.json").read_text())
    assert not {"ep_size", "ep_dispatch", "expert_compute"} & written.keys()
    assert MoELoRAConfig.from_pretrained(path).ep_size == 1


def deepspeed_engine(model: Any) -> Any:
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=dict(CONFIG))[0]


def failing_save(folder: str, how: str) -> str:
    """On every rank: the error of saving where rank 0's disk is full, or an expert of rank 1 is not finite."""
    model = adapted(ep_size=2)
    deepspeed_engine(model)
    if how == "not finite" and dist.get_rank() == 1:
        next(p for name, p in model.named_parameters() if name.endswith("shard.lora_A")).data[0, 0, 0] = torch.nan
    full = OSError(28, "No space left on device")
    writer = {"full disk": (peft_model, "safe_save_file"), "full disk later": (tensor_file.os, "fsync")}.get(how)
    patched = mock.patch.object(*writer, side_effect=full) if writer else contextlib.nullcontext()
    with patched, pytest.raises(ValueError) as caught:  # noqa: PT011
        model.save_pretrained(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("full disk", "rank 0: OSError: [Errno 28] No space left on device"),
        ("full disk later", "rank 0: OSError: [Errno 28] No space left on device"),
        ("not finite", "lora_A is not finite"),
    ],
)
def test_a_failure_is_told_to_every_rank(how: str, message: str, tmp_path: Path) -> None:
    for error in run_on_ranks(2, failing_save, folder=str(tmp_path), how=how):
        assert message in error
    assert not list(tmp_path.glob(".*partial"))


def watched_save(folder: str) -> tuple[int, int]:
    """On every rank: most bytes of gathered factors alive at once, and those of all."""
    model = adapted(ep_size=2)
    deepspeed_engine(model)
    alive: list[Any] = []
    peak = total = 0
    original = ShardedExperts.gather

    def gather(self: Any, name: str) -> Any:
        nonlocal peak, total
        whole = original(self, name)
        if whole is not None:
            alive.append(weakref.ref(whole.untyped_storage()))
            total += whole.nbytes
            peak = max(peak, sum(s.nbytes() for s in (ref() for ref in alive) if s is not None))
        return whole

    with mock.patch.object(ShardedExperts, "gather", gather):
        model.save_pretrained(folder)
    return peak, total


def test_saving_holds_one_factor_at_a_time(tmp_path: Path) -> None:
    peak, total = run_on_ranks(2, watched_save, folder=str(tmp_path))[0]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    sizes = [t.nbytes for name, t in saved.items() if name.endswith(("lora_A", "lora_B"))]
    assert total == sum(sizes)
    assert max(sizes) <= peak < 2 * max(sizes) < total


def load_adapter(path: str, ep_size: int, **options: Any) -> dict[str, Any]:
    """On every rank: the saved adapter in another topology; its whole weights and the mean loss of a batch."""
    import deepspeed

    config = MoELoRAConfig.from_pretrained(path)
    config.ep_size = ep_size
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Net(), path, config=config, is_trainable=True, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=dict(CONFIG))
    x, target = batches(1, 1, 1)[0][0][0]
    result = {"weights": whole_weights(engine.module), "loss": engine(x, target)["loss"].item()}
    engine.destroy()
    return result


@pytest.mark.parametrize(
    ("world", "ep_size", "low_cpu_mem_usage"), [(2, 1, False), (2, 2, True), (4, 2, False), (4, 4, True)]
)
def test_loads_under_any_ep_size(
    saved: tuple[Path, dict[str, Any]], world: int, ep_size: int, low_cpu_mem_usage: bool
) -> None:
    path, result = saved
    loaded = run_on_ranks(world, load_adapter, path=str(path), ep_size=ep_size, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded[0]["weights"].keys() == result["weights"].keys()
    for name, weight in result["weights"].items():
        assert torch.equal(loaded[0]["weights"][name], weight), name
    torch.manual_seed(0)
    whole = PeftModel.from_pretrained(Net(), path)
    whole.train()
    x, target = batches(1, 1, 1)[0][0][0]
    expected = whole(x, target)["loss"].item()
    assert all(result["loss"] == pytest.approx(expected, rel=1e-5) for result in loaded)


@pytest.mark.parametrize(
    ("kind", "stage", "world", "ep_size"),
    [("GateRiemannianAdamW", 0, 2, 2), ("GateRiemannianSGD", 1, 2, 2), ("GateRiemannianAdamW", 2, 4, 2)],
)
def test_engine_checkpoint_resumes_bit_equal(kind: str, stage: int, world: int, ep_size: int, tmp_path: Path) -> None:
    config = engine_config(stage, kind, clip=1.0)
    go = functools.partial(run_on_ranks, world, run, config=config, model={"ep_size": ep_size})
    whole = go(steps=6)[0]
    first = go(steps=3, save=str(tmp_path))[0]
    files = sorted(p.name for p in (tmp_path / "global_step3").glob("layer_*_expert_*"))
    assert len(files) == 2 * 4, files  # one file per layer and expert, of all ranks
    second = go(steps=6, start=3, load=str(tmp_path))[0]
    assert first["losses"] + second["losses"] == whole["losses"]
    for name, weight in whole["weights"].items():
        assert torch.equal(second["weights"][name], weight), name


def test_another_ep_size_is_refused(tmp_path: Path) -> None:
    """DeepSpeed would load it: the files are there, and optimizer states of the same size."""
    run_on_ranks(4, run, config=CONFIG, steps=1, model={"ep_size": 2}, save=str(tmp_path))
    with pytest.raises(AssertionError, match=r"this checkpoint was saved with ep_size=2 .* the run has 4"):
        run_on_ranks(4, run, config=CONFIG, steps=2, start=1, model={"ep_size": 4}, load=str(tmp_path))


def test_data_before_expert_parallel(tmp_path: Path) -> None:
    """`use_data_before_expert_parallel_` puts other ranks into a group: experts change places, nothing else changes."""
    wanted = run_on_ranks(4, run, config=CONFIG)[0]
    config = {**CONFIG, "use_data_before_expert_parallelism": True}
    pool = RankPool(4)  # of its own: DeepSpeed keeps the groups of an ep_size for the life of a process
    try:
        options = {"config": config, "model": {"ep_size": 2}, "export": str(tmp_path)}
        found = pool.run(run, options, 300)[0]
        ranks = pool.run(expert_ranks, {}, 300)
    finally:
        pool.close()
    assert ranks == [[0, 2], [1, 3], [0, 2], [1, 3]]
    for name, weight in wanted["weights"].items():
        assert torch.equal(found["first"][name], wanted["first"][name]), name
        assert torch.allclose(found["weights"][name], weight, rtol=1e-5, atol=1e-6), name


def expert_ranks() -> list[int]:
    from deepspeed.utils import groups

    return list(groups._get_expert_parallel_group_ranks("ep_size_2"))


def attempt(config: dict[str, Any], how: str = "initialize", **fields: Any) -> str:
    """On every rank: the message of the error that building or initializing raises."""
    import deepspeed

    try:
        model = adapted(**fields)
        trained = [p for p in model.parameters() if p.requires_grad]
        if how == "forward":
            model(*batches(1, 1, 1)[0][0][0])
        elif how == "copied state":
            deepspeed.initialize(model=model, model_parameters=trained, config=config)
            state = {name: t.clone() for name, t in model.state_dict().items()}
            model.save_pretrained("/nowhere", state_dict=state, is_main_process=False)
        else:
            deepspeed.initialize(model=model, model_parameters=trained, config=config)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"config": CONFIG, "ep_size": 4}, "ep_size=4 must divide num_experts and the number of ranks; with "
         "num_experts=4 on 2 ranks these sizes do: 1, 2."),
        ({"config": engine_config(3, "AdamW"), "ep_size": 2}, "ep_size > 1 cannot be combined with ZeRO stage 3"),
        ({"config": engine_config(0, "AdamW", clip=1.0, precision="bf16"), "ep_size": 2}, "needs ZeRO stage 1 or 2"),
        ({"config": CONFIG, "ep_size": 2, "how": "forward"}, "call deepspeed.initialize first"),
        ({"config": CONFIG, "ep_size": 2, "how": "copied state"}, "Call model.save_pretrained(path) on every rank"),
    ],
)  # fmt: skip
def test_refused_on_every_rank(case: dict[str, Any], message: str) -> None:
    for found in run_on_ranks(2, attempt, **case):
        assert message in found


def test_an_unknown_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"call deepspeed.init_distributed\(\) before get_peft_model"):
        adapted(ep_size=2)


def test_another_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_moelora.expert_parallel import groups

    for name in groups.NEEDED:
        with monkeypatch.context() as patch:
            patch.delattr(groups.groups, name)
            with pytest.raises(ValueError, match=rf"needs {name}, which this DeepSpeed \("):
                groups.check_deepspeed()


def test_one_shard_is_all_that_is_drawn() -> None:
    """No rank materialises the experts of others, not even while they are initialised."""
    for shapes in run_on_ranks(2, drawn_shapes):
        assert shapes
        assert all(first <= 2 for first in shapes)


def drawn_shapes() -> list[int]:
    model = adapted(ep_size=2)
    return [len(p) for n, p in model.named_parameters() if n.endswith((".lora_A", ".lora_B"))]


def generate(ep_size: int) -> list[int]:
    """On every rank: greedy decoding of a prompt of its own length, in which ranks finish at different steps."""
    import deepspeed

    from ..support.adapter_support import adapted as llama_adapted
    from ..support.adapter_support import llama

    model = llama_adapted(llama, ep_size=ep_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=dict(CONFIG))
    engine.eval()
    ids = torch.arange(1, 4 + 3 * dist.get_rank()).unsqueeze(0)
    with torch.no_grad():
        out = engine.module.generate(
            input_ids=ids, max_new_tokens=4 + 2 * dist.get_rank(), do_sample=False, synced_gpus=ep_size > 1
        )
    engine.destroy()
    return out[0].tolist()


def test_generate_with_different_lengths() -> None:
    assert run_on_ranks(2, generate, ep_size=2) == run_on_ranks(2, generate, timeout=60, ep_size=1)
