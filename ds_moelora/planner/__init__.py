"""Memory, traffic and time of a fine-tuning step on machines that are not here; docs/scaling.md has the model.

    model = describe_model("config.json")
    plan = make_plan(model, Workload(num_experts=64, rank=16, gpus=64), hardware())
    print(plan.best.choice, plan.best.memory.total, plan.best.time.total)

Plain arithmetic: no weights, no process group, no DeepSpeed, no GPU.
"""
