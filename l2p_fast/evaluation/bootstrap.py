"""Standard errors and confidence intervals by the bootstrap: prompts (or images) are drawn again with replacement.

A resample holds some images twice, which moves a Frechet distance up. So an interval is that of the deviations of the
resamples from their own mean, laid around the value itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from .metrics import Statistic
from .table import Row

RESAMPLES = 200
LEVEL = 0.95


def draws(statistic: Statistic, count: int, seed: int = 0) -> list[Tensor]:
    """Rows of ``count`` resamples. Statistics of the same units get the same units."""
    rng = torch.Generator().manual_seed(seed)
    number = len(statistic.members)
    return [
        torch.cat([statistic.members[unit] for unit in torch.randint(number, (number,), generator=rng).tolist()])
        for _ in range(count)
    ]


def judge(statistics: Sequence[Statistic], resamples: int = RESAMPLES) -> list[Row]:
    """A row for each statistic: its value, standard error and interval."""
    rows = []
    for statistic in statistics:
        if not statistic.members:
            rows.append(Row(statistic.name, math.nan, None, 0))
            continue
        values = _values(statistic, resamples) if len(statistic.members) > 1 else []
        rows.append(_row(statistic.name, statistic.value(None), values, len(statistic.members)))
    return rows


def compare(ours: Sequence[Statistic], theirs: Sequence[Statistic], resamples: int = RESAMPLES) -> list[Row]:
    """Three rows for each statistic: of either set, and the difference, first minus second.

    Where both sets have the same units, a resample draws the same of both, so what is hard in both cancels.
    """
    rows = []
    for a, b in zip(ours, theirs, strict=True):
        pair = judge([a], resamples) + judge([b], resamples)
        rows += [Row(f"{row.name}, {which}", *_rest(row)) for row, which in zip(pair, ("first", "second"), strict=True)]
        if min(len(a.members), len(b.members)) < 2:
            continue
        same = a.keys == b.keys
        one, other = _values(a, resamples), _values(b, resamples, seed=0 if same else 1)
        differences = [x - y for x, y in zip(one, other, strict=True)]
        count = min(len(a.members), len(b.members))
        name = f"{a.name}, difference{' (paired)' if same else ''}"
        rows.append(_row(name, pair[0].value - pair[1].value, differences, count))
    return rows


def _rest(row: Row) -> tuple:
    return row.value, row.error, row.count, row.low, row.high


def _values(statistic: Statistic, resamples: int, seed: int = 0) -> list[float]:
    parts = draws(statistic, resamples, seed)
    return [
        statistic.value(rows)
        for rows in tqdm(parts, desc=f"resamples of {statistic.name}", leave=False, disable=not sys.stderr.isatty())
    ]


def _row(name: str, value: float, values: Sequence[float], count: int) -> Row:
    held = torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float64)
    if len(held) < 2:
        return Row(name, value, None, count)
    off = held - held.mean()
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(off, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Row(name, value, held.std().item(), count, value + low, value + high)
