"""What the documentation says of commands, options, files and Python holds. (Links within it: mkdocs, strictly.)"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from l2p_fast import convert, data, evaluate, sample, serve, train

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]}
PARSERS = {
    "sample": sample.build_parser,
    "train": train.parser,
    "convert": convert.build_parser,
    "data": data.build_parser,
    "evaluate": evaluate.build_parser,
    "serve": serve.build_parser,
}


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of each fenced block."""
    found = [(name, re.findall(rf"```{language}\n(.*?)```", text, re.S)) for name, text in PAGES.items()]
    return [(name, block) for name, many in found for block in many]


def commands() -> list[list[str]]:
    """The words of every documented ``l2p COMMAND ...`` whose options are parsed here."""
    lines = [line for _, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"l2p \w", line)]
    return [line[1:] for line in words if line[1] in PARSERS]


def test_commands_have_the_options_that_are_written():
    found = commands()
    assert {name for name, *_ in found} == set(PARSERS)
    for name, *words in found:
        PARSERS[name]().parse_intermixed_args(words) if name == "train" else PARSERS[name]().parse_args(words)


def test_every_option_of_sample_is_documented():
    known = {option for action in sample.build_parser()._actions for option in action.option_strings}
    written = set(re.findall(r"--[a-z][a-z-]*", PAGES["sampling.md"]))
    assert known - {"-h", "--help"} <= written


def test_every_option_of_serve_is_documented():
    known = {option for action in serve.build_parser()._actions for option in action.option_strings}
    assert known - {"-h", "--help"} <= set(re.findall(r"--[a-z][a-z-]*", PAGES["serving.md"]))


def test_every_option_of_evaluate_is_documented():
    drawing = {option for action in sample.build_parser()._actions for option in action.option_strings}
    [subparsers] = [action.choices for action in evaluate.build_parser()._actions if action.choices]
    known = {o for sub in subparsers.values() for action in sub._actions for o in action.option_strings} - drawing
    written = set(re.findall(r"--[a-z][a-z-]*", PAGES["evaluation.md"]))
    assert {"--shard", "--ways"} <= known <= written


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "design.md"])
def test_named_files_are_there(page):
    text = PAGES[page]
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    base = ROOT if (ROOT / page).exists() else ROOT / "docs"
    assert not [link for link in links if not (base / link).exists()]
    places = re.findall(r"`((?:csrc|l2p_fast|tests|benchmarks|examples|configs|docs|\.ci)/[^`\s]*)`", text)
    lost = [p for p in places if "NAME" not in p and not list(ROOT.glob(p.rstrip("/")))]
    assert not lost and (places or page == "README.md")


def test_readme():
    """It is short, and what CI runs stands behind its markers."""
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 170
    for marker, command in (("sample", "python -m l2p_fast.sample"), ("test", "python -m pytest")):
        assert re.search(rf"<!-- {marker}-command -->\n```bash\n.*{command}.*\n```", text)


def test_python_compiles():
    for page, block in blocks("python"):
        compile(block, page, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for _, b in blocks("python") if "tiny-" in b])
def test_python_runs(block, tmp_path, monkeypatch):
    """Every example that needs nothing but the bundled models."""
    os.symlink(ROOT / "l2p_fast", tmp_path / "l2p_fast")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "example"})
