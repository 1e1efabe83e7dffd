"""The layer, the optimizer and whole training steps on one GPU: `make bench-gpu`, at most 8 minutes, no network.

    python -m benchmarks.bench_gpu [--device cuda] [--tiny] [--minutes 8]

Needs torch and peft. Triton's kernels and DeepSpeed's training steps are measured where these are installed; what is
missing is said. First layer, router losses and optimizer are compared with float64 on the device, and a deviation that
is too large ends the run. Then two ceilings are measured, a large copy (bytes read and written) and a large bfloat16
GEMM; `of_gemm` is (FLOPs that the layer must do) / time / (rate of the GEMM), `of_copy` the same for the bytes that an
AdamW step must move. Last come training steps of a Llama of 1.1 billion parameters in bfloat16 under DeepSpeed (ZeRO-2,
NCCL): PEFT's LoRA with torch's AdamW, and the mixture, balance loss included, with GateRiemannianAdamW. Times lie
between CUDA events, after warm-up; otherwise columns are those of bench_layer.py. Rows go to results/gpu.csv, a plot to
results/gpu.svg. Cases for which no time is left are named.

`--device cpu --tiny` runs every line in seconds, for a test; its figures mean nothing.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ds_moelora import GateRiemannianAdamW, GateRiemannianSGD
from ds_moelora.mixture import grouped_mm
from ds_moelora.mixture.choice import BY_NAME
from ds_moelora.mixture.fused_losses import Sequences, covers, fused_losses
from ds_moelora.mixture.grouped_mm import GROUPED_MM
from ds_moelora.mixture.mixture import mix
from ds_moelora.mixture.operands import Operands, Products, RoutingRule
from ds_moelora.mixture.reference import max_relative_error, reference_layer
from ds_moelora.mixture.routing import chosen_by, route, sequence_balance_loss, sequence_z_loss
from ds_moelora.mixture.triton_operators import NO_TRITON
from ds_moelora.optimizer.reference import ReferenceAdamW, ReferenceSGD
from ds_moelora.pairs import GateSettings, LoraPair, tag_pair

from .harness import Results, Row, Step, arguments, case_of, measure, peak_bytes, ratio, read_rows, saved_bytes
from .layers import Size, contenders, lora, mixture, training_step

CASE = ("part", "dtype", "experts", "top_k", "rank", "in_features", "out_features", "tokens", "modules")
EXTRAS = ("bound", "over_peft", "of_gemm", "of_copy", "saved_mb", "peak_mb", "gemm_tflops", "copy_gb_per_s")
MIXTURES = ((20, 10, 4), (8, 2, 4), (64, 4, 8), (64, 2, 16))
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "GateRiemannianSGD": (GateRiemannianSGD, ReferenceSGD),
    "GateRiemannianAdamW": (partial(GateRiemannianAdamW, eps=1e-3), partial(ReferenceAdamW, eps=1e-3)),
}
# float32: sums of a few thousand products in another order. bfloat16: 8 bits, and p and q are rounded in between.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def layer_sizes(tiny: bool) -> Iterator[Size]:
    """The layer's cases: d 4096 and 8192, tokens up to 32k."""
    for features in (64,) if tiny else (4096, 8192):
        for tokens in (32,) if tiny else (2048, 8192, 32768):
            yield from (Size(*mixture, features, features, tokens) for mixture in MIXTURES)


def layer_deviation(device: str, dtype: torch.dtype, products: Products) -> float:
    """The largest relative error of output and gradients against the per-expert formula in float64."""
    generator = torch.Generator().manual_seed(1)
    T, I, O, E, k, r = 256, 512, 384, 20, 10, 8
    sizes = [((T, O), 1.0), ((T, I), 1.0), ((E, I), I**-0.5), ((E, I, r), I**-0.5), ((E, O, r), r**-0.5)]

    def draw(size: tuple[int, ...], std: float) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * std).to(device, dtype)

    leaves = [draw(size, std).requires_grad_() for size, std in sizes]
    dy = draw((T, O), 1.0)
    base, x, router, A, B = leaves
    rule, settings = RoutingRule(k), GateSettings("sqrt")
    operands = Operands(x=x, lora_A=A, lora_B=B, scaling=1.5, router=router, rule=rule, settings=settings)
    y, _, gates = mix(operands, base, products=products)
    y.backward(dy)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    base, x, router, A, B = wide
    expected = reference_layer(x, base, A, B, router, k, 1.5, "sqrt", False, chosen_by(gates))
    expected.backward(dy.double())
    pairs = [(y, expected), *((leaf.grad, exact.grad) for leaf, exact in zip(leaves, wide, strict=True))]
    return max(max_relative_error(actual, exact) for actual, exact in pairs)  # type: ignore[arg-type]


def losses_deviation(device: str, dtype: torch.dtype) -> float:
    """The largest relative error of the routers' losses and their gradient against the formulas in float64."""
    S, N, E, k = 3, 700, 20, 4
    wide = torch.randn(S * N, E, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    mask = (torch.arange(S * N, device=device) % 7 > 0).view(S, N)
    gates, logits, exact = route(wide, k), wide.clone().requires_grad_(), wide.double().requires_grad_()
    found = fused_losses(logits, gates, Sequences((S, N), mask=mask), True, True)
    shaped, chosen = exact.view(S, N, E), chosen_by(gates).view(S, N, E)
    expected = sequence_balance_loss(shaped, chosen, mask).mean(), sequence_z_loss(shaped, mask).mean()
    for balance, z in (found, expected):
        (balance + 0.1 * z).backward()
    pairs = [*zip(found, expected, strict=True), (logits.grad, exact.grad)]
    return max(max_relative_error(actual, wanted) for actual, wanted in pairs)  # type: ignore[arg-type]


def tagged_factors(modules: int, size: Size, device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A and B of so many mixtures, with the tags that the optimizer looks for, and with gradients."""
    torch.manual_seed(0)
    params = []
    for i in range(modules):
        shapes = [(size.experts, features, size.rank) for features in (size.in_features, size.out_features)]
        A, B = (nn.Parameter(torch.randn(shape, device=device, dtype=dtype) / 8) for shape in shapes)
        tag_pair(LoraPair(f"layer {i}", size.experts, size.rank, gate=GateSettings()), A, B)
        params += [A, B]
    for param in params:
        param.grad = torch.randn_like(param) / 8
    return params


def optimizer_deviation(device: str, kernels: str, kind: str) -> float:
    """The largest relative deviation of one float32 step from the whole-matrix reference in float64."""
    ours, reference = OPTIMIZERS[kind]
    size = Size(4, 2, 4, 96, 64, 0)
    params = tagged_factors(3, size, device)
    exact = tagged_factors(3, size, device)
    for param, twin in zip(params, exact, strict=True):
        twin.data, twin.grad = param.data.double(), param.grad.double()  # type: ignore[union-attr]
    before = [param.detach().clone() for param in params]
    ours(params, lr=0.1, kernels=kernels).step()
    reference(exact, lr=0.1).step()
    steps = zip(before, params, exact, strict=True)
    return max(max_relative_error(p - start, twin - start.double()) for start, p, twin in steps)


def check(device: str) -> None:
    """Ends the run if anything deviates from float64 by more than rounding."""
    deviations = {
        f"layer {dtype}, {products.name}": (layer_deviation(device, dtype, products), bound)
        for dtype, bound in TOLERANCE.items()
        for products in BY_NAME.values()
    }
    if (reason := grouped_mm.why_not(8, torch.bfloat16, None, 20)) is None:
        bound = TOLERANCE[torch.bfloat16]
        deviations["layer torch.bfloat16, grouped_mm"] = (layer_deviation(device, torch.bfloat16, GROUPED_MM), bound)
    else:
        print(f"grouped_mm is left out: {reason}")
    if covers(torch.empty(1, 20, device=device)):
        for dtype, bound in TOLERANCE.items():
            deviations[f"router losses {dtype}"] = (losses_deviation(device, dtype), bound)
    else:
        print("The kernels of the routers' losses are left out: they need CUDA and Triton.")
    for kernels in step_kernels(device):
        for kind in OPTIMIZERS:  # inverses of Gram matrices amplify 6e-8
            deviations[f"{kind}, {kernels}"] = (optimizer_deviation(device, kernels, kind), 1e-3)
    for name, (deviation, bound) in deviations.items():
        print(f"{name}: {deviation:.1e} from float64 (bound {bound:.0e})")
        if not deviation < bound:
            raise SystemExit(f"{name} is wrong on {device}: no timing")


def ceilings(device: str, tiny: bool) -> tuple[float, float]:
    """Measured (bytes/s of a copy, FLOP/s of a bfloat16 GEMM)."""
    n, numel = (128, 1 << 16) if tiny else (8192, 1 << 29)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(numel, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    steps: dict[str, Step] = {"gemm": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    medians = {name: statistics.median(seconds) for name, seconds in measure(steps, 9, device=device).items()}
    return 2 * source.nbytes / medians["copy"], 2 * n**3 / medians["gemm"]


def wanted(results: Results, case: dict[str, Any], deadline: float) -> bool:
    """Whether a case is still to be measured."""
    if results.has(case):
        return False
    if time.monotonic() > deadline:
        print("no time left for " + ", ".join(f"{name}={value}" for name, value in case.items()))
        return False
    return True


def run_layers(results: Results, device: str, tiny: bool, copy_rate: float, gemm_rate: float, deadline: float) -> None:
    """Forward and backward of every size, bfloat16."""
    for size in layer_sizes(tiny):
        case = {"part": "layer", "dtype": "bfloat16", **vars(size), "modules": 1}
        if not wanted(results, case, deadline):
            continue
        layers = contenders(size, torch.bfloat16, device, loop=False, computes=tuple(BY_NAME))
        x = torch.randn(1, size.tokens, size.in_features, device=device).bfloat16().requires_grad_()
        dy = torch.randn(1, size.tokens, size.out_features, device=device).bfloat16()
        steps = {name: training_step(layer, x, dy) for name, layer in layers.items()}
        samples = measure(steps, rounds=9, device=device)
        extras: dict[str, dict[str, Any]] = {}
        for name, layer in layers.items():
            flops = size.base_flops * (1 if name == "base" else size.bound)
            saved = saved_bytes(partial(layer, x), [x, *layer.parameters()])
            extras[name] = {
                "bound": f"{size.bound:.4f}",
                "over_peft": f"{ratio(samples, name, 'peft')[1]:.4f}",
                "of_gemm": f"{flops / statistics.median(samples[name]) / gemm_rate:.3f}",
                "saved_mb": f"{saved / 1e6:.3f}",
                "peak_mb": f"{peak_bytes(steps[name], device) / 1e6:.1f}",
                "gemm_tflops": f"{gemm_rate / 1e12:.1f}",
                "copy_gb_per_s": f"{copy_rate / 1e9:.0f}",
            }
        results.add(case, "base", samples, extras)


def step_kernels(device: str) -> list[str]:
    """The optimizer's `kernels` that there are for a device."""
    if not device.startswith("cuda"):
        return ["torch", "cpp"]
    if NO_TRITON is not None:
        print(f"{NO_TRITON}: its kernels are left out")
        return ["torch"]
    return ["torch", "triton"]


def run_optimizer(
    results: Results, device: str, tiny: bool, copy_rate: float, gemm_rate: float, deadline: float
) -> None:
    """One step on float32 factors, against torch's fused AdamW on the same tensors."""
    for modules, features in ((2, 64),) if tiny else ((112, 4096), (112, 8192)):
        size = Size(20, 10, 4, features, features, 0)
        case = {"part": "optimizer", "dtype": "float32", **vars(size), "modules": modules}
        if not wanted(results, case, deadline):
            continue
        plain = tagged_factors(modules, size, device)
        steps: dict[str, Step] = {"fused AdamW": torch.optim.AdamW(plain, lr=1e-5, fused=True).step}
        for kernels in step_kernels(device):
            params = tagged_factors(modules, size, device)
            steps[kernels] = GateRiemannianAdamW(params, lr=1e-5, kernels=kernels).step
        samples = measure(steps, rounds=9, device=device)
        moved = 7 * sum(param.nbytes for param in plain)  # weight and two moments read and written, gradient read
        extras = {
            name: {
                "of_copy": f"{moved / statistics.median(samples[name]) / copy_rate:.3f}",
                "peak_mb": f"{peak_bytes(steps[name], device) / 1e6:.1f}",
                "gemm_tflops": f"{gemm_rate / 1e12:.1f}",
                "copy_gb_per_s": f"{copy_rate / 1e9:.0f}",
            }
            for name in steps
        }
        results.add(case, "fused AdamW", samples, extras)


def training_engine(name: str, size: Size, device: str, tiny: bool) -> Step:
    """A training step of a Llama under DeepSpeed: forward, backward, optimizer."""
    import deepspeed

    shape = (64, 128, 2, 4, 512) if tiny else (2048, 8192, 16, 32, 32000)
    hidden, inner, layers, heads, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=vocabulary,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    adapter = lora(size) if name == "peft" else mixture(size, "auto", balance=0.01)
    adapter.target_modules = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    kind = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}
    if name != "peft":
        kernels = name.partition(", ")[2]
        kind = {"type": "GateRiemannianAdamW", "params": {"lr": 1e-4, "kernels": kernels}}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": not tiny},
            "optimizer": kind,
        },
    )
    engine.train()
    tokens = torch.randint(vocabulary, (1, size.tokens), device=device)

    def step() -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    return step


def run_training(results: Results, device: str, tiny: bool, deadline: float) -> None:
    """Whole training steps, one process; left out without DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        print("DeepSpeed is not installed: training steps are left out")
        return
    size = Size(8, 2, 4, 0, 0, 16 if tiny else 4096)
    case = {"part": "training", "dtype": "float32" if tiny else "bfloat16", **vars(size), "modules": 8 if tiny else 64}
    if not wanted(results, case, deadline):
        return
    with tempfile.TemporaryDirectory() as folder, one_process(device, f"file://{folder}/store"):
        names = ["peft", *(f"mixture, {kernels}" for kernels in step_kernels(device))]
        steps = {name: training_engine(name, size, device, tiny) for name in names}
        samples = measure(steps, rounds=2 if tiny else 9, device=device)
        extras = {name: {"peak_mb": f"{peak_bytes(step, device) / 1e6:.1f}"} for name, step in steps.items()}
        results.add(case, "peft", samples, extras)


@contextmanager
def one_process(device: str, store: str) -> Iterator[None]:
    """A process group of this process alone, unless there is one already."""
    if dist.is_initialized():
        yield
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def draw(path: Path) -> None:
    """Milliseconds of every contender, a panel for each part's largest case. Needs matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plot")
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts: dict[str, list[Row]] = {}
    for row in read_rows(path):
        cases = parts.setdefault(row["part"], [])
        if cases and case_of(cases[0]) != case_of(row):
            cases.clear()
        cases.append(row)
    figure, all_axes = plt.subplots(1, len(parts), figsize=(4.5 * len(parts), 3.5), layout="constrained", squeeze=False)
    for axes, (part, rows) in zip(all_axes[0], parts.items(), strict=True):
        axes.bar([row["contender"] for row in rows], [float(row["median_ms"]) for row in rows])
        axes.set_ylabel("ms")
        axes.set_title(f"{part}: " + ", ".join(f"{name} {value}" for name, value in case_of(rows[0])[2:]), fontsize=6)
        axes.tick_params(axis="x", rotation=30, labelsize=8)
    figure.suptitle(f"{rows[0]['hardware']}; {rows[0]['date']}", fontsize=8)
    figure.savefig(path.with_suffix(".svg"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no case in the last of them")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * (args.minutes - 1)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --tiny runs the same code without one")
    check(args.device)
    copy_rate, gemm_rate = ceilings(args.device, args.tiny)
    print(f"ceilings: copy {copy_rate / 1e9:.0f} GB/s, bfloat16 GEMM {gemm_rate / 1e12:.1f} TFLOP/s")
    results = Results(args.output, CASE, EXTRAS, args.fresh, args.device)
    run_optimizer(results, args.device, args.tiny, copy_rate, gemm_rate, deadline)
    run_training(results, args.device, args.tiny, deadline)
    run_layers(results, args.device, args.tiny, copy_rate, gemm_rate, deadline)
    draw(args.output)


if __name__ == "__main__":
    main()
