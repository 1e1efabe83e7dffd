"""The table of docs/front_ends.md, from benchmarks/results/front_ends.csv."""

from __future__ import annotations

from itertools import groupby

COLUMNS = ("front_end", "what", "adapter", "stage", "deviation", "from_adamw", "processes", "versions", "date")


def render(rows: list[dict[str, str]]) -> str:
    """A markdown table with one row per run, its stages beside each other, and the versions below it."""
    lines = ["| front end | what was run | adapter | ZeRO stage: deviation | from AdamW |", "|---|---|---|---|---|"]
    for key, group in groupby(rows, key=lambda row: tuple(row[name] for name in COLUMNS[:3])):
        found = list(group)
        stages = ", ".join(f"{row['stage']}: {row['deviation']}".removeprefix(": ") for row in found)
        apart = next((row["from_adamw"] for row in found if row["from_adamw"]), "")
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {stages} | {apart} |")
    versions = dict.fromkeys(f"- {row['front_end']}: {row['versions']} ({row['date']})" for row in rows)
    return "\n".join([*lines, "", *versions])
