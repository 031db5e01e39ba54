"""A taxonomy that grows: a language model names more categories, and doubles are left out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from .filters import WordList
from .llm import Model, Question, ask_all
from .taxonomy import LONGEST, Category, Taxonomy, core
from .texts import language_of

AT_ONCE = 20  # categories a question

RULES = """You extend a taxonomy of what images can show. You are given a group of categories that are there, and name
new ones that belong beside them: as concrete and as general as those, each clearly different from all of them and from
each other, visible things with a name of one to six words. No brands, no named characters, no named persons, nothing
sexual, violent, hateful or political. Each has an English name with its article, in small letters ("a red fox"), and a
Chinese one with its measure word (一只赤狐)."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "categories": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"en": {"type": "string"}, "zh": {"type": "string"}},
                "required": ["en", "zh"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["categories"],
    "additionalProperties": False,
}


def grow(taxonomy: Taxonomy, more: int, model: Model, say: Callable[[str], None]) -> Taxonomy:
    """``taxonomy`` with up to ``more`` categories in every sub-class, the smallest groups first.

    Raises:
        UserError: no answers will come.
    """
    words, known = WordList(), {core(c.en) for c in taxonomy.categories} | {c.zh for c in taxonomy.categories}
    room = Counter({name: more for name in taxonomy.subclasses()})
    questions = list(_questions(taxonomy, more))
    refused: Counter[str] = Counter()
    grown: list[Category] = []
    for answer in tqdm(
        ask_all(model, questions), desc="taxonomy", total=len(questions), disable=not sys.stderr.isatty()
    ):
        place: Category = answer.key
        for item in [] if answer.problem else answer.value["categories"]:
            en, zh = (" ".join(item[name].split()) for name in ("en", "zh"))
            problem = _problem(en, zh, words) or ("a double" if {core(en), zh} & known else "")
            if problem or not room[place.subclass]:
                refused[problem or "more than was asked for"] += 1
                continue
            known |= {core(en), zh}
            room[place.subclass] -= 1
            grown.append(Category(en, zh, place.group, place.subclass, place.topclass))
        if answer.problem:
            refused[answer.problem] += 1
    for problem, number in refused.most_common():
        say(f"left out {number}: {problem}")
    return taxonomy.with_more(grown)


def _problem(en: str, zh: str, words: WordList) -> str:
    if not en or not zh or len(en) > LONGEST or len(zh) > LONGEST:
        return "a name that is missing or too long"
    if any(c in en + zh for c in '|=#"“”{}<>\\') or en.startswith("-") or not core(en) or language_of(zh) != "zh":
        return "not a name"
    return (words.find(en) or words.find(zh) or ("", ""))[1]


def _questions(taxonomy: Taxonomy, more: int) -> Sequence[Question]:
    groups: dict[tuple[str, str], list[Category]] = {}
    for category in taxonomy.categories:
        groups.setdefault((category.subclass, category.group), []).append(category)
    found = []
    for subclass in taxonomy.subclasses():
        inside = sorted((some for key, some in groups.items() if key[0] == subclass), key=len)
        for number in range(-(-more // AT_ONCE)):
            some = inside[number % len(inside)]
            wanted = min(AT_ONCE, more - number * AT_ONCE)
            there = "\n".join(f"{category.en} | {category.zh}" for category in some)
            place = subclass + (f", {some[0].group}" if some[0].group else "")
            task = f"Name {wanted} new categories beside these of {place}:\n{there}"
            found.append(Question(some[0], RULES, task, SCHEMA, len(taxonomy.categories) + number))
    return found
