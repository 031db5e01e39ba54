"""Several images: their seeds and files, and which of them a run that was interrupted has finished. No torch here."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import FieldError, UserError
from ..files import is_special, near_path
from .drawing import FORMATS, SUFFIXES, read_settings
from .request import RANGES, Lora, Request, Setup

LARGEST_FILE = 1 << 28  # bytes of a file of prompts


@dataclass(frozen=True)
class Job:
    """One image to draw, and its file."""

    request: Request
    path: Path


def read_prompts(field: str, path: str) -> list[str]:
    """The prompts of a file, one a line, blank lines left out.

    Raises:
        FieldError: no text file, or an empty one.
    """
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # a pipe would be waited for
            raise FieldError(field, f"{path} is not a file; name one with a prompt a line")
        if os.path.getsize(path) > LARGEST_FILE:
            raise FieldError(field, f"{path} is larger than 256 MB; split it")
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FieldError(field, f"{path} is not UTF-8 text; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise FieldError(field, f"can't be read: {path}: {words}{near_path(path)}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise FieldError(field, f"{path} is empty; write one prompt a line")
    return prompts


def slug(prompt: str) -> str:
    """A file name's worth of a prompt."""
    return re.sub(r"\W+", "-", prompt.lower())[:40].strip("-_") or "image"


def plan_jobs(
    base: Request, prompts: Sequence[str], each: int, out: str | None, format: str | None, folder: str | None = None
) -> tuple[list[Job], str]:
    """The images to draw and where: names from index and prompt in a folder when there are several.

    Args:
        base: all but prompt and seed; the seeds count up from its own.
        each: images of each prompt.
        out: a file, or a folder where there are several images; None: named by the prompt, here.
        format: png, jpg or webp; None: by ``out``, else png.
        folder: where several images go when ``out`` is None; None says that there is one alone.

    Returns:
        the jobs, and the format.

    Raises:
        UserError: a place that can't be written, more images than `RANGES` allows.
    """
    several = folder is not None or each > 1
    if len(prompts) * each > RANGES["num_images"].most:
        raise FieldError("num_images", f"makes {len(prompts) * each} images; at most {RANGES['num_images'].most} a run")
    place = Path(out) if out is not None else None
    suffix = place.suffix.lower() if place is not None and not is_dir(place) else ""
    if several and suffix in SUFFIXES:
        raise FieldError("out", f"must be a folder for several images, got {place}; try {place.with_suffix('')}")
    if several and place is not None and place.exists() and not is_dir(place):
        raise FieldError("out", f"must be a folder for several images, and {place} is a file; name another")
    single = not several and place is not None and not is_dir(place)
    if single:
        if suffix not in SUFFIXES and (suffix or format is None):
            near = place.with_suffix(FORMATS[format or "png"])
            raise FieldError("out", f"has no suffix of an image format: {place.name!r}; try {near}")
        if suffix and format is not None and SUFFIXES[suffix] != format:
            near = place.with_suffix(FORMATS[format])
            raise FieldError("out", f"{place} does not fit {{format}} {format}; try {near}")
    format = format or SUFFIXES.get(suffix, "png")

    extension = FORMATS[format]
    jobs = []
    if single:
        jobs.append(Job(replace(base, prompt=prompts[0]), place if suffix else place.with_suffix(extension)))
    elif not several:
        name = f"{slug(prompts[0])}-{base.seed}{extension}"
        jobs.append(Job(replace(base, prompt=prompts[0]), (place or Path()) / name))
    else:
        place = place or Path(folder or slug(prompts[0]))
        for i, prompt in enumerate(prompts):
            for k in range(each):
                tail = f"-{k}" if each > 1 else ""
                seed = (base.seed + i * each + k) % 2**63
                request = replace(base, prompt=prompt, seed=seed)
                jobs.append(Job(request, place / f"{i:04d}-{slug(prompt)}{tail}{extension}"))
    check_writable(jobs[0].path)
    return jobs, format


def is_dir(path: Path) -> bool:
    """Whether ``path`` is a folder; what can't be a path is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def check_writable(path: Path) -> None:
    """The nearest folder above ``path`` that exists can be written, and ``path`` is no folder."""
    try:
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        path.exists()  # a name that is too long
        longest = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") and folder.is_dir() else 255
        if any(len(os.fsencode(part)) > longest for part in path.parts):  # in a folder to be made
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except (OSError, ValueError) as error:
        raise FieldError("out", f"can't be written: {path}: {getattr(error, 'strerror', None) or error}") from error
    if not folder.is_dir():
        raise FieldError("out", f"can't be written: {path}, {folder} is not a folder; choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FieldError("out", f"can't be written: {path}, no permission in {folder}; choose another folder")
    if path.is_dir():
        raise FieldError("out", f"{path} is a folder; choose another name")
    if is_special(path):
        raise FieldError("out", f"{path} is a device or a pipe; name a file")


def is_finished(job: Job, setup: Setup, any_seed: bool) -> bool:
    """Whether the job's file holds an image of its request: what the request names was so when it was drawn, and so
    were the LoRAs.

    ``any_seed``: the seeds were drawn at random, so they need not agree.
    """
    try:
        if not job.path.is_file():
            return False
        settings = read_settings("out", str(job.path))
    except (OSError, UserError):  # empty, damaged, or not ours
        return False
    asked = {name: value for name, value in job.request.as_dict().items() if value is not None}
    asked["guidance_interval"] = job.request.guidance_interval  # the model chooses none, so none is asked for as well
    del asked["cfg_batch"]  # how it is drawn, not what
    if any_seed:
        del asked["seed"]
    try:
        loras = list(map(str, map(Lora.of, settings.get("lora") or [])))
    except (FieldError, TypeError):
        return False
    return loras == list(map(str, setup.lora)) and all(settings.get(name) == value for name, value in asked.items())
