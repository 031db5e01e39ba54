"""What the benchmarks' own scorers wrote, as rows with standard errors.

The scorers need detectors and models that answer questions; they run where they are installed, on the folders that
`suites` lays out. Here their files are read back:

========  =====================================================================================================
geneval   JSON lines of `evaluate_images.py`: an image each, with ``tag`` and ``correct``
geneval2  the JSON list of lists of `evaluation.py`: an answer's probability each, in the order of the prompts
dpg       the text of `compute_dpg_bench.py`: scores of an image a line, then means by category
pixverve  what `eval.py` printed, saved as text
========  =====================================================================================================

The images of one prompt are not independent, so standard errors count prompts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from ..errors import UserError
from ..formats.header import parse_json
from .suites import Task, read_json_lines, read_text
from .table import Row

_PIXVERVE = re.compile(
    r"^\s*(FID|FID-Patch|Aesthetics|(?:FG-)?CLIP2? Score \(\w+ Caption\)|GLCM Score):\s+(\S+)\s*$", re.M
)
_CATEGORY = re.compile(r"^\t(.+): ([0-9.]+)$")


def read_scores(suite: str, path: str, tasks: Sequence[Task]) -> list[Row]:
    """The rows of a score file, the total first.

    Raises:
        UserError: no such file, or not one of this benchmark's scorer.
    """
    readers = {"geneval": _geneval, "geneval2": _geneval2, "dpg": _dpg, "pixverve": _pixverve}
    if suite not in readers:
        raise UserError(f"{suite} has no scorer of its own, so there is nothing to read from {path}")
    return readers[suite](path, tasks)


def mean_row(name: str, values: Sequence[float]) -> Row:
    """Mean and its standard error of independent values."""
    return grouped_row(name, [[value] for value in values])


def grouped_row(name: str, groups: Sequence[Sequence[float]]) -> Row:
    """Mean of all values, and its standard error where those of one group depend on each other."""
    total, count = sum(map(len, groups)), len(groups)
    if not total:
        return Row(name, math.nan, None, 0)
    mean = math.fsum(value for group in groups for value in group) / total
    spread = math.fsum((math.fsum(group) - mean * len(group)) ** 2 for group in groups)
    return Row(name, mean, math.sqrt(spread * count / (count - 1)) / total if count > 1 else None, count)


def _geneval(path: str, _: Sequence[Task]) -> list[Row]:
    """By task, the share of right images; the total is the mean over tasks, as published."""
    right: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, line in read_json_lines(path):
        tag, prompt, correct = line.get("tag"), line.get("prompt"), line.get("correct")
        if not isinstance(tag, str) or not isinstance(prompt, str) or not isinstance(correct, bool):
            raise UserError(f"{path}, line {number}: no tag, prompt and correct; give GenEval's results")
        right[tag][prompt].append(float(correct))
    if not right:
        raise UserError(f"{path} is empty; give GenEval's results, a line an image")
    rows = [grouped_row(f"GenEval {tag}", list(prompts.values())) for tag, prompts in right.items()]
    errors = [row.error for row in rows]
    error = None if None in errors else math.sqrt(math.fsum(e * e for e in errors)) / len(rows)
    mean = math.fsum(row.value for row in rows) / len(rows)
    return [Row("GenEval", mean, error, sum(row.count for row in rows)), *rows]


def _geneval2(path: str, tasks: Sequence[Task]) -> list[Row]:
    """Soft-TIFA in percent: arithmetic and geometric mean of a prompt's answers, by skill and by number of atoms."""
    try:
        lists = parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON ({error}); give GenEval 2's list of scores") from error
    fits = isinstance(lists, list) and all(
        isinstance(one, list) and one and all(type(v) in (int, float) and 0 <= v <= 1.01 for v in one) for one in lists
    )
    if not fits:
        raise UserError(f"{path} is no list of lists of scores from 0 to 1; give what GenEval 2's evaluation.py wrote")
    if len(lists) != len(tasks):
        raise UserError(f"{path} scores {len(lists)} prompts, and there are {len(tasks)}; give the scores of this file")
    skills: dict[str, list[list[float]]] = defaultdict(list)
    atoms: dict[int, list[float]] = defaultdict(list)
    for task, one in zip(tasks, lists, strict=True):
        named = task.facts.get("skills")
        if isinstance(named, list) and len(named) == len(one):
            for skill in dict.fromkeys(map(str, named)):
                skills[skill].append([100 * v for s, v in zip(named, one, strict=True) if str(s) == skill])
        if type(task.facts.get("atom_count")) is int:
            atoms[task.facts["atom_count"]].append(100 * _geometric(one))
    return [
        mean_row("GenEval 2 Soft-TIFA, arithmetic", [100 * math.fsum(one) / len(one) for one in lists]),
        mean_row("GenEval 2 Soft-TIFA, geometric", [100 * _geometric(one) for one in lists]),
        *(grouped_row(f"GenEval 2 {skill}", groups) for skill, groups in skills.items()),
        *(mean_row(f"GenEval 2 {count} atoms, geometric", atoms[count]) for count in sorted(atoms)),
    ]


def _geometric(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def _dpg(path: str, _: Sequence[Task]) -> list[Row]:
    """The mean over prompts, in percent, and the categories' means as the file has them."""
    averages, categories, level = [], [], ""
    for line in read_text(path).splitlines():
        if line.endswith(" category scores:"):
            level = line.split()[0]
        elif found := _CATEGORY.match(line):
            categories.append(Row(f"DPG-Bench {level} {found[1]}", float(found[2])))
        elif re.search(r", [0-9.]+, [0-9.]+$", line):
            averages.append(100 * float(line.rsplit(", ", 1)[1]))
    if not averages:
        raise UserError(f"{path} has no line with the scores of an image; give what compute_dpg_bench.py wrote")
    return [mean_row("DPG-Bench", averages), *categories]


def _pixverve(path: str, _: Sequence[Task]) -> list[Row]:
    found = {}
    for name, value in _PIXVERVE.findall(read_text(path)):
        try:
            found[name] = float(value)
        except ValueError:
            continue
    if not found:
        raise UserError(f"{path} has no line such as 'FID: 33.46'; save what PixVerve's eval.py prints")
    return [Row(f"PixVerve {name}", value) for name, value in found.items()]
