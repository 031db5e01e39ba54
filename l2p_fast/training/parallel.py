"""Processes and shards: FSDP2 applied from outside the model, in one order: freeze, checkpointing, shard, load.

`torchrun` starts the processes. Each transformer block and the head are gathered when they run; what is left belongs to
the root. Frozen and trained blocks are sharded alike. Left out: tensor and sequence parallelism.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from ..errors import UserError
from ..models.pixel import PixelModel
from .config import Config

PATIENCE = timedelta(hours=1)  # the others wait while the first process lists many images
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Workers:
    """Which of how many processes this is, and where it computes."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    def sum(self, values: Iterable[float]) -> list[float]:
        """Each value summed over the processes."""
        values = torch.tensor(list(values), dtype=torch.float64)
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.tolist()

    def union(self, names: set[str]) -> set[str]:
        """All processes' ``names`` together (pickled: among ourselves only)."""
        if self.world == 1:
            return names
        boxes = [None] * self.world
        dist.all_gather_object(boxes, names)
        return set().union(*boxes)

    def share(self, value):
        """The first process's ``value`` on all of them (pickled: among ourselves only)."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start(config: Config) -> Workers:
    """Join the processes that torchrun started, if it did, and choose the device.

    Raises:
        UserError: several processes without ``--fsdp``, or a device that isn't there.
    """
    world, rank, place = (int(os.environ.get(key, default)) for key, default in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    if world > 1 and not config.parallel.fsdp:
        raise UserError(f"torchrun started {world} processes; add --fsdp so that they share the model")
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"no device {name!r}; use cuda or cpu") from error
    if device.type == "cuda":
        if not torch.cuda.is_available() or place >= torch.cuda.device_count():
            raise UserError(f"no CUDA device {place} here; use device=cpu, or fewer processes a node")
        device = torch.device("cuda", place if device.index is None else device.index)
        torch.cuda.set_device(device)
    if config.parallel.fsdp and not dist.is_initialized():
        if world == 1:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "0")
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Workers(rank, world, device)


def shard(model: PixelModel, config: Config, workers: Workers) -> None:
    """`fully_shard` every block, the head and the root; the model may be on the meta device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind, world = workers.device.type, workers.world
    if config.parallel.hybrid:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        mesh = init_device_mesh(kind, (world // local_world, local_world), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    # Gradients are summed over the processes in fp32. RoPE and noise levels stay fp32: inputs are not cast.
    compute = DTYPES[config.model.compute] if config.model.compute != config.model.weights else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [*(block for _, block in model.blocks()), model.head]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_sharded(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, this process's rows of something, as a tensor sharded like ``parameter``; the storage is shared."""
    if not isinstance(parameter, DTensor):
        return value
    shape = torch.Size((parameter.shape[0], *value.shape[1:]))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    meta = TensorMeta(shape, stride, value.dtype)
    # Not DTensor.from_local: it would copy what is kept in CPU memory to the mesh's device.
    return DTensor(value, DTensorSpec(parameter.device_mesh, parameter.placements, meta), requires_grad=False)


def fill(parameter: Tensor, value: Tensor | None) -> None:
    """Give ``parameter`` the first process's ``value`` (elsewhere None), each process its rows."""
    with torch.no_grad():
        if not isinstance(parameter, DTensor):
            parameter.copy_(value)
            return
        if value is None:
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
        value = value.to(parameter.device, parameter.dtype)
        whole = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(whole.to_local())


def replicas(parameter: Tensor) -> int:
    """How many processes hold the same rows of ``parameter``."""
    return parameter.device_mesh.size(0) if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 2 else 1


def shard_index(parameter: Tensor) -> int:
    """Which of its rows this process holds, counted in shards; copies of a shard have the same index."""
    return parameter.device_mesh.get_local_rank("shard") if isinstance(parameter, DTensor) else 0


def held_rows(tensor: Tensor, every_copy: bool = False) -> tuple[int, int]:
    """(first row, how many) of what this process holds of ``tensor``; of several copies the first alone has rows,
    unless ``every_copy``. FSDP gives out rows as `torch.chunk` does."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if every_copy or not dist.is_initialized() or dist.get_rank() == 0 else 0
    mesh = tensor.device_mesh
    if mesh.ndim == 2 and mesh.get_local_rank("replicate") and not every_copy:
        return 0, 0
    each = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    return min(shard_index(tensor) * each, tensor.shape[0]), local(tensor).shape[0]


def load_sharded(model: nn.Module, read: Callable[[str], Tensor], workers: Workers) -> None:
    """Give the meta parameters and buffers of a sharded ``model`` memory and what the first process reads."""
    unread = {name for name, p in model.named_parameters() if p.is_meta}
    tables = {name: b for name, b in model.named_buffers() if b.is_meta}  # whole on every process
    for module in model.modules():
        if any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device=workers.device, recurse=False)
    for name, parameter in model.named_parameters():
        if name in unread:
            fill(parameter, read(name) if workers.first else None)
    for name, table in tables.items():
        owner, _, leaf = name.rpartition(".")
        value = read(name) if workers.first else None
        setattr(model.get_submodule(owner), leaf, broadcast(tuple(table.shape), table.dtype, value, workers))


def broadcast(shape: tuple[int, ...], dtype: torch.dtype, value: Tensor | None, workers: Workers) -> Tensor:
    """The first process's ``value`` (elsewhere None) on every process's device."""
    value = torch.empty(shape, dtype=dtype, device=workers.device) if value is None else value.to(workers.device, dtype)
    if workers.world > 1:
        dist.broadcast(value, 0)
    return value
