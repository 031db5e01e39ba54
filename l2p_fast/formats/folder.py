"""A path -> the safetensors or GGUF files behind it. Loads no torch, downloads nothing, never leaves the folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, few
from .gguf import MAGIC, read_gguf
from .header import Stored, load_json, read_header

CONFIG_LIMIT = 1 << 20  # bytes of a config.json
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_STANDARD = tuple(
    f"{stem}.safetensors{end}" for stem in ("diffusion_pytorch_model", "model") for end in ("", ".index.json")
)
_SHARD = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.safetensors")


class Opened(NamedTuple):
    """All tensors by the file's own names, the metadata (of the first file that has any), the folder's config.json."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    config: dict[str, Any]


class _Files(NamedTuple):
    files: list[Path]
    index: dict[str, str]  # tensor -> file name, where an index says so
    config: dict[str, Any]


def _shards(index: Path, config: dict[str, Any]) -> _Files:
    names = load_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise UserError(f"{index} has no weight_map; download it again")
    chosen = sorted(set(names.values()))
    strange = [name for name in chosen if not re.fullmatch(r"[^/\\\x00-\x1f]{1,200}\.safetensors", name)]
    if strange:
        raise UserError(f"{index} names {strange[0][:80]!r}, not a .safetensors file beside it; download it again")
    files = [index.parent / name for name in chosen]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"{index} names {few(absent)}, not there: {len(absent)} of {len(files)} shards are missing; download them"
        )
    return _Files(files, names, config)


def _find(path: Path, part: str) -> _Files:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .safetensors file or a folder (`hf download` fetches one)")
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _shards(path, {})
        _refuse_lone_shard(path)
        return _Files([path], {}, {})
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder; give a .safetensors file or a folder")
    if (path / part).is_dir():
        path = path / part
    entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    config = load_json(path / "config.json", CONFIG_LIMIT) if path / "config.json" in entries else {}
    indexes = [p for p in entries if p.name.endswith(".safetensors.index.json")]
    weights = [p for p in entries if p.suffix == ".safetensors" and p.is_file()]
    weights = weights or [p for p in entries if p.suffix == ".gguf" and p.is_file()]
    if len(indexes) > 1 or (not indexes and len(weights) > 1):
        for standard in _STANDARD:
            if path / standard in entries:
                weights, indexes = [path / standard], [path / standard] if standard.endswith(".json") else []
                break
    if len(indexes) == 1:
        return _shards(indexes[0], config)
    if len(weights) == 1:
        _refuse_lone_shard(weights[0])
        return _Files(weights, {}, config)
    if not weights and not indexes:
        pickles = [p.name for p in entries if p.suffix in PICKLES]
        if pickles:
            raise UserError(
                f"{path} holds only pickles ({few(pickles)}), which may run any code; get .safetensors files"
            )
        raise UserError(
            f"{path} holds no .safetensors file; give the folder with the {part.replace('_', ' ')}'s weights"
        )
    numbers = [_SHARD.fullmatch(p.name) for p in weights]
    if not indexes and all(numbers) and len({(m[1], m[3]) for m in numbers if m}) == 1:
        total, found = int(numbers[0][3]), {int(m[2]) for m in numbers}
        missing = [i for i in range(1, min(total, len(found) + 4) + 1) if i not in found]
        if missing:
            raise UserError(f"{path} lacks shard {few(missing)} of {total}; download the rest")
        return _Files(weights, {}, config)
    raise UserError(f"{path} holds several checkpoints ({few([p.name for p in weights or indexes])}); name one of them")


def _refuse_lone_shard(path: Path) -> None:
    found = _SHARD.fullmatch(path.name)
    if found and int(found[3]) > 1:
        raise UserError(
            f"{path} is shard {int(found[2])} of {int(found[3])} alone; give the folder that holds them all"
        )


def _is_gguf(file: Path) -> bool:
    """By its first bytes; as a length they would be that of a larger header than any safetensors file may have."""
    try:
        with open(file, "rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # whoever reads it says what is wrong


def open_tensors(path: str | Path, part: str = "transformer") -> Opened:
    """Open a .safetensors or .gguf file, an ``*.index.json``, a folder of shards, or a pipeline folder (its ``part``).

    Raises:
        UserError: nothing there, unreadable, only pickles, a shard missing or stale, a damaged header.
    """
    path = Path(path)
    try:
        files, index, config = _find(path, part)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        held, notes = read_gguf(file) if _is_gguf(file) else read_header(file)
        metadata = metadata or notes
        double = sorted(tensors.keys() & held.keys())
        if double:
            other = tensors[double[0]].file.name
            raise UserError(f"{path}: {few(double)} in both {other} and {file.name}; remove the stale shard")
        tensors.update(held)
    lost = sorted(name for name, file in index.items() if name not in tensors or tensors[name].file.name != file)
    if lost:
        raise UserError(
            f"{path}: the index names {few(name[:80] for name in lost)}, not in its shard; "
            "the shards don't belong together"
        )
    return Opened(tensors, metadata, config)
