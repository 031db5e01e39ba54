"""A folder of images of prompts, in the published layout, drawn by any number of processes and finished by the last.

    metadata.csv       image, prompt, seed: what training reads
    images/000012_1.png  prompt 12, its second image, with all its settings in it
    prompts.jsonl      the prompts, in order
    set.json           what all images have in common
    rejected.csv       where there is a gate: the images that it keeps out of metadata.csv, with their scores
    shards/00000.tar   WebDataset, where asked for

An image's file is the only record that it is drawn, so a run goes on wherever it was killed, on any number of
processes. Names come from numbers alone, never from a prompt.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import FieldError, UserError
from ..files import atomic_path
from ..formats.header import parse_json
from ..sampling.drawing import FORMATS, read_settings, save_image
from ..sampling.jobs import Job, check_writable, is_finished
from .gate import ClipGate
from .llm import INSTALL
from .painters import Painter, Source
from .records import Prompt, alone, write_lines

COLUMNS = ("image", "prompt", "seed")  # of metadata.csv
MOST = 1_000_000  # images of a folder
FAILURES = 10  # images in a row that can't be drawn, before the run ends


@dataclass(frozen=True)
class Share:
    """Which process of how many this is, as torchrun says."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """By RANK and WORLD_SIZE.

        Raises:
            UserError: they are no numbers that fit together.
        """
        try:
            share = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        except ValueError as error:
            raise UserError(f"RANK and WORLD_SIZE must be whole numbers ({error}); torchrun sets them") from error
        if not 0 <= share.rank < share.world:
            raise UserError(f"RANK must be below WORLD_SIZE, got {share.rank} and {share.world}")
        return share

    def device(self, name: str) -> str:
        """``name``, or where several processes are to choose, the GPU of this one."""
        if name != "auto" or self.world == 1:
            return name
        import torch

        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


class ImageSet:
    """The images of ``prompts``, ``each`` of every one, in the folder ``out``.

    Args:
        source: what draws them, with all of the requests but prompt and seed; the seeds count up from its own.
        format: png, jpg or webp.
        gate: folder of the model that scores them.
        least: of the scores, where there is a gate.

    Raises:
        UserError: the folder can't be written, or holds images of other settings.
    """

    def __init__(
        self, out: str, prompts: Sequence[Prompt], each: int, source: Source, format: str, gate: str | None = None,
        least: float | None = None,
    ):  # fmt: skip
        if len(prompts) * each > MOST:
            raise FieldError("each", f"makes {len(prompts) * each} images; at most {MOST} a folder: use {{limit}}")
        folder = self.folder = Path(out)
        self.prompts, self.source, self.format, self.gate, self.least = prompts, source, format, gate, least
        base, self._setup = source.request, source.setup
        self.jobs: list[Job] = []
        for index, prompt in enumerate(prompts):
            for k in range(each):
                request = replace(base, prompt=prompt.prompt, seed=(base.seed + index * each + k) % 2**63)
                self.jobs.append(Job(request, folder / "images" / f"{index:06d}_{k}{FORMATS[format]}"))
        if "\0" in out:
            raise FieldError("out", f"is not a folder: {out[:60]!r}; name one")
        check_writable(self.jobs[0].path)
        shared = {key: value for key, value in base.as_dict().items() if key not in ("prompt", "cfg_batch")}
        self._settings = {**shared, "model": source.name, "each": each, "format": format, "gate": gate}
        if self._setup.lora:
            self._settings["lora"] = list(map(str, self._setup.lora))
        self._check_settings()

    def _check_settings(self) -> None:
        file = self.folder / "set.json"
        try:
            there = parse_json(file.read_bytes()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error}); name another --out") from error
        names = [key for key in {*self._settings, *there} if self._settings.get(key) != there.get(key)]
        if there and names:
            name = min(names)
            raise UserError(
                f"{self.folder} holds images with {name} {there.get(name)!r}, not {self._settings.get(name)!r}; "
                "give the same, or another --out"
            )

    def start(self) -> None:
        """Write what does not change."""
        write_lines(self.folder / "set.json", [json.dumps(self._settings, indent=1) + "\n"])
        write_lines(self.folder / "prompts.jsonl", (prompt.line() for prompt in self.prompts))

    def waiting(self, share: Share) -> list[Job]:
        """Those of the jobs that fall to this process and are not drawn."""
        return [job for job in self.jobs[share.rank :: share.world] if not self._is_drawn(job)]

    def _is_drawn(self, job: Job) -> bool:
        return is_finished(job, self._setup, any_seed=False)

    def draw(self, painter: Painter, jobs: Sequence[Job], gate: ClipGate | None, bar: bool) -> int:
        """Draw ``jobs`` one after the other, and `follow` them."""
        return self.follow(((job, self.draw_one(painter, job, gate)) for job in jobs), len(jobs), bar)

    def draw_one(self, painter: Painter, job: Job, gate: ClipGate | None) -> str | None:
        """Draw ``job`` and write it, unless it is there; returns why it can't be drawn, or None.

        Raises:
            FieldError: a setting that the model can't take.
        """
        if self._is_drawn(job):
            return None
        try:
            drawing = painter(job.request)
        except FieldError:
            raise
        except UserError as error:
            return str(error)
        settings = drawing.settings
        if gate is not None:
            settings = settings | {"score": gate.score(drawing.image, job.request.prompt)}
        save_image(drawing.image, job.path, self.format, settings)
        return None

    def follow(self, outcomes: Iterable[tuple[Job, str | None]], total: int, bar: bool) -> int:
        """Show the progress of what `draw_one` returns of each of ``total`` jobs; returns how many were not drawn.

        Raises:
            UserError: `FAILURES` images in a row that can't be drawn.
        """
        failed = in_a_row = 0
        for job, problem in tqdm(outcomes, desc="images", total=total, disable=not (bar and sys.stderr.isatty())):
            if problem is None:
                in_a_row = 0
                continue
            failed, in_a_row = failed + 1, in_a_row + 1
            if in_a_row >= FAILURES:
                raise UserError(problem)
            tqdm.write(f"note: {job.path.name} is not drawn: {problem}", file=sys.stderr)
        return failed

    def write_tables(self) -> tuple[int, int]:
        """metadata.csv, and rejected.csv where there is a gate, of what is drawn; returns the numbers of both.

        Processes look and write one after the other, so the tables of the last one to be done are whole.
        """
        with alone(self.folder):
            return self._write_tables()

    def _write_tables(self) -> tuple[int, int]:
        kept, rejected = [], []
        for job in self.jobs:
            if self._is_drawn(job):
                row = (f"images/{job.path.name}", job.request.prompt, job.request.seed)
                score = read_settings("out", str(job.path)).get("score") if self.least is not None else None
                if isinstance(score, float) and score < self.least:
                    rejected.append((*row, f"{score:.4f}"))
                else:
                    kept.append(row)
        _write_csv(self.folder / "metadata.csv", COLUMNS, kept)
        if self.least is not None:
            _write_csv(self.folder / "rejected.csv", (*COLUMNS, "score"), rejected)
        return len(kept), len(rejected)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_lines(path, [text.getvalue()])


def read_table(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder's metadata.csv: image, prompt, seed.

    Raises:
        UserError: none there, or another table.
    """
    path = folder / "metadata.csv"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not rows or not all(isinstance(row.get(name), str) for row in rows for name in COLUMNS[:2]):
        raise UserError(f"{path} has no rows with image and prompt; l2p data images writes such a table")
    return rows


def write_shards(folder: Path, per_shard: int) -> int:
    """``folder``/shards: the images of metadata.csv as WebDataset, each with a .json (prompt, seed); returns how many.

    Raises:
        UserError: the package webdataset is missing, or an image.
    """
    try:
        from webdataset import TarWriter
    except ImportError as error:
        raise UserError(f"shards need the package webdataset: {INSTALL}") from error
    rows = read_table(folder)
    with alone(folder), atomic_path(folder / "shards") as place:
        place.mkdir()
        for number, start in enumerate(range(0, len(rows), per_shard)):
            with TarWriter(str(place / f"{number:05d}.tar"), user="", group="", encoder=False, mtime=0) as tar:
                for sample in _samples(folder, rows[start : start + per_shard]):
                    tar.write(sample)
    return -(-len(rows) // per_shard)


def _samples(folder: Path, rows: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        name = Path(row["image"]).name
        stem, _, suffix = name.partition(".")
        about = {"prompt": row["prompt"], "seed": int(row["seed"])}
        image = (folder / "images" / name).read_bytes()
        yield {"__key__": stem, suffix: image, "json": json.dumps(about, ensure_ascii=False).encode()}
