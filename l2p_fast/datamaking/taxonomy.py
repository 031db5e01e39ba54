"""What a set of images is to be about: 4 classes, 17 sub-classes and over 1,000 fine categories, as a text file.

    = class | in Chinese
    == sub-class | in Chinese
    -- group, whose categories share a grammar
    a red fox | 一只赤狐        a category: the words of a sentence in both languages

Left out: any other languages.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import near_path

SHIPPED = Path(__file__).with_name("taxonomy.txt")
LARGEST = 1 << 26  # bytes of a taxonomy's file
LONGEST = 80  # characters of a name
UNBALANCED = 1.5  # times the mean, from which on a sub-class is called unbalanced
_ARTICLES = {"a", "an", "the", "of", "with", "in", "on", "and", "pair", "set"}


@dataclass(frozen=True)
class Category:
    """A fine category, and where it stands."""

    en: str
    zh: str
    group: str
    subclass: str
    topclass: str

    def words(self, language: str) -> str:
        return self.zh if language == "zh" else self.en


@dataclass(frozen=True)
class Taxonomy:
    """All categories, in the file's order. ``chinese`` has the Chinese names of classes and sub-classes."""

    categories: tuple[Category, ...]
    chinese: dict[str, str]

    def subclasses(self) -> dict[str, str]:
        """The class of each sub-class, in order."""
        return {category.subclass: category.topclass for category in self.categories}

    def sizes(self) -> Counter[str]:
        """Categories of each sub-class."""
        return Counter(category.subclass for category in self.categories)

    def find(self, en: str) -> Category | None:
        return next((category for category in self.categories if category.en == en), None)

    def problems(self) -> list[str]:
        """Doubles, near-doubles and sub-classes that are out of balance, as lines."""
        lines, seen = [], {}
        for category in self.categories:
            for key in {core(category.en), category.zh}:
                if key in seen:
                    lines.append(f"{category.en!r} ({category.subclass}) is {seen[key].en!r} ({seen[key].subclass})")
                seen[key] = category
        sizes = self.sizes()
        mean = sum(sizes.values()) / len(sizes)
        for name, size in sizes.items():
            if not mean / UNBALANCED <= size <= mean * UNBALANCED:
                lines.append(f"{name} has {size} categories, the mean is {mean:.0f}")
        return lines

    def text(self) -> str:
        """The file's text."""
        lines, before = [], ("", "", "")
        for category in self.categories:
            place = category.topclass, category.subclass, category.group
            for depth, mark in enumerate(("=", "==", "--")):
                if place[: depth + 1] != before[: depth + 1] and place[depth]:
                    name = place[depth]
                    lines.append(f"{mark} {name}" + (f" | {self.chinese[name]}" if name in self.chinese else ""))
            lines.append(f"{category.en} | {category.zh}")
            before = place
        return "\n".join(lines) + "\n"

    def with_more(self, more: Iterable[Category]) -> Taxonomy:
        """With ``more`` behind those of the same group."""
        places = {(c.topclass, c.subclass, c.group): None for c in self.categories}
        grown = [*self.categories, *more]
        ordered = [c for place in places for c in grown if (c.topclass, c.subclass, c.group) == place]
        return Taxonomy(tuple(ordered), self.chinese)


def core(name: str) -> str:
    """A name's words without articles, plural endings and order: near-doubles have the same."""
    words = re.findall(r"[a-zà-ÿ]+", name.lower())
    return " ".join(sorted(re.sub(r"(?<=x|h|s)es$|s$", "", word) for word in words if word not in _ARTICLES))


def read_taxonomy(path: str | Path | None = None) -> Taxonomy:
    """The taxonomy of a file; None: the one that ships.

    Raises:
        UserError: no such file, or a line that is not as described.
    """
    path = Path(path or SHIPPED)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file; name a taxonomy")
        if os.path.getsize(path) > LARGEST:
            raise UserError(f"{path} is larger than 64 MB; no taxonomy is")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        words = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"can't read the taxonomy {path}: {words}{near_path(str(path))}") from error
    place, found, chinese = ["", "", ""], [], {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        mark, name = re.fullmatch(r"(==|=|--)?\s*(.*)", line).groups()
        en, _, zh = (part.strip() for part in name.partition("|"))
        if not en or len(en) > LONGEST or len(zh) > LONGEST or (mark is None and not zh):
            wanted = "a category is written: a red fox | 一只赤狐"
            raise UserError(f"{path}, line {number}: {wanted}; got {line[:60]!r}")
        if mark is None:
            if not place[0] or not place[1]:
                raise UserError(f"{path}, line {number}: {en!r} stands before the first class (=) and sub-class (==)")
            found.append(Category(en, zh, place[2], place[1], place[0]))
            continue
        depth = ("=", "==", "--").index(mark)
        place[depth:] = [en] + [""] * (2 - depth)
        if zh:
            chinese[en] = zh
    if not found:
        raise UserError(f"{path} holds no categories; a category is written: a red fox | 一只赤狐")
    return Taxonomy(tuple(found), chinese)
