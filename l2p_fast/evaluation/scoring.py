"""What a set of images is scored with, and its statistics: each score where what it needs is given."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import FieldError, UserError
from .clips import ClipModel, load_clip
from .gridmeter import measure_grid
from .imagesets import Cache, Item, bytes_of, items_of_folder
from .metrics import (
    CROP,
    CROPS,
    Statistic,
    crop_places,
    diversity,
    frechet_statistic,
    inception_statistic,
    mean_statistic,
    units,
)
from .networks import BATCH, load_inception, load_lpips


@dataclass
class Judges:
    """What scores images; None: not scored so.

    Attributes:
        inception: bytes (B, 3, H, W) -> features (B, D), such as `networks.Inception`; with a method ``logits``, the
            Inception Score too.
        clip, long_clip: `clips.ClipModel`s, for captions and for long ones.
        lpips: `networks.Lpips`, or what has its ``forward`` and ``distance``.
        reference: images that FID compares with.
        resize: side in pixels that FID brings both sets to; 0: as they are.
        period: of the patch grid in pixels; 0: not measured.
        cache: where features are kept.
        device: of the networks.
        names: of the networks and their weights, for the cache.
    """

    inception: nn.Module | None = None
    clip: ClipModel | None = None
    long_clip: ClipModel | None = None
    lpips: nn.Module | None = None
    reference: Sequence[Item] = ()
    resize: int = 0
    period: int = 0
    cache: Cache = field(default_factory=lambda: Cache(None))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    names: dict[str, str] = field(default_factory=dict)

    def name(self, judge: str) -> str:
        return self.names.get(judge, judge)


LOADERS = {"inception": load_inception, "clip": load_clip, "long_clip": load_clip, "lpips": load_lpips}


def load_judges(
    paths: Mapping[str, str],
    reference: str | None = None,
    resize: int = 0,
    period: int = 0,
    cache: str | Path | None = None,
    device: str | None = None,
) -> Judges:
    """The networks of ``paths`` ("inception", "clip", "long_clip", "lpips" -> file or folder), on their device.

    Raises:
        UserError: weights that can't be used, a missing package, a device that isn't there.
    """
    kind = device or "auto"
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if kind == "auto" else kind)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise FieldError("device", f"{kind}: torch {torch.__version__} sees none; try {{device}} cpu") from error
    judges = Judges(resize=resize, period=period, device=place, cache=Cache(None if cache is None else Path(cache)))
    for name, path in paths.items():
        setattr(judges, name, LOADERS[name](path, place))
        judges.names[name] = weights_name(name, path)
    if reference is not None:
        judges.reference = items_of_folder(reference)
    return judges


def weights_name(judge: str, path: str) -> str:
    """A name of a network by its weights' file or folder, for the cache."""
    facts = os.stat(path)
    text = f"{os.path.realpath(path)}|{facts.st_size}|{facts.st_mtime_ns}"
    return f"{judge}-{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


def statistics_of(items: Sequence[Item], judges: Judges) -> list[Statistic]:
    """All scores of a set of images that ``judges`` can give.

    Raises:
        UserError: an image that can't be read, or is too small; no captions for CLIP.
    """
    keys = [item.prompt or item.key for item in items]
    found: list[Statistic] = []
    if judges.inception is not None:
        found += _inception(items, keys, judges)
    for judge, name, long in ((judges.clip, "CLIP score", False), (judges.long_clip, "CLIP score, long", True)):
        if judge is not None:
            found.append(_clip(name, items, keys, judge, judges, long))
    if judges.lpips is not None:
        found.append(_diversity(items, judges))
    if judges.period:
        found += _grid(items, keys, judges)
    return found


@torch.inference_mode()
def _inception(items: Sequence[Item], keys: Sequence[str], judges: Judges) -> list[Statistic]:
    def whole(item: Item, _: int) -> Tensor:
        image = _resized(item.load(), judges.resize, Image.Resampling.BILINEAR)
        return judges.inception(bytes_of(image)[None].to(judges.device))[0]

    def crops(places: Sequence[Sequence[tuple[int, int]]]):
        def of_item(item: Item, index: int) -> Tensor:
            image = bytes_of(_resized(item.load(), judges.resize, Image.Resampling.LANCZOS))
            parts = [image[:, top : top + CROP, left : left + CROP] for top, left in places[index]]
            made = [
                judges.inception(torch.stack(parts[start : start + BATCH]).to(judges.device))
                for start in range(0, CROPS, BATCH)
            ]
            return torch.cat(made)

        return of_item

    def patches(images: Sequence[Item]) -> Tensor:
        places = crop_places([(judges.resize,) * 2 if judges.resize else item.size() for item in images])
        name = judges.name("inception") + "-patch"
        return judges.cache.features(name, images, crops(places), [f"{judges.resize} {at}" for at in places])

    name, more = judges.name("inception"), f"whole {judges.resize}"
    features = judges.cache.features(name, items, whole, [more] * len(items))
    found = []
    if judges.reference:
        reference = judges.cache.features(name, judges.reference, whole, [more] * len(judges.reference))
        found.append(frechet_statistic("FID", keys, features, reference))
        found.append(frechet_statistic("FID-patch", keys, patches(items), patches(judges.reference)))
    if hasattr(judges.inception, "logits"):
        found.append(inception_statistic(keys, judges.inception.logits(features.to(judges.device)).cpu()))
    return found


def _resized(image: Image.Image, side: int, how: Image.Resampling) -> Image.Image:
    return image if not side or image.size == (side, side) else image.resize((side, side), how)


def _clip(
    name: str, items: Sequence[Item], keys: Sequence[str], judge: ClipModel, judges: Judges, long: bool
) -> Statistic:
    texts = [item.long if long else item.caption for item in items]
    if None in texts:
        lost = items[texts.index(None)].path
        raise UserError(f"{lost} has no caption to compare with; give --captions, or leave --clip and --long-clip out")
    kind = judges.name("long_clip" if long else "clip")
    features = judges.cache.features(kind, items, lambda item, _: judge.image(item.load()))
    different = list(dict.fromkeys(texts))
    said = torch.cat([judge.texts(different[start : start + BATCH]) for start in range(0, len(different), BATCH)])
    place = {text: number for number, text in enumerate(different)}
    scores = 100 * (features * said[[place[text] for text in texts]]).sum(dim=1)
    return mean_statistic(name, keys, scores.tolist(), lower=False)


@torch.inference_mode()
def _diversity(items: Sequence[Item], judges: Judges) -> Statistic:
    """Over the prompts that have two images or more; features of one prompt's images are held at a time."""
    prompts, members = units([item.prompt or item.key for item in items])
    several = [(prompt, rows) for prompt, rows in zip(prompts, members, strict=True) if len(rows) > 1]

    def of_prompt(_: Item, index: int) -> Tensor:
        images = [items[row] for row in several[index][1].tolist()]
        made = [judges.lpips(bytes_of(item.load())[None].to(judges.device)) for item in images]
        if len({tuple(one[0].shape) for one in made}) > 1:
            raise UserError(f"images of {several[index][0]!r} have several sizes, and LPIPS compares equal ones")
        return torch.tensor(diversity(made, judges.lpips.distance))

    firsts = [items[rows[0]] for _, rows in several]
    more = ["|".join(items[row].digest() for row in rows.tolist()) for _, rows in several]
    values = judges.cache.features(judges.name("lpips"), firsts, of_prompt, more).tolist() if firsts else []
    return mean_statistic("LPIPS diversity", [prompt for prompt, _ in several], values, lower=None)


def _grid(items: Sequence[Item], keys: Sequence[str], judges: Judges) -> list[Statistic]:
    bar = tqdm(items, desc="patch grid", unit="image", disable=not sys.stderr.isatty())
    readings = [measure_grid(bytes_of(item.load()), judges.period).as_dict() for item in bar]
    names = {"grid": "grid", "red": "grid, red", "green": "grid, green", "blue": "grid, blue",
             "dark": "grid, dark pixels", "smooth": "grid, smooth areas", "step": "grid, step of 255"}  # fmt: skip
    return [
        mean_statistic(f"{words} ({judges.period} px)", keys, [reading[name] for reading in readings], lower=True)
        for name, words in names.items()
    ]
