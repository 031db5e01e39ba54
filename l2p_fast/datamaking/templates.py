"""Prompts without a language model: a small grammar for each language, in ``grammar.en.txt`` and ``grammar.zh.txt``.

    [mammals/wild]           a section: a sub-class and a group of the taxonomy; [*] is for all
    @scene                   a symbol; below it what it may become, one a line
    resting at {place}       {place} becomes what the nearest section has for it

A symbol is looked up in the sub-class and group, then in the sub-class, then in [*]. ``form`` is where a prompt begins;
``{it}`` is the category. What was used for one prompt is used again only after all others were.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from .plan import Brief
from .texts import quoted_texts

LEAST, MOST = 200, 350  # characters
TRIES = 200
_SLOT = re.compile(r"\{([a-z0-9_ ']+)\}", re.I)
FAMILIES = {  # of styles; all others: art
    "photograph": "photo", "pencil drawing": "mono", "charcoal drawing": "mono", "3D render": "model",
    "clay model": "model",
}  # fmt: skip


class Grammar:
    """The grammars of both languages; ``write`` draws from them by a seed."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.rules = {language: read_grammar(language) for language in ("en", "zh")}
        self._used: dict[tuple[str, str, str], list[str]] = {}

    def write(self, brief: Brief) -> tuple[str, list[str]]:
        """A prompt of `LEAST` to `MOST` characters, and the texts that it quotes.

        Raises:
            ValueError: the grammar has none of that length.
        """
        generator = random.Random(f"{self.seed} {brief.id}")
        for _ in range(TRIES):
            text = " ".join(self._expand("form", brief, generator).split())
            if brief.language == "en":
                text = re.sub(r"(^|[.!?] )([a-z])", lambda found: found[1] + found[2].upper(), text)
            sentences = re.split(r"[.。]", text)
            if LEAST <= len(text) <= MOST and len(set(sentences)) == len(sentences):
                return text, quoted_texts(text)
        raise ValueError(f"the grammar has no prompt of {LEAST} to {MOST} characters for {brief.category.en!r}")

    def _expand(self, symbol: str, brief: Brief, generator: random.Random) -> str:
        if symbol == "it":
            return brief.category.words(brief.language)
        if symbol == "mark" and not brief.quoted:
            return ""
        key = {
            "form": f"form {FAMILIES.get(brief.style, 'art')}",
            "style": f"style {brief.style}",
            "words": f"words {brief.category.en}",
        }.get(symbol, symbol)
        section, choices = self._find(key, brief)
        # Out of those not used for longest, so that all of a list are used before one is again.
        bag = self._used.setdefault((brief.language, section, key), [])
        bag[:] = [choice for choice in bag if choice in choices] or list(choices)
        chosen = bag.pop(generator.randrange(len(bag)))
        return _SLOT.sub(lambda slot: self._expand(slot[1], brief, generator), chosen).strip()

    def _find(self, symbol: str, brief: Brief) -> tuple[str, list[str]]:
        rules, category = self.rules[brief.language], brief.category
        for name in (symbol, "words") if symbol.startswith("words ") else (symbol,):
            for section in (f"{category.subclass}/{category.group}", category.subclass, "*"):
                if name in rules.get(section, {}):
                    return section, rules[section][name]
        raise KeyError(f"{symbol!r} of {category.subclass}/{category.group} in the {brief.language} grammar")


def read_grammar(language: str) -> dict[str, dict[str, list[str]]]:
    """The choices of each symbol in each section of a grammar that ships."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in Path(__file__).with_name(f"grammar.{language}.txt").read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line.startswith("@"):
            choices = section.setdefault(line[1:].strip(), [])
        else:
            choices.append(line)
    return sections
