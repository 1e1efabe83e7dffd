"""One rank of `bench_scaling`: trains every contender of every case in turns and tells what a step took.

    deepspeed --num_gpus N benchmarks/scaling_worker.py CASES.json RESULTS.json

Contenders are three engines in the same process: the mixture with GateRiemannianAdamW (`ours`), the same mixture with
torch's AdamW (`adamw`), and PEFT's LoRA of rank E r with AdamW (`lora`). A round is one step of each.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script: Python put this folder first on the path; the repository's root is what is needed.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ds_moelora
from benchmarks.harness import peak_bytes
from benchmarks.traffic import Traffic
from benchmarks.train_lora import lora_config
from launch.checks.extensions import skip_inference_collectives
from launch.checks.flags import AdapterArguments

CONTENDERS = ("lora", "adamw", "ours")
EXPERTS, TOP_K, RANK = 8, 2, 4
HIDDEN, LAYERS, VOCAB = 256, 4, 512
SEQUENCE = 64
WARM_UP = 2


def build(contender: str, stage: int, ep_size: int) -> Any:
    """An engine; equal weights on every rank."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS, **heads
        )
    )
    if contender == "lora":
        adapter: Any = lora_config(AdapterArguments(num_experts=EXPERTS, r=RANK), "causal-lm")
    else:
        parallel: dict[str, Any] = {"ep_size": ep_size, "ep_dispatch": "weights"} if ep_size > 1 else {}
        adapter = ds_moelora.MoELoRAConfig(
            r=RANK, num_experts=EXPERTS, top_k=TOP_K, target_modules="all-linear", task_type="CAUSAL_LM",
            expert_compute="dense", **parallel,
        )  # fmt: skip
    model = get_peft_model(base, adapter).train()
    kinds: dict[str, dict[str, Any]] = {
        "ours": {"type": "GateRiemannianAdamW", "params": {"lr": 1e-4}},
        "adamw": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": kinds.get(contender, kinds["adamw"]),
        "gradient_clipping": 1.0,
        # By default DeepSpeed's buffers would be 2 GB, whatever the model.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=config
    )[0]


def held_bytes() -> int:
    """Of all tensors that exist in this process; parts of one buffer once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def step_of(engine: Any, sequences: int, device: torch.device) -> Any:
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(0, VOCAB, (sequences, SEQUENCE), device=device)

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    return step


def measure(case: dict[str, Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Contender -> seconds of every round (the slowest rank's), and sums or maxima over the ranks of the rest."""
    world = dist.get_world_size()
    engines, steps, memory = {}, {}, {}
    for name in CONTENDERS:
        before = held_bytes()
        engines[name] = build(name, case["stage"], 1 if name == "lora" else case["ep_size"])
        device = torch.device(engines[name].device)
        steps[name] = step_of(engines[name], case["tokens"] // SEQUENCE, device)
        for _ in range(WARM_UP):
            steps[name]()
        memory[name] = held_bytes() - before + peak_bytes(steps[name], device)
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"wall": [], "cpu": []})
    for i in range(rounds):
        for name in CONTENDERS[:: 1 if i % 2 == 0 else -1]:
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name]["wall"].append(time.perf_counter() - wall)
            found[name]["cpu"].append(time.process_time() - cpu)
    for name in CONTENDERS:
        with Traffic() as traffic:
            steps[name]()
        mine = torch.tensor([*found[name]["wall"], memory[name]], dtype=torch.float64, device=device)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        *found[name]["wall"], found[name]["memory"] = mine.tolist()
        sums = torch.tensor(
            [*found[name]["cpu"], traffic.sent, traffic.calls.total()], dtype=torch.float64, device=device
        )
        dist.all_reduce(sums)
        *cpu_s, sent, calls = (sums / world).tolist()
        found[name] |= {"cpu": cpu_s, "sent": sent, "collectives": calls}
    for engine in engines.values():
        engine.destroy()
    return dict(found)


def main() -> None:
    # DeepSpeed's launcher puts --local_rank in front.
    cases_path, results_path = (Path(word) for word in sys.argv[1:] if not word.startswith("--local_rank"))
    plan = json.loads(cases_path.read_text())
    torch.set_num_threads(1)
    skip_inference_collectives()
    deepspeed.init_distributed()
    gc.collect()
    gc.freeze()  # what the imports made need not be searched for tensors again and again
    results = []
    for case in plan["cases"]:
        if dist.get_world_size() != case["world"]:
            raise ValueError(f"{dist.get_world_size()} ranks were started, {case['world']} wanted.")
        results.append({"case": case, "found": measure(case, plan["rounds"])})
        gc.collect()
    if dist.get_rank() == 0:
        results_path.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
