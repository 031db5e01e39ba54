"""AdamW for weights that may be bf16 and sharded, with states of 8 or 32 bits.

One class, whatever the state: it updates one tensor at a time from its gradient, so the same code runs after the
backward pass or inside it (`fuse`). Each process works on the rows it holds (FSDP shards the first dimension).

8-bit states are bitsandbytes' blocks of 256 values. No block crosses a row: a row is filled up to whole blocks. So the
states are the same on any number of processes, and a distributed checkpoint can share them out anew, bit for bit.
Which tensors have 8-bit states follows from their global shape alone.

A bf16 weight keeps 8 bits: at lr 5e-5 most updates are smaller than half its last one and rounding to nearest loses
them. ``rounding`` chooses the remedy: ``stochastic`` (right on average, no memory), ``masters`` (an fp32 copy), or
``nearest`` (none, for comparison). fp32 weights need none.

Letters: R rows held here, C values a row, K = C filled up to a multiple of 256.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .config import OptimConfig
from .parallel import like_sharded, local, shard_index

BLOCK = 256  # values that share a scale, as in bitsandbytes
MIN_8BIT_VALUES, MIN_8BIT_ROW = 4096, 128  # smaller tensors, or shorter rows, have 32-bit states
CHUNK = 1 << 22  # values updated at a time: bounds the fp32 copies
MAX_SEED = 2**63 - 1


def has_8bit_state(shape: Iterable[int]) -> bool:
    """Whether a trained tensor of this global shape gets 8-bit states under ``adamw8bit``."""
    shape = tuple(shape)
    values = math.prod(shape)
    return len(shape) > 1 and values >= MIN_8BIT_VALUES and values // shape[0] >= MIN_8BIT_ROW


def state_bytes(shape: Iterable[int], config: OptimConfig, weight_bytes: int) -> int:
    """Bytes of the optimizer's state of a tensor of this global shape."""
    shape = tuple(shape)
    values = math.prod(shape)
    masters = 4 * values if config.rounding == "masters" and weight_bytes == 2 else 0
    if config.kind == "adamw" or not has_8bit_state(shape):
        return 8 * values + masters
    padded = shape[0] * _padded(values // shape[0])
    return 2 * (padded + padded // BLOCK * 4) + masters


def stochastic_round_(out: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Write fp32 ``values`` to bf16 ``out``, each to one of its two neighbours, so that the mean is kept."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    out.copy_((bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32))


class AdamW:
    """AdamW over named parameters (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        named: the trained parameters by name.
        config: kind, rates, rounding.
        seed: of stochastic rounding.

    Attributes:
        lr: learning rate of the next update.
        steps: updates made.
        squared: sum of squares of the gradients that this step's fused updates have seen.
        skipped: tensors that this step's fused updates have left alone, their gradient not being finite.

    Raises:
        UserError: bitsandbytes or torchao is wanted but not installed.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: OptimConfig, seed: int = 0):
        self.named = dict(named)
        self.config, self.seed = config, seed
        self.lr, self.steps = config.lr, 0
        self.squared, self.skipped = 0.0, 0
        self.state: dict[str, dict[str, Tensor]] = {name: self._new_state(p) for name, p in self.named.items()}
        self._kernel = None
        if any("m_scale" in state for state in self.state.values()):
            self._kernel = {"adamw8bit": _bitsandbytes_update, "torchao": _torchao_update}[config.kind]()
        self._rngs: dict[torch.device, torch.Generator] = {}
        self._places = {name: place for place, name in enumerate(self.named)}

    @torch.no_grad()
    def step(self) -> None:
        """Update every tensor that has a gradient, and drop the gradients."""
        for name in self.named:
            self._update(name)
        self.steps += 1

    @torch.no_grad()
    def squared_norm(self) -> float:
        """Sum of squares of the gradients held here."""
        return float(sum(_square(local(p.grad)) for p in self.named.values() if p.grad is not None))

    @torch.no_grad()
    def clip(self, norm: float, highest: float) -> None:
        """Scale the gradients, whose norm over all processes is ``norm``, down to ``highest``; 0: leave them."""
        if highest and norm > highest:
            for parameter in self.named.values():
                if parameter.grad is not None:
                    local(parameter.grad).mul_(highest / norm)

    def drop(self) -> None:
        """Make no update: forget the gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    def fuse(self) -> None:
        """From now on a tensor is updated in the backward pass, when its gradient is complete.

        `finish` ends a step. From a gradient that isn't finite on, the step's tensors (on this process: its shards) are
        left alone; those before it, nearer to the model's output, have their update.
        """
        for name, parameter in self.named.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._update_if_finite(name))

    def finish(self) -> tuple[float, int]:
        """End a fused step: (sum of squares of the gradients seen here, tensors left alone here)."""
        found = float(self.squared), self.skipped
        self.squared, self.skipped = 0.0, 0
        self.steps += 1
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The states by name, for a checkpoint: sharded as their parameters, the storage shared."""
        return {
            f"{name}.{key}": like_sharded(value, self.named[name])
            for name, state in self.state.items()
            for key, value in state.items()
        }

    def _new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        weight = local(parameter)
        device = torch.device("cpu") if self.config.offload else weight.device
        new = {"device": device, "pin_memory": device.type == "cpu" and weight.is_cuda}
        if self.config.kind != "adamw" and has_8bit_state(parameter.shape):
            rows, padded = weight.shape[0], _padded(math.prod(parameter.shape[1:]))
            state = {key: torch.zeros(rows, padded, dtype=torch.uint8, **new) for key in ("m", "v")}
            state |= {f"{key}_scale": torch.zeros(rows, padded // BLOCK, **new) for key in ("m", "v")}
        else:
            state = {key: torch.zeros(weight.shape, dtype=torch.float32, **new) for key in ("m", "v")}
        if self.config.rounding == "masters" and weight.dtype == torch.bfloat16:
            state["master"] = torch.empty(weight.shape, dtype=torch.float32, **new).copy_(weight.detach())
        return state

    @torch.no_grad()
    def _update_if_finite(self, name: str) -> None:
        square = _square(local(self.named[name].grad))
        if not self.skipped and torch.isfinite(square):
            self.squared = self.squared + square
            self._update(name)
        else:
            self.named[name].grad = None
            self.skipped += 1

    def _update(self, name: str) -> None:
        parameter = self.named[name]
        if parameter.grad is None:
            return
        weight, gradient = local(parameter), local(parameter.grad)
        if weight.numel():
            rows = weight.shape[0] if weight.ndim > 1 else 1  # a vector is one row of 32-bit states
            flat = [weight.detach().view(rows, -1), gradient.reshape(rows, -1)]
            state = {key: value.view(rows, -1) for key, value in self.state[name].items()}
            rng = self._rng(name, weight)
            step = max(1, CHUNK // flat[0].shape[1])
            for start in range(0, rows, step):
                part = slice(start, start + step)
                self._update_rows(*(x[part] for x in flat), {key: x[part] for key, x in state.items()}, rng)
        parameter.grad = None

    def _update_rows(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], rng: torch.Generator) -> None:
        """Update rows of a weight (R, C) from their gradient (R, C)."""
        held, state = state, {key: value.to(weight.device, non_blocking=True) for key, value in state.items()}
        values = state["master"] if "master" in state else weight.float()  # itself, if it is fp32
        gradient = gradient.float()
        if "m_scale" in state:
            self._adam_8bit(values, gradient, state)
        else:
            self._adam_32bit(values, gradient, state)
        if weight.dtype == torch.bfloat16 and self.config.rounding == "stochastic":
            stochastic_round_(weight, values, rng)
        elif values is not weight:
            weight.copy_(values)
        if self.config.offload:
            for key, value in state.items():
                held[key].copy_(value)

    def _adam_32bit(self, values: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        (beta1, beta2), t = self.config.betas, self.steps + 1
        state["m"].lerp_(gradient, 1 - beta1)
        state["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = state["v"].sqrt().div_(math.sqrt(1 - beta2**t)).add_(self.config.eps)
        values.mul_(1 - self.lr * self.config.weight_decay)
        values.addcdiv_(state["m"], scale, value=-self.lr / (1 - beta1**t))

    def _adam_8bit(self, values: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        columns = values.shape[1]
        missing = state["m"].shape[1] - columns
        padded = F.pad(values, (0, missing)) if missing else values
        if missing:
            gradient = F.pad(gradient, (0, missing))
        beta1, beta2 = self.config.betas
        self._kernel(
            gradient.contiguous(), padded, state["m"], state["v"], state["m_scale"].view(-1),
            state["v_scale"].view(-1), beta1=beta1, beta2=beta2, eps=self.config.eps, step=self.steps + 1, lr=self.lr,
            weight_decay=self.config.weight_decay,
        )  # fmt: skip
        if missing:
            values.copy_(padded[:, :columns])

    def _rng(self, name: str, weight: Tensor) -> torch.Generator:
        """Seeded by run, step, tensor and shard: no random state needs to be kept, and copies of a shard stay equal."""
        rng = self._rngs.setdefault(weight.device, torch.Generator(weight.device))
        shard = shard_index(self.named[name])
        return rng.manual_seed(hash((self.seed, self.steps, self._places[name], shard)) & MAX_SEED)


def _square(gradient: Tensor) -> Tensor:
    """The sum of squares in fp32, without an fp32 copy."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()


def _padded(columns: int) -> int:
    return -(-columns // BLOCK) * BLOCK


def _bitsandbytes_update():
    """bitsandbytes' blockwise Adam: (gradient, weight, m, v, m_scale, v_scale, *, rates), all changed in place."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UserError(
            "optim.kind=adamw8bit needs bitsandbytes: pip install l2p_fast[train], or optim.kind=adamw"
        ) from error
    codes: dict[torch.device, tuple[Tensor, Tensor]] = {}  # what the 256 values of a byte mean, signed and not

    def update(gradient, weight, m, v, m_scale, v_scale, *, beta1, beta2, eps, step, lr, weight_decay):
        if weight.device not in codes:
            codes[weight.device] = tuple(
                functional.create_dynamic_map(signed=signed).to(weight.device) for signed in (True, False)
            )
        with _on_default_stream(weight.device):
            functional.optimizer_update_8bit_blockwise(
                "adam", gradient, weight, m, v, beta1, beta2, 0.0, 0.0, eps, step, lr, *codes[weight.device],
                m_scale, v_scale, weight_decay,
            )  # fmt: skip

    return update


@contextlib.contextmanager
def _on_default_stream(device: torch.device) -> Iterator[None]:
    """Order a kernel that always goes to the default stream among those of the current one.

    FSDP makes fused updates on a stream of its own, and PyTorch's streams don't wait for the default one.
    """
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    yield
    current.wait_stream(default)


def _torchao_update():
    """The same by torchao's compiled kernel, on the same states (its blocks and codes are bitsandbytes')."""
    try:
        from torchao.optim.adam import single_param_adam
        from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned
    except ImportError as error:
        raise UserError(
            "optim.kind=torchao needs torchao: pip install l2p_fast[torchao], or optim.kind=adamw8bit"
        ) from error
    compiled = torch.compile(single_param_adam, fullgraph=True, dynamic=False)

    def update(gradient, weight, m, v, m_scale, v_scale, *, beta1, beta2, eps, step, lr, weight_decay):
        states = []
        for codes, scale, qmap in ((m, m_scale, get_qmap_signed()), (v, v_scale, get_qmap_unsigned())):
            qmap = torch.tensor(qmap, dtype=torch.float32, device=weight.device)
            states.append(OptimState8bit(codes, scale, qmap, signed=not states, dtype=torch.float32))
        with torch._dynamo.utils.disable_cache_limit():  # one compilation a shape
            compiled(
                weight, gradient, torch.tensor(float(step)), *states, None, torch.tensor(lr), beta1, beta2,
                weight_decay, eps, True, False,
            )  # fmt: skip

    return update
