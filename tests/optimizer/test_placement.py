"""Slices, cut rows and blocks cover every element exactly once, wherever the boundaries fall."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ds_moelora.optimizer.sharding.placement import Placement, expert_blocks, split_slice


@given(
    experts=st.integers(1, 4),
    rows=st.integers(1, 6),
    rank=st.integers(1, 5),
    position=st.integers(0, 20),
    world=st.integers(1, 5),
    slack=st.integers(0, 40),
)
def test_ranks_cover_a_factor_exactly_once(
    experts: int, rows: int, rank: int, position: int, world: int, slack: int
) -> None:
    numel = experts * rows * rank
    partition = -(-(position + numel + slack) // world)
    places = [
        Placement(numel=numel, unit=0, position=position, partition=partition, process=q, world=world)
        for q in range(world)
    ]
    owned: list[int] = []
    pieces_of: dict[int, set[int]] = {}
    for place in places:
        pieces, first_row, num_rows = split_slice(place.start, place.stop, rank)
        mine = list(range(first_row * rank, (first_row + num_rows) * rank))
        for piece in pieces:
            assert place.start + piece.offset == piece.row * rank + piece.column
            assert piece.column + piece.length <= rank
            elements = range(place.start + piece.offset, place.start + piece.offset + piece.length)
            mine += elements
            pieces_of.setdefault(piece.row, set()).update(elements)
        assert sorted(mine) == list(range(place.start, place.stop))
        owned += mine
    assert sorted(owned) == list(range(numel))
    # Every rank knows the same cut rows: exactly those of which some rank holds only a piece, and all their elements.
    cut = places[0].cut_rows(rank)
    assert all(place.cut_rows(rank) == cut for place in places)
    assert sorted(pieces_of) == cut
    assert all(pieces_of[row] == set(range(row * rank, (row + 1) * rank)) for row in cut)
    assert len(cut) <= world - 1
    assert bool(places[0].cut_rows(numel)) == (sum(place.start < place.stop for place in places) > 1)


@given(first=st.integers(0, 30), count=st.integers(0, 40), per_expert=st.integers(1, 9))
def test_blocks_name_the_expert_of_every_row(first: int, count: int, per_expert: int) -> None:
    blocks = expert_blocks(first, count, per_expert)
    experts = [expert + k for expert, num, _, rows in blocks for k in range(num) for _ in range(rows)]
    assert experts == [(first + j) // per_expert for j in range(count)]
    starts = [row for _, _, row, _ in blocks]
    assert starts == [sum(num * rows for _, num, _, rows in blocks[:i]) for i in range(len(blocks))]
    assert len(blocks) <= 3
