"""Maximum relative error of the layer's output and gradients against float64 autograd of the per-expert formula.

    python benchmarks/check_gradients.py [--tokens 256] [--in-features 64] [--experts 8] [--top-k 2] [--rank 4] ...

One row for each gate scaling, setting of `scale_input_grad` and dtype. The error of a tensor is
max |actual - expected| / max |expected|; a row shows the worst of `--seeds` draws. The reference computes in float64
from the same numbers, rounded to the row's dtype, with the same choice of experts.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from ds_moelora.mixture.mixture import mix
from ds_moelora.mixture.operands import Operands
from ds_moelora.mixture.reference import max_relative_error, reference_layer
from ds_moelora.mixture.routing import chosen_by, route
from ds_moelora.pairs import GATE_SCALINGS, GateSettings

COLUMNS = ("y", "dx", "dA", "dB", "drouter")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def draw(args: Any, dtype: torch.dtype, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, base output, A, B and router weight as leaves, in sizes that keep activations near 1; and dy."""
    generator = torch.Generator().manual_seed(seed)
    T, I, O, E, r = args.tokens, args.in_features, args.out_features, args.experts, args.rank
    sizes = [((T, I), 1.0), ((T, O), 1.0), ((E, I, r), I**-0.5), ((E, O, r), r**-0.5), ((E, I), I**-0.5)]

    def normal(size: tuple[int, ...], std: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * std).to(dtype)

    return [normal(size, std).requires_grad_() for size, std in sizes], normal((T, O))


def errors(args: Any, gate_scaling: str, scale_input_grad: bool, dtype: torch.dtype, seed: int) -> list[float]:
    """One error per column."""
    leaves, dy = draw(args, dtype, seed)
    x, base, A, B, router = leaves
    gates = route(x @ router.t(), args.top_k)
    settings = GateSettings(gate_scaling, scale_input_grad)
    operands = Operands(x=x, lora_A=A, lora_B=B, scaling=args.scaling, gates=gates, settings=settings)
    y = mix(operands, base).y
    y.backward(dy)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, base, A, B, router = wide
    expected = reference_layer(
        x, base, A, B, router, args.top_k, args.scaling, gate_scaling, scale_input_grad, chosen_by(gates)
    )
    expected.backward(dy.double())
    result = [max_relative_error(y, expected)]
    for actual, reference in [(leaves[i], wide[i]) for i in (0, 2, 3, 4)]:
        assert actual.grad is not None
        assert reference.grad is not None
        result.append(max_relative_error(actual.grad, reference.grad))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 256, "in-features": 64, "out-features": 96, "experts": 8, "top-k": 2, "rank": 4, "seeds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scaling", type=float, default=4.0)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, CPU, T={args.tokens}, in={args.in_features}, out={args.out_features}, "
        f"E={args.experts}, k={args.top_k}, r={args.rank}, s={args.scaling:g}, worst of {args.seeds} draws\n"
    )
    print("| gate_scaling | scale_input_grad | dtype | " + " | ".join(COLUMNS) + " |")
    print("|---|---|---|" + "---|" * len(COLUMNS))
    for dtype, gate_scaling, scale_input_grad in itertools.product(DTYPES, GATE_SCALINGS, (False, True)):
        rows = [errors(args, gate_scaling, scale_input_grad, dtype, seed) for seed in range(args.seeds)]
        worst = [f"{max(column):.1e}" for column in zip(*rows, strict=True)]
        name = str(dtype).removeprefix("torch.")
        print(f"| {gate_scaling} | {scale_input_grad} | {name} | " + " | ".join(worst) + " |")


if __name__ == "__main__":
    main()
