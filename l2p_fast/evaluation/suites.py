"""What the benchmarks ask for and how they want it: prompts from their own files, images where their scorers look.

========  ==========================================  ============================================================
suite     its prompts                                 images
========  ==========================================  ============================================================
geneval   JSON lines: ``prompt``, ``tag``, ...        ``00000/samples/0000.png`` to ``0003``, ``00000/metadata.jsonl``
geneval2  JSON lines: ``prompt``, ``vqa_list``, ...   ``images/0000.png``, ``images.json`` from prompts to paths
dpg       a folder of ``ITEM_ID.txt``, or its CSV     ``ITEM_ID.png``, four images in a square, each as large as asked
pixverve  JSON lines: ``file_name``, two captions     ``STEM.jpg``
prompts   text, a prompt a line                       ``0000-a-red-star.png``, as `l2p_fast.sample` names them
========  ==========================================  ============================================================

The files come from the user; no list of prompts is shipped. No torch here.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FieldError, UserError
from ..files import atomic_path, near_path
from ..formats.header import parse_json
from ..sampling.drawing import open_image, read_settings
from ..sampling.jobs import LARGEST_FILE, Job, check_writable, is_finished, read_prompts, slug
from ..sampling.request import RANGES, Request, Setup, check_text

EACH = {"geneval": 4, "geneval2": 1, "dpg": 4, "pixverve": 1, "prompts": 1}  # images of a prompt, as published
MAP = "images.json"  # of geneval2
TILED = ("dpg",)  # suites whose file holds all images of a prompt
SAMPLERS = ("euler", "stochastic", "heun", "unipc")  # of `render`, for the report on the patch grid
WAYS = ("none", "roll", "pad")  # of moving the grid, see `gridshift`


@dataclass(frozen=True)
class Task:
    """One prompt of a benchmark.

    Attributes:
        key: what its files are called by.
        prompt: what is drawn.
        caption: what CLIP compares an image with; ``long``: what a CLIP for long texts does.
        facts: the prompt's own entry in the benchmark's file.
    """

    key: str
    prompt: str
    caption: str
    long: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One file to draw: an image, or several in a square."""

    task: Task
    requests: tuple[Request, ...]
    path: Path

    def is_finished(self, setup: Setup) -> bool:
        """Whether the file holds what is asked for, whole, by the model and the LoRAs that ``setup`` names."""
        first = self.requests[0]
        if not is_finished(Job(first, self.path), setup, any_seed=False):
            return False
        settings = read_settings("out", str(self.path))
        if (settings.get("model"), settings.get("quantize")) != (setup.model, setup.quantize):
            return False
        side = 2 if len(self.requests) > 1 else 1
        return open_image("out", str(self.path)).size == (side * first.width, side * first.height)


# --- Reading ---------------------------------------------------------------------------------------------------------
def read_tasks(suite: str, path: str, caption: str = "long") -> list[Task]:
    """The prompts of a benchmark's file.

    Args:
        suite: a name of `EACH`.
        path: file, or for dpg a folder.
        caption: which of PixVerve's captions is drawn, "short" or "long".

    Raises:
        UserError: no such file, or not of this benchmark.
    """
    if suite == "prompts":
        tasks = tasks_of(read_prompts("prompts", path))
    elif suite == "dpg":
        tasks = [_task(_name(key, path), text, {}) for key, text in _dpg(path)]
    elif suite == "pixverve":
        tasks = [
            Task(_name(Path(line["file_name"]).stem, path), line[f"{caption}_caption"], line["short_caption"],
                 line["long_caption"], line)
            for line in _lines(path, ("file_name", "short_caption", "long_caption"))
        ]  # fmt: skip
    else:
        width = 5 if suite == "geneval" else 4
        wanted = ("prompt", "tag") if suite == "geneval" else ("prompt",)
        tasks = [_task(f"{i:0{width}d}", line["prompt"], line) for i, line in enumerate(_lines(path, wanted))]
    if not tasks:
        raise UserError(f"{path} holds no prompts; give the prompt file of {suite}")
    for task in tasks:
        check_text("prompt", task.prompt)
        if not task.prompt.strip():
            raise UserError(f"{path}: the prompt of {task.key} is empty; every prompt must say what to draw")
    if len({task.key for task in tasks}) < len(tasks):
        raise UserError(f"{path} names one image twice; give the benchmark's own file")
    return tasks


def tasks_of(prompts: Sequence[str]) -> list[Task]:
    """Plain prompts, named by number and words."""
    return [_task(f"{i:04d}-{slug(prompt)}", prompt, {}) for i, prompt in enumerate(prompts)]


def _task(key: str, prompt: str, facts: dict[str, Any]) -> Task:
    return Task(key, prompt, prompt, prompt, facts)


def _name(key: str, path: str) -> str:
    """``key`` if it can be a file's name and nothing else: a stranger's list picks no path."""
    if not re.fullmatch(r"\w[\w -]{0,199}", key):
        raise UserError(f"{path}: {key[:60]!r} can't be the name of an image; letters, digits, - and _ can")
    return key


def read_text(path: str) -> str:
    """A file of text; a mistake is a `UserError`."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # a pipe would be waited for
            raise UserError(f"{path} is not a file; name one")
        if os.path.getsize(path) > LARGEST_FILE:
            raise UserError(f"{path} is larger than 256 MB; this is no list of prompts or scores")
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} can't be read: {getattr(error, 'strerror', None) or error}{near_path(path)}"
        ) from error


def read_json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every line that isn't blank."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); give one JSON object a line") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; give one a line")
        yield number, value


def _lines(path: str, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, which have the text fields ``wanted``."""
    for number, line in read_json_lines(path):
        lost = [name for name in wanted if not isinstance(line.get(name), str)]
        if lost:
            raise UserError(f"{path}, line {number}: no text {lost[0]!r}; give the benchmark's own file")
        yield line


def _dpg(path: str) -> Iterator[tuple[str, str]]:
    """(item_id, prompt) of a folder of texts, or of the benchmark's CSV, which has a row for each question."""
    if os.path.isdir(path):
        for file in sorted(Path(path).glob("*.txt")):
            yield file.stem, read_text(str(file)).strip()
        return
    rows = csv.DictReader(read_text(path).splitlines(keepends=True))
    if not {"item_id", "text"} <= set(rows.fieldnames or ()):
        raise UserError(f"{path} has no columns item_id and text; give DPG-Bench's CSV, or its folder of prompts")
    texts: dict[str, str] = {}
    try:
        for row in rows:
            if row["item_id"] and row["text"]:
                texts.setdefault(row["item_id"], row["text"].strip())
    except csv.Error as error:
        raise UserError(f"{path} is not CSV ({error})") from error
    yield from texts.items()


# --- Writing ---------------------------------------------------------------------------------------------------------
def plan(suite: str, tasks: Sequence[Task], base: Request, each: int, out: Path) -> list[Work]:
    """The files to draw, in order; seeds count up from that of ``base`` over all images.

    Args:
        base: height and width are given; prompt and seed are replaced.
        each: images of a prompt.
        out: folder of all of them.

    Raises:
        UserError: a folder that can't be written, sizes or numbers of images that can't be.
    """
    if len(tasks) * each > RANGES["num_images"].most:
        raise FieldError("num_images", f"makes {len(tasks) * each} images; at most {RANGES['num_images'].most} a run")
    if each > 1 and suite in ("geneval2", "pixverve"):
        raise FieldError("num_images", f"must be 1 for {suite}, got {each}: the benchmark takes one image of a prompt")
    if suite in TILED and (each not in (1, 4) or base.height != base.width):
        raise FieldError("num_images", f"{each} of {base.width}x{base.height}: {suite} takes 1 or 4 square images")
    works = []
    for index, task in enumerate(tasks):
        requests = [replace(base, prompt=task.prompt, seed=(base.seed + index * each + k) % 2**63) for k in range(each)]
        if suite in TILED:
            works.append(Work(task, tuple(requests), out / f"{task.key}.png"))
            continue
        works += [Work(task, (r,), out / _file(suite, task.key, k, each)) for k, r in enumerate(requests)]
    check_writable(works[0].path)
    return works


def _file(suite: str, key: str, number: int, each: int) -> str:
    if suite == "geneval":
        return f"{key}/samples/{number:04d}.png"
    if suite == "geneval2":
        return f"images/{key}.png"
    if suite == "pixverve":
        return f"{key}.jpg"
    return f"{key}-{number}.png" if each > 1 else f"{key}.png"


def write_lists(suite: str, works: Sequence[Work], out: Path) -> None:
    """What a benchmark's scorer reads beside the images."""
    if suite == "geneval":
        for work in {work.task.key: work for work in works}.values():
            _write(work.path.parents[1] / "metadata.jsonl", json.dumps(work.task.facts))
    elif suite == "geneval2":
        _write(out / MAP, json.dumps({work.task.prompt: str(work.path.resolve()) for work in works}, indent=1))


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_bytes() != text.encode():
        with atomic_path(path) as temporary:
            temporary.write_bytes(text.encode())
