"""Pairwise covering: few cases in which every pair of values of any two settings occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

Case = dict[str, Any]


def pairwise(
    settings: dict[str, list[Any]],
    valid: Callable[[Case], bool],
    seed: int = 0,
    cost: Callable[[Case], float] = lambda case: 1.0,
) -> Iterator[Case]:
    """Greedy: of many random cases around a pair that is still missing, the one that covers most for its cost.

    Pairs that no valid case contains are given up after many draws; `valid` decides, on complete cases.
    """
    draw = random.Random(seed)
    names = list(settings)

    def pairs(case: Case) -> set[tuple[str, Any, str, Any]]:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}

    missing = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in settings[a] for y in settings[b]}
    while missing:
        a, x, b, y = min(missing, key=repr)
        candidates = []
        for _ in range(300):
            case = {name: draw.choice(values) for name, values in settings.items()}
            case.update({a: x, b: y})
            if valid(case):
                candidates.append(case)
        if not candidates:
            missing.discard((a, x, b, y))
            continue
        # A power: of two pairs in one dear case, neither needs a case of its own.
        best = max(candidates, key=lambda case: len(pairs(case) & missing) / cost(case) ** 0.3)
        missing -= pairs(best)
        yield best
