"""Memory, traffic and time of a fine-tuning step on machines that are not here; docs/scaling.md has the model.

    model = describe_model("config.json")
    plan = make_plan(model, Workload(num_experts=64, rank=16, gpus=64), hardware())
    print(plan.best.choice, plan.best.memory.total, plan.best.time.total)

Plain arithmetic: no weights, no process group, no DeepSpeed, no GPU.
"""

from .hardware import GPUS, LINKS, CalibratedNetwork, Hardware, Link, TwoLevelNetwork, hardware, load_calibration
from .memory import Memory, memory_per_gpu
from .model import Linear, ModelShape, describe_model
from .planner import Candidate, DoesNotFitError, Plan, candidates, evaluate, make_plan
from .timing import StepTime, layer_time, step_time
from .traffic import Transfer, step_traffic
from .workload import Choice, Workload

__all__ = [
    "GPUS",
    "LINKS",
    "CalibratedNetwork",
    "Candidate",
    "Choice",
    "DoesNotFitError",
    "Hardware",
    "Linear",
    "Link",
    "Memory",
    "ModelShape",
    "Plan",
    "StepTime",
    "Transfer",
    "TwoLevelNetwork",
    "Workload",
    "candidates",
    "describe_model",
    "evaluate",
    "hardware",
    "layer_time",
    "load_calibration",
    "make_plan",
    "memory_per_gpu",
    "step_time",
    "step_traffic",
]
