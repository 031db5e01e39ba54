"""Layouts, buckets, order, unreadable images, cached features."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from l2p_fast.errors import UserError
from l2p_fast.training.config import DataConfig, GridConfig, ObjectiveConfig
from l2p_fast.training.data import (
    UNREADABLE,
    Features,
    Stream,
    TrainingImage,
    list_images,
    make_buckets,
    make_features,
    shapes_of,
)


def image(number: int, width: int = 32, height: int = 32) -> Image.Image:
    """All of one color: its red tells which one it is."""
    return Image.fromarray(np.full((height, width, 3), (number, 100, 200), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def write_csv(folder, count=6, size=lambda i: (32, 32)):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        image(i, *size(i)).save(folder / f"{i}.png")
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt", "seed"), *((f"{i}.png", f"p{i}", i) for i in range(count))])
    return folder


def write_imagefolder(folder, count=6):
    write_csv(folder, count)
    (folder / "metadata.csv").unlink()
    rows = [{"file_name": f"{i}.png", "text": f"p{i}", "seed": i} for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_shard(path, samples):
    """``samples``: the content of each member, by name."""
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_shards(folder, count=6):
    folder.mkdir()
    for shard in range(2):
        samples = {}
        for i in range(shard * count // 2, (shard + 1) * count // 2):
            samples[f"part/{i:03d}.png"] = png(image(i))
            about = ("json", json.dumps({"caption": f"p{i}", "seed": i})) if shard else ("txt", f"p{i}\n")
            samples[f"part/{i:03d}.{about[0]}"] = about[1].encode()
        write_shard(folder / f"{shard}.tar", samples)
    return folder


def write_published(folder, count=6):
    """Tars without captions, and the table beside them."""
    folder.mkdir()
    for shard in range(2):
        numbers = range(shard * count // 2, (shard + 1) * count // 2)
        write_shard(folder / f"{shard}.tar", {f"set_20k/images/Posters_{i}_2.jpg": png(image(i)) for i in numbers})
    rows = [(f"images/Posters_{i}_2.jpg", f"p{i}", i) for i in range(count)]
    with open(folder / "set_20k.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt", "seed"), *rows])
    (folder / "other.csv").write_text("a,b\n1,2\n")
    return folder


def write_texts(folder, count=6):
    """The other columns of the published sets."""
    write_csv(folder, count)
    table = folder / "metadata.csv"
    table.write_text(table.read_text().replace("image,prompt", "file_name,text", 1))
    return folder


@pytest.mark.parametrize("write", [write_csv, write_imagefolder, write_shards, write_published, write_texts])
def test_layouts_hold_the_same(tmp_path, write):
    images = list_images(DataConfig(path=str(write(tmp_path / "d"))))
    assert [p.prompt for p in images] == [f"p{i}" for i in range(6)]
    assert [p.seed for p in images][3:] == [3, 4, 5]
    for i, p in enumerate(images):
        pixels = p.load(16, 48)
        assert pixels.shape == (3, 16, 48) and pixels.dtype == torch.float32
        torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([i, 100, 200]) / 127.5 - 1)


def test_a_table_beside_shards_names_what_is_missing(tmp_path):
    folder = write_published(tmp_path / "d")
    (folder / "1.tar").unlink()
    write_shard(folder / "2.tar", {"other/Posters_0_2.jpg": png(image(9)), "x/Posters_4_2.jpg": png(image(4))})
    images = list_images(DataConfig(path=str(folder / "set_20k.csv")))
    readable = [number for number, one in enumerate(images) if one.member]
    assert readable == [0, 1, 2, 4] and images[0].member == "set_20k/images/Posters_0_2.jpg"
    with pytest.raises(UNREADABLE):
        images[3].open()


@pytest.mark.parametrize("length", [512 * 5, 512 * 5 + 100, 512 * 6, 512 * 6 + 10, 512 * 7])
def test_a_shard_that_ends_early_is_named(tmp_path, length):
    """The first sample of the second shard takes 4 blocks of 512 bytes; then come a header, an image, a header."""
    shard = write_shards(tmp_path / "d") / "1.tar"
    shard.write_bytes(shard.read_bytes()[:length])
    images = list_images(DataConfig(path=str(tmp_path / "d")))
    assert [p.prompt for p in images if p.prompt is not None] == ["p0", "p1", "p2", "p3"]
    lost = [p.name for p in images if p.prompt is None]
    assert f"{shard}:(the shard ends early)" in lost and set(lost[:-1]) <= {
        f"{shard}:part/004 (no prompt)", f"{shard}:part/004 (its prompt is damaged)",
    }  # fmt: skip


def test_samples_that_lack_something_are_named_and_skipped(tmp_path):
    good = {"0.png": png(image(0)), "0.txt": b"p0", "1.png": png(image(1)), "1.json": b'{"text": "p1"}'}
    write_shard(tmp_path / "a.tar", {
        **good, "2.png": b"", "3.txt": b"p3", "4.png": b"", "4.json": b"{", "5.png": b"", "5.json": b"[5]",
        "6.png": b"", "6.txt": b"\xff",
    })  # fmt: skip
    for aspect in (1.0, 2.0):
        s = stream(tmp_path, max_bad_share=0.8, max_aspect=aspect)
        assert {tuple(sorted(s.next()[0].prompts)) for _ in range(4)} == {("p0", "p1")}
        assert [name.rpartition(":")[2] for name in s.learn(s.new_bad())] == [
            "2 (no prompt)", "3 (no image)", "4 (its prompt is damaged)", "5 (its prompt is damaged)",
            "6 (its prompt is damaged)",
        ]  # fmt: skip
    assert Features(tmp_path / "f").missing(p.prompt for p in s.images) == ["p0", "p1"]
    with pytest.raises(UserError, match="5 of 7 images can't be read .*a.tar:2 "):
        stream(tmp_path)
    write_shard(tmp_path / "a.tar", {"0.txt": b"p0"})
    with pytest.raises(UserError, match="none of the images"):
        stream(tmp_path, max_bad_share=1.0)


def test_exif_turns_even_beside_a_damaged_tag(tmp_path):
    """PIL reads such a tag, but fails to write it (struct.error)."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "camera"  # a quarter turn; the model, whose tag becomes one of numbers
    image = Image.fromarray(np.repeat(np.uint8([[[0] * 3], [[200] * 3]]), 16, axis=0).repeat(32, axis=1))
    image.save(tmp_path / "a.jpg", exif=exif.tobytes().replace(b"\x01\x10", b"\x01\x00"))
    pixels = TrainingImage(str(tmp_path / "a.jpg"), "").load(32, 32)
    assert pixels[..., 0].mean() > 0.5 and pixels[..., -1].mean() < -0.9  # the lower half is the left one now


@pytest.mark.parametrize(("side", "readable"), [(32768, True), (32769, False)])
def test_large_images_are_no_bombs(tmp_path, monkeypatch, recwarn, side, readable):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    header = bytearray(png(image(0))[:33])  # signature and IHDR alone: sides at 16, check sum at 29
    header[16:24] = struct.pack(">II", side, side)
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    (tmp_path / "a.png").write_bytes(header + png(image(0))[33:])
    if readable:
        assert TrainingImage(str(tmp_path / "a.png"), "").open().size == (side, side)
    else:
        with pytest.raises(UNREADABLE):
            TrainingImage(str(tmp_path / "a.png"), "").open()
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def test_wrong_data(tmp_path):
    with pytest.raises(UserError, match="no training data"):
        list_images(DataConfig())
    with pytest.raises(UserError, match="holds no metadata.csv"):
        list_images(DataConfig(path=str(tmp_path)))
    (tmp_path / "metadata.csv").write_text("image,seed\na.png,1\n")
    with pytest.raises(UserError, match="image 1: wanted image"):
        list_images(DataConfig(path=str(tmp_path)))
    for seed in ("often", "inf", 2**64, -(2**63) - 1):
        (tmp_path / "metadata.csv").write_text(f"image,prompt,seed\na.png,x,1\nb.png,x,{seed}\n")
        with pytest.raises(UserError, match=r"metadata.csv, image 2: seed must be a whole number of 64 bits, got "):
            list_images(DataConfig(path=str(tmp_path)))
    (tmp_path / "metadata.csv").write_text("image,prompt,seed\n")
    with pytest.raises(UserError, match="names no images"):
        list_images(DataConfig(path=str(tmp_path)))
    good = '{"file_name": "a.png", "text": "x", "seed": %s}\n'
    for line in ("[1]", "3", "null", '"text"', "{", '{"file_name": 1, "text": "x"}', good % "Infinity", good % 2**64):
        (tmp_path / "metadata.jsonl").write_text(good % 1 + "\n" + line)
        with pytest.raises(UserError, match="metadata.jsonl, image 2: "):
            list_images(DataConfig(path=str(tmp_path), layout="imagefolder"))


def test_pipes_are_no_files(tmp_path):
    """Reading one would wait for ever."""
    folder = write_csv(tmp_path / "d", 10)
    (folder / "3.png").unlink()
    os.mkfifo(folder / "3.png")
    s = stream(folder, max_bad_share=0.1)
    assert "p3" not in [p for _ in range(5) for p in s.next()[0].prompts]
    assert s.new_bad() == {str(folder / "3.png")}
    for name, layout in (("metadata.csv", "csv"), ("metadata.jsonl", "imagefolder"), ("a.tar", "webdataset")):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match="can't read .*not a regular file"):
            list_images(DataConfig(path=str(folder), layout=layout))
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        Features(tmp_path)


def test_prompts_that_are_hardly_text(tmp_path):
    rows = ['{"file_name": "a.png", "text": "a \\ud800"}', '{"file_name": "b.png", "text": "' + "x" * 10**6 + '"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    prompts = [image.prompt for image in list_images(DataConfig(path=str(tmp_path)))]
    assert prompts[0] == "a ?" and Features(tmp_path / "f").missing(prompts) == prompts
    (tmp_path / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match="image 1: "):
        list_images(DataConfig(path=str(tmp_path)))


def test_shapes_of_a_token_count():
    assert shapes_of(4096, 1.0) == [(64, 64)]
    shapes = shapes_of(4096, 2.0)
    assert shapes[0] == (64, 64) and all(0.9 * 4096 <= h * w <= 4096 and max(h / w, w / h) <= 2 for h, w in shapes)
    assert {(w, h) for h, w in shapes} == set(shapes)
    assert all(h % 2 == 0 and w % 2 == 0 for h, w in shapes_of(4096, 2.0, step=2))
    with pytest.raises(UserError, match="fewer than"):
        shapes_of(3, 1.0, step=2)


def stream(folder, batch=2, world=1, rank=0, accumulation=1, **config):
    config = DataConfig(path=str(folder), workers=1, **{"grids": [GridConfig(tokens=4, batch=batch)], **config})
    images, bad = list_images(config), set()
    buckets = make_buckets(images, config, 1, bad, 1)
    return Stream(images, buckets, config, ObjectiveConfig(), 16, 0, rank, world, accumulation, bad)


def test_aspects_go_to_their_buckets(tmp_path):
    folder = write_csv(tmp_path / "d", 9, lambda i: [(32, 32), (64, 32), (30, 66)][i % 3])
    s = stream(folder, batch=1, max_aspect=2.0, grids=[GridConfig(tokens=32, batch=1)])
    found = {}
    for _ in range(12):
        [batch] = s.next()
        height, width = batch.pixels.shape[-2:]
        found.setdefault(int(batch.prompts[0][1:]) % 3, set()).add((height > width) - (height < width))
    assert found == {0: {0}, 1: {-1}, 2: {1}}


def test_every_epoch_shows_every_image_once(tmp_path):
    s = stream(write_csv(tmp_path / "d"))
    epochs = [[p for _ in range(3) for p in s.next()[0].prompts] for _ in range(3)]
    assert all(sorted(epoch) == [f"p{i}" for i in range(6)] for epoch in epochs)
    assert epochs[0] != epochs[1] and s.epoch == 3.0


def test_processes_and_passes_share_a_batch(tmp_path):
    folder = write_csv(tmp_path / "d", 9)
    [whole] = stream(folder, batch=4).next()
    parts = [stream(folder, batch=4, world=2, rank=r, accumulation=2).next() for r in (0, 1)]
    ordered = [parts[r][n] for n in (0, 1) for r in (0, 1)]
    for name in ("pixels", "noise", "sigma"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(b, name) for b in ordered]))
    with pytest.raises(UserError, match="multiple of 3"):
        stream(folder, batch=4, world=3)


def test_position_is_state(tmp_path):
    folder = write_csv(tmp_path / "d")
    one = stream(folder)
    for _ in range(4):
        one.next()
    state = json.loads(json.dumps(one.state()))
    other = stream(folder)
    other.restore(state)
    for _ in range(3):
        [a], [b] = one.next(), other.next()
        assert a.prompts == b.prompts and torch.equal(a.noise, b.noise) and torch.equal(a.sigma, b.sigma)


def test_unreadable_images_are_named_and_skipped(tmp_path):
    folder = write_csv(tmp_path / "d", 10)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    (folder / "5.png").unlink()
    s = stream(folder, max_bad_share=0.2)
    prompts = [p for _ in range(5) for p in s.next()[0].prompts]
    assert len(prompts) == 10 and not {"p3", "p5"} & set(prompts)
    assert s.learn(s.new_bad()) == [str(folder / "3.png"), str(folder / "5.png")] and s.new_bad() == set()
    strict = stream(folder, max_bad_share=0.1)
    with pytest.raises(UserError, match="2 of 10 images can't be read .*3.png"):
        for _ in range(5):
            strict.next()
    s = stream(folder, max_bad_share=0.2, max_aspect=1.5)  # found when the buckets are made
    assert len(s.learn(s.new_bad())) == len(s.bad) == 2


def test_processes_judge_unreadable_images_together(tmp_path):
    folder = write_csv(tmp_path / "d", 10)
    for name in ("1.png", "4.png", "7.png"):
        (folder / name).unlink()
    ranks = [stream(folder, world=2, rank=rank, max_bad_share=0.2) for rank in (0, 1)]
    for rank in ranks:
        for _ in range(10):
            rank.next()  # none fails alone
    for rank in ranks:
        with pytest.raises(UserError, match="3 of 10 images can't be read"):
            rank.learn(ranks[0].new_bad() | ranks[1].new_bad())


def test_unreadable_images_are_remembered_by_name(tmp_path):
    folder = write_csv(tmp_path / "d", 10)
    for name in ("8.png", "9.png"):
        (folder / name).unlink()
    one = stream(folder, max_bad_share=0.2)
    for _ in range(5):
        one.next()
    one.learn(one.new_bad())
    state = json.loads(json.dumps(one.state()))
    rows = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join(row for row in rows if not row.startswith(("1.png", "9.png"))))
    other = stream(folder, max_bad_share=0.2)
    other.restore(state)
    for _ in range(5):
        other.next()
    assert other.bad == {str(folder / "8.png")} and not other.new_bad()


def test_dropped_captions(tmp_path):
    s = stream(write_csv(tmp_path / "d"), caption_dropout=0.5)
    prompts = [p for _ in range(60) for p in s.next()[0].prompts]
    assert 30 < prompts.count("") < 90


def test_features(tmp_path):
    features = Features(tmp_path)
    assert features.missing(["a", "b", "a"]) == ["a", "b"]
    with pytest.raises(UserError, match="give data.text_encoder"):
        make_features(features, ["a"], "", torch.device("cpu"))
    values = [torch.randn(3, 4), torch.randn(5, 4)]
    features.add(["a", "b"], values)
    features.refresh()
    assert features.missing(["a", "b", "c"]) == ["c"] and torch.equal(features["b"], values[1])


def test_features_are_the_text_encoders(tmp_path):
    from tiny_pipeline import tiny_text_encoder, tiny_tokenizer

    from l2p_fast.models.text import encode_prompts

    tiny_text_encoder().save_pretrained(tmp_path / "z" / "text_encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "z" / "tokenizer")
    features = Features(tmp_path / "f")
    make_features(features, ["a cat", ""], str(tmp_path / "z"), torch.device("cpu"))
    features.refresh()
    [wanted] = encode_prompts(tiny_text_encoder(), tiny_tokenizer(), ["a cat"])
    torch.testing.assert_close(features["a cat"], wanted)
