"""Scores of a set of images as statistics: a value, and what it would be of a resample of the set.

Values are torchmetrics' own, from features computed before. Resamples of the Frechet distance go by a faster formula of
ours, which the tests hold to torchmetrics' number.

N images, D features, K crops of an image.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from .networks import import_torchmetrics

CROPS, CROP, CROP_SEED = 20, 299, 42  # of FID-patch, as PixVerve's scorer has them
SPLITS = 10  # of the Inception Score


@dataclass(frozen=True)
class Statistic:
    """A score, and all that resampling it takes.

    Attributes:
        name: what it measures.
        keys: names of the units that are drawn again and again: prompts where an image has one, else images.
        members: rows of each unit.
        value: the score of the rows given; of None, of the set as it is.
        lower: whether lower is better; None: neither is.
    """

    name: str
    keys: tuple[str, ...]
    members: tuple[Tensor, ...]
    value: Callable[[Tensor | None], float]
    lower: bool | None = None


def units(keys: Sequence[str], rows_each: int = 1) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Rows by key, in the order of the keys; ``rows_each`` rows belong to each of ``keys``."""
    found: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        found.setdefault(key, []).extend(range(number * rows_each, (number + 1) * rows_each))
    return tuple(found), tuple(torch.tensor(rows) for rows in found.values())


def mean_statistic(name: str, keys: Sequence[str], values: Sequence[float | None], lower: bool | None) -> Statistic:
    """The mean of a score that every image has; None: this one has none."""
    kept = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
    held = torch.tensor([value for _, value in kept], dtype=torch.float64)

    def value(rows: Tensor | None) -> float:
        return (held if rows is None else held[rows]).mean().item()

    return Statistic(name, *units([key for key, _ in kept]), value, lower)


# --- Frechet distance ------------------------------------------------------------------------------------------------
class _Given(nn.Module):
    """Stands where torchmetrics wants a network: what it is given are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet(features: Tensor, reference: Tensor) -> float:
    """The Frechet distance of two sets of features (N, D), (M, D): torchmetrics' own number.

    Raises:
        UserError: a set of fewer than 2.
    """
    if min(len(features), len(reference)) < 2:
        raise UserError(f"FID needs 2 images or more, got {len(features)} and {len(reference)} to compare with")
    metric = import_torchmetrics("image.fid").FrechetInceptionDistance(feature=_Given(features.shape[1]))
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return metric.compute().item()


class FrechetResampler:
    """The Frechet distance of many subsets of one set to one reference.

    With covariances S of a subset and R'R of the reference, the eigenvalues of S R'R are those of the small matrix
    (X R')'(X R'), where X are the subset's centered features; X R' is computed once for all.
    """

    def __init__(self, features: Tensor, reference: Tensor):
        self.features, reference = features.double(), reference.double()
        self.mean = reference.mean(dim=0)
        centered = (reference - self.mean) / math.sqrt(len(reference) - 1)
        self.trace = centered.square().sum()
        if len(centered) > centered.shape[1]:
            values, vectors = torch.linalg.eigh(centered.T @ centered)
            centered = values.clamp(min=0).sqrt()[:, None] * vectors.T
        self.moved = self.features @ centered.T

    def __call__(self, rows: Tensor) -> float:
        chosen, moved = self.features[rows], self.moved[rows]
        mean, freedom = chosen.mean(dim=0), len(rows) - 1
        moved = moved - moved.mean(dim=0)
        small = moved @ moved.T if len(moved) < moved.shape[1] else moved.T @ moved
        root = torch.linalg.eigvalsh(small / freedom).clamp(min=0).sqrt().sum()
        trace = (chosen - mean).square().sum() / freedom
        return ((mean - self.mean).square().sum() + trace + self.trace - 2 * root).item()


def frechet_statistic(name: str, keys: Sequence[str], features: Tensor, reference: Tensor) -> Statistic:
    """Of features (N, D), or (N, K, D) with the crops of an image together; the reference likewise."""
    each = features.shape[1] if features.ndim == 3 else 1
    features, reference = features.flatten(0, -2), reference.flatten(0, -2)
    resampler: list[FrechetResampler] = []

    def value(rows: Tensor | None) -> float:
        if rows is None:
            return frechet(features, reference)
        if not resampler:
            resampler.append(FrechetResampler(features, reference))
        return resampler[0](rows)

    return Statistic(name, *units(keys, each), value, True)


def crop_places(sizes: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """(top, left) of the crops of each image of (height, width), in order, as PixVerve's scorer draws them.

    Raises:
        UserError: an image smaller than a crop.
    """
    rng, places = random.Random(CROP_SEED), []
    for height, width in sizes:
        if min(height, width) < CROP:
            raise UserError(f"FID-patch takes crops of {CROP} px, and an image has {width} x {height}; give --resize")
        places.append([(rng.randint(0, height - CROP), rng.randint(0, width - CROP)) for _ in range(CROPS)])
    return places


# --- Inception Score -------------------------------------------------------------------------------------------------
def inception_score(logits: Tensor) -> float:
    """The Inception Score of logits (N, C), over 10 random parts: torchmetrics' own number under seed 0."""
    inception = import_torchmetrics("image.inception")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features take memory; that one part has no deviation
        metric = inception.InceptionScore(feature=_Given(logits.shape[1]), splits=min(SPLITS, len(logits)))
        metric.update(logits)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return metric.compute()[0].item()


def inception_statistic(keys: Sequence[str], logits: Tensor) -> Statistic:
    return Statistic("IS", *units(keys), lambda rows: inception_score(logits if rows is None else logits[rows]), False)


# --- Diversity -------------------------------------------------------------------------------------------------------
def diversity(features: Sequence[list[Tensor]], distance: Callable[[list[Tensor], list[Tensor]], Tensor]) -> float:
    """Mean distance of all pairs of images of one prompt."""
    pairs = [distance(one, other).item() for one, other in itertools.combinations(features, 2)]
    return math.fsum(pairs) / len(pairs)
