"""Pictures with prompts: three layouts on disk, buckets by shape, cached text features, batches.

    folder or .csv   metadata.csv with the columns image, prompt and (optional) seed: the published layout
    imagefolder      metadata.jsonl with file_name and prompt, text or caption: Hugging Face's layout
    webdataset       .tar shards; of each sample a picture and a .txt or a .json (prompt, text or caption; seed)

Shards are indexed once by their headers and then read at any place, so all layouts are lists of `Picture` and an epoch
is a permutation. What a batch holds follows from the seed and from how many pictures of its bucket were drawn before:
that position is the state. A picture that can't be read is counted, named and replaced by the next one in order; so is
a sample that lacks its picture or its prompt.
Left out: streaming shards from a network.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import json
import math
import struct
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError
from ..files import atomic_path
from .config import DataConfig, ObjectiveConfig
from .objective import coarse_noise, draw_noise, draw_sigma, generator

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PROMPT_KEYS = ("prompt", "text", "caption")
MAX_PIXELS = 2**30  # of a picture; a header that promises more is taken for a damaged one
FEATURES_AT_ONCE = 256  # prompts in one file of cached features
UNREADABLE = (  # what PIL raises for damaged files
    OSError, ValueError, SyntaxError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A training picture, not yet opened: a file, or ``length`` bytes from ``offset`` of a shard, of data `path`.

    Without a ``prompt`` it is what a shard lacks, and its ``member`` says why: it counts as unreadable.
    """

    file: str
    prompt: str | None
    seed: int | None = None
    member: str = ""
    offset: int = 0
    length: int = 0
    path: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}:{self.member}" if self.member else self.file

    def open(self) -> Image.Image:
        """The picture with its header read; raises one of `UNREADABLE`."""
        Image.MAX_IMAGE_PIXELS = None  # global, so once and for all: it guards from strangers, and 10K is ordinary here
        if self.member:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                image = Image.open(io.BytesIO(file.read(self.length)))
        else:
            image = Image.open(self.file)
        if image.width * image.height > MAX_PIXELS:
            image.close()
            raise Image.DecompressionBombError(f"{self.name} has more than {MAX_PIXELS} pixels")
        return image

    def load(self, height: int, width: int) -> Tensor:
        """(3, height, width) fp32 in [-1, 1]: resized to cover, the middle cut out."""
        with self.open() as image:
            image.load()
            image.getexif()  # the image keeps it; of its bytes PIL would write a turned copy, and fail at any odd tag
            image.info.pop("exif", None)
            image = ImageOps.exif_transpose(image).convert("RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


# --- The layouts -----------------------------------------------------------------------------------------------------
def list_pictures(config: DataConfig) -> list[Picture]:
    """All pictures of ``config.path`` and of the grids' own paths, in the order of their tables or shards.

    Raises:
        UserError: no such data, no known layout, a row without a prompt, a number that is none.
    """
    if any(not (grid.path or config.path) for grid in config.grids):
        raise UserError("no training data; give data.path=FOLDER (metadata.csv, metadata.jsonl or .tar shards)")
    paths = dict.fromkeys(grid.path or config.path for grid in config.grids)
    return [replace(picture, path=path) for path in paths for picture in _list(path, config.layout)]


def _list(where: str, layout: str) -> list[Picture]:
    path = Path(where)
    shards = sorted(glob.glob(str(path / "*.tar") if path.is_dir() else where))
    if layout == "auto":
        if path.suffix == ".csv" or (path / "metadata.csv").exists():
            layout = "csv"
        elif path.suffix == ".jsonl" or (path / "metadata.jsonl").exists():
            layout = "imagefolder"
        elif shards and shards[0].endswith(".tar"):
            layout = "webdataset"
        else:
            raise UserError(f"{path} holds no metadata.csv, no metadata.jsonl and no .tar shards; check data.path")
    if layout == "webdataset":
        found = [picture for shard in shards for picture in _read_shard(shard)]
    else:
        table = path / ("metadata.csv" if layout == "csv" else "metadata.jsonl") if path.is_dir() else path
        try:
            with open(table, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file) if layout == "csv" else filter(str.strip, file))
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"can't read {table}: {error}") from error
        found = [_of_row(row, table, number) for number, row in enumerate(rows, 1)]
    if not found:
        raise UserError(f"{path} names no pictures; check data.path and data.layout")
    return found


def _of_row(row: dict | str, table: Path, number: int) -> Picture:
    """The picture of a row of metadata.csv or a line of metadata.jsonl."""
    where = f"{table}, picture {number}"
    try:
        row = json.loads(row) if isinstance(row, str) else row
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: wanted an object with file_name and prompt, got {row!r}")
    file = row.get("image") or row.get("file_name")
    prompt = _prompt(row)
    if not file or not isinstance(file, str) or prompt is None:
        keys = ", ".join(str(key) for key in row)
        raise UserError(f"{where}: wanted image (or file_name) and prompt, got {keys}")
    return Picture(str(table.parent / file), prompt, _seed(row.get("seed"), where))


def _prompt(about: dict) -> str | None:
    return next((about[key] for key in PROMPT_KEYS if isinstance(about.get(key), str)), None)


def _seed(value: object, where: str) -> int | None:
    if value in (None, ""):
        return None
    try:
        seed = int(value)
        torch.Generator().manual_seed(seed)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: seed must be a whole number of 64 bits, got {value!r}") from error
    return seed


def _read_shard(shard: str) -> list[Picture]:
    """The samples of a WebDataset shard: members of one name up to the first dot belong together.

    What can't be trained on is among them, without a prompt; one more stands for all that a shard lost that ends early.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            with contextlib.suppress(tarfile.ReadError):
                for member in tar:
                    suffix = "".join(member.name.rpartition("/")[2].partition(".")[1:])
                    if member.isfile():
                        samples.setdefault(member.name.removesuffix(suffix), {})[suffix.lower()] = member
            found = [_of_sample(shard, tar, name, parts) for name, parts in samples.items()]
            file.seek(tar.offset)  # where the next member would be: zeros end an archive
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                found.append(Picture(shard, None, member="(the shard ends early)"))
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"can't read the shard {shard}: {error}") from error
    return found


def _of_sample(shard: str, tar: tarfile.TarFile, name: str, parts: dict[str, tarfile.TarInfo]) -> Picture:
    """The picture of the members ``parts`` (by suffix) of a shard; without a prompt if one of them lacks."""
    picture = next((parts[suffix] for suffix in PICTURES if suffix in parts), None)
    why = "no picture" if picture is None else "no prompt"
    try:
        about = json.loads(tar.extractfile(parts[".json"]).read()) if ".json" in parts else {}
        if not isinstance(about, dict):
            raise ValueError("no object")
        if ".txt" in parts:
            about["prompt"] = tar.extractfile(parts[".txt"]).read().decode().strip()
        prompt = _prompt(about)
    except (ValueError, tarfile.ReadError):
        prompt, why = None, "its prompt is damaged"
    if picture is None or prompt is None:
        return Picture(shard, None, member=f"{name} ({why})")
    seed = _seed(about.get("seed"), f"{shard}:{picture.name}")
    return Picture(shard, prompt, seed, picture.name, picture.offset_data, picture.size)


# --- Text features ---------------------------------------------------------------------------------------------------
class Features:
    """Text features (L, C) by prompt, kept in safetensors files of a folder; a prompt's key is a digest of it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.refresh()

    @staticmethod
    def key(prompt: str) -> str:
        return hashlib.sha256(prompt.encode()).hexdigest()[:32]

    def refresh(self) -> None:
        """Look again at what the folder holds."""
        from safetensors import SafetensorError, safe_open

        self._file_of, self._open = {}, {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                self._open[path] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is damaged ({error}); remove it, and it is made again") from error
            self._file_of.update(dict.fromkeys(self._open[path].keys(), path))

    def missing(self, prompts: Iterable[str | None]) -> list[str]:
        return [p for p in dict.fromkeys(prompts) if p is not None and self.key(p) not in self._file_of]

    def add(self, prompts: Sequence[str], features: Sequence[Tensor]) -> None:
        """Write the features of ``prompts`` as one more file."""
        from safetensors.torch import save_file

        tensors = {self.key(p): f.contiguous().cpu() for p, f in zip(prompts, features, strict=True)}
        name = hashlib.sha256("".join(tensors).encode()).hexdigest()[:16]
        with atomic_path(self.folder / f"{name}.safetensors") as temporary:
            save_file(tensors, temporary)

    def __getitem__(self, prompt: str) -> Tensor:
        key = self.key(prompt)
        return self._open[self._file_of[key]].get_tensor(key)


def make_features(features: Features, prompts: Sequence[str], source: str, device: torch.device) -> None:
    """Encode ``prompts`` with the text encoder of ``source`` into ``features``; what an interrupted run wrote stays."""
    from tqdm import tqdm

    from ..loading import load_text_encoder
    from ..models.text import encode_prompts

    if not source:
        raise UserError(
            f"{len(prompts)} prompts have no cached text features in {features.folder}; give data.text_encoder=FOLDER "
            "(with text_encoder/ and tokenizer/, such as a Z-Image folder) to make them"
        )
    encoder, tokenizer = load_text_encoder(source, torch.float32 if device.type == "cpu" else torch.bfloat16)
    encoder = encoder.to(device)
    for start in tqdm(range(0, len(prompts), FEATURES_AT_ONCE), desc="text features", disable=None):
        part = prompts[start : start + FEATURES_AT_ONCE]
        features.add(part, encode_prompts(encoder, tokenizer, part))


# --- Buckets and batches ---------------------------------------------------------------------------------------------
def shapes_of(tokens: int, max_aspect: float, step: int = 1) -> list[tuple[int, int]]:
    """Token grids (h, w) of at most ``tokens``, as many as fit, within the aspect; sides are multiples of ``step``.

    The squarest first. With ``max_aspect`` 1 that is the only one.
    """
    side = math.isqrt(tokens) // step * step
    if side == 0:
        raise UserError(f"data.grids: {tokens} tokens are fewer than the smallest picture has ({step * step})")
    found = {(side, side)}
    for short in range(step, side, step):
        long = tokens // short // step * step
        if long / short <= max_aspect and short * long >= 0.9 * tokens:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape))


@dataclass
class Bucket:
    """Pictures of one shape: a grid of the configuration, (h, w) tokens, places in the list of pictures."""

    grid: int
    shape: tuple[int, int]
    members: list[int]


def make_buckets(
    pictures: Sequence[Picture], config: DataConfig, step: int, bad: set[str], workers: int
) -> list[Bucket]:
    """Sort the pictures into the shapes of each grid by their aspect; the names of unreadable ones go to ``bad``.

    With squares only no picture is opened.

    Raises:
        UserError: a grid without a picture.
    """
    aspects: list[float | None] = [None if picture.prompt is None else 1.0 for picture in pictures]
    if config.max_aspect > 1:

        def aspect(picture: Picture) -> float | None:
            if picture.prompt is None:
                return None
            try:
                with picture.open() as image:
                    turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF: lies on its side
                    return image.width / image.height if turned else image.height / image.width
            except UNREADABLE:
                return None

        with ThreadPoolExecutor(workers) as pool:
            aspects = list(pool.map(aspect, pictures))
    bad.update(picture.name for picture, a in zip(pictures, aspects, strict=True) if a is None)
    buckets = []
    for number, grid in enumerate(config.grids):
        shapes = shapes_of(grid.tokens, config.max_aspect, step)
        members: dict[tuple[int, int], list[int]] = {shape: [] for shape in shapes}
        for i, a in enumerate(aspects):
            if a is not None and pictures[i].path == (grid.path or config.path):
                members[min(shapes, key=lambda s, a=a: abs(math.log(s[0] / s[1]) - math.log(a)))].append(i)
        if not any(members.values()):
            raise UserError(f"none of the pictures of {grid.path or config.path} can be read; check data.path")
        buckets += [Bucket(number, shape, places) for shape, places in members.items() if places]
    return buckets


@dataclass
class Batch:
    """What one process passes through the model at once: B pictures of one size.

    Attributes:
        pixels, noise: (B, 3, H, W) fp32 on the CPU.
        sigma: (B,) fp32 noise levels.
        prompts: B of them, empty where the caption was dropped.
        windows: B boxes (row, column, height, width) in tokens that the head sees, or None.
    """

    pixels: Tensor
    noise: Tensor
    sigma: Tensor
    prompts: list[str]
    windows: list[tuple[int, int, int, int]] | None


class Stream:
    """The batches of a run, step after step.

    Args:
        pictures: all of them.
        buckets: of `make_buckets`.
        config, objective: of the data, and of what is drawn for each picture.
        patch_size: pixels of a side of a token.
        seed: of the run.
        rank, world: which of how many processes; each gets its part of every step's batch.
        accumulation: passes that a step's batch is cut into.
        bad: names of unreadable pictures found so far, the same for each process.

    Attributes:
        bad: names of the unreadable pictures that all processes know of.

    Raises:
        UserError: a batch that can't be shared out; more unreadable pictures than allowed.
    """

    def __init__(
        self, pictures: Sequence[Picture], buckets: Sequence[Bucket], config: DataConfig,
        objective: ObjectiveConfig, patch_size: int, seed: int,
        rank: int = 0, world: int = 1, accumulation: int = 1, bad: Iterable[str] = (),
    ):  # fmt: skip
        self.pictures, self.buckets, self.config, self.objective = pictures, list(buckets), config, objective
        self.patch_size, self.seed, self.rank, self.world, self.accumulation = (
            patch_size, seed, rank, world, accumulation
        )  # fmt: skip
        self.bad, self._found, self._names = set(), set(bad), {picture.name for picture in pictures}
        for i, grid in enumerate(config.grids):
            if grid.batch % (world * accumulation):
                raise UserError(
                    f"data.grids.{i}.batch = {grid.batch} pictures can't be shared by {world} processes x "
                    f"{accumulation} passes; make it a multiple of {world * accumulation}"
                )
        self.step, self.cursors = 0, [0] * len(self.buckets)  # after the last batch given out
        self._pool = ThreadPoolExecutor(config.workers)
        self._ahead: deque[tuple[list[int], list[list[Future]]]] = deque()
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self._check(self._found)

    def next(self) -> list[Batch]:
        """This process's batches of the next step, one for each accumulated pass."""
        while len(self._ahead) < self.config.prefetch:
            cursors = self._ahead[-1][0] if self._ahead else self.cursors
            self._ahead.append(self._plan(self.step + len(self._ahead), cursors))
        self.cursors, passes = self._ahead.popleft()
        self.step += 1
        return [self._collect(part) for part in passes]

    def state(self) -> dict:
        """Where the stream stands, as plain values."""
        return {"step": self.step, "cursors": self.cursors, "bad": sorted(self.bad)}

    def restore(self, state: dict) -> None:
        """Go on where `state` was taken."""
        if len(state["cursors"]) != len(self.buckets):
            raise UserError("the data has other buckets than the checkpoint's; resume with the data it was made with")
        self._ahead.clear()
        self.step, self.cursors = state["step"], list(state["cursors"])
        self.bad |= self._names & set(state["bad"])  # the data may have lost others since

    def new_bad(self) -> set[str]:
        """Names of the unreadable pictures that this process found and others may not know of: see `learn`."""
        return self._found - self.bad

    def learn(self, names: set[str]) -> list[str]:
        """Take over all processes' `new_bad`, the same ``names`` on each; returns those that are new, in order.

        Raises:
            UserError: on all processes, if these are more unreadable pictures than allowed.
        """
        new = sorted(names - self.bad)
        self.bad.update(new)
        self._check(self.bad)
        return new

    @property
    def epoch(self) -> float:
        """Passes over the data so far, the fullest bucket's count."""
        return max(c / len(b.members) for c, b in zip(self.cursors, self.buckets, strict=True))

    def _plan(self, step: int, cursors: list[int]) -> tuple[list[int], list[list[Future]]]:
        """Draw the step's bucket, move its cursor, and send this process's pictures to the decoding threads."""
        rng = generator(self.seed, "bucket", step)
        config = self.config
        grid = _pick([g.share for g in config.grids], rng)
        choices = [i for i, bucket in enumerate(self.buckets) if bucket.grid == grid]
        chosen = choices[_pick([len(self.buckets[i].members) for i in choices], rng)]
        bucket, start, size = self.buckets[chosen], cursors[chosen], config.grids[grid].batch
        after = [*cursors]
        after[chosen] += size
        share = size // (self.world * self.accumulation)
        passes = []
        for number in range(self.accumulation):
            first = (number * self.world + self.rank) * share
            passes.append([
                self._pool.submit(self._load, bucket, self._candidates(chosen, start + place), step, place)
                for place in range(first, first + share)
            ])  # fmt: skip
        return after, passes

    def _candidates(self, bucket: int, position: int) -> Iterator[int]:
        """The picture at ``position`` of the bucket's endless order, then those that stand in for it."""
        members = self.buckets[bucket].members
        epoch, offset = divmod(position, len(members))
        if self._orders.get(bucket, (None,))[0] != epoch:
            rng = generator(self.seed, "order", bucket, epoch)
            self._orders[bucket] = epoch, torch.randperm(len(members), generator=rng).tolist()
        order = self._orders[bucket][1]
        return (members[order[(offset + i) % len(order)]] for i in range(len(order)))

    def _load(
        self, bucket: Bucket, candidates: Iterator[int], step: int, place: int
    ) -> tuple[Tensor, Tensor, float, str, tuple[int, int, int, int] | None]:
        """Picture, noise, noise level, prompt and window at ``place`` of a step's batch."""
        grid = self.config.grids[bucket.grid]
        height, width = (side * self.patch_size for side in bucket.shape)
        for candidate in candidates:
            picture = self.pictures[candidate]
            try:
                pixels = picture.load(height, width)
            except UNREADABLE:
                self._found.add(picture.name)
                if self.world == 1:  # several processes judge in `learn`: an error of one would leave others waiting
                    self._check(self.bad | self._found)
                continue
            rng = generator(self.seed, "picture", step, place)
            sigma = draw_sigma(self.objective, rng, grid)
            dropped = torch.rand((), generator=rng).item() < self.config.caption_dropout
            noise = draw_noise(self.objective, pixels.shape, picture.seed, rng)
            if grid.coarse:
                noise = coarse_noise(noise, pixels, grid.coarse * self.patch_size, grid.sigma_max, rng)
            window = None
            if grid.head_crop:
                sides = [min(grid.head_crop, side) for side in bucket.shape]
                rooms = zip(bucket.shape, sides, strict=True)
                corner = [int(torch.randint(side - part + 1, (), generator=rng)) for side, part in rooms]
                window = *corner, *sides
            return pixels, noise, sigma, "" if dropped else picture.prompt, window
        raise UserError("none of the pictures can be read; check data.path")

    @staticmethod
    def _collect(parts: list[Future]) -> Batch:
        pixels, noise, sigma, prompts, windows = zip(*(part.result() for part in parts), strict=True)
        return Batch(
            torch.stack(pixels), torch.stack(noise), torch.tensor(sigma), list(prompts),
            None if windows[0] is None else list(windows),
        )  # fmt: skip

    def _check(self, bad: set[str]) -> None:
        if len(bad) > self.config.max_bad_share * len(self._names):
            names = ", ".join(sorted(bad)[:3])
            raise UserError(
                f"{len(bad)} of {len(self._names)} pictures can't be read ({names}, ...), more than "
                f"data.max_bad_share = {self.config.max_bad_share:g} allows; mend them or raise it"
            )


def _pick(weights: Sequence[float], rng: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=rng))
