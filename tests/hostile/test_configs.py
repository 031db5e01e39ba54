"""Configurations of trainings that nobody should write: each is valid, or one line says what is wrong. No model."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from l2p_fast.errors import UserError
from l2p_fast.training.config import BOUNDS, Config, as_dict, load_config, write_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
PIECES = [b"{", b"]", b": ", b"- ", b"\n", b"&a ", b"*a", b"!!", b"\xff", b"\0", b"'"]
NUMBERS = [key.replace("*", "0") for key in BOUNDS if key != "optim.betas.*"]
VALUES = {
    "infinite": ".inf", "negative infinite": "-.inf", "no number": ".nan", "large": "1" + "0" * 20,
    "text": "many", "a list": "[1, 2]", "a table": "{a: 1}", "a truth": "true",
}  # fmt: skip
FILES = {
    "empty": b"",
    "a list": b"- 1\n- 2",
    "a number": b"7",
    "text": b"hello",
    "null": b"null",
    "no YAML": b"a: [1",
    "tabs": b"a:\n\t- 1",
    "two documents": b"steps: 1\n---\nsteps: 2",
    "a tag": b"!!python/object/apply:os.system [id]",
    "a tag inside": b"steps: !!python/name:os.system",
    "an object": b"!!python/object/new:os.getcwd {}",
    "zeros": bytes(1000),
    "no UTF-8": b"run: \xff\xfe",
    "a mark": b"\xef\xbb\xbfsteps: 3",
    "UTF-16": "steps: 3".encode("utf-16"),
    "deep lists": b"[" * 20_000,
    "deep tables": b"{a: " * 20_000,
    "a deep block": b"".join(b" " * i + b"a:\n" for i in range(900)),
    "laughs": LAUGHS.encode(),
    "laughs as a value": LAUGHS.encode() + b"run: *i",
    "laughs in a list": LAUGHS.encode() + b"log: {prompts: *i}",
    "laughs as grids": LAUGHS.encode() + b"data: {grids: *i}",
    "itself": b"&a [*a]",
    "itself as a value": b"run: &a [*a]",
    "itself as a table": b"model: &a {base: *a}",
    "an unknown anchor": b"run: *nothing",
    "a merge": b"<<: {steps: 5}",
    "a merge of itself": b"&a {<<: *a}",
    "a key twice": b"steps: 1\nsteps: 2",
    "a list as a key": b"[1, 2]: 3",
    "a table as a key": b"{a: 1}: 3",
    "a number as a key": b"5: 3",
    "null as a key": b"~: 3",
    "a long key": b"x" * 100_000 + b": 1",
    "a long value": b"steps: " + b"9" * 6000,
    "a long text": b"device: '" + b"x" * 500_000 + b"'",
    "a day": b"steps: 2024-01-01",
    "no day": b"steps: 2024-99-99",
    "a time": b"steps: 10:20:30",
    "no time": b"run: 2024-01-01T99:99:99",
    "octal": b"steps: 0o17",
    "binary": b"run: !!binary aGVsbG8=",
    "no binary": b"run: !!binary '*'",
    "a set": b"data: !!set {a, b}",
    "pairs": b"data: !!pairs [a: 1]",
    "an ordered map": b"data: !!omap [a: 1]",
    "a NUL": b'run: "a\\0b"',
    "half a character": b'run: "\\ud800"',
    "a bell": b"run: a\x07b",
    "too large": b"# " + b"x" * (1 << 20),
    "an image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a pickle": b"\x80\x04\x95cos\nsystem\n",
    "JSON": b'{"steps": 3, "optim": {"lr": 1e-4}}',
    "nulls": b"model: null\ndata: null",
    "a null list": b"data: {grids: null}",
    "grids of nothing": b"data: {grids: [null]}",
    "grids of text": b"data: {grids: [a]}",
    "grids of lists": b"data: {grids: [[]]}",
    "grids as a table": b"data: {grids: {tokens: 4}}",
    "empty grids": b"data: {grids: []}",
    "betas of one": b"optim: {betas: [0.9]}",
    "betas of text": b"optim: {betas: [a, b]}",
    "betas of one number": b"optim: {betas: 0.9}",
    "betas of 1": b"optim: {betas: [1, 1]}",
    "betas of three": b"optim: {betas: [0.1, 0.1, 0.1]}",
    "no betas": b"optim: {betas: []}",
    "a policy of numbers": b"freeze: {policy: [1, 2]}",
    "a policy of lists": b"freeze: {policy: [[a]]}",
    "a policy table": b"freeze: {policy: {a: 1}}",
    "prompts as text": b"log: {prompts: a fish}",
    "prompts of null": b"log: {prompts: [null]}",
    "bits of text": b"model: {frozen_bits: '8'}",
    "bits as a truth": b"model: {frozen_bits: true}",
    "bits as a list": b"model: {frozen_bits: [8]}",
    "bits of 3": b"model: {frozen_bits: 3}",
    "a kind as a table": b"optim: {kind: {a: b}}",
    "fused twice": b"accumulation: 2\noptim: {fused: true}",
    "fused and clipped": b"optim: {fused: true, clip: 1}",
    "hybrid alone": b"parallel: {hybrid: true}",
    "contradiction": b"model: {weights: bfloat16, compute: float32}",
}
OVERRIDES = [
    "",
    "=",
    "==",
    "=5",
    ".=5",
    "..=5",
    "steps",
    "steps=",
    "steps==3",
    " steps=3",
    "steps =3",
    "STEPS=3",
    "steps.=3",
    ".steps=3",
    "steps.0=3",
    "steps.a=3",
    "model=",
    "model=3",
    "model.=3",
    "model.base.x=3",
    "data.grids=",
    "data.grids.0=",
    "data.grids.0=3",
    "data.grids.1.batch=3",
    "data.grids.-1.batch=3",
    "data.grids.99999999999999999999.batch=1",
    "data.grids.x.batch=1",
    "data.grids.\u00b2.batch=1",
    "data.grids.\u0663.batch=1",
    "data.grids.0.batch.0=1",
    "data.grids.0.\0=1",
    "run=a\0b",
    "run=[a]",
    "device=\ud800",
    "run=\udcff",
    "steps=!!python/object/apply:os.getcwd []",
    "steps=&a [*a]",
    "steps=" + "[" * 5000,
    "steps=" + "9" * 5000,
    "a." * 5000 + "b=1",
    "x" * 5000 + "=1",
    "optim.lr=1e400",
    "optim.lr=" + "9" * 400,
    "optim.lr=-1e-320",
    "optim.lr=0x10",
    "optim.lr=1e-5",
    "optim.lr=[1e-5]",
    "optim.betas.0=2",
    "optim.betas.2=0.5",
    "optim.betas.0=.nan",
    "freeze.policy=",
    "freeze.policy=[]",
    "freeze.policy=*",
    "freeze.policy=['*']",
    "log.prompts=[a, 1]",
    "log.prompts.0=a",
    "seed=-9223372036854775809",
    "seed=18446744073709551616",
    "seed=1.5",
    "steps=100000000",
    "steps=1e4",
    "steps=-0",
    "data.max_aspect=0.99",
    "data.prefetch=1000000",
    "data.workers=100000",
    "log.height=10000000",
    "data.grids.0.tokens=100000000000000000000",
    "data.grids.0.sigma_max=1.5",
    "model.patch_size=-16",
    "keep=0",
    "minutes=1e300",
]


def ends_well(path, overrides=()) -> None:
    """``load_config`` gives a configuration whose numbers are numbers, or says what is wrong in one short line."""
    try:
        config = load_config(path, list(overrides))
    except UserError as error:
        assert 0 < len(" ".join(str(error).split())) < 2000
        return
    assert isinstance(config, Config) and config.steps >= 1 and math.isfinite(config.optim.lr)


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    path = tmp_path / "c.yaml"
    path.write_bytes(FILES[name])
    ends_well(path)
    ends_well(path, ["steps=3", "model.base=x", "data.grids.0.batch=4"])


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: ascii(text)[:40])
def test_overrides(override):
    ends_well(None, [override])
    ends_well(CONFIGS[0], [override, "steps=3"])


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_bounds(key):
    for name, value in VALUES.items():
        try:
            load_config(None, [f"{key}={value}"])
        except UserError as error:
            assert key in str(error), name
        else:
            pytest.fail(f"{key}: {name} is taken")
    lowest, highest = BOUNDS[key.replace(".0", ".*")]
    for value in (highest * 2 + 1, -1 if lowest is None else lowest - 1):
        with pytest.raises(UserError, match=key):
            load_config(None, [f"{key}={value!r}"])


def test_no_number_is_forgotten():
    def numbers(values, where=""):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            name = f"{where}.{key}".lstrip(".")
            if isinstance(value, dict | list):
                yield from numbers(value, name)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield name

    assert set(numbers(as_dict(Config()))) == {*NUMBERS, "optim.betas.0", "optim.betas.1", "model.frozen_bits"}


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files(tmp_path, seed):
    """Bytes of a shipped configuration cut out, put in, turned over."""
    rng = random.Random(seed)
    content = bytearray(CONFIGS[seed % len(CONFIGS)].read_bytes())
    for _ in range(rng.randint(1, 30)):
        place = rng.randrange(len(content))
        action = rng.randrange(4)
        if action == 0:
            del content[place : place + rng.randint(1, 20)]
        elif action == 1:
            content[place:place] = rng.choice(
                [b"{", b"]", b": ", b"- ", b"\n", b"&a ", b"*a", b"!!", b"\xff", b"\0", b"'"]
            )
        elif action == 2:
            content[place] = rng.randrange(256)
        else:
            content[place:place] = content[place : place + 40]
        content = content or bytearray(b"x")
    (tmp_path / "c.yaml").write_bytes(content)
    ends_well(tmp_path / "c.yaml")


def test_paths(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.yaml", Path("/dev/zero"), tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(UserError, match="configuration"):
            load_config(path)


def test_what_is_valid_comes_back(tmp_path):
    for path in CONFIGS:
        config = load_config(path, ["run=r\u00e9sum\u00e9 of \U0001f40d", "log.prompts=['a: b # c']"])
        write_config(config, tmp_path / "c.yaml")
        assert load_config(tmp_path / "c.yaml") == config
