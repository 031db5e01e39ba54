"""What every training of the small world shares: optimizers, average weights, a resumable loop with a progress bar."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from l2p_fast.files import atomic_path
from l2p_fast.ops import cpu_has_fast_bf16


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast: on processors without it, matrix products take twenty times as long as in fp32."""
    return torch.bfloat16 if device.type != "cpu" or cpu_has_fast_bf16() else torch.float32


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan 2024), for weights of two or more axes; the axes after the first count as one.

    All weights of one shape are orthogonalized by one batch of products: a small model has many small matrices. The
    update has the size of AdamW's, so that the rate can be shared.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for weights in alike.values():
                for p in weights:
                    if not self.state[p]:
                        self.state[p]["average"] = torch.zeros_like(p)
                grads = torch.stack([p.grad.flatten(1) for p in weights])
                averages = torch.stack([self.state[p]["average"].flatten(1) for p in weights])
                averages.lerp_(grads, 1 - group["momentum"])
                updates = orthogonal(grads.lerp(averages, group["momentum"]))  # Nesterov's look ahead
                size = 0.2 * math.sqrt(max(updates.shape[1:]))
                for p, average, update in zip(weights, averages, updates, strict=True):
                    self.state[p]["average"].copy_(average.view_as(p))
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(update.view_as(p), alpha=group["lr"] * size)


def orthogonal(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought near 1, by five Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).to(fast_dtype(x.device))
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y + (-4.775 * square + 2.0315 * square @ square) @ y
    return (y.mT if tall else y).float()


class Optimizer:
    """Muon for the weight matrices of the blocks, AdamW for all else; one learning rate for both.

    `matrices` says which parameters go to Muon.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], lr: float, matrices: Callable[[str, Tensor], bool]):
        named = [(name, p) for name, p in named if p.requires_grad]
        muon = [p for name, p in named if matrices(name, p)]
        rest = [p for name, p in named if not matrices(name, p)]
        self.parts = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]
        if muon:
            self.parts.append(Muon(muon, lr))
        self.parameters = [p for _, p in named]
        self.lr = lr

    def step(self, scale: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * scale
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def fit(
    title: str,
    model: nn.Module,
    optimizer: Optimizer,
    loss_of: Callable[[int], Tensor],
    *,
    folder: Path,
    minutes: float,
    max_steps: int | None = None,
    ema_decay: float = 0.999,
    save_every: float = 120.0,
) -> None:
    """Train until ``minutes`` are used (earlier runs counted in) or ``max_steps`` made; ends with average weights.

    The rate warms up over 100 steps and falls to zero as a cosine of the time used. The state in
    ``folder/state.pt`` is written every ``save_every`` seconds, so a stopped run goes on from there. ``loss_of(step)``
    draws what it needs from a generator seeded by ``step``: no random state is kept.
    """
    average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    path, step, used = folder / "state.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, used = state["average"], state["step"], state["used"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        with atomic_path(path) as temporary:
            torch.save(state | {"step": step, "used": used}, temporary)

    smooth, saved, log = None, time.monotonic(), (folder / "log.jsonl").open("a")
    total = round(minutes * 60)
    with (
        log,
        tqdm(
            total=total, initial=min(round(used), total), desc=title, unit="s", disable=not sys.stderr.isatty()
        ) as bar,
    ):
        while used < minutes * 60 and (max_steps is None or step < max_steps):
            start = time.monotonic()
            progress = max(used / (minutes * 60), step / max_steps if max_steps else 0)
            loss = loss_of(step)
            loss.backward()
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.step(min((step + 1) / 100, 1.0) * (0.02 + 0.98 * cosine))
            with torch.no_grad():
                decay = min(ema_decay, (step + 1) / (step + 10))
                for name, p in model.named_parameters():
                    if name in average:
                        average[name].lerp_(p, 1 - decay)
            step += 1
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            used += time.monotonic() - start
            bar.n = min(round(used), total)
            bar.set_postfix(step=step, loss=f"{smooth:.4f}")
            if step % 50 == 0:
                log.write(json.dumps({"step": step, "seconds": round(used, 1), "loss": round(smooth, 5)}) + "\n")
                log.flush()
            if time.monotonic() - saved > save_every:
                save()
                saved = time.monotonic()
        save()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in average:
                p.copy_(average[name])
