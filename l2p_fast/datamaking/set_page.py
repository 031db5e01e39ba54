"""What a set of prompts and images is like, in numbers and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
import random
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from ..files import atomic_path
from ..sampling.drawing import read_image
from .duplicates import MinHashes
from .image_sets import read_table
from .llm import INSTALL
from .records import Prompt
from .taxonomy import Taxonomy
from .texts import language_of, quoted_texts

SAMPLES = 24  # images, or prompts where there are none
THUMBNAIL = 320  # px, the longer side
OTHER = "other"  # sub-classes that the taxonomy doesn't have
NEAR = 0.7  # share of shingles in common
COLORS = {"en": "#4c6ef5", "zh": "#f08c42", "other": "#adb5bd"}
NAMES = {"en": "English", "zh": "Chinese", "other": "other"}


@dataclass
class Facts:
    """Counts of a set."""

    prompts: int = 0
    images: int = 0
    quoting: int = 0
    repeated: int = 0
    near: int = 0
    covered: int = 0
    categories: int = 0
    subclasses: dict[str, Counter[str]] = field(default_factory=dict)  # by language
    lengths: dict[str, list[int]] = field(default_factory=dict)  # by language
    styles: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    per_category: Counter[int] = field(default_factory=Counter)  # how many categories have so many prompts
    pairs: list[tuple[str, str, float]] = field(default_factory=list)  # nearest ones

    def lines(self) -> list[str]:
        """For a terminal."""
        lengths = [length for some in self.lengths.values() for length in some]
        tongues = ", ".join(f"{NAMES[name]} {len(self.lengths[name])}" for name in NAMES if name in self.lengths)
        return [
            f"prompts     {self.prompts} ({tongues}), {min(lengths)} to {max(lengths)} characters, "
            f"median {statistics.median(lengths):g}",
            f"categories  {self.covered} of {self.categories} in {len(self.subclasses)} sub-classes",
            f"quoted text {self.quoting} prompts",
            f"duplicates  {self.repeated} exact, {self.near} near",
            *([f"images      {self.images}"] if self.images else []),
        ]


def measure(prompts: Sequence[Prompt], taxonomy: Taxonomy, images: int = 0) -> Facts:
    """The counts of ``prompts``.

    Raises:
        UserError: there are none.
    """
    if not prompts:
        raise UserError("no prompts to count")
    facts = Facts(prompts=len(prompts), images=images, categories=len(taxonomy.categories))
    facts.subclasses = {name: Counter() for name in (*taxonomy.subclasses(), OTHER)}
    seen, near, counts = set(), MinHashes(NEAR), Counter(prompt.category for prompt in prompts)
    for index, prompt in enumerate(prompts):
        language = prompt.language if prompt.language in NAMES else language_of(prompt.prompt)
        facts.subclasses[prompt.subclass if prompt.subclass in facts.subclasses else OTHER][language] += 1
        facts.lengths.setdefault(language, []).append(len(prompt.prompt))
        facts.styles[prompt.style or "no style"] += 1
        facts.sources[prompt.source or "unknown"] += 1
        facts.quoting += _quotes(prompt.prompt)
        if prompt.prompt in seen:
            facts.repeated += 1
            continue
        seen.add(prompt.prompt)
        if found := near.near(prompt.prompt):
            facts.near += 1
            facts.pairs.append((prompts[int(found[0])].prompt, prompt.prompt, found[1]))
        near.add(str(index), prompt.prompt)
    if not facts.subclasses[OTHER]:
        del facts.subclasses[OTHER]
    facts.pairs = sorted(facts.pairs, key=lambda pair: -pair[2])[:5]
    numbers = [counts[category.en] for category in taxonomy.categories]
    facts.covered, facts.per_category = sum(map(bool, numbers)), Counter(numbers)
    return facts


def _quotes(text: str) -> bool:
    try:
        return bool(quoted_texts(text))
    except ValueError:
        return False


def prompts_of(folder: Path) -> list[Prompt]:
    """One prompt an image of a folder's metadata.csv, with what its prompts.jsonl knows of it."""
    from .records import read_prompt_file

    file = folder / "prompts.jsonl"
    known = {prompt.prompt: prompt for prompt in read_prompt_file(str(file))} if file.exists() else {}
    texts = dict.fromkeys(row["prompt"] for row in read_table(folder))
    return [known.get(text, Prompt(text)) for text in texts]


def write_page(out: Path, facts: Facts, prompts: Sequence[Prompt], taxonomy: Taxonomy, folder: Path | None) -> None:
    """The page; its samples are images of ``folder``, or prompts where there is none.

    Raises:
        UserError: a package is missing, or an image.
    """
    try:
        from jinja2 import Environment
        from matplotlib import rc_context
    except ImportError as error:
        raise UserError(f"the page needs the packages jinja2 and matplotlib: {INSTALL}") from error
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("set_page.html").read_text(encoding="utf-8")
    )
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "l2p_fast"}):
        known = bool(facts.covered)  # prompts from elsewhere have no categories and no styles
        plots = {
            "By sub-class and language": known and _svg(_draw_subclasses, facts),
            "By style": len(facts.styles) > 1 and _svg(_draw_styles, facts),
            "Lengths": _svg(_draw_lengths, facts),
            "How evenly the categories are covered": known and _svg(_draw_coverage, facts),
        }
    generator = random.Random(0)
    samples, chosen = [], []
    if folder is not None:
        rows = read_table(folder)
        samples = [_thumbnail(folder, row) for row in generator.sample(rows, min(SAMPLES, len(rows)))]
    else:
        chosen = generator.sample(list(prompts), min(SAMPLES, len(prompts)))
    tables: dict[str, list[tuple[str, int]]] = {name: [] for name in taxonomy.subclasses()}
    counts = Counter(prompt.category for prompt in prompts)
    for category in taxonomy.categories:
        tables[category.subclass].append((category.en, counts[category.en]))
    page = template.render(
        facts=facts, plots=plots, samples=samples, chosen=chosen, tables=tables, classes=taxonomy.subclasses(),
        names=NAMES, colors=COLORS, lengths=[n for some in facts.lengths.values() for n in some],
        median=statistics.median,
    )  # fmt: skip
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _thumbnail(folder: Path, row: dict[str, str]) -> dict[str, Any]:
    """Of an image that lies in the folder; a table's row names no other place."""
    path = (folder / row["image"]).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{folder}/metadata.csv names {row['image'][:80]!r}, which is not in the folder")
    image = read_image("metadata.csv", str(path))
    size = f"{image.width} x {image.height}"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return {"source": source, "prompt": row["prompt"], "seed": row.get("seed") or "", "size": size}


def _svg(draw: Any, facts: Facts) -> Any:
    """A plot as SVG whose colors and letters are the page's."""
    from markupsafe import Markup
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    draw(figure, axis, facts)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_axisbelow(True)
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters in fonts: the page's draw them
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor").replace('width="', 'data-width="', 1)
    return Markup(text.replace('height="', 'data-height="', 1))


def _label(name: str) -> str:
    """A name of a stranger's as the label of an axis: no formula, no line breaks, not long."""
    return one_line(name)[:30].replace("\\", "/").replace("$", r"\$")


def _draw_subclasses(figure: Any, axis: Any, facts: Facts) -> None:
    figure.set_size_inches(6.4, 0.8 + 0.27 * len(facts.subclasses))
    names, labels = list(facts.subclasses)[::-1], [_label(name) for name in facts.subclasses][::-1]
    left = [0] * len(names)
    for language in (name for name in NAMES if name in facts.lengths):
        widths = [facts.subclasses[name][language] for name in names]
        axis.barh(labels, widths, 0.72, left, color=COLORS[language])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_xlabel("prompts")
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)


def _draw_lengths(_: Any, axis: Any, facts: Facts) -> None:
    tongues = [name for name in NAMES if name in facts.lengths]
    axis.hist(
        [facts.lengths[name] for name in tongues], 24, stacked=True, color=[COLORS[n] for n in tongues], rwidth=0.9
    )
    axis.set(xlabel="characters", ylabel="prompts")
    axis.grid(axis="y", alpha=0.25)


def _draw_styles(figure: Any, axis: Any, facts: Facts) -> None:
    common = facts.styles.most_common(18)[::-1]
    figure.set_size_inches(6.4, 0.8 + 0.25 * max(4, len(common)))
    axis.barh([_label(name) for name, _ in common], [n for _, n in common], 0.72, color="#7048e8")
    axis.set_xlabel("prompts")
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)


def _draw_coverage(_: Any, axis: Any, facts: Facts) -> None:
    most = min(max(facts.per_category), 20)
    numbers = [facts.per_category[n] for n in range(most)] + [
        sum(v for n, v in facts.per_category.items() if n >= most)
    ]
    labels = [*map(str, range(most)), f"{most}" + "+" * (max(facts.per_category) > most)]
    bars = axis.bar(labels, numbers, 0.72, color="#2b8a6e")
    axis.bar_label(bars, fontsize=8, padding=2)
    axis.set(xlabel="prompts of a category", ylabel="categories")
    axis.grid(axis="y", alpha=0.25)
