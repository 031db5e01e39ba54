"""Which prompts to ask for: categories in even numbers, languages, styles, texts to render.

Category by inverse frequency, taken to its limit: the next one is always among those with the fewest prompts, drawn by
the seed. A plan depends on its seed and on the prompts that are counted alone, and a longer plan begins as a shorter
one does, so an interrupted run goes on and a finished one can be made longer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .records import Prompt
from .taxonomy import Category, Taxonomy

LETTERING = "lettering"  # the sub-class whose prompts all quote a text
STYLES = (  # a photograph as often as all others together
    "photograph", "watercolor painting", "oil painting", "gouache illustration", "ink wash painting",
    "flat vector illustration", "children's book illustration", "pencil drawing", "charcoal drawing", "linocut print",
    "woodblock print", "paper collage", "pixel art", "3D render", "clay model", "isometric illustration",
    "pastel drawing",
)  # fmt: skip
COUNTS = ("two", "three", "four", "five", "six")
POSITIONS = ("on the left", "on the right", "in the foreground", "behind", "above", "below", "between", "in the corner")


@dataclass(frozen=True)
class Brief:
    """What one prompt is to be.

    Attributes:
        id: ``SEED-INDEX``.
        quoted: whether it quotes a text to be rendered.
        count, position: words that are to occur ("" : as the writer likes).
    """

    id: str
    category: Category
    language: str
    style: str
    quoted: bool
    count: str
    position: str

    def prompt(self, text: str, quoted: Sequence[str], source: str) -> Prompt:
        """The prompt that was written for this."""
        category = self.category
        return Prompt(text, self.id, category.subclass, category.en, self.language, self.style, source, tuple(quoted))


def make_plan(
    taxonomy: Taxonomy, count: int, seed: int, there: Counter[str], languages: Sequence[str], quoted: float
) -> list[Brief]:
    """``count`` briefs.

    Args:
        there: prompts of each category (its English name) that count already.
        languages: drawn with equal chances.
        quoted: share of the prompts that quote a text; all of sub-class `LETTERING` do.
    """
    generator = random.Random(seed)
    numbers = {category: there[category.en] for category in taxonomy.categories}
    briefs: list[Brief] = []
    while len(briefs) < count:
        fewest = min(numbers.values())
        left = [category for category, number in numbers.items() if number == fewest]
        generator.shuffle(left)
        for category in left:
            numbers[category] += 1
            briefs.append(
                Brief(
                    f"{seed}-{len(briefs)}",
                    category,
                    generator.choice(list(languages)),
                    STYLES[0] if generator.random() < 0.5 else generator.choice(STYLES[1:]),
                    generator.random() < quoted or category.subclass == LETTERING,
                    generator.choice(COUNTS) if generator.random() < 0.4 else "",
                    generator.choice(POSITIONS) if generator.random() < 0.5 else "",
                )
            )
    return briefs[:count]
