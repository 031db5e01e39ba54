"""Scores of images: torchmetrics' own numbers, CLIPs of every layout, the patch-grid meter, resampling, the cache."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import save_clip, save_fg_clip, save_fg_clip2
from torch import nn

pytest.importorskip("torchmetrics", reason="scores need torchmetrics: pip install l2p_fast[evaluate]")

from l2p_fast.errors import UserError
from l2p_fast.evaluation import bootstrap, metrics, networks
from l2p_fast.evaluation.clips import load_clip
from l2p_fast.evaluation.gridmeter import measure_grid
from l2p_fast.evaluation.gridshift import ShiftedGrid, offset
from l2p_fast.evaluation.imagesets import Cache, items_of_folder
from l2p_fast.evaluation.scoring import Judges, statistics_of

torch.set_num_threads(1)
CPU = torch.device("cpu")


class TinyInception(nn.Module):
    """Takes and gives what Inception does, at a small width."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.head = nn.Conv2d(3, 6, 7, 4), nn.Linear(6, 9)
        self.calls = 0

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.ndim == 4
        self.calls += len(images)
        return self.conv(images.float() / 255).relu().mean(dim=(2, 3))

    def logits(self, features):
        return self.head(features) * 20


def write_images(folder: Path, count: int, seed: int, side: int = 304, shift: int = 0) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255 - shift, (6, 6, 3), dtype=np.uint8) + np.uint8(shift))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        rows.append(json.dumps({"file_name": f"{number:02d}.png", "text": f"image {number // 2}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    made = [write_images(folder / name, n, seed, shift=s) for name, n, seed, s in (("a", 6, 1, 0), ("b", 5, 2, 40))]
    return [items_of_folder(str(one), str(one / "captions.jsonl")) for one in made]


def stack(items) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(item.load())).permute(2, 0, 1) for item in items])


# --- torchmetrics ----------------------------------------------------------------------------------------------------
def test_fid_patch_fid_and_inception_score_are_torchmetrics_own(sets):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore

    ours, theirs = sets
    network = TinyInception()
    found = {s.name: s for s in statistics_of(ours, Judges(inception=network, reference=theirs))}
    fid = FrechetInceptionDistance(feature=network)
    fid.update(stack(theirs), real=True)
    fid.update(stack(ours), real=False)
    assert found["FID"].value(None) == pytest.approx(fid.compute().item(), rel=1e-5)

    patches = FrechetInceptionDistance(feature=network)
    for items, real in ((theirs, True), (ours, False)):
        images = stack(items)
        for image, places in zip(images, metrics.crop_places([tuple(i.shape[1:]) for i in images]), strict=True):
            assert len(places) == 20
            patches.update(torch.stack([image[:, t : t + 299, x : x + 299] for t, x in places]), real=real)
    assert found["FID-patch"].value(None) == pytest.approx(patches.compute().item(), rel=1e-5)

    class Logits(nn.Module):
        def forward(self, images):
            return network.logits(network(images))

    score = InceptionScore(feature=Logits(), splits=6)
    score.update(stack(ours))
    torch.manual_seed(0)
    assert found["IS"].value(None) == pytest.approx(score.compute()[0].item(), rel=1e-5)


def test_crops_are_the_published_ones():
    """Python's generator under seed 42, top before left, image after image."""
    import random

    rng = random.Random(42)
    wanted = [(rng.randint(0, 4096 - 299), rng.randint(0, 4096 - 299)) for _ in range(40)]
    places = metrics.crop_places([(4096, 4096)] * 2)
    assert places[0] + places[1] == wanted
    with pytest.raises(UserError, match="crops of 299 px, and an image has 128 x 256"):
        metrics.crop_places([(256, 128)])


@pytest.mark.parametrize(("count", "others"), [(5, 40), (40, 5), (40, 60), (4, 3)])
def test_resampled_frechet_distance(count, others):
    torch.manual_seed(1)
    features, reference = torch.randn(count, 12), torch.randn(others, 12) * 1.5 + 0.3
    fast = metrics.FrechetResampler(features, reference)
    for rows in (torch.arange(count), torch.randint(count, (count,))):
        wanted = metrics.frechet(features[rows].double(), reference.double())
        assert fast(rows) == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UserError, match="2 images or more"):
        metrics.frechet(features[:1], reference)


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_is_torchmetrics_own(kind, monkeypatch, tmp_path):
    from torchmetrics.functional.image import lpips

    torch.manual_seed(2)
    layers, at = [], 0
    for index, before, after, kernel, stride, padding in networks.LPIPS_LAYERS[kind]:
        if index > at:
            layers.append(nn.MaxPool2d(3 if kind == "alex" else 2, 2))
        layers += [nn.Conv2d(before, after, kernel, stride, padding), nn.ReLU()]
        at = index + 2
    backbone = nn.Sequential(*layers)
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: backbone)
    theirs = lpips._LPIPS(net=kind)
    torch.save({f"features.{k}": v for k, v in backbone.state_dict().items()}, tmp_path / "weights.pth")
    ours = networks.load_lpips(str(tmp_path / "weights.pth"), CPU)
    a, b = (torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8) for _ in range(2))
    wanted = theirs(a / 127.5 - 1, b / 127.5 - 1).flatten()
    assert torch.allclose(ours.distance(ours(a), ours(b)), wanted, rtol=1e-4)


def test_diversity_is_the_mean_over_pairs_of_a_prompt(sets):
    class Plain(nn.Module):
        def forward(self, images):
            return [images.float()]

        def distance(self, one, other):
            return (one[0] - other[0]).abs().mean()[None]

    [found] = statistics_of(sets[0], Judges(lpips=Plain()))
    images = stack(sets[0]).float()
    pairs = [(images[i] - images[i + 1]).abs().mean().item() for i in range(0, 6, 2)]
    assert len(found.keys) == 3 and found.value(None) == pytest.approx(np.mean(pairs), rel=1e-5)


@pytest.mark.parametrize("save", [save_clip, save_fg_clip, save_fg_clip2])
def test_clip_score(save, sets, tmp_path):
    """Of each layout, against the same model without our reading of it."""
    reference = save(tmp_path / "clip")
    judge = load_clip(str(tmp_path / "clip"), CPU)
    [found] = statistics_of(sets[0], Judges(long_clip=judge))
    scores = [reference(item.load(), item.long) for item in sets[0]]
    assert found.value(None) == pytest.approx(np.mean(scores), rel=1e-4)
    assert len(found.keys) == 3  # two images of each prompt


def test_clip_score_is_torchmetrics_own(sets, tmp_path):
    from torchmetrics.multimodal.clip_score import CLIPScore

    save_clip(tmp_path / "clip")
    judge = load_clip(str(tmp_path / "clip"), CPU)

    class Model:  # transformers 5 returns an object where torchmetrics expects a tensor
        config = judge.model.config

        def to(self, _):
            return self

        def get_image_features(self, pixels):
            return judge.model.get_image_features(pixels).pooler_output

        def get_text_features(self, ids, mask):
            return judge.model.get_text_features(ids, mask).pooler_output

    def processor(text=None, images=None, **_):
        if text is not None:
            return judge.tokenizer(text, return_tensors="pt", padding=True)
        return judge.processor(images=images, return_tensors="pt")

    metric = CLIPScore(model_name_or_path=lambda: (Model(), processor))
    metric.update(list(stack(sets[0])), [item.caption for item in sets[0]])
    [found] = statistics_of(sets[0], Judges(clip=judge))
    assert found.value(None) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_clip_folders_that_are_none(tmp_path, sets):
    with pytest.raises(UserError, match="no config.json"):
        load_clip(str(tmp_path), CPU)
    save_clip(tmp_path / "clip")
    whole = load_file(tmp_path / "clip/model.safetensors")
    save_file({k: v for k, v in whole.items() if "layers.1" not in k}, tmp_path / "clip/model.safetensors")
    with pytest.raises(UserError, match="holds no CLIP or FG-CLIP .its weights lack"):
        load_clip(str(tmp_path / "clip"), CPU)
    (tmp_path / "clip/model.safetensors").unlink()
    with pytest.raises(UserError, match="no .safetensors"):
        load_clip(str(tmp_path / "clip"), CPU)


# --- Weights ---------------------------------------------------------------------------------------------------------
def test_weights_run_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save({"a": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="bomb.pth can't be read as weights"):
        networks.read_weights(str(tmp_path / "bomb.pth"))
    with pytest.raises(UserError, match="is not a file"):
        networks.read_weights(str(tmp_path / "none.pth"))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is no AlexNet and no VGG-16"):
        networks.load_lpips(str(tmp_path / "other.pth"), CPU)


def test_a_missing_package_is_a_line(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1)}, tmp_path / "inception.pth")
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="needs torch-fidelity and a torchvision .*: pip install torch-fidelity torch=="
    ):
        networks.load_inception(str(tmp_path / "inception.pth"), CPU)
    monkeypatch.setattr(networks.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UserError, match=r"needs torchmetrics: pip install l2p_fast\[evaluate\]"):
        networks.import_torchmetrics("image.fid")


# --- Cache -----------------------------------------------------------------------------------------------------------
def test_features_are_computed_once(sets, tmp_path):
    ours, theirs = sets
    network = TinyInception()
    judges = Judges(inception=network, reference=theirs, cache=Cache(tmp_path / "cache"))
    first = {s.name: s.value(None) for s in statistics_of(ours, judges)}
    assert network.calls == 21 * 11
    again = {s.name: s.value(None) for s in statistics_of(ours, judges)}
    assert network.calls == 21 * 11 and again == first
    judges.names["inception"] = "inception-of-other-weights"
    statistics_of(ours, judges)
    assert network.calls == 2 * 21 * 11


def test_sizes_are_those_of_upright_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    for item, size in zip(items_of_folder(str(tmp_path)), ((30, 20), (20, 30)), strict=True):
        assert item.size() == size == item.load().size[::-1]


def test_an_interrupted_computation_goes_on(sets, tmp_path):
    cache, done = Cache(tmp_path), []

    def compute(item, index):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(item)
        return torch.tensor([float(index)])

    with pytest.raises(KeyboardInterrupt):
        cache.features("x", sets[0], compute)
    found = cache.features("x", sets[0], lambda item, index: torch.tensor([float(index)]) if index > 2 else 1 / 0)
    assert found.flatten().tolist() == list(range(6))


# --- The bootstrap ---------------------------------------------------------------------------------------------------
def test_standard_errors_of_means():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, 400).tolist()
    [row] = bootstrap.judge([metrics.mean_statistic("x", [str(i) for i in range(400)], values, None)], 400)
    assert row.value == pytest.approx(np.mean(values)) and row.count == 400
    assert row.error == pytest.approx(np.std(values) / 20, rel=0.1)
    assert row.low == pytest.approx(row.value - 1.96 * row.error, abs=0.03)
    doubled = metrics.mean_statistic("x", [str(i // 2) for i in range(800)], np.repeat(values, 2).tolist(), None)
    [twice] = bootstrap.judge([doubled], 400)  # a second image that says the same is no news
    assert twice.count == 400 and twice.error == pytest.approx(row.error, rel=0.1)


def test_a_paired_difference_is_sharper():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 5, 100)
    keys = [str(i) for i in range(100)]
    a = metrics.mean_statistic("x", keys, (hard + 1 + rng.normal(0, 0.1, 100)).tolist(), None)
    b = metrics.mean_statistic("x", keys, hard.tolist(), None)
    first, second, paired = bootstrap.compare([a], [b])
    assert paired.name == "x, difference (paired)" and 0.9 < paired.low < 1 < paired.high < 1.1
    assert paired.value == pytest.approx(first.value - second.value)
    other = metrics.mean_statistic("x", keys[1:] + ["other"], hard.tolist(), None)
    loose = bootstrap.compare([a], [other])[2]
    assert loose.name == "x, difference" and loose.low < 0 < loose.high


def test_nothing_to_measure():
    [row] = bootstrap.judge([metrics.mean_statistic("x", ["a"], [None], None)])
    assert math.isnan(row.value) and row.error is None and row.count == 0


# --- The patch grid --------------------------------------------------------------------------------------------------
def checkered(step: int, side: int = 128, period: int = 16, level: float = 120.0, seed: int = 0) -> torch.Tensor:
    """Smooth noise whose patches are ``step`` brighter and darker in turn."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn((3, side, side), generator=rng) * 2 + level
    patch = torch.arange(side) // period
    return (noise + step * ((patch[:, None] + patch[None]) % 2)).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (17, 300)])
def test_a_plain_image_has_no_grid(size):
    image = checkered(0, 300)[:, : size[0], : size[1]]
    found = measure_grid(image, 16)
    assert found.ratio == pytest.approx(1, abs=0.1) and found.smooth == found.ratio and found.dark is None
    assert found.step < 1


@pytest.mark.parametrize("step", [3, 8])
def test_a_grid_is_found_and_its_step(step):
    found = measure_grid(checkered(step), 16)
    assert found.ratio == pytest.approx(1 + step**2 / 8, rel=0.15)
    assert all(c == pytest.approx(found.ratio, rel=0.2) for c in found.channels)
    assert found.step == pytest.approx(step, rel=0.1)
    assert measure_grid(checkered(step), 13).ratio < 0.6 * found.ratio
    assert measure_grid(checkered(step).float() / 255, 16) == found


def test_a_grid_in_one_channel_and_in_the_dark():
    image = checkered(0)
    image[2] = checkered(8)[2]
    red, green, blue = measure_grid(image, 16).channels
    assert blue > 5 and max(red, green) < 1.2
    image = checkered(0)
    image[:, 60:] = checkered(8, level=30.0)[:, 60:]
    found = measure_grid(image, 16)
    assert found.dark > 5 > found.ratio
    assert measure_grid(torch.full((3, 64, 64), 100, dtype=torch.uint8), 16).ratio is None


def test_bands_change_nothing(monkeypatch):
    from l2p_fast.evaluation import gridmeter

    image = checkered(5, 200)
    whole = measure_grid(image, 16)
    monkeypatch.setattr(gridmeter, "BAND", 37)
    assert measure_grid(image, 16).as_dict() == pytest.approx(whole.as_dict())
    with pytest.raises(UserError, match="a grid of 200 px does not show in an image of 200 x 200"):
        measure_grid(image, 200)


# --- The moved grid --------------------------------------------------------------------------------------------------
class Model(nn.Module):
    """Answers with the mean of each patch: the grid itself."""

    patch_size = size_multiple = 8

    def prepare(self, caps, height, width, **_):
        return height, width

    def forward(self, pixels, t, *, cond, step):
        assert tuple(pixels.shape[-2:]) == cond
        return nn.functional.interpolate(nn.functional.avg_pool2d(pixels, 8), scale_factor=8)


@pytest.mark.parametrize("way", ["roll", "pad"])
@pytest.mark.parametrize("size", [(32, 48), (8, 16)])
def test_a_moved_grid(way, size):
    torch.manual_seed(0)
    moved, x = ShiftedGrid(Model(), way), torch.randn(2, 3, *size)
    cond = moved.prepare([], *size)
    assert not list(moved.parameters()) and moved.patch_size == 8
    outs = [moved(x, None, cond=cond, step=step) for step in range(4)]
    assert all(out.shape == x.shape for out in outs)
    for step, out in enumerate(outs):
        changes = (out.diff(dim=3).abs() > 1e-6).any(dim=2).any(dim=1).any(dim=0)
        right = offset(step, 8)[1] + (4 if way == "pad" else 0)
        assert changes.tolist() == [(c + right) % 8 == 0 for c in range(1, size[1])]
    moves = torch.tensor([offset(step, 64) for step in range(200)]).float()
    assert moves.abs().max() <= 32 and moves.mean(dim=0).abs().max() < 1
    assert offset(0, 8) == (0, 0) and len({offset(step, 64) for step in range(50)}) == 50
