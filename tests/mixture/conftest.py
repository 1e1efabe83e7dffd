"""torch's grouped_mm, slowly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ds_moelora.mixture import grouped_mm


def by_group(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """What `torch.nn.functional.grouped_mm` computes, in any dtype and for any strides."""
    ends = offsets.tolist()
    groups = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    if right.dim() == 3:
        return torch.cat([left[rows] @ matrix for rows, matrix in zip(groups, right, strict=True)])
    return torch.stack([left[:, rows] @ right[rows] for rows in groups])


@pytest.fixture(scope="module")
def grouped_mm_in_any_dtype() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_mm, "grouped_mm", by_group)
        yield
