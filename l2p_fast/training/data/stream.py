"""Buckets by shape, and the batches of a run.

An epoch is a permutation of a bucket. What a batch holds follows from the seed and from how many images of its bucket
were drawn before: that position is the state. An image that can't be read is counted, named and replaced by the next
one in order; so is a sample that lacks its image or its prompt.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from ..config import DataConfig, ObjectiveConfig
from ..objective import coarse_noise, draw_noise, draw_sigma, generator
from .layouts import UNREADABLE, TrainingImage


def shapes_of(tokens: int, max_aspect: float, step: int = 1) -> list[tuple[int, int]]:
    """Token grids (h, w) of at most ``tokens``, as many as fit, within the aspect; sides are multiples of ``step``.

    The squarest first. With ``max_aspect`` 1 that is the only one.
    """
    side = math.isqrt(tokens) // step * step
    if side == 0:
        raise UserError(f"data.grids: {tokens} tokens are fewer than the smallest image has ({step * step})")
    found = {(side, side)}
    for short in range(step, side, step):
        long = tokens // short // step * step
        if long / short <= max_aspect and short * long >= 0.9 * tokens:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape))


@dataclass
class Bucket:
    """Images of one shape: a grid of the configuration, (h, w) tokens, places in the list of images."""

    grid: int
    shape: tuple[int, int]
    members: list[int]


def make_buckets(
    images: Sequence[TrainingImage], config: DataConfig, step: int, bad: set[str], workers: int
) -> list[Bucket]:
    """Sort the images into the shapes of each grid by their aspect; the names of unreadable ones go to ``bad``.

    With squares only no image is opened.

    Raises:
        UserError: a grid without an image.
    """
    aspects: list[float | None] = [None if image.prompt is None else 1.0 for image in images]
    if config.max_aspect > 1:

        def aspect(image: TrainingImage) -> float | None:
            if image.prompt is None:
                return None
            try:
                with image.open() as opened:
                    turned = opened.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF: lies on its side
                    return opened.width / opened.height if turned else opened.height / opened.width
            except UNREADABLE:
                return None

        with ThreadPoolExecutor(workers) as pool:
            aspects = list(pool.map(aspect, images))
    bad.update(image.name for image, a in zip(images, aspects, strict=True) if a is None)
    buckets = []
    for number, grid in enumerate(config.grids):
        shapes = shapes_of(grid.tokens, config.max_aspect, step)
        members: dict[tuple[int, int], list[int]] = {shape: [] for shape in shapes}
        for i, a in enumerate(aspects):
            if a is not None and images[i].path == (grid.path or config.path):
                members[min(shapes, key=lambda s, a=a: abs(math.log(s[0] / s[1]) - math.log(a)))].append(i)
        if not any(members.values()):
            raise UserError(f"none of the images of {grid.path or config.path} can be read; check data.path")
        buckets += [Bucket(number, shape, places) for shape, places in members.items() if places]
    return buckets


@dataclass
class Batch:
    """What one process passes through the model at once: B images of one size.

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
        images: all of them.
        buckets: of `make_buckets`.
        config, objective: of the data, and of what is drawn for each image.
        patch_size: pixels of a side of a token.
        seed: of the run.
        rank, world: which of how many processes; each gets its part of every step's batch.
        accumulation: passes that a step's batch is cut into.
        bad: names of unreadable images found so far, the same for each process.

    Attributes:
        bad: names of the unreadable images that all processes know of.

    Raises:
        UserError: a batch that can't be shared out; more unreadable images than allowed.
    """

    def __init__(
        self, images: Sequence[TrainingImage], buckets: Sequence[Bucket], config: DataConfig,
        objective: ObjectiveConfig, patch_size: int, seed: int,
        rank: int = 0, world: int = 1, accumulation: int = 1, bad: Iterable[str] = (),
    ):  # fmt: skip
        self.images, self.buckets, self.config, self.objective = images, list(buckets), config, objective
        self.patch_size, self.seed, self.rank, self.world, self.accumulation = (
            patch_size, seed, rank, world, accumulation
        )  # fmt: skip
        self.bad, self._found, self._names = set(), set(bad), {image.name for image in images}
        for i, grid in enumerate(config.grids):
            if grid.batch % (world * accumulation):
                raise UserError(
                    f"data.grids.{i}.batch = {grid.batch} images can't be shared by {world} processes x "
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
        """Names of the unreadable images that this process found and others may not know of: see `learn`."""
        return self._found - self.bad

    def learn(self, names: set[str]) -> list[str]:
        """Take over all processes' `new_bad`, the same ``names`` on each; returns those that are new, in order.

        Raises:
            UserError: on all processes, if these are more unreadable images than allowed.
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
        """Draw the step's bucket, move its cursor, and send this process's images to the decoding threads."""
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
        """The image at ``position`` of the bucket's endless order, then those that stand in for it."""
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
        """Image, noise, noise level, prompt and window at ``place`` of a step's batch."""
        grid = self.config.grids[bucket.grid]
        height, width = (side * self.patch_size for side in bucket.shape)
        for candidate in candidates:
            image = self.images[candidate]
            try:
                pixels = image.load(height, width)
            except UNREADABLE:
                self._found.add(image.name)
                if self.world == 1:  # several processes judge in `learn`: an error of one would leave others waiting
                    self._check(self.bad | self._found)
                continue
            rng = generator(self.seed, "picture", step, place)
            sigma = draw_sigma(self.objective, rng, grid)
            dropped = torch.rand((), generator=rng).item() < self.config.caption_dropout
            noise = draw_noise(self.objective, pixels.shape, image.seed, rng)
            if grid.coarse:
                noise = coarse_noise(noise, pixels, grid.coarse * self.patch_size, grid.sigma_max, rng)
            window = None
            if grid.head_crop:
                sides = [min(grid.head_crop, side) for side in bucket.shape]
                rooms = zip(bucket.shape, sides, strict=True)
                corner = [int(torch.randint(side - part + 1, (), generator=rng)) for side, part in rooms]
                window = *corner, *sides
            return pixels, noise, sigma, "" if dropped else image.prompt, window
        raise UserError("none of the images can be read; check data.path")

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
                f"{len(bad)} of {len(self._names)} images can't be read ({names}, ...), more than "
                f"data.max_bad_share = {self.config.max_bad_share:g} allows; mend them or raise it"
            )


def _pick(weights: Sequence[float], rng: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=rng))
