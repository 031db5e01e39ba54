"""A table of scores: rows with standard errors, as Markdown to read and JSON to keep."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import atomic_path


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what it measures.
        value: the figure; not a number where there is nothing to measure.
        error: its standard error; None: not known.
        count: how many independent things (prompts, or images) it comes from.
        low, high: ends of a confidence interval of 95 %.
    """

    name: str
    value: float
    error: float | None = None
    count: int | None = None
    low: float | None = None
    high: float | None = None


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; columns that no row fills are left out."""
    cells = {
        "value": [number(row.value) for row in rows],
        "standard error": [number(row.error) for row in rows],
        "95 % interval": ["" if row.low is None else f"{number(row.low)} to {number(row.high)}" for row in rows],
        "of": ["" if row.count is None else str(row.count) for row in rows],
    }
    cells = {"": [row.name for row in rows]} | {head: column for head, column in cells.items() if any(column)}
    return _lines(list(cells), list(zip(*cells.values(), strict=True)))


def pivot(found: Mapping[str, Sequence[Row]]) -> str:
    """Sets of the same rows as one table: a line for each set, a column for each score with its standard error."""
    heads = [row.name for row in next(iter(found.values()))]
    cells = [[f"{number(r.value)}" + (f" ± {number(r.error)}" if r.error else "") for r in rs] for rs in found.values()]
    return _lines(["", *heads], [[label, *line] for label, line in zip(found, cells, strict=True)])


def _lines(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    whole = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in whole)


def number(value: float | None) -> str:
    """Four digits or so; nothing for None."""
    if value is None:
        return ""
    return "-" if math.isnan(value) else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def save_table(rows: Sequence[Row], folder: Path, facts: dict | None = None, text: str | None = None) -> None:
    """Write ``scores.md`` (``text``, or the rows) and ``scores.json`` (the rows, with ``facts``) in ``folder``."""
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()} for row in rows]
    with atomic_path(folder / "scores.md") as temporary:
        temporary.write_text(text or markdown(rows), encoding="utf-8")
    with atomic_path(folder / "scores.json") as temporary:
        temporary.write_text(json.dumps({"rows": plain} | (facts or {}), indent=1) + "\n", encoding="utf-8")
