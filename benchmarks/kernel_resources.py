"""`python -m benchmarks.kernel_resources`: what the Triton kernels take of a GPU, compiled without one.

Columns: registers per thread (of 255), bytes spilled to local memory per thread, bytes of shared memory per program
(48 KB without opting in), threads per program. bfloat16, gate_scaling "sqrt", float32 parameters.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_moelora.mixture import fused_losses, kernels
from ds_moelora.optimizer.kernels import triton_kernels

CAPABILITIES = (80, 90)
TOKENS = 4096  # of a sequence
CASES = ((8, 4, 2), (20, 4, 10), (64, 4, 2), (64, 16, 2), (256, 64, 8))  # E, r, k
_DTYPES = {"gates_ptr": "*fp32", "dgates_ptr": "*fp32", "order_ptr": "*i64", "scaling": "fp32", "top_p": "fp32"}
_DTYPES |= dict.fromkeys(("sums_ptr", "weights_ptr", "losses_ptr", "slopes_ptr", "dbalance_ptr", "dz_ptr"), "*fp32")
_DTYPES |= {"mask_ptr": "*i64", "weight": "fp32"}


STEP_RANKS = (4, 16, 64)  # of the optimizer's kernels
_STEP = dict.fromkeys(("out", "grams", "matrices", "lr_ptr"), "*fp32")
_STEP |= {
    "lines": "*i64",
    "summands": "*i64",
    "addresses": "*i64",
    "table": "*i64",
    "d": "fp32",
    "relative": "fp32",
    "lr": "fp32",
    "eps": "fp32",
}
_STEP |= dict.fromkeys(("beta1", "beta2", "weight_decay", "log_beta1", "log_beta2"), "fp32")
_STEP |= dict.fromkeys(("log_beta1_rest", "log_beta2_rest"), "fp32")


class Row(NamedTuple):
    """One kernel, compiled."""

    kernel: str
    experts: int
    rank: int
    capability: int
    registers: int
    spilled: int
    shared: int
    threads: int


def resources(cases: Sequence[tuple[int, int, int]], capability: int) -> Iterator[Row]:
    """Compiles the kernels for each case (E, r, k)."""
    for E, R, k in cases:
        tile = kernels.tile_of(E, R)
        warps = tile.pop("num_warps")
        sizes = {"E": E, "R": R, "STEP": R, "LOGITS": E * R, "TOP_K": k, "HAS_TOP_P": False, **tile}
        backward = {"GATE_SCALING": "sqrt", "SCALE_INPUT": False, "gates_ptr": None, "dgates_ptr": None}
        padded = triton.next_power_of_2(R)
        blocks = {"BLOCK_F": kernels.COPIED_AT_ONCE // padded, "BLOCK_W": kernels.COPIED_AT_ONCE}
        losses = {"E": E, **fused_losses.tile_of(E, TOKENS)}
        finish = {"E": E, "BALANCE": True, "Z": True, **fused_losses.tile_of(E, fused_losses.MOST_PARTS)}
        for kernel, constants, num_warps in (
            (kernels.gate_forward, sizes, warps),
            (kernels.gate_backward, sizes | backward, warps),
            (kernels.restack, {"R": R, "R_PAD": padded, "STACK": True, **blocks}, 4),
            (kernels.combine, {"K": k, "BLOCK": kernels.TILE}, 4),
            (kernels.router_sums, {**losses, "packed_ptr": None}, 4),
            (kernels.router_losses, finish, 4),
            (kernels.router_gradient, {**losses, "packed_ptr": None}, 4),
        ):
            yield Row(kernel.__name__, E, R, capability, *_compiled(kernel, constants, num_warps, capability))


def step_resources(ranks: Sequence[int], capability: int) -> Iterator[Row]:
    """Compiles the kernels of the optimizer's step for each rank; 0: of any."""
    moved = {"BLOCK": triton_kernels.MOVED}
    yield Row("move", 0, 0, capability, *_compiled(triton_kernels.move, moved, 4, capability))
    for rank in ranks:
        tile = {"R": rank, **triton_kernels.tile_of(rank)}
        products = {"R": rank, **triton_kernels.tile_of(rank, True)}
        inverse = {"R": rank, **triton_kernels.square_of(rank)}
        for kernel, constants in (
            (triton_kernels.add_grams, products),
            (triton_kernels.damped_inverse, {**inverse, "damping": None}),
            (triton_kernels.step_rows, {**tile, "ADAMW": True}),
        ):
            warps = int(constants.pop("num_warps"))
            yield Row(kernel.__name__, 0, rank, capability, *_compiled(kernel, constants, warps, capability))


def _compiled(kernel: Any, constants: dict[str, Any], num_warps: int, capability: int) -> tuple[int, int, int, int]:
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else _type_of(name) for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, 32 * num_warps


def _type_of(name: str) -> str:
    """The parameter's type in a step in bfloat16 with float32 parameters."""
    if name in _STEP:
        return _STEP[name]
    if name in _DTYPES or name == "factor":
        return _DTYPES.get(name, "fp32")
    if name.startswith("source_"):
        return "*fp32"
    return "*bf16" if name.endswith("_ptr") or name.startswith("target_") else "i32"


if __name__ == "__main__":
    print("| kernel | E | r | compute capability | registers | spilled | shared | threads |\n|" + "---|" * 8)
    for capability in CAPABILITIES:
        for row in resources(CASES, capability):
            print("|", " | ".join(map(str, row)), "|")
    print("\n| kernel | r | compute capability | registers | spilled | shared | threads |\n|" + "---|" * 7)
    for capability in CAPABILITIES:
        for row in step_resources(STEP_RANKS, capability):
            print("|", " | ".join(map(str, (row[0], *row[2:]))), "|")
