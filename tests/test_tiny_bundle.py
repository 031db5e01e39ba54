"""The small world's source, and the pixel models that inherit its transformer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

pytest.importorskip("scipy", reason="the small world needs scipy: pip install l2p_fast[tiny]")

from examples.tiny import __main__ as command
from examples.tiny import bundle, flat, ldm
from examples.tiny.autoencoder import PatchAutoencoder
from examples.tiny.corpus import load_source, sample_source
from examples.tiny.fit import orthogonal
from l2p_fast.errors import UserError
from l2p_fast.models.detailer import DetailerHead
from l2p_fast.sampling.pipeline import load_pipeline

BODY = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 8,
        "axes_dims": [8, 12, 12], "axes_lens": [64, 16, 16]}  # fmt: skip


def small_source() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    return ZImageTransformer2DModel(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, **BODY).eval()


def small_vae() -> PatchAutoencoder:
    rng = torch.Generator().manual_seed(0)
    return PatchAutoencoder.fit(torch.rand(4, 3, 64, 64, generator=rng) * 2 - 1)


@torch.no_grad()
def test_flat_transformer_is_diffusers():
    model, rng = small_source(), torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=rng))
    x, t = torch.randn(2, 16, 16, 16, generator=rng), torch.tensor([0.2, 0.9])
    texts, lengths = torch.randn(2, 32, 8, generator=rng), torch.tensor([5, 32])
    found, _ = flat.forward(model, x, t, texts, lengths, *flat.ropes(model, 8), probe_layer=0, compiled=False)
    ragged = [row[:n] for row, n in zip(texts, lengths.tolist(), strict=True)]
    wanted = model(list(x.unsqueeze(2)), t, ragged, patch_size=2, return_dict=False)[0]
    torch.testing.assert_close(found, torch.stack(list(wanted)).squeeze(2), atol=2e-5, rtol=1e-4)


def test_autoencoder_is_an_orthogonal_projection():
    vae = small_vae()
    torch.testing.assert_close(vae.basis.T @ vae.basis, torch.eye(16), atol=1e-5, rtol=0)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    once = vae.decode(vae.encode(images))[0]
    torch.testing.assert_close(vae.encode(once), vae.encode(images), atol=1e-4, rtol=0)
    assert vae.encode(images).shape == (2, 16, 8, 8) and (once - images).square().mean() < images.square().mean()


@torch.no_grad()
@pytest.mark.parametrize(("patch", "side"), [(16, 128), (16, 256), (64, 512)])
def test_pixel_model_says_what_the_source_says_of_the_latent(patch, side):
    """The image's noisy means, projected, are a noisy latent; features at every token agree."""
    source, vae = small_source(), small_vae()
    model = bundle.inherit(source, vae, patch).eval()
    rng, gain = torch.Generator().manual_seed(3), side // 128
    small, sigma = torch.randn(1, 3, 128, 128, generator=rng), 0.7
    k = 1 - sigma + sigma / gain
    noisy = (k * small).repeat_interleave(gain, 2).repeat_interleave(gain, 3)
    text = torch.randn(1, 32, 8, generator=rng)
    found = model.features(noisy, torch.tensor([1 - sigma]), [text[0]])
    _, wanted = flat.forward(
        source, vae.encode(small), torch.tensor([1 - sigma / gain / k]), text, torch.tensor([32]),
        *flat.ropes(source, 8), probe_layer=1, compiled=False,
    )  # fmt: skip
    wanted = wanted.transpose(1, 2).unflatten(2, (8, 8))
    wanted = torch.nn.functional.interpolate(wanted, found.shape[-2:], mode="bilinear")
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("patch", [16, 64])
def test_samples_agree_with_what_the_model_reads(patch):
    """The crop's noise and the small image's are the same noise; windows lie inside the image."""
    recipe = bundle.RECIPES[patch]
    for seed in range(12):
        sample = bundle.draw_sample(recipe, patch, seed)
        gain, (row, column, size) = sample.side // 128, sample.window
        assert sample.clean.shape == (3, recipe.crop, recipe.crop) and 0.01 <= sample.sigma <= 1
        assert 0 <= row <= 8 - size and 0 <= column <= 8 - size
        if sample.side != next(iter(recipe.sides)) or recipe.crop % gain:
            continue  # blurred, or not on whole means
        k, cells = 1 - sample.sigma + sample.sigma / gain, recipe.crop // gain
        means = torch.nn.functional.avg_pool2d(sample.noisy, gain) / k
        top, left = round(row * 16), round(column * 16)
        part = sample.small[:, top : top + cells, left : left + cells]
        assert (part - means).abs().mean() < 0.02  # edges are drawn at each size


@torch.no_grad()
def test_large_head_contains_the_small_one():
    """From the same skip of the level outside, the inner levels give the same, whatever the channels beside it hold."""
    torch.manual_seed(0)
    small, large = DetailerHead(16, 32, 0.25), DetailerHead(64, 32, 0.375)
    bundle.inherit_inner(large, small)
    assert not large.up1[1].weight.requires_grad and large.dec1[0].weight.requires_grad
    features, known = torch.randn(1, 32, 2, 2), small.enc1[0].out_channels
    skip = torch.randn(1, large.enc1[0].out_channels, 32, 32)

    def inner(head: DetailerHead, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level in "234":
            x = getattr(head, f"enc{level}")(torch.nn.functional.max_pool2d(x, 2))
            skips.append(x)
        x = torch.nn.functional.silu(head.bottleneck[0](torch.nn.functional.max_pool2d(x, 2), features))
        for level in "432":
            x = torch.cat([getattr(head, f"up{level}")(x), skips.pop()], dim=1)
            x = getattr(head, f"dec{level}")(x)
        return head.up1(x)

    wanted = inner(small, skip[:, :known])
    torch.testing.assert_close(inner(large, skip)[:, : wanted.shape[1]], wanted)


def test_orthogonal_matrices():
    x = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(x))
    assert values.shape == (3, 16) and 0.6 < values.min() and values.max() < 1.3


@pytest.mark.slow
def test_from_nothing_to_a_bundle(tmp_path, monkeypatch):
    """Every stage runs on a model that learns nothing, and leaves folders that load."""
    monkeypatch.setattr(ldm, "PCA_IMAGES", 8)
    monkeypatch.setattr(ldm, "BATCH", 2)
    monkeypatch.setattr(ldm, "build_transformer", small_source)
    build = ldm.build_text_encoder

    def narrow(tokenizer):
        config = build(tokenizer).config
        config.hidden_size, config.head_dim = 8, 4
        return type(build(tokenizer))(config)

    monkeypatch.setattr(ldm, "build_text_encoder", narrow)
    argv = ["--folder", str(tmp_path)]
    command.main(["ldm", *argv, "--pictures", "4", "--minutes", "0.001"])
    images = sample_source(load_source(tmp_path, torch.device("cpu")), ["a red star"], [1])
    assert np.asarray(images[0]).shape == (128, 128, 3)
    for patch, name in bundle.FOLDERS.items():
        command.main(["bundle", *argv, "--patch-size", str(patch), "--minutes", "0.001"])
        config = load_pipeline(tmp_path / name).transformer.config
        assert (config.read_mean, config.x0_floor, config.rope_grid) == (patch // 16, bundle.X0_FLOOR, 8)
    begun = ["ldm", "--folder", str(tmp_path / "again"), "--pictures", "4", "--minutes", "0.001"]
    command.main([*begun, "--start", str(tmp_path / "tiny-1k")])
    assert (tmp_path / "again" / "source").exists()
    begun = ["bundle", "--folder", str(tmp_path / "again"), "--minutes", "1e-9", "--start"]
    with pytest.raises(UserError, match="must be a model of patch 16, got patch 64"):
        command.main([*begun, str(tmp_path / "tiny-4k")])
    other = load_pipeline(tmp_path / "tiny-1k")
    other.transformer.head.out_conv.bias.data.fill_(0.3)
    other.save_pretrained(tmp_path / "other")
    command.main([*begun, str(tmp_path / "other")])
    bias = load_pipeline(tmp_path / "again" / "tiny-1k").transformer.head.out_conv.bias
    assert (bias - 0.3).abs().max() < 0.05  # a new one begins at 0.8
