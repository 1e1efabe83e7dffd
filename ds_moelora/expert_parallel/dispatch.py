"""What moves when experts lie on several processes, how many bytes that is, and which of the two ways "auto" takes.

Letters: E experts of rank r on n processes (ep_size), k chosen per token, I and O features, T tokens per process, b
bytes per element. Sent by each process per layer, forward and backward:

    "weights"   3 (n - 1) / n E r (I + O) b            two all-gathers of all factors, a reduce-scatter of gradients
    "tokens"    T (n - 1) P (2 (I + O) b + 8 E / n)    rows there and back, forward and backward; gates in float32

P is the probability that a token needs a given other process, 1 - C(E - E/n, k) / C(E, k) if routing is even.
"""

from __future__ import annotations

from .spec import ShardSpec

# Tokens per process and forward pass that "auto" reckons with: a micro-batch of one sequence of usual length. The
# number of the batch at hand would not do: processes differ in it, and all have to take the same collectives.
USUAL_TOKENS = 2048
USUAL_BYTES = 2  # per element: bfloat16


def share_needing(num_experts: int, ranks: int, top_k: int) -> float:
    """P, for `ranks` processes."""
    local = num_experts // ranks
    missed = 1.0
    for i in range(top_k):
        missed *= max(num_experts - local - i, 0) / (num_experts - i)
    return 1 - missed


def bytes_moved(
    num_experts: int, ranks: int, top_k: int, in_features: int, out_features: int, rank: int, tokens: float, size: int
) -> dict[str, float]:
    """Bytes that a process sends per layer and training step (forward and backward), for both ways.

    "tokens" takes routing to be even (`share_needing`).

    Args:
        ranks: processes. rank: of one expert. tokens: per process. size: bytes per element of the compute dtype.
    """
    local = num_experts // ranks
    rows = tokens * share_needing(num_experts, ranks, top_k) * (ranks - 1)
    width = in_features + out_features
    return {
        "weights": 3 * (ranks - 1) / ranks * num_experts * rank * width * size,
        "tokens": rows * (2 * width * size + 2 * local * 4),
    }


def choose_dispatch(spec: ShardSpec) -> str:
    """`ep_dispatch` as it is set; for "auto" what moves fewer bytes with `USUAL_TOKENS` tokens per process.

    A function of the configuration alone: every process takes the same way, in every run, without asking the others.
    """
    if spec.dispatch != "auto":
        return spec.dispatch
    sizes = (spec.num_experts, spec.ep_size, spec.top_k, spec.in_features, spec.out_features, spec.rank)
    moved = bytes_moved(*sizes, USUAL_TOKENS, USUAL_BYTES)
    return "weights" if moved["weights"] <= moved["tokens"] else "tokens"
