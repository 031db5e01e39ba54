"""The table of hostile command lines, and their run: `python command_lines.py` in a folder prints what each one did.

All run in one process, each through its command's ``main`` as the shell would. Nothing is drawn or trained: the session
that would draw is replaced, which also shows that whatever is wrong is found before torch is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import struct
import sys
import traceback
import types
import zlib
from pathlib import Path
from typing import NamedTuple

ACCEPTED = "the command line was accepted"
SECONDS = 240  # for one; the first of some commands imports all of torch, on a machine that others use too

INVALID = os.fsdecode(b"caf\xe9-\xff\xfe")  # what Python makes of a name that is not UTF-8
STRINGS = {
    "empty": "",
    "blank": " \t ",
    "nul": "a\0b",
    "invalid UTF-8": INVALID,
    "lone surrogate": "\ud800",
    "newlines": "a\nb\r\nc",
    "escapes": "\x1b[31m\x07\x9b",
    "right to left": "\u202egnp.a",
    "emoji": "🟥" * 9,
    "255 bytes": "x" * 255,
    "256 bytes": "x" * 256,
    "255 characters of 4 bytes": "🟥" * 255,
    "5000 bytes": "y" * 5000,
    "deep": "a/" * 2100 + "a",
    "up": "../" * 40 + "nowhere",
    "formats": "%s%n{0}{x!r}$HOME`id`",
    "slash": "/",
    "a folder": "folder",
    "a file": "text.txt",
    "below a file": "text.txt/a.png",
    "a link to itself": "loop",
    "a pipe": "pipe",
    "zeros": "/dev/zero",
    "full": "/dev/full",
    "process": "/proc/self/mem",
}
NUMBERS = ("-1", "x", "", "nan", "-inf", "1e400", "9" * 30, "9" * 5000, "0x10", "1 0", "١٢-", "\0", INVALID)
WHOLE_ALSO = ("1.5", "1e3")


class Case(NamedTuple):
    """One command line; ``says`` must be in its error."""

    command: str
    argv: tuple[str, ...]
    says: str = ""

    @property
    def name(self) -> str:
        said = [arg if len(arg) < 40 else f"{arg[:16]}...{len(arg)}" for arg in self.argv]
        return ascii(f"{self.command} {' '.join(said)}")


def sample(*argv: str, says: str = "") -> Case:
    return Case("l2p_fast.sample", argv, says)


def sample_cases() -> list[Case]:
    cases = [sample(says="what to draw"), sample("a", "b", says="unrecognized"), sample("a", "--re", "64", says="--re")]
    for option in ("steps", "num-images", "res", "height", "width", "seed", "coarse-size"):
        for value in (*NUMBERS, *WHOLE_ALSO):
            cases.append(sample("a", f"--{option}={value}", says=f"--{option}"))
    for option in ("guidance", "shift", "strength", "coarse-strength", "head-memory-mb"):
        for value in NUMBERS:
            cases.append(sample("a", f"--{option}={value}", "--image=good.png", says=f"--{option}"))
    cases += [
        sample("a", "--steps=1000000000", says="--steps must be at most"),
        sample("a", "--num-images=1000000000", says="--num-images must be at most"),
        sample("a", "--res=1048576", says="would fit"),
        sample("a", "--height=64", "--width=104857600", says="--width must be at most"),
        sample("a", "--height=16384", "--width=64", "--format=webp", says="--format"),
        sample("a", "--res=100000000000000000000000", says="--res must be at most"),
        sample("a", "--res=63", says="try 64 or 48"),
        sample("a", "--seed=9223372036854775808", says="--seed must be below 2^63"),
        sample("a", "--guidance=1e308", says="--guidance must be at most"),
        sample("a", "--res=64", "--height=64", says="not both"),
        sample("a", "--strength=0.5", says="--strength has no effect without --image"),
        sample("a", "--prompts-file=prompts.txt", says="not both"),
        sample("a", "--offload=model", "--device=cpu", says="needs a GPU"),
        sample("a", "--device=cuda:99999999", says="--device"),
    ]
    for name in ("device", "dtype", "attention", "format", "quantize", "offload", "cfg-batch"):
        for key in ("empty", "nul", "invalid UTF-8", "newlines", "escapes", "5000 bytes", "formats"):
            cases.append(sample("a", f"--{name}={STRINGS[key]}", says=f"--{name}"))
    for name in ("model", "text-encoder", "image", "from-image", "prompts-file", "out"):
        for value in STRINGS.values():
            cases.append(sample(*([] if name in ("from-image", "prompts-file") else ["a"]), f"--{name}={value}"))
    for option in ("--negative=", ""):
        for value in STRINGS.values():
            cases.append(sample(option + value, *(["a"] if option else [])))
    cases += [sample("--from-image", name) for name in images()]
    cases += [sample("a", "--image", name) for name in images()]
    cases += [sample("--prompts-file", name) for name in prompts_files()]
    cases += [sample("a", "--model", name, "--out", "model.png") for name in model_files()]
    return cases


def other_cases() -> list[Case]:
    cases = []
    paths = {key: value for key, value in STRINGS.items() if key not in ("blank", "right to left", "emoji")}
    for value in paths.values():
        cases += [
            Case("l2p_fast.plot", (value,)),
            Case("l2p_fast.convert", ("export", value, "--out", "out.safetensors")),
            Case("l2p_fast.convert", ("init", "--res=1k", value, "--out", "out.safetensors")),
            Case("l2p_fast.convert", ("export", "text.txt", "--out", value)),
            Case("l2p_fast.convert", ("merge", value, "--base", "text.txt", "--out", "out.safetensors")),
            Case("l2p_fast.train", (value,)),
            Case("l2p_fast.train", ("bad.yaml", "--run", value)),
            Case("l2p_fast.train", ("--dry-run", value + "=1")),
            Case("l2p_fast.train", ("--resume", value, "bad.yaml")),
            Case("l2p_fast.evaluate", ("geneval", value, "--out", "o")),
            Case("l2p_fast.evaluate", ("dpg", value, "--out", "o")),
            Case("l2p_fast.evaluate", ("prompts", "prompts.txt", "--res=16", "--out", value)),
            Case("l2p_fast.evaluate", ("prompts", "prompts.txt", "--res=16", "--out=o", "--clip", value)),
            Case("l2p_fast.evaluate", ("geneval2", "text.txt", "--out=o", "--scores", value)),
            Case("l2p_fast.data", ("filter", value, "--out", "kept.jsonl")),
            Case("l2p_fast.data", ("filter", "prompts.txt", "--out", value)),
            Case("l2p_fast.data", ("prompts", "--count=1", "--out", value)),
            Case("l2p_fast.data", ("prompts", "--count=1", "--out=p.jsonl", "--taxonomy", value)),
            Case("l2p_fast.data", ("images", value, "--out", "set")),
            Case("l2p_fast.data", ("images", "prompts.txt", "--out", value)),
            Case("l2p_fast.data", ("images", "prompts.txt", "--out=set", "--pipeline", value)),
            Case("l2p_fast.data", ("stats", value, "--out", "s.html")),
            Case("l2p_fast.info", (value,)) if value else Case("l2p_fast.info", ("--nothing",)),
            Case("examples.tiny", (value,)),
            Case("examples.tiny", ("sheet", "--device", value or "x")),
        ]
    for value in NUMBERS:
        cases += [
            Case("l2p_fast.convert", ("init", "text.txt", "--res=1k", f"--seed={value}", "--out=o.safetensors")),
            Case("l2p_fast.convert", ("init", "text.txt", "--res=1k", f"--head-width={value}", "--out=o.safetensors")),
            Case("l2p_fast.convert", ("init", "text.txt", f"--patch-size={value}", "--out=o"), "--patch-size"),
            Case("l2p_fast.train", ("--dry-run", f"--processes={value}"), "--processes"),
            Case("l2p_fast.train", ("--dry-run", f"--device-gb={value}"), "--device-gb"),
        ]
        for option in ("num-images", "resamples", "period", "res", "seed", "shard"):
            cases.append(
                Case("l2p_fast.evaluate", ("prompts", "prompts.txt", "--out=o", f"--{option}={value}"), option)
            )
        for step, option in (
            ("prompts", "count"), ("prompts", "seed"), ("prompts", "quoted-share"), ("filter", "near"),
            ("images", "each"), ("images", "res"),
        ):  # fmt: skip
            rest = ("--endpoint=http://127.0.0.1:9/v1", "--llm=m") if step == "prompts" else ("prompts.txt",)
            cases.append(Case("l2p_fast.data", (step, "--out=new", f"--{option}={value}", *rest), f"--{option}"))
        for stage, option in (
            ("ldm", "minutes"), ("ldm", "vae-minutes"), ("ldm", "pictures"), ("corpus", "count"), ("ablate", "steps"),
            ("score", "per-task"), ("score", "sides-64"), ("sheet", "res"), ("transfer", "patch-size"),
        ):  # fmt: skip
            cases.append(Case("examples.tiny", (stage, f"--{option}={value}"), f"--{option}"))
    cases += [
        Case("l2p_fast.plot", (), "RUN"),
        Case("l2p_fast.plot", ("folder", "--out", "/dev/full/x.png")),
        Case("l2p_fast.convert", (), "command"),
        Case("l2p_fast.convert", ("explode",), "explode"),
        Case("l2p_fast.convert", ("export", "text.txt"), "--out"),
        Case("l2p_fast.convert", ("init", "text.txt", "--res=1k", "--patch-size=16", "--out=o"), "--patch-size"),
        Case("l2p_fast.train", ("--nothing",), "--nothing"),
        Case("l2p_fast.train", ("a.yaml", "b.yaml")),
        Case("l2p_fast.evaluate", (), "COMMAND"),
        Case("l2p_fast.evaluate", ("folder", "pipe", "--period=16")),
        Case("l2p_fast.evaluate", ("folder", ".", "--period=16")),
        Case("l2p_fast", ("smaple",), "try sample"),
        Case("l2p_fast", ("../sample",), "../sample"),
        Case("l2p_fast", (INVALID,)),
        Case("l2p_fast", ("a\0b",)),
    ]
    return cases


def cases() -> list[Case]:
    """All of them, without doubles; those of `sample` first, while torch is still away."""
    return list(dict.fromkeys(sample_cases() + other_cases()))


# --- what they are let loose on ---
def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """A PNG's bytes with any header and any chunks."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", zlib.compress(data or bytes((3 * width + 1) * height)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def remembering(settings: str) -> bytes:
    """A small image with these settings, as bytes of JSON."""
    return png(16, 16, (b"tEXt", b"l2p_fast\0" + settings.encode("utf-8", "surrogatepass")))


GOOD = {"prompt": "a", "seed": 1, "height": 16, "width": 16, "steps": 1, "model": "tiny-1k", "version": "0"}


def images() -> dict[str, bytes]:
    """Files that say they are images."""

    def changed(**values: object) -> bytes:
        return remembering(json.dumps(GOOD | values))

    return {
        "good.png": changed(),
        "nothing.png": png(16, 16),
        "empty.png": b"",
        "text.png": b"not an image",
        "cut.png": changed()[:-40],
        "bomb.png": png(1 << 30, 1 << 30, data=b"x"),
        "wide.png": png(100_000, 100_000, data=b"x"),
        "zero.png": png(0, 0, data=b"x"),
        "deep.png": remembering("[" * 100_000 + "]" * 100_000),
        "deeper.png": remembering('{"prompt":' * 100_000),
        "list.png": remembering("[]"),
        "null.png": remembering("null"),
        "no-json.png": remembering("{"),
        "twice.png": remembering('{"prompt": "a", "prompt": {"$ref": "#"}}'),
        "long-int.png": remembering('{"prompt": "a", "seed": ' + "9" * 10_000 + "}"),
        "text-bomb.png": png(16, 16, (b"zTXt", b"l2p_fast\0\0" + zlib.compress(bytes(1 << 27)))),
        "steps.png": changed(steps=10**9),
        "size.png": changed(height=1 << 40),
        "memory.png": changed(height=1 << 20, width=1 << 20),
        "nan.png": changed(guidance=float("nan")),
        "inf.png": changed(shift=float("inf")),
        "types.png": changed(prompt=["a"], seed="1"),
        "true.png": changed(seed=True),
        "surrogate.png": remembering(json.dumps(GOOD | {"prompt": "\ud800"})),
        "hub.png": changed(text_encoder="stranger/encoder"),
        "path.png": changed(model="/etc/passwd"),
        "up.png": changed(image="../../../etc/passwd"),
        "nul.png": changed(model="a\0b"),
        "attention.png": changed(attention="flash_hub"),
        "device.png": changed(device="cuda:0"),
        "offload.png": changed(offload="model", device="cuda"),
        "dtype.png": changed(dtype="bfloat61"),
        "version.png": changed(version={"a": 1}),
        "quantize.png": changed(quantize="int3"),
        "extra.png": changed(__class__="os.system", out="/etc/passwd", prompts_file="/etc/passwd"),
        "gif.png": b"GIF89a\xff\xff\xff\xff\0\0\0;",
        "webp.webp": b"RIFF\xff\xff\xff\x7fWEBPVP8X" + bytes(30),
        "jpeg.jpg": b"\xff\xd8\xff\xe1\xff\xffExif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(40),
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999999 9999999\n(a) run\n",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    }


def prompts_files() -> dict[str, bytes]:
    """Files of prompts."""
    return {
        "prompts.txt": b"a red star\n",
        "no-prompts.txt": b"",
        "blank.txt": b"\n \n\t\n",
        "latin.txt": b"caf\xe9\n",
        "utf16.txt": "a\n".encode("utf-16"),
        "nuls.txt": b"a\0b\n",
        "long-line.txt": b"a" * 1_000_000,
        "many.txt": b"a\n" * 200_000,
        "controls.txt": b"\x1b]0;x\x07\n\x7f\n",
    }


def model_files() -> dict[str, bytes]:
    """Files that say they are models."""

    def header(text: str, size: int | None = None) -> bytes:
        return struct.pack("<Q", len(text) if size is None else size) + text.encode()

    return {
        "empty.safetensors": b"",
        "short.safetensors": b"\1\2\3",
        "huge-header.safetensors": header("{}", 1 << 62),
        "deep.safetensors": header("[" * 100_000),
        "list.safetensors": header("[]"),
        "offsets.safetensors": header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999]}}'),
        "shape.safetensors": header('{"a":{"dtype":"F32","shape":[-1,1e9],"data_offsets":[0,0]}}'),
        "layers.safetensors": header(
            '{"layers.99999999.attention.to_q.weight":{"dtype":"BF16","shape":[4,4],"data_offsets":[0,32]}}' + " " * 32
        ),
        "pickle.safetensors": b"\x80\x04cos\nsystem\n(X\x02\0\0\0idtR.",
        "pickle.pt": b"\x80\x04cos\nsystem\n(X\x02\0\0\0idtR.",
        "model.gguf": b"GGUF" + b"\xff" * 64,
    }


def lay_out(folder: Path) -> None:
    """All files that the table names."""
    files = images() | prompts_files() | model_files()
    files |= {"text.txt": b"text\n", "bad.yaml": b"model: {base: nowhere}\n"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


# --- their run ---
class _Slow(BaseException):
    pass


def _run(case: Case) -> dict[str, object]:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))

    def slow(*_):
        raise _Slow

    from l2p_fast.errors import run_cli

    name = f"{case.command}.__main__" if case.command in ("l2p_fast", "examples.tiny") else case.command
    sys.argv = [case.command, *case.argv]
    signal.signal(signal.SIGALRM, slow)
    signal.alarm(SECONDS)
    ended: object = "no exit"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module = importlib.import_module(name)
            run_cli(module.dispatch if case.command == "l2p_fast" else module.main)
        except SystemExit as error:
            ended = error.code
        except BaseException:
            ended = traceback.format_exc()
        finally:
            signal.alarm(0)
    out.flush(), err.flush()
    said = [stream.buffer.getvalue().decode("ascii", "backslashreplace") for stream in (out, err)]
    return {"code": ended, "out": said[0][-2000:], "err": said[1][-20_000:], "torch": "torch" in sys.modules}


def main() -> None:
    """Run all in the working folder; one JSON object a line, in the table's order."""

    def load(*_):
        from l2p_fast.errors import UserError

        raise UserError(ACCEPTED)

    stand_in = types.ModuleType("l2p_fast.sampling.session")
    stand_in.Session, stand_in.draw_small = types.SimpleNamespace(load=load), load
    sys.modules["l2p_fast.sampling.session"] = stand_in
    stdout = sys.stdout
    for case in cases():
        print(json.dumps(_run(case)), file=stdout, flush=True)


if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]
    main()
