"""What can be told of a prompt by its characters: its language, the texts it quotes, the words it is compared by.

Left out: any language but English and Chinese, which are "other".
"""

from __future__ import annotations

import re
import unicodedata

LANGUAGES = ("en", "zh")
QUOTES = {'"': '"', "“": "”", "「": "」", "『": "』"}  # what stands between is text to be rendered
_COMMON = frozenset("a an the of in on at with and is are by to from under over its their one two three".split())
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_ENGLISH_LEAST = 0.12  # share of common words; English prose has 0.3, other languages in Latin letters 0.05


def quoted_texts(text: str) -> list[str]:
    """The texts between quotation marks, in order.

    Raises:
        ValueError: a mark that opens nothing or closes nothing, or marks within marks.
    """
    found, closing, start = [], "", 0
    for place, character in enumerate(text):
        if closing and character == closing:
            found.append(text[start:place])
            closing = ""
        elif character in QUOTES:
            if closing:
                raise ValueError(f"the quotation mark {character} opens within another quotation")
            closing, start = QUOTES[character], place + 1
        elif character in QUOTES.values():
            raise ValueError(f"the quotation mark {character} closes nothing")
    if closing:
        raise ValueError(f"the quotation mark {closing} is missing")
    return found


def without_quotes(text: str) -> str:
    """``text`` without what stands between quotation marks; a text of the other language may stand there."""
    return re.sub(r'"[^"]*"|“[^”]*”|「[^」]*」|『[^』]*』', " ", text)


def language_of(text: str) -> str:
    """``en``, ``zh`` or ``other``: by scripts, and for Latin letters by the share of common English words."""
    plain = without_quotes(text)
    letters = [c for c in plain if c.isalpha()]
    han = len(_HAN.findall(plain))
    if letters and han / len(letters) > 0.7:
        return "zh"
    latin = sum(unicodedata.name(c, "").startswith("LATIN") for c in letters)
    words = re.findall(r"[a-z']+", plain.lower())
    if letters and latin / len(letters) > 0.95 and sum(w in _COMMON for w in words) >= _ENGLISH_LEAST * len(words):
        return "en"
    return "other"


def terms(text: str) -> list[str]:
    """Words in lower case, and Chinese characters one by one: what prompts are compared by."""
    return re.findall(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+", text.lower())
