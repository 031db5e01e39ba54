"""A procedural world of captioned pictures: coloured shapes on paper, drawn at any resolution from their outlines.

Prompts follow the six tasks of GenEval (Ghosh et al., 2023). A picture is a list of vector shapes in units of its
longer side, so the same scene can be drawn at 128 px or at 4096 px; paper and paint carry two octaves of texture, the
coarser one visible from 512 px, the finer one from 2048 px: a large picture holds detail that a small one can't.

Left out: rotation, overlap, perspective. The world is meant to be learnt within an hour on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SHAPES = ("circle", "square", "triangle", "star", "ring")
COLORS = {  # sRGB in [0, 1]
    "red": (0.86, 0.13, 0.12),
    "green": (0.12, 0.62, 0.24),
    "blue": (0.12, 0.30, 0.86),
    "yellow": (0.97, 0.80, 0.10),
    "purple": (0.56, 0.20, 0.70),
    "black": (0.10, 0.10, 0.11),
}
# What a thing looks like when no color is asked for.
USUAL_COLORS = {"circle": "red", "square": "blue", "triangle": "green", "star": "yellow", "ring": "purple"}
PAPER = (0.94, 0.93, 0.90)
COUNTS = ("a", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
TEXTURE_PERIODS = (128, 512)  # periods along the longer side
WEAVE = 0.05  # amplitude of the texture of paint, white being 1


@dataclasses.dataclass(frozen=True)
class Group:
    """``count`` things of one shape; ``color`` None leaves the colour open (one colour for the whole group)."""

    count: int
    shape: str
    color: str | None = None

    @property
    def text(self) -> str:
        noun = self.shape + ("s" if self.count > 1 else "")
        return " ".join(word for word in (COUNTS[self.count - 1], self.color, noun) if word)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One or two groups and how the first stands to the second (a member of `RELATIONS`, or None)."""

    groups: tuple[Group, ...]
    relation: str | None = None
    task: str = "free"

    @property
    def text(self) -> str:
        return f" {self.relation or 'and'} ".join(group.text for group in self.groups)

    @staticmethod
    def parse(text: str) -> Prompt | None:
        """The prompt that ``text`` spells ("a red star above two blue circles"), or None outside this language."""
        noun = rf"({'|'.join(COUNTS)})(?: ({'|'.join(COLORS)}))? ({'|'.join(SHAPES)})s?"
        match = re.fullmatch(rf"{noun}(?: (and|{'|'.join(RELATIONS)}) {noun})?", text.strip().lower())
        if match is None:
            return None
        first, relation, second = match.groups()[:3], match.group(4), match.groups()[4:]
        groups = [Group(COUNTS.index(n) + 1, shape, color) for n, color, shape in (first, second) if n]
        return Prompt(tuple(groups), relation if relation in RELATIONS else None)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One shape of a picture: centre (x right, y down) and half size, in units of the picture's longer side."""

    shape: str
    color: str
    x: float
    y: float
    size: float


# ---- prompts -------------------------------------------------------------------------------------------------------


def draw_prompt(rng: np.random.Generator, task: str) -> Prompt:
    """A random prompt of one of the `TASKS`, or of "free": any counts, colours and relation together."""
    shapes = [str(s) for s in rng.choice(SHAPES, 2, replace=False)]
    colors = [str(c) for c in rng.choice(list(COLORS), 2, replace=False)]
    relation = str(rng.choice(RELATIONS))
    if task == "single_object":
        return Prompt((Group(1, shapes[0]),), task=task)
    if task == "two_object":
        return Prompt((Group(1, shapes[0]), Group(1, shapes[1])), task=task)
    if task == "counting":
        return Prompt((Group(int(rng.integers(2, 5)), shapes[0]),), task=task)
    if task == "colors":
        return Prompt((Group(1, shapes[0], colors[0]),), task=task)
    if task == "position":
        return Prompt((Group(1, shapes[0]), Group(1, shapes[1])), relation, task)
    if task == "color_attr":
        return Prompt((Group(1, shapes[0], colors[0]), Group(1, shapes[1], colors[1])), task=task)
    if task == "free":
        counts = ((1, 1), (1, 1), (1, 2), (2, 1), (2, 2))[int(rng.integers(5))]
        if rng.random() < 0.2:
            return Prompt((Group(int(rng.integers(1, 5)), shapes[0], colors[0]),))
        groups = (Group(counts[0], shapes[0], colors[0]), Group(counts[1], shapes[1], colors[1]))
        return Prompt(groups, relation if rng.random() < 0.8 else None)
    raise ValueError(f"task must be one of {TASKS} or 'free', got {task!r}")


def evaluation_prompts(per_task: int = 40) -> list[Prompt]:
    """The fixed prompts of the score table: ``per_task`` of each of the six tasks, always the same ones."""
    rng = np.random.default_rng(20)
    return [draw_prompt(rng, task) for task in TASKS for _ in range(per_task)]


# ---- scenes --------------------------------------------------------------------------------------------------------

# Half sizes in units of half a cell: a single thing has the page to itself, others share it cell by cell.
_SIZES = {1: (0.46, 0.62), 2: (0.64, 0.84)}
_PLAY = 0.8  # share of the room around a thing in which it moves about


def relation_holds(relation: str, first: np.ndarray, second: np.ndarray, clearness: float = 1.0) -> bool:
    """Whether points ``first`` (n, 2) stand in ``relation`` to ``second`` (m, 2), (x, y) with y down.

    True when every first point is on the named side of every second one and that axis separates the centres most,
    by ``clearness`` times what the other one does.
    """
    dx, dy = second.mean(0) - first.mean(0)
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    gap = (sign * second[:, axis]).min() - (sign * first[:, axis]).max()
    return bool(gap > 0 and abs((dx, dy)[axis]) > clearness * abs((dx, dy)[1 - axis]))


def layout(prompt: Prompt) -> tuple[np.ndarray, float]:
    """Where a prompt's things stand: centres (n, 2) in units of the page's sides, and the side of a thing's cell.

    The layout follows from the words. Two groups share the page as their relation says, without one as they are read,
    from left to right, and each is a row along the middle of its half. Two things of one kind stand side by side,
    three and four in two rows.
    """
    if len(prompt.groups) == 1:
        points = {
            1: [(0.5, 0.5)],
            2: [(0.25, 0.5), (0.75, 0.5)],
            3: [(0.5, 0.25), (0.25, 0.75), (0.75, 0.75)],
            4: [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)],
        }[prompt.groups[0].count]
        return np.array(points), 1.0 if len(points) == 1 else 0.5
    relation = prompt.relation or RELATIONS[0]
    sides = (0.25, 0.75) if relation in ("left of", "above") else (0.75, 0.25)
    rows = [np.stack([np.full(g.count, s), (np.arange(g.count) + 0.5) / g.count], 1)
            for g, s in zip(prompt.groups, sides, strict=True)]  # fmt: skip
    points = np.concatenate(rows)
    return points if relation in ("left of", "right of") else points[:, ::-1], 1 / max(
        2, *(group.count for group in prompt.groups)
    )


def draw_scene(rng: np.random.Generator, prompt: Prompt, height: int = 1, width: int = 1) -> list[Thing]:
    """A random scene that shows ``prompt`` on a canvas of aspect ``height`` : ``width``, nothing overlapping.

    Things vary in size and move about a little in a cell of their own.
    """
    kinds = [(g.shape, g.color or USUAL_COLORS[g.shape]) for g in prompt.groups for _ in range(g.count)]
    points, cell = layout(prompt)
    page = np.array([width, height]) / max(height, width)
    half = cell * page.min() / 2
    size = rng.uniform(*_SIZES[min(len(kinds), 2)], len(kinds)) * half
    play = _PLAY * (0.95 * half - size[:, None])
    points = points * page + rng.uniform(-play, play, points.shape)
    return [
        Thing(*kind, x=float(x), y=float(y), size=float(s)) for kind, (x, y), s in zip(kinds, points, size, strict=True)
    ]


def labels(scene: list[Thing], grid: int) -> np.ndarray:
    """What is where: (grid * grid,) uint8, row by row; 0 for paper, else 1 + the number of a shape and color."""
    centre = (np.arange(grid) + 0.5) / grid
    found = np.zeros((grid, grid), np.uint8)
    for thing in scene:
        rows, cols = (np.abs(centre - c) < thing.size for c in (thing.y, thing.x))
        found[np.ix_(rows, cols)] = 1 + SHAPES.index(thing.shape) * len(COLORS) + list(COLORS).index(thing.color)
    return found.ravel()


# ---- drawing -------------------------------------------------------------------------------------------------------


def _star() -> np.ndarray:
    angle = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)


_POLYGONS = {
    "square": np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
    "triangle": np.array([(0.0, -0.95), (0.97, 0.8), (-0.97, 0.8)]),
    "star": _star(),
}


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a unit ``shape``, negative inside; ``x``, ``y`` broadcast, y down."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.7) - 0.24
    corners = _POLYGONS[shape]
    distance = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    inside = np.zeros(distance.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        ex, ey = np.float32(bx - ax), np.float32(by - ay)
        px, py = x - np.float32(ax), y - np.float32(ay)
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.square(px - along * ex) + np.square(py - along * ey))
        if ey != 0:  # even-odd rule on a ray to the right
            inside ^= ((y < ay) != (y < by)) & (px < py * ex / ey)
    return np.where(inside, -1, 1) * np.sqrt(distance)


def _texture(x: np.ndarray, y: np.ndarray, pixels: float, weave: bool) -> np.ndarray:
    """Brightness change at unit coordinates; octaves finer than two pixels are left out, four pixels are whole."""
    value = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for periods in TEXTURE_PERIODS:
        strength = float(np.clip(pixels / periods / 2 - 1, 0, 1))
        if strength:
            k = np.float32(2 * np.pi * periods)
            value += strength * (np.sin(k * x) * np.sin(k * y) if weave else np.sin(k * (x + y)))
    return value


def draw(
    scene: list[Thing],
    height: int,
    width: int,
    window: tuple[int, int, int, int] | None = None,
    texture_of: int | None = None,
) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: things in units of the longer side.
        height, width: size of the whole picture in pixels.
        window: (top, left, height, width) in pixels of the part to draw; the whole picture when None.
        texture_of: longer side in pixels of the picture whose texture to draw, if not its own: a smaller one has less.

    Returns:
        float32 (3, h, w) in [-1, 1].
    """
    pixels = float(max(height, width))
    detail = float(texture_of or pixels)
    top, left, rows, cols = window or (0, 0, height, width)
    y = ((top + np.arange(rows, dtype=np.float32) + 0.5) / pixels)[:, None]
    x = ((left + np.arange(cols, dtype=np.float32) + 0.5) / pixels)[None]
    light = 0.03 * (0.5 - y) + 0.025 * _texture(x, y, detail, weave=True)
    picture = np.asarray(PAPER, np.float32)[:, None, None] + light
    for thing in scene:
        reach = thing.size + 1 / pixels
        r0, r1 = np.clip(np.floor([(thing.y - reach) * pixels - top, (thing.y + reach) * pixels - top + 1]), 0, rows)
        c0, c1 = np.clip(np.floor([(thing.x - reach) * pixels - left, (thing.x + reach) * pixels - left + 1]), 0, cols)
        part = np.s_[int(r0) : int(r1)], np.s_[int(c0) : int(c1)]
        if r0 >= r1 or c0 >= c1:
            continue
        ys, xs = y[part[0]], x[:, part[1]]
        size = np.float32(thing.size)
        distance = signed_distance(thing.shape, (xs - np.float32(thing.x)) / size, (ys - np.float32(thing.y)) / size)
        cover = np.clip(0.5 - distance * size * np.float32(pixels), 0, 1)
        paint = np.asarray(COLORS[thing.color], np.float32)[:, None, None] + WEAVE * _texture(
            xs, ys, detail, weave=False
        )
        picture[:, part[0], part[1]] += cover * (paint - picture[:, part[0], part[1]])
    return np.clip(picture, 0, 1) * 2 - 1
