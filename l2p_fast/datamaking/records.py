"""Prompts in files: one JSON object a line, added line by line, so that whatever was paid for is kept.

A file may come from a stranger or a language model: what it says is data, never a path and never a format.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FieldError, UserError
from ..files import atomic_path, near_path, regular
from ..formats.header import parse_json
from ..sampling.jobs import LARGEST_FILE, check_writable, read_prompts

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

STARTER = Path(__file__).with_name("starter.jsonl.gz")  # what the name ``starter`` stands for
TEXTS = ("id", "subclass", "category", "language", "style", "source", "prompt")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what it was asked to be.

    Attributes:
        prompt: the text.
        id: of the plan's seed and its place in it.
        subclass, category: in the taxonomy, in English.
        language: en or zh.
        style: a photograph, a watercolor painting, ...
        source: the model that wrote it, or ``templates``.
        quoted: texts that are to be rendered; they stand in the prompt between quotation marks.
    """

    prompt: str
    id: str = ""
    subclass: str = ""
    category: str = ""
    language: str = ""
    style: str = ""
    source: str = ""
    quoted: tuple[str, ...] = ()

    def line(self) -> str:
        """Its line in a file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def of(cls, values: Any) -> Prompt:
        """The prompt of a line's JSON.

        Raises:
            ValueError: a prompt is missing, or a value has another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"wanted an object with a prompt, got {type(values).__name__}")
        if "prompt" not in values:
            raise ValueError("prompt is missing")
        for name in TEXTS:
            if not isinstance(values.get(name, ""), str):
                raise ValueError(f"{name} is not text")
        quoted = values.get("quoted", [])
        if not isinstance(quoted, list) or not all(isinstance(text, str) for text in quoted):
            raise ValueError("quoted is not a list of texts")
        found = cls(quoted=tuple(quoted), **{name: values[name] for name in TEXTS if name in values})
        try:
            found.line().encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a character") from None
        return found


def read_lines(path: str) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank; ``starter`` names the prompts that ship.

    Raises:
        UserError: no such file, or none of text.
    """
    file = STARTER if path == "starter" and not os.path.exists(path) else Path(path)
    if file == STARTER and not STARTER.exists():
        raise UserError(f"the starter set is not installed ({STARTER}); name a file of prompts")
    if file.suffix != ".gz":
        try:
            read_prompts("", path)  # its checks: a file, of text, not too large
        except FieldError as error:
            raise UserError(error.problem) from error
    try:
        regular(file)
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8-sig") as f:
            text = f.read(LARGEST_FILE)
    except (OSError, EOFError, ValueError) as error:
        words = getattr(error, "strerror", None) or "it is damaged, or not text"
        raise UserError(f"can't read {file}: {words}{near_path(str(file))}") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def parse_prompt(line: str) -> Prompt:
    """The prompt of a line.

    Raises:
        ValueError: it says what is wrong.
    """
    try:
        values = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    return Prompt.of(values)


def read_prompt_file(path: str) -> list[Prompt]:
    """The prompts of a file: JSON lines, or in a .txt one prompt a line.

    Raises:
        UserError: no such file, or a line that holds no prompt.
    """
    if path.endswith(".txt"):
        return [Prompt(line.strip()) for _, line in read_lines(path)]
    found = []
    for number, line in read_lines(path):
        try:
            found.append(parse_prompt(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; run l2p data filter on it first") from error
    return found


def place(path: str) -> Path:
    """Where something is to be written.

    Raises:
        FieldError: it can't be.
    """
    found = Path(path)
    if "\0" in path or not found.name:
        raise FieldError("out", f"is not a place for a file: {path[:60]!r}; name one")
    check_writable(found)
    return found


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """A file of ``lines``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time inside, where the system has locks; the others wait."""
    with open(folder / ".lock", "a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Ledger:
    """A file of prompts that grows line by line, held for this process.

    A line that was cut off by a kill is dropped, and what comes after it is written anew.
    """

    def __init__(self, path: str):
        self.path = place(path)
        self.prompts: list[Prompt] = []

    @contextlib.contextmanager
    def held(self) -> Iterator[Ledger]:
        """Open the file and read what it holds.

        Raises:
            UserError: another process writes it, or it holds other things than prompts.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            regular(self.path)
        with open(self.path, "a+b") as self._file:
            if fcntl is not None:
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise UserError(f"another run writes {self.path}; wait for it, or name another --out") from None
            self._file.seek(0)
            whole = 0
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    self.prompts.append(parse_prompt(line.decode()))
                except ValueError as error:
                    raise UserError(f"{self.path} holds other things than prompts ({error}); name another") from error
            self._file.truncate(whole)
            yield self

    def add(self, prompt: Prompt) -> None:
        """Write a prompt; it is in the file when this returns."""
        self._file.write(prompt.line().encode())
        self._file.flush()
        self.prompts.append(prompt)
