"""How clean the small world's images look: the measures say of the renderer what it draws, and notice what is wrong."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("scipy", reason="the small world needs scipy: pip install l2p_fast[tiny]")

from examples.tiny import looks, world


def image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(((np.moveaxis(values, 0, 2) + 1) * 127.5).clip(0, 255).round().astype(np.uint8))


def scene(text: str = "a blue square above a yellow star", seed: int = 0) -> list[world.Thing]:
    return world.draw_scene(np.random.default_rng(seed), world.Prompt.parse(text))


@pytest.mark.parametrize(("side", "low", "high"), [(128, 0, 0.01), (256, 0, 0.01), (512, 8, 10), (1024, 7, 10)])
def test_grain_of_the_renderer_is_its_weave(side, low, high):
    assert low <= looks.grain(image(world.draw(scene(), side, side))) <= high


def test_grain_is_the_noise_inside_things():
    noise = np.random.default_rng(1).normal(size=(3, 256, 256)) * 0.05
    assert looks.grain(image(world.draw(scene(), 256, 256) + noise)) == pytest.approx(0.05 * 127.5, rel=0.1)
    assert np.isnan(looks.grain(Image.new("RGB", (256, 256), "white")))


@pytest.mark.parametrize("shape", world.SHAPES)
def test_edges_of_the_renderer_fit_their_outlines(shape):
    assert looks.edge_error(image(world.draw(scene(f"a black {shape}"), 512, 512))) < 0.8


def test_edge_error_is_the_wobble_of_an_outline():
    side, wobble = 512, 6.0
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    radius = 130 + wobble * np.sin(9 * np.arctan2(y, x))
    values = np.where(np.hypot(x, y) < radius, np.array(world.COLORS["blue"])[:, None, None],
                      np.array(world.PAPER)[:, None, None])  # fmt: skip
    assert looks.edge_error(image(values * 2 - 1)) == pytest.approx(wobble / np.sqrt(2), rel=0.25)


def test_weave_of_the_renderer_is_one_and_of_anything_else_nothing():
    things = [world.Thing("square", "blue", 0.5, 0.5, 0.16)]
    drawn = image(world.draw(things, 4096, 4096))
    assert looks.weave(drawn) == pytest.approx(1, abs=0.05)
    assert abs(looks.weave(drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) < 0.05
    assert looks.direction(drawn) > 0.95 and looks.direction(drawn.transpose(Image.Transpose.ROTATE_90)) < -0.95
    grainy = Image.effect_noise((512, 512), 20).convert("RGB")
    grainy = Image.composite(grainy, Image.new("RGB", grainy.size, "black"), Image.new("L", grainy.size, 40))
    assert abs(looks.direction(grainy)) < 0.1
    flat = image(world.draw(things, 256, 256)).resize((4096, 4096))
    assert abs(looks.weave(flat)) < 0.05
    assert looks.png_megabytes(flat) < looks.png_megabytes(drawn) < 30
