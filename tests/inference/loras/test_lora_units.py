"""How the rows of a batch are put into slots of LoRA factors, each of which has a LoRA's bytes."""

from __future__ import annotations

import pytest

from deployments.loras.lora_forward import SlotRun, runs_of, units_of
from deployments.loras.lora_set import combine

SETS = {name: combine([({}, 1.0)]) for name in "abc"}


def units(rows: str) -> list[tuple[str, int, int]]:
    """Name of the set, first row and rows of each unit. rows: the set of each; "-": none."""
    names = {id(lora_set): name for name, lora_set in SETS.items()}
    found = units_of([SETS.get(row) for row in rows])
    return [(names[id(unit.lora_set)], unit.start, unit.rows) for unit in found]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("", []),
        ("--", []),
        ("aabb", [("a", 0, 2), ("b", 2, 2)]),
        ("aa-bb", [("a", 0, 2), ("b", 3, 2)]),
        ("aab", [("a", 0, 1), ("a", 1, 1), ("b", 2, 1)]),
        ("aaaabb", [("a", 0, 2), ("a", 2, 2), ("b", 4, 2)]),
    ],
)
def test_runs_of_one_set_are_cut_into_units_of_one_length(
    rows: str, expected: list[tuple[str, int, int]]
) -> None:
    assert units(rows) == expected


@pytest.mark.parametrize("rows", ["a" * 24 + "b" * 16, "a" * 7 + "b", "aaabbbbbcccc"])
def test_factors_are_never_kept_for_each_row_of_a_large_batch(rows: str) -> None:
    found = units(rows)

    assert [(name, length) for name, _, length in found] == [
        (name, rows.count(name)) for name in dict.fromkeys(rows)
    ]


def test_units_of_one_length_with_adjacent_rows_share_a_product() -> None:
    a, b, c = SETS["a"], SETS["b"], SETS["c"]

    assert runs_of(units_of([a, a, b, b])) == [SlotRun(0, 2, 0, 4)]
    assert runs_of(units_of([a, a, None, b, b])) == [SlotRun(0, 1, 0, 2), SlotRun(1, 2, 3, 5)]
    assert runs_of(units_of([a] * 5 + [b] + [c])) == [SlotRun(0, 1, 0, 5), SlotRun(1, 3, 5, 7)]
