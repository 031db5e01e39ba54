"""Every file an L2P checkpoint comes in <-> our state dict: one table, both directions.

A tensor is never read whole in the file's dtype: rows are read in pieces of `CHUNK` bytes, dequantized and cast on
the way into their place, so loading needs the model in the wanted dtype and little more. The safetensors container
(an 8-byte length, a JSON header, the bytes) is read and written here directly: memory-mapped pages would count as
ours, and the library's errors name no remedy. Pickles are refused. Nothing is downloaded.

Letters: D = model width, P = patch size in pixels, L = text tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..files import atomic_path

if TYPE_CHECKING:
    from ..models.zimage import L2PTransformer2DModel

logger = logging.getLogger(__name__)

CHUNK = 8 << 20  # bytes read, cast or written at a time

# --- The table -------------------------------------------------------------------------------------------------------
# Ours (= published = diffusers' Z-Image names) | ComfyUI's. Several of ours in a row: they lie fused in one of theirs,
# row block after row block. {P}: the patch size, which theirs tells by its shape alone.
TABLE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("attention.to_q", "attention.to_k", "attention.to_v"), "attention.qkv"),
    (("attention.to_out.0",), "attention.out"),
    (("attention.norm_q",), "attention.q_norm"),
    (("attention.norm_k",), "attention.k_norm"),
    (("all_x_embedder.{P}-1",), "x_embedder"),
    (("all_final_layer.{P}-1",), "final_layer"),
)
# Wrappers that trainers and user interfaces put around the names above; stripped in this order.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "base_model.model.", "transformer.", "pipe.dit.", "module.")
# Other models in an all-in-one file, and a parameter that Z-Image's own file carries and never uses.
FOREIGN = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "norm_final.")
LAYOUTS = ("published", "comfyui")

SCALE_NAMES = ("weight_scale", "scale_weight")  # today's and the older name
QUANT_NOTES = ("comfy_quant", "input_scale", "scale_input")  # the first is read, the others concern activations only
QUANT_FORMATS = {"int8_tensorwise": "I8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
# Keys of a `comfy_quant` note that change nothing in the weight. Any other that is set means a format we don't know.
QUANT_HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape", "per_channel"}

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# Constructor arguments that no key or shape tells. A folder's config.json or our files' metadata keep them.
NOT_IN_SHAPES = ("norm_eps", "rope_theta", "t_scale", "axes_dims", "axes_lens", "rope_grid")
METADATA_KEY = "l2p_config"


# --- One file --------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies: ``shape`` elements of ``dtype`` (a safetensors name) from byte ``offset`` of ``file``.

    ``scale`` (scalar or one per row) and ``rotation`` (group size, 0 = none) belong to a quantized weight:
    value = stored x scale, then each group of ``rotation`` columns is rotated back by a Hadamard matrix.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scale: Stored | None = None
    rotation: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def quantized(self) -> bool:
        return self.dtype in ("I8", "F8_E4M3", "F8_E5M2")

    def rows(self, first: int, count: int) -> Stored:
        """The tensor made of ``count`` rows (first dimension) from row ``first``; a scale per row is cut along."""
        skip = first * math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        scale = self.scale
        if scale is not None and scale.numel > 1:
            scale = scale.rows(first, count)
        return dataclasses.replace(self, shape=(count, *self.shape[1:]), offset=self.offset + skip, scale=scale)


def _looks_like(head: bytes) -> str | None:
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a pickle, which may run any code when it is loaded; use a .safetensors version of it"
    if head[:4] == b"GGUF":
        return "a GGUF file; use a .safetensors version (BF16, float8 or INT8)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch it with `git lfs pull` or `hf download`"
    if head.lstrip()[:1] == b"<":
        return "a web page, not the file itself; download it again (the address may need a login)"
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found


def read_header(path: str | Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the metadata of one safetensors file, from its header alone.

    Raises:
        UserError: ``path`` is unreadable, no safetensors file (a pickle, for one), truncated or damaged.
    """
    path = Path(path)
    again = "download or copy it again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            if size == 0:
                raise UserError(f"{path} is empty; {again}")
            start = head + file.read(56)
            # A header's length may begin like another format's magic, so its "{" decides first.
            other = None if start[8:9] == b"{" else _looks_like(start)
            if other:
                raise UserError(f"{path} is {other}")
            length = int.from_bytes(head, "little")
            if len(head) < 8 or start[8:9] not in (b"{", b"") or not 2 <= length <= 100 << 20:
                raise UserError(
                    f"{path} is not a safetensors file (it starts with {start[:8]!r}); give a .safetensors file"
                )
            if length > size - 8:
                raise UserError(f"{path} is truncated: it ends inside its header ({size:,} bytes); {again}")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_once)
        metadata = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        spans = {
            name: (e["dtype"], tuple(map(int, e["shape"])), *map(int, e["data_offsets"])) for name, e in header.items()
        }
    except KeyError as error:
        raise UserError(f"{path} has a damaged header (at {error}, missing or given twice); {again}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a damaged header ({error}); {again}") from error
    if not spans:
        raise UserError(f"{path} holds no tensors; give the file with the weights")
    tensors, end = {}, 0
    for name, (dtype, shape, first, last) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if dtype not in DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {dtype}, which is not supported; use a BF16, float8 or INT8 version"
            )
        if first != end or last - first != math.prod(shape) * DTYPES[dtype].itemsize or min(shape, default=0) < 0:
            raise UserError(f"{path} has a damaged header: {name} {list(shape)} can't lie at {first}..{last}; {again}")
        tensors[name] = Stored(path, name, dtype, shape, 8 + length + first)
        end = last
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "longer than its header says"
        raise UserError(f"{path} is {what}: {size:,} of {8 + length + end:,} bytes; {again}")
    return tensors, metadata


def _hadamard(size: int) -> torch.Tensor:
    """The regular Hadamard matrix (size, size), symmetric and its own inverse; ``size`` a power of 4 (ConvRot)."""
    seed = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    return matrix


def _read(file: Any, stored: Stored, out: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes of ``stored`` as a tensor of its shape and dtype; into ``out`` (contiguous, on the CPU) if given."""
    if out is None:
        out = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    if stored.numel:
        file.seek(stored.offset)
        view = memoryview(out.view(-1).view(torch.uint8).numpy())
        if file.readinto(view) != len(view):
            raise UserError(f"{stored.file} ends inside {stored.name}; download or copy it again")
    return out


def _check_finite(stored: Stored, out: torch.Tensor, source: torch.Tensor) -> None:
    if not out.numel() or not out.is_floating_point():
        return
    low, high = torch.aminmax(out)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    if out.dtype == torch.float16 and source.float().isfinite().all():
        raise UserError(f"{stored.file}: {stored.name} has values beyond float16's range; use bfloat16")
    raise UserError(
        f"{stored.file}: {stored.name} holds NaN or infinite values: the file is damaged or its training diverged; "
        "get it again, or take an earlier training step"
    )


def _chunks(stored: Stored, dtype: torch.dtype, into: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """The rows of ``stored`` as dequantized, checked CPU tensors of ``dtype``, `CHUNK` bytes of the file at a time.

    With ``into`` (the whole tensor, any device) they are written there instead and the parts of it yielded.
    """
    rows = stored.shape[0] if stored.shape else 1
    whole = stored if stored.shape else dataclasses.replace(stored, shape=(1,))
    step = max(1, CHUNK * rows // max(1, whole.numel * DTYPES[stored.dtype].itemsize))
    target = None if into is None else into.view(whole.shape)
    plain = stored.scale is None and not stored.rotation and DTYPES[stored.dtype] == dtype
    try:
        with open(stored.file, "rb", buffering=0) as file:
            for first in range(0, rows, step):
                part = whole.rows(first, min(step, rows - first))
                out = None if target is None else target[first : first + part.shape[0]]
                if plain and (out is None or out.device.type == "cpu"):
                    source = out = _read(file, part, out)
                else:
                    source = _read(file, part)
                    if part.scale is not None:
                        scale = _read(file, part.scale).float()
                        source = source.float() * scale.reshape(
                            -1, *[1] * (source.dim() - 1) if scale.numel() > 1 else ()
                        )
                    if part.rotation:
                        groups = source.float().unflatten(-1, (-1, part.rotation))
                        source = (groups @ _hadamard(part.rotation)).flatten(-2)
                    out = source.to(dtype) if out is None else out.copy_(source)
                _check_finite(stored, out, source)
                yield out
    except OSError as error:
        raise UserError(f"can't read {stored.file}: {error.strerror or error}") from error


# --- Files and folders -----------------------------------------------------------------------------------------------
def _load_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    return found


def _shards(index: Path) -> tuple[list[Path], dict[str, str]]:
    names = _load_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise UserError(f"{index} has no weight_map; download it again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"{index} names {few(absent)}, not there: {len(absent)} of {len(files)} shards are missing; download them"
        )
    return files, names


def _find(path: Path) -> tuple[list[Path], dict[str, str], dict[str, Any]]:
    """The safetensors files behind ``path``, what an index says (tensor -> file name) and the folder's config.json."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .safetensors file or a folder (`hf download` fetches one)")
    if path.is_file():
        if path.name.endswith(".index.json"):
            return *_shards(path), {}
        return [path], {}, {}
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder; give a .safetensors file or a folder")
    if (path / "transformer").is_dir():
        path = path / "transformer"
    files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    config = _load_json(path / "config.json") if path / "config.json" in files else {}
    indexes = [p for p in files if p.name.endswith(".safetensors.index.json")]
    weights = [p for p in files if p.suffix == ".safetensors" and not p.is_dir()]
    if len(indexes) > 1 or (not indexes and len(weights) > 1):
        for standard in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"):
            if path / standard in files:
                weights, indexes = [path / standard], [path / standard] if standard.endswith(".json") else []
                break
    if len(indexes) == 1:
        return *_shards(indexes[0]), config
    if len(weights) == 1:
        _refuse_lone_shard(weights[0])
        return weights, {}, config
    if not weights and not indexes:
        pickles = [p.name for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickles:
            raise UserError(
                f"{path} holds only pickles ({few(pickles)}), which may run any code; get .safetensors files"
            )
        raise UserError(f"{path} holds no .safetensors file; give the folder with the transformer's weights")
    numbers = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", p.name) for p in weights]
    if not indexes and all(numbers) and len({(m[1], m[3]) for m in numbers if m}) == 1:
        total = int(numbers[0][3])
        missing = sorted(set(range(1, total + 1)) - {int(m[2]) for m in numbers})
        if missing:
            raise UserError(f"{path} lacks shard {few(missing)} of {total}; download the rest")
        return weights, {}, config
    raise UserError(f"{path} holds several checkpoints ({few([p.name for p in weights or indexes])}); name one of them")


def _refuse_lone_shard(path: Path) -> None:
    found = re.fullmatch(r".*-0*(\d+)-of-0*(\d+)\.safetensors", path.name)
    if found and int(found[2]) > 1:
        raise UserError(f"{path} is shard {found[1]} of {found[2]} alone; give the folder that holds them all")


def _open_raw(path: Path) -> tuple[dict[str, Stored], dict[str, str], dict[str, Any]]:
    """All tensors by the file's own names, the metadata (of the first file that has any) and the folder's config."""
    try:
        files, index, config = _find(path)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    if path.is_file() and not index:
        _refuse_lone_shard(path)
    raw: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors, notes = read_header(file)
        metadata = metadata or notes
        double = sorted(raw.keys() & tensors.keys())
        if double:
            other = raw[double[0]].file.name
            raise UserError(f"{path}: {few(double)} in both {other} and {file.name}; remove the stale shard")
        raw.update(tensors)
    lost = sorted(name for name, file in index.items() if name not in raw or raw[name].file.name != file)
    if lost:
        raise UserError(f"{path}: the index names {few(lost)}, not in its shard; the shards don't belong together")
    return raw, metadata, config


def misshapen(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Those in both that differ: ``name [came] instead of [wanted]``."""
    return [f"{k} {list(shapes[k])} instead of {list(s)}" for k, s in wanted.items() if k in shapes and shapes[k] != s]


def few(names: Iterable[Any], most: int = 3) -> str:
    """``a, b, c and 7 more``."""
    names = [str(name) for name in names]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _strip(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


# --- Names -----------------------------------------------------------------------------------------------------------
def _patch_of(in_features: int) -> int | None:
    """The patch size of a bare ``x_embedder``: 3 P^2 inputs for pixels, 16 P^2 for latents (never both)."""
    for channels in (3, 16):
        patch = math.isqrt(in_features // channels)
        if channels * patch * patch == in_features:
            return patch
    return None


def _to_ours(stored: dict[str, Stored], path: Path) -> dict[str, Stored]:
    """ComfyUI's names and fused tensors as ours; published names pass unchanged."""
    bare = stored.get("x_embedder.weight")
    patch = _patch_of(bare.shape[-1]) if bare is not None and len(bare.shape) == 2 else None
    if bare is not None and patch is None:
        raise UserError(f"{path}: x_embedder.weight {list(bare.shape)} fits no patch size (3 P^2 inputs wanted)")
    ours: dict[str, Stored] = {}
    for name, where in stored.items():
        names = [name]
        for our_modules, theirs in TABLE:
            found = re.fullmatch(rf"((?:.*\.)?){re.escape(theirs)}(\..+)", name)
            if found:
                names = [found[1] + module.replace("{P}", str(patch)) + found[2] for module in our_modules]
                break
        if len(names) > 1 and (not where.shape or where.shape[0] % len(names)):
            raise UserError(f"{path}: {name} {list(where.shape)} can't be cut into {len(names)} equal parts")
        for i, our_name in enumerate(names):
            if our_name in ours:
                raise UserError(f"{path} has {our_name} twice ({ours[our_name].name} and {where.name}); remove one")
            count = where.shape[0] // len(names) if len(names) > 1 else 0
            ours[our_name] = where.rows(i * count, count) if len(names) > 1 else where
    return ours


def _to_layout(keys: Iterable[str], layout: str, prefix: str) -> dict[str, list[str]]:
    """Name in the file -> our keys that it holds, in row order. The inverse of `_to_ours`."""
    theirs: dict[str, list[str]] = {}
    for key in keys:
        name, place = key, 0
        if layout == "comfyui":
            for our_modules, their_module in TABLE:
                for i, module in enumerate(our_modules):
                    pattern = re.escape(module).replace(re.escape("{P}"), r"\d+")
                    found = re.fullmatch(rf"((?:.*\.)?){pattern}(\..+)", key)
                    if found:
                        name, place = found[1] + their_module + found[2], i
        group = theirs.setdefault(prefix + name, [])
        group.insert(place, key) if len(group) >= place else group.append(key)
    for name, group in theirs.items():
        theirs[name] = sorted(group, key=_fused_place)
    return theirs


def _fused_place(key: str) -> int:
    return next((i for ours, _ in TABLE for i, module in enumerate(ours) if f".{module}." in f".{key}"), 0)


def _quantization(stored: dict[str, Stored], metadata: dict[str, str], path: Path) -> dict[str, Stored]:
    """Attach scales and rotations to the weights they belong to, and drop them as tensors of their own."""
    notes: dict[str, dict] = {}
    try:
        notes.update(json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {}))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} has damaged quantization metadata ({error}); download it again") from error
    notes = {_strip(layer): note for layer, note in notes.items()}
    plain, scales = {}, {}
    for name, where in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf in SCALE_NAMES:
            scales[module] = where
        elif leaf == "comfy_quant":
            with open(where.file, "rb") as file:
                text = bytes(_read(file, dataclasses.replace(where, dtype="U8")).flatten().tolist())
            try:
                notes[module] = json.loads(text)
            except ValueError as error:
                raise UserError(f"{path}: {name} is not JSON ({error}); download it again") from error
        elif leaf not in QUANT_NOTES and name != "scaled_fp8":
            plain[name] = where
    stray = sorted(module for module in scales.keys() | notes.keys() if f"{module}.weight" not in plain)
    if stray:
        raise UserError(f"{path} has a quantization scale or note without its weight ({few(stray)}); download it again")
    for name, where in plain.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            continue
        scale, note = scales.get(module), notes.get(module)
        rotation = 0
        if note is not None:
            rotation = _rotation(note, where, path)
        elif scale is not None and not where.quantized:
            raise UserError(f"{path}: {name} is {where.dtype} but has a scale; only INT8 and float8 weights take one")
        if scale is None and where.dtype == "I8":
            raise UserError(f"{path}: {name} is INT8 without its weight_scale; download the file again")
        if scale is not None:
            rows = where.shape[0] if where.shape else 1
            if scale.numel not in (1, rows) or max(scale.shape, default=1) != scale.numel or scale.dtype not in FLOATS:
                raise UserError(
                    f"{path}: {scale.name} is {scale.dtype} {list(scale.shape)}; "
                    f"wanted one F32 number, or one per row ({rows},); get another version of the file"
                )
            if scale.numel == rows:
                scale = dataclasses.replace(scale, shape=(rows,))
        plain[name] = dataclasses.replace(where, scale=scale, rotation=rotation)
    return plain


def _rotation(note: Any, where: Stored, path: Path) -> int:
    """The ConvRot group size of a ``comfy_quant`` note (0: none), refusing what we can't undo."""
    known = f"supported: {', '.join(QUANT_FORMATS)}; use another version of the file"
    form = note.get("format") if isinstance(note, dict) else note
    if form not in QUANT_FORMATS:
        raise UserError(f"{path}: {where.name} has quantization format {form!r}; {known}")
    if where.dtype != QUANT_FORMATS[form]:
        raise UserError(f"{path}: {where.name} is {where.dtype} but its note says {form}; download it again")
    size = int(note.get("convrot_groupsize", 256)) if note.get("convrot") else 0
    strange = sorted(k for k, v in note.items() if v and k not in QUANT_HARMLESS | {"convrot", "convrot_groupsize"})
    columns = where.shape[-1] if len(where.shape) == 2 else 0
    if strange or (size and (columns == 0 or columns % size or 4 ** round(math.log(size, 4)) != size)):
        raise UserError(f"{path}: {where.name} has quantization {json.dumps(note)}; {known}")
    return size


# --- A checkpoint ----------------------------------------------------------------------------------------------------
class Checkpoint:
    """An opened checkpoint: its tensors by our keys, read only when asked for.

    Args:
        path: a .safetensors file, a ``*.index.json``, a folder of shards, a diffusers model folder, or a pipeline
            folder (its ``transformer/``).

    Attributes:
        tensors: our key -> `Stored`. Of a LoRA: its own names.
        is_lora: whether it holds a LoRA.
        config: the constructor arguments that shapes don't tell, where the file or its folder keeps them.

    Raises:
        UserError: no such file, unreadable, truncated, a pickle, a missing shard, an unknown quantization, ...
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        raw, metadata, config = _open_raw(self.path)
        all_in_one = any(name.startswith(PREFIXES[0]) for name in raw)
        tensors: dict[str, Stored] = {}
        for name, where in raw.items():
            if name.startswith(FOREIGN) and (all_in_one or name.startswith("norm_final.")):
                continue
            bare = _strip(name)
            if bare in tensors:
                raise UserError(f"{path} has {bare} twice ({tensors[bare].name} and {name}); remove one")
            tensors[bare] = where
        self.is_lora = any(re.search(r"\.lora[._]|\.dora_scale|\.(hada|lokr)_|^lora_", name) for name in tensors)
        self.tensors = tensors if self.is_lora else _to_ours(_quantization(tensors, metadata, self.path), self.path)
        if METADATA_KEY in metadata:
            try:
                config = json.loads(metadata[METADATA_KEY]) | config
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}: its {METADATA_KEY} metadata is damaged ({error}); write the file again"
                ) from error
        self.config = {k: config[k] for k in NOT_IN_SHAPES if config.get(k) is not None}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: where.shape for key, where in self.tensors.items()}

    @property
    def default_dtype(self) -> torch.dtype:
        """One dtype for the model: the smallest float of 16 bits or more in the file; bfloat16 if it is quantized.

        So the published 1K file, whose middle layers are bfloat16 values stored as F32 beside BF16, loads as bfloat16.
        """
        kinds = {where.dtype for where in self.tensors.values()}
        if any(where.quantized for where in self.tensors.values()) or "BF16" in kinds:
            return torch.bfloat16
        return torch.float16 if "F16" in kinds else torch.float32

    def tensor(self, key: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
        """The tensor of our key ``key``, dequantized and checked for NaN and Inf, in ``dtype`` (None: as stored)."""
        where = self.tensors[key]
        out = torch.empty(where.shape, dtype=dtype or self.dtype_of(key), device=device)
        for _ in _chunks(where, out.dtype, into=out):
            pass
        return out

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype of `tensor` when none is given: the stored one, bfloat16 for a quantized weight."""
        where = self.tensors[key]
        return torch.bfloat16 if where.quantized else DTYPES[where.dtype]

    def kind(self) -> str:
        """``l2p``, ``latent`` (a Z-Image), ``delta`` (only trained tensors), ``lora`` or ``other``."""
        names = self.tensors.keys()
        if self.is_lora:
            return "lora"
        if any(name.startswith("all_final_layer.") for name in names):
            return "latent"
        blocks = {int(m[1]) for m in (re.match(r"layers\.(\d+)\.", name) for name in names) if m}
        head = any(name.startswith("local_decoder.") for name in names)
        embedder = any(name.startswith("all_x_embedder.") for name in names)
        if not blocks and not head and not embedder:
            return "other"
        if blocks != set(range(max(blocks, default=0) + 1)) or not (head or embedder):
            return "delta"
        if not head and any(s[-1] % 16 == 0 and s[-1] % 3 for n, s in self.shapes.items() if n.startswith("all_x_")):
            return "latent"
        return "l2p"

    def demand(self, *kinds: str) -> None:
        """Refuse another kind of checkpoint than ``kinds``, naming the remedy."""
        kind = self.kind()
        if kind in kinds:
            return
        wanted = "a Z-Image or L2P checkpoint" if "latent" in kinds else "a whole L2P checkpoint"
        first = few(where.name for where in self.tensors.values())
        raise UserError(f"{self.path} is " + {
            "latent": f"a latent Z-Image checkpoint, not {wanted}; make a pixel model of it first: "
                      "python -m l2p_fast.convert init FILE --res 1k --out NEW.safetensors",
            "delta": f"a training output ({len(self.tensors)} tensors), not {wanted}; merge it first: "
                     "python -m l2p_fast.convert merge FILE --base BASE.safetensors --out NEW.safetensors",
            "lora": f"a LoRA, not {wanted}; load its model, then l2p_fast.formats.checkpoint.load_lora(model, FILE)",
            "l2p": f"a whole L2P checkpoint, not {wanted}",
            "other": f"not {wanted} (its tensors: {first}); give the transformer's file",
        }[kind])  # fmt: skip

    def compare(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Name every missing, unexpected or misshapen tensor (the first few and the count) against ``wanted``."""
        shapes = self.shapes
        missing = [key for key in wanted if key not in shapes]
        extra = [self.tensors[key].name for key in shapes if key not in wanted]
        wrong = misshapen(shapes, wanted)
        found = [
            f"{len(names)} {what} ({few(names)})"
            for what, names in (("missing", missing), ("unexpected", extra), ("misshapen", wrong))
            if names
        ]
        if found:
            raise UserError(
                f"{self.path} is not the L2P model that its shapes tell: {'; '.join(found)} of {len(wanted)} tensors; "
                "the file is incomplete or of another model"
            )

    def model_config(self, **overrides: Any) -> dict[str, Any]:
        """`infer_config` of this file, with what its folder or metadata adds, and ``overrides``."""
        try:
            return infer_config(self.shapes) | self.config | overrides
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error


def load_state(path: str | Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (our key, CPU tensor) one by one from any supported file or folder, dequantized.

    ``dtype`` None keeps each tensor's stored dtype (bfloat16 for quantized weights).

    Raises:
        UserError: see `Checkpoint`.
    """
    checkpoint = Checkpoint(path)
    for key in checkpoint.tensors:
        yield key, checkpoint.tensor(key, dtype)


# --- Configuration ---------------------------------------------------------------------------------------------------
def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are shared by the RoPE axes (text, row, column): 1/4, 3/8, 3/8, each even.

    128 -> (32, 48, 48) as published; 32 -> (8, 12, 12).
    """
    side = 2 * round(head_dim * 3 / 16)
    return head_dim - 2 * side, side, side


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Constructor arguments of `L2PTransformer2DModel` from our keys and shapes alone (also of a latent Z-Image).

    What shapes don't tell (``norm_eps``, ``rope_theta``, ``t_scale``, ``axes_lens``, ``rope_grid``) is left out.

    Raises:
        UserError: a tensor that tells a size is missing.
    """
    wanted = {
        "cap_embedder.1.weight": 2, "cap_embedder.0.weight": 1, "layers.0.attention.norm_q.weight": 1,
        "layers.0.attention.to_q.weight": 2, "layers.0.attention.to_k.weight": 2,
    }  # fmt: skip
    lost = [key for key, rank in wanted.items() if len(shapes.get(key, ())) != rank or 0 in shapes[key]]
    embedders = {}
    for key, shape in shapes.items():
        found = re.fullmatch(r"all_x_embedder\.(\d+)-(\d+)\.weight", key)
        if found and len(shape) == 2:
            embedders[int(found[1]), int(found[2])] = shape[1]
    if not embedders:
        lost.append("all_x_embedder.{patch}-1.weight")
    if lost:
        raise UserError(
            f"{len(lost)} missing or misshapen ({few(lost)}), which tell the model's sizes; get the file again"
        )
    (patch, f_patch), inputs = next(iter(embedders.items()))
    dim, head_dim = shapes["cap_embedder.1.weight"][0], shapes["layers.0.attention.norm_q.weight"][0]

    def count(stem: str) -> int:
        return 1 + max((int(m[1]) for m in (re.match(rf"{stem}\.(\d+)\.", key) for key in shapes) if m), default=-1)

    config = {
        "all_patch_size": tuple(p for p, _ in embedders),
        "all_f_patch_size": tuple(f for _, f in embedders),
        "in_channels": inputs // (patch * patch * f_patch),
        "dim": dim,
        "n_layers": count("layers"),
        "n_refiner_layers": max(count("noise_refiner"), count("context_refiner")),
        "n_heads": shapes["layers.0.attention.to_q.weight"][0] // head_dim,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head_dim,
        "cap_feat_dim": shapes["cap_embedder.0.weight"][0],
        "axes_dims": rope_axes(head_dim),
    }
    head = {key.removeprefix("local_decoder."): s for key, s in shapes.items() if key.startswith("local_decoder.")}
    if head:
        config["head_width"] = _head_width(head, patch, dim)
    return config


def _head_width(head: Mapping[str, tuple[int, ...]], patch: int, dim: int) -> float:
    """The head's width multiplier: the first round number that gives all its shapes, 1.0 if none does."""
    bottleneck = head.get("bottleneck.0.weight", (0,))[0]
    if bottleneck in (0, 512):
        return 1.0
    near = bottleneck / 512
    # A width rounds to the channel counts, so several give the same head; a short decimal is what a person chose.
    tries = [round(near, 1), round(near, 2), near, round(near, 3)] + [near + i / 1024 for i in range(-4, 5)]
    for width in dict.fromkeys(w for w in tries if w > 0):
        if _head_shapes(patch, dim, width) == head:
            return width
    return near


def _head_shapes(patch: int, dim: int, width: float) -> dict[str, tuple[int, ...]]:
    from ..models.detailer import DetailerHead

    with torch.device("meta"):
        return {key: tuple(v.shape) for key, v in DetailerHead(patch, dim, width).state_dict().items()}


def build_empty(config: Mapping[str, Any]) -> L2PTransformer2DModel:
    """The model of ``config`` on the meta device: shapes, no memory.

    Raises:
        UserError: the constructor refuses ``config``.
    """
    from ..models.zimage import L2PTransformer2DModel

    try:
        with torch.device("meta"):
            return L2PTransformer2DModel(**config)
    except UserError as error:
        raise UserError(f"no L2P model has the sizes that these tensors tell: {error}") from error


def model_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Our key -> shape of the model of ``config``."""
    return {key: tuple(value.shape) for key, value in build_empty(config).state_dict().items()}


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> L2PTransformer2DModel:
    """Load an L2P checkpoint of any supported file layout (see `Checkpoint`) as a model in evaluation mode.

    The configuration comes from keys and shapes; ``config.json`` of a folder or our files' metadata add what shapes
    don't tell; ``overrides`` are constructor arguments that win over both. Every parameter is read straight into
    ``dtype`` (None: `Checkpoint.default_dtype`) on ``device``, so host memory peaks at the model plus `CHUNK`-sized
    pieces.

    Raises:
        UserError: see `Checkpoint`; also missing, unexpected or misshapen tensors, NaN or Inf, a latent checkpoint, a
            training output that has yet to be merged.
    """
    from tqdm import tqdm

    checkpoint = Checkpoint(path)
    checkpoint.demand("l2p")
    model = build_empty(checkpoint.model_config(**overrides))
    checkpoint.compare({key: tuple(value.shape) for key, value in model.state_dict().items()})
    dtype = dtype or checkpoint.default_dtype
    state = {}
    for key in tqdm(checkpoint.tensors, desc="load", unit="tensor", leave=False, disable=not sys.stderr.isatty()):
        state[key] = checkpoint.tensor(key, dtype, device)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


# --- Writing ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor to be written: its shape, its dtype, and its rows as CPU tensors of that dtype, made when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[torch.dtype], Iterator[torch.Tensor]]

    @staticmethod
    def of_checkpoint(checkpoint: Checkpoint, key: str, dtype: torch.dtype | None = None) -> Piece:
        where = checkpoint.tensors[key]
        return Piece(where.shape, dtype or checkpoint.dtype_of(key), lambda kind: _chunks(where, kind))

    @staticmethod
    def of_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Piece:
        return Piece(tuple(tensor.shape), dtype or tensor.dtype, lambda kind: iter([tensor.detach().to("cpu", kind)]))

    @staticmethod
    def of_init(key: str, shape: tuple[int, ...], fan_in: int, seed: int, dtype: torch.dtype) -> Piece:
        """A new tensor: uniform in +-1/sqrt(fan_in), PyTorch's default for a Linear or Conv2d and for its bias.

        Drawn in fp32 from a generator seeded by the first 8 bytes of sha256("{seed}:{key}"), so a tensor depends on its
        own name and ``seed`` alone.
        """
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        bound = fan_in**-0.5

        def draw(kind: torch.dtype) -> Iterator[torch.Tensor]:
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            yield torch.empty(shape).uniform_(-bound, bound, generator=generator).to(kind)

        return Piece(shape, dtype, draw)

    @staticmethod
    def fused(parts: list[Piece]) -> Piece:
        """``parts`` row after row in one tensor, in the dtype that holds them all exactly."""
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return Piece(shape, dtype, lambda kind: (chunk for part in parts for chunk in part.chunks(kind)))


def write_pieces(
    pieces: Mapping[str, Piece],
    path: str | Path,
    layout: str = "published",
    prefix: str = "",
    config: Mapping[str, Any] | None = None,
) -> int:
    """Write ``pieces`` (by our keys) as one safetensors file, atomically, a chunk at a time. Returns its bytes.

    Args:
        pieces: our key -> `Piece`.
        path: the file to write.
        layout: ``published`` (our names) or ``comfyui`` (fused ``qkv``, short names).
        prefix: put before every name, such as ``model.diffusion_model.``.
        config: constructor arguments that shapes don't tell; kept in the metadata.

    Raises:
        UserError: an unknown layout, ``path`` can't be written, or a tensor holds NaN or Inf (nothing is left then).
    """
    from tqdm import tqdm

    if layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
    named: dict[str, Piece] = {}
    for name, keys in _to_layout(pieces, layout, prefix).items():
        if name in named:
            raise UserError(f"two tensors would be named {name}")
        named[name] = pieces[keys[0]] if len(keys) == 1 else Piece.fused([pieces[key] for key in keys])
    # The order of the safetensors library: wide dtypes first, so that every tensor is aligned, then by name.
    order = sorted(named, key=lambda name: (-named[name].dtype.itemsize, name))
    kept = {key: value for key, value in (config or {}).items() if key in NOT_IN_SHAPES and value is not None}
    metadata = {"format": "pt"} | ({METADATA_KEY: json.dumps(kept, sort_keys=True)} if kept else {})
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        piece = named[name]
        size = math.prod(piece.shape) * piece.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        with tqdm(
            total=end, desc="write", unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
        ) as bar:
            for name in order:
                for chunk in named[name].chunks(named[name].dtype):
                    bar.update(file.write(memoryview(chunk.contiguous().view(-1).view(torch.uint8).numpy())))
        if file.tell() != 8 + len(text) + end:
            raise UserError(f"{path}: {file.tell():,} bytes written instead of {8 + len(text) + end:,}")
    return 8 + len(text) + end


def save_single_file(
    model_or_state: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | Path,
    layout: str = "published",
    prefix: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model, or a state dict by our keys, as one safetensors file that `load_model` and ComfyUI's layout know.

    Args:
        model_or_state: an `L2PTransformer2DModel` (its metadata then keeps what shapes don't tell) or a dict.
        path, layout, prefix: see `write_pieces`.
        dtype: cast to this; None keeps each tensor's own.

    Raises:
        UserError: see `write_pieces`; NaN or infinite values.
    """
    state, config = model_or_state, None
    if isinstance(model_or_state, torch.nn.Module):
        state, config = model_or_state.state_dict(), dict(model_or_state.config)
    for key, value in state.items():
        if value.is_floating_point() and not all(torch.isfinite(v) for v in torch.aminmax(value.detach())):
            raise UserError(f"{key} holds NaN or infinite values; nothing was written")
    write_pieces({key: Piece.of_tensor(value, dtype) for key, value in state.items()}, path, layout, prefix, config)


# --- LoRA ------------------------------------------------------------------------------------------------------------
_LORA_LEAVES = (
    (re.compile(r"\.(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight$"), "A"),
    (re.compile(r"\.(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight$"), "B"),
    (re.compile(r"\.alpha$"), "alpha"),
)


def _lora_modules(model: torch.nn.Module) -> dict[str, list[str]]:
    """Every name a LoRA file may give a module (ours, ComfyUI's, either with underscores) -> our modules."""
    names: dict[str, list[str]] = {}
    modules = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for layout in LAYOUTS:
        for theirs, ours in _to_layout((f"{name}.weight" for name in modules), layout, "").items():
            names[theirs.removesuffix(".weight")] = [key.removesuffix(".weight") for key in ours]
    return names | {"lora_unet_" + name.replace(".", "_"): ours for name, ours in names.items()}


def read_lora(model: torch.nn.Module, path: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Our module name -> (A (rank, in), B (out, rank)) in fp32 with alpha / rank folded into B.

    Fused ``qkv`` is cut into three. What only a latent model has (its patch embedding, its final layer) is left out
    with a warning.

    Raises:
        UserError: not a LoRA, not one of this model, an unsupported kind (LoHa, LoKr, DoRA), or NaN.
    """
    checkpoint = Checkpoint(path)
    if not checkpoint.is_lora:
        raise UserError(f"{path} is not a LoRA (no lora_A/lora_B or lora_down/lora_up in it); load it as a model")
    known, found, unknown = _lora_modules(model), {}, []
    for name in checkpoint.tensors:
        leaf = next(((name[: m.start()], kind) for rx, kind in _LORA_LEAVES if (m := rx.search(name))), None)
        if leaf is None:
            unknown.append(name)
        else:
            found.setdefault(leaf[0], {})[leaf[1]] = checkpoint.tensor(name, torch.float32)
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} tensors are no plain LoRA's ({few(unknown)}); only A/B (down/up) pairs work"
        )
    result, latent = {}, []
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if hasattr(module, "weight")}
    for module, parts in found.items():
        if "A" not in parts or "B" not in parts:
            raise UserError(f"{path}: {module} lacks one half of its pair; the file is incomplete")
        if re.search(r"final_layer|x_embedder", module) and known.get(module) is None:
            latent.append(module)
            continue
        if module not in known:
            unknown.append(module)
            continue
        a, b = parts["A"], parts["B"]
        if "alpha" in parts:
            b = b * (float(parts["alpha"]) / a.shape[0])
        targets = known[module]
        if b.shape[0] % len(targets):
            raise UserError(f"{path}: {module} has {b.shape[0]} rows, not {len(targets)} equal parts")
        for target, part in zip(targets, b.chunk(len(targets)), strict=True):
            came, want = (part.shape[0], math.prod(a.shape[1:])), shapes[target]
            if came != (want[0], math.prod(want[1:])) or part.shape[1] != a.shape[0]:
                if "x_embedder" in module:
                    latent.append(module)
                    continue
                raise UserError(f"{path}: {module} is for a weight of {list(came)}, the model's is {list(want)}")
            if target in result:
                if len(targets) == 1:
                    raise UserError(f"{path} has {target} twice; remove one")
                continue  # a fused copy beside the split one
            result[target] = (a, part)
    if unknown:
        raise UserError(f"{path}: {len(unknown)} modules are not in this model ({few(unknown)}); give a LoRA of it")
    if latent:
        logger.warning("%s: left out what only a latent model has: %s", path, few(latent))
    if not result:
        raise UserError(f"{path} changes nothing in this model ({few(latent)}); give a LoRA of it")
    return result


def load_lora(model: L2PTransformer2DModel, path: str | Path, scale: float = 1.0, adapter: str | None = None) -> int:
    """Apply a Z-Image or L2P LoRA (diffusers, ComfyUI or kohya names, split or fused qkv). Returns the modules changed.

    Args:
        model: changed in place.
        path: the .safetensors file (or a folder with one).
        scale: multiplies the LoRA; -scale takes a merged one out again (up to rounding).
        adapter: None merges into the weights (W += scale * alpha/rank * B A, computed in fp32); a name adds a PEFT
            adapter of that name instead, which can be switched off or reweighted and works on quantized weights too.

    Raises:
        UserError: see `read_lora`; merging into quantized weights.
    """
    pairs = read_lora(model, path)
    if adapter is not None:
        state = {}
        for module, (a, b) in pairs.items():
            state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = a, b
        model.load_lora_adapter(state, prefix=None, adapter_name=adapter)
        model.set_adapters([adapter], [scale])
        return len(pairs)
    whole = [module for module in pairs if not model.get_submodule(module).weight.is_floating_point()]
    if whole:
        raise UserError(f"can't merge a LoRA into quantized weights ({few(whole)}); give adapter=NAME")
    with torch.no_grad():
        for module, (a, b) in pairs.items():
            weight = model.get_submodule(module).weight
            delta = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape).to(weight.device)
            weight.copy_(weight.float() + scale * delta)
    return len(pairs)
