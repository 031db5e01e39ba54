"""Prompts by a language model or by templates, one for each brief of a plan, into a file that grows."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from .llm import Model, Question, ask_all
from .plan import Brief
from .records import Ledger, Prompt
from .templates import Grammar

ROUNDS = 3  # that briefs without a usable prompt are asked for
NAMES = {"en": "English", "zh": "Chinese"}

RULES = """You write prompts for a text-to-image model. Each prompt describes one image that could exist, so that a
painter who reads nothing else could make it.

- 200 to 350 characters (count Chinese characters as one each), one paragraph, no line breaks, no lists, no markdown.
- The language asked for, in plain, idiomatic words. A Chinese prompt has no Latin letters but in quoted text.
- Begin with the style and the subject. Then: what it does or how it stands, where it is, one or two details, the light,
  and how the image is composed.
- Concrete nouns and visible facts. No praise ("stunning", "masterpiece"), no camera brands, no resolution words.
- The count and position words that are asked for occur and agree with the rest.
- Text to be rendered stands between double quotation marks (Chinese: between the marks “ and ”), letter for letter, at
  most 40 characters, and the prompt says where it stands and what the letters look like. Repeat each such text in
  "quoted". Use quotation marks for nothing else. Where no text is asked for, "quoted" is empty.
- No brands, logos, named characters of films, books or games, no living or recent people, no artist's name.
- Nothing sexual, violent, hateful or political."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "prompts": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "number": {"type": "integer"},
                    "prompt": {"type": "string"},
                    "quoted": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["number", "prompt", "quoted"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["prompts"],
    "additionalProperties": False,
}


def task(briefs: Sequence[Brief]) -> str:
    """What is asked for, a numbered line a brief."""
    lines = [f"Write {len(briefs)} prompts:"]
    for number, brief in enumerate(briefs, 1):
        words = [
            f"{number}. subject: {brief.category.words(brief.language)} ({brief.category.subclass})",
            f"language: {NAMES[brief.language]}",
            f"style: {brief.style}",
            "with a text to be rendered" if brief.quoted else "no text",
        ]
        words += [f'a count: "{brief.count}"'] * bool(brief.count)
        words += [f'a position: "{brief.position}"'] * bool(brief.position)
        lines.append("; ".join(words))
    return "\n".join(lines)


def read_prompts(briefs: Sequence[Brief], value: Any, source: str) -> list[Prompt]:
    """The prompts of an answer, at most one a brief; what it has beside them is left out."""
    found: dict[int, Prompt] = {}
    for item in value["prompts"]:
        number, text = item["number"], " ".join(item["prompt"].split())
        if 1 <= number <= len(briefs) and number not in found and text:
            try:  # as the file's line will be read
                prompt = briefs[number - 1].prompt(text, item["quoted"], source)
                found[number] = Prompt.of({**vars(prompt), "quoted": list(prompt.quoted)})
            except ValueError:
                continue
    return list(found.values())


def waiting(ledger: Ledger, plan: Sequence[Brief]) -> list[Brief]:
    """The briefs of ``plan`` that ``ledger`` has no prompt for.

    Raises:
        UserError: it holds prompts of another plan under the same numbers.
    """
    there = {prompt.id: prompt for prompt in ledger.prompts}
    for brief in plan:
        prompt = there.get(brief.id)
        if prompt is not None and (prompt.category, prompt.language) != (brief.category.en, brief.language):
            raise UserError(
                f"{ledger.path} was made with other settings ({brief.id} is {prompt.category!r} in {prompt.language}); "
                "give the same ones, another --seed or another --out"
            )
    return [brief for brief in plan if brief.id not in there]


def write_by_templates(ledger: Ledger, plan: Sequence[Brief], left: Sequence[Brief], grammar: Grammar) -> None:
    """Write those of ``plan`` that are ``left``; what a prompt becomes depends on those before it, so all are made."""
    missing = {brief.id for brief in left}
    for brief in tqdm(plan, desc="prompts", disable=not sys.stderr.isatty()):
        text, quoted = grammar.write(brief)
        if brief.id in missing:
            ledger.add(brief.prompt(text, quoted, "templates"))


def write_by_model(ledger: Ledger, briefs: Sequence[Brief], model: Model, batch: int) -> Counter[str]:
    """Fill ``ledger`` by a language model, ``batch`` prompts a request; returns what went wrong in the last round.

    Raises:
        UserError: no answers will come.
    """
    left = {brief.id: brief for brief in briefs}
    problems: Counter[str] = Counter()
    with tqdm(total=len(left), desc="prompts", disable=not sys.stderr.isatty()) as bar:
        for round in range(ROUNDS):
            problems.clear()
            for answer in ask_all(model, _questions(list(left.values()), batch, round)):
                found = [] if answer.problem else read_prompts(answer.key, answer.value, model.name)
                for prompt in found:
                    ledger.add(prompt)
                    del left[prompt.id]
                bar.update(len(found))
                if len(found) < len(answer.key):
                    problems[answer.problem or "an answer with too few prompts"] += len(answer.key) - len(found)
            if not left:
                break
    return problems


def _questions(briefs: Sequence[Brief], batch: int, round: int) -> Iterator[Question]:
    for start in range(0, len(briefs), batch):
        some = briefs[start : start + batch]
        seed = int(some[0].id.rpartition("-")[2]) + round * 1_000_003
        yield Question(some, RULES, task(some), SCHEMA, seed)
