"""What ours is measured against: the plain pixel model, and the latent model with its autoencoder.

The plain model is L2P as its authors write it: Z-Image's blocks (here diffusers'), contiguous tensors, concat,
interpolate, and everything computed anew in every step. It holds the very weights of the model it is compared with.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2p_fast.errors import UserError
from l2p_fast.models.detailer import DetailerHead
from l2p_fast.quantize import products as lowbit

from . import counts
from .measure import Case, NotHere, Scale, error

if TYPE_CHECKING:  # not everywhere there: what needs them becomes a row that says so
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    from l2p_fast.models.zimage import L2PTransformer2DModel

LATENT_CHANNELS = 16
VAE_FACTOR = 8
LATENT_PATCH = 2
LOWBIT_TOLERANCE = 0.3  # relative error that 8-bit weights may cause; a wrong product is far beyond it
VAE_TILE = 1024  # pixels of a side of a tile, where the autoencoder tiles


@contextlib.contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside are born on ``device`` in ``dtype``: no second copy of 6B weights."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(usual)


def pixel_model(scale: Scale, patch: int, device: str) -> L2PTransformer2DModel:
    """Ours, with random weights; in the head larger ones than usual, else neither image nor tokens reach the result
    and a comparison would see little but biases."""
    from l2p_fast.models.zimage import L2PTransformer2DModel

    with made_on(device, scale.torch_dtype):
        model = L2PTransformer2DModel(all_patch_size=(patch,), head_width=scale.head_width, **_sizes(scale))
    with torch.no_grad():
        for p in model.local_decoder.parameters():
            if p.ndim == 4:
                p.mul_(2.5)
    return model.eval()


def latent_model(scale: Scale, device: str) -> ZImageTransformer2DModel:
    """diffusers' Z-Image on latents, with random weights. Longer position tables than published, for 10240 px."""
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    with made_on(device, scale.torch_dtype):
        model = ZImageTransformer2DModel(axes_lens=(1024, 1024, 1024), **_sizes(scale))
    return model.eval()


def _sizes(scale: Scale) -> dict:
    heads = scale.heads(scale.dim)
    width = scale.dim // heads
    return dict(
        dim=scale.dim,
        n_layers=scale.layers,
        n_refiner_layers=scale.refiners,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=scale.cap_dim,
        axes_dims=(width // 4, width // 8 * 3, width // 8 * 3),
    )


def text_features(scale: Scale, device: str) -> Tensor:
    """(L, C) of one prompt."""
    return torch.randn(scale.text_tokens, scale.cap_dim, device=device, dtype=scale.torch_dtype)


def latent_call(model: ZImageTransformer2DModel, cap: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The latent model as a function of one image's latents (1, 16, h, w) and time (1,)."""
    return lambda x, t: model([x[0, :, None].to(model.dtype)], t, [cap]).sample[0][None, :, 0]


def model_facts(scale: Scale, tokens: int) -> dict:
    return {"width": scale.dim, "layers": scale.layers, "tokens": tokens}


def body_work(scale: Scale, patch: int, side: int) -> counts.Work:
    """One pass of the pixel model's transformer and head over a square image of ``side`` px."""
    with torch.device("meta"):
        head = DetailerHead(patch, scale.dim, scale.head_width)
    sizes = scale.dim, scale.layers, scale.refiners
    body = counts.body((side // patch) ** 2, scale.text_tokens, *sizes, 3 * patch * patch, scale.cap_dim)
    return body + counts.head(head.levels, head.bottleneck[0].out_channels, scale.dim, side, side, patch)


def latent_work(scale: Scale, side: int) -> counts.Work:
    """One pass of the latent model at ``side`` px."""
    tokens = (side // VAE_FACTOR // LATENT_PATCH) ** 2
    return counts.latent_step(tokens, scale.text_tokens, scale.dim, scale.layers, scale.refiners, scale.cap_dim)


def roomy(device: str) -> bool:
    """Whether a GPU has memory for the whole plain model at any size, and in fp32."""
    return device == "cuda" and torch.cuda.mem_get_info()[0] > 100 * 2**30


def check_side(side: int, device: str) -> int:
    """Pixels of a side that a result is compared at: all of them where memory abounds, else at most 1280.

    1280 is divisible as every head wants it.
    """
    return side if roomy(device) else min(side, 1280)


class Judge:
    """How far a result of the whole model may be from the plain model's.

    Where an fp32 copy of the model fits, errors are taken against that copy, in units of the plain model's own error,
    of which 2 are allowed. Else it is the distance to the plain model in the same dtype, and 0.1 is allowed, or 1e-4 if
    that is fp32.
    """

    def __init__(self, model: L2PTransformer2DModel, device: str):
        in_fp32 = model.dtype == torch.float32
        self.model, self.by_fp32 = model, not in_fp32 and (device == "cpu" or roomy(device))
        self.tolerance = 2.0 if self.by_fp32 else 1e-4 if in_fp32 else 0.1
        self.against = "fp32, in units of the plain model's own error" if self.by_fp32 else "the plain model"

    def __call__(self, result: Tensor, plain_result: Tensor, run_plain: Callable[[PlainL2P], Tensor]) -> float:
        """The error of ``result``; ``run_plain`` gives what a plain model makes of the same inputs."""
        if not self.by_fp32:
            return error(result, plain_result)
        exact = run_plain(PlainL2P(copy.deepcopy(self.model).float()))
        return error(result, exact) / error(plain_result, exact)


def pixel_case(
    model: L2PTransformer2DModel,
    scale: Scale,
    device: str,
    run: Callable[[], object],
    call: Callable[[Tensor], Tensor],
    run_plain: Callable[..., Tensor],
    steps: int = 1,
) -> Case:
    """A case of the whole pixel model: ``run`` is timed over ``steps`` steps, and ``call(noise)`` is judged by
    ``run_plain(noise, plain)`` on a square image of a size that memory allows."""
    patch = model.patch_size
    side = scale.grid * patch
    checked, judge = check_side(side, device), Judge(model, device)

    def check() -> float:
        noise = torch.randn(1, 3, checked, checked, device=device)
        plain = PlainL2P(model)
        return judge(call(noise), run_plain(noise, plain), lambda plain: run_plain(noise, plain))

    return Case(
        run=run,
        work=body_work(scale, patch, side) * steps,
        check=check,
        tolerance=judge.tolerance,
        against=f"{judge.against}, at {checked} px",
        facts=model_facts(scale, scale.grid**2) | {"head_width": scale.head_width, "steps": steps},
    )


def check_lowbit(name: str, device: str) -> None:
    """That ``device`` can do the 8 bits called ``name``; else the row is not run, and says why."""
    try:
        lowbit.check(name, torch.device(device))
    except UserError as problem:
        raise NotHere(str(problem)) from problem


def freeze(model: nn.Module, scale: Scale) -> list[nn.Parameter]:
    """Freeze the blocks between the first and the last ``scale.free_layers``; returns what is left to train."""
    model.requires_grad_(True)
    model.layers[scale.free_layers : scale.layers - scale.free_layers].requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


def autoencoder(scale: Scale, device: str, tiled: bool) -> AutoencoderKL:
    """FLUX's type of autoencoder, random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with made_on(device, scale.torch_dtype):
        vae = AutoencoderKL(
            block_out_channels=scale.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=32,
            sample_size=VAE_TILE,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    if tiled:
        vae.enable_tiling()
    del vae.encoder
    return vae.eval()


class PlainHead(nn.Module):
    """`DetailerHead.forward_reference`, which is the head as published, as a module that can be compiled."""

    def __init__(self, head: DetailerHead):
        super().__init__()
        self.head = head

    def forward(self, pixels: Tensor, features: Tensor) -> Tensor:
        return self.head.forward_reference(pixels, features)


class PlainL2P(nn.Module):
    """The whole pixel model, plain, for one image: (1, 3, H, W), t (1,), text (L, C) -> (1, 3, H, W).

    Shares ``model``'s weights. ``checkpointing`` recomputes every block and the head in the backward pass.
    """

    def __init__(self, model: L2PTransformer2DModel):
        from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

        super().__init__()
        config = {k: v for k, v in model.config.items() if k in ("dim", "n_layers", "n_refiner_layers", "n_heads")}
        config |= {k: model.config[k] for k in ("n_kv_heads", "cap_feat_dim", "axes_dims", "rope_theta", "t_scale")}
        self.patch = model.patch_size
        with torch.device("meta"):
            body = ZImageTransformer2DModel(
                all_patch_size=(self.patch,), in_channels=3, axes_lens=(1024, 1024, 1024), **config
            )
        del body.all_final_layer
        weights = {k: v for k, v in model.state_dict().items() if not k.startswith("local_decoder.")}
        body.load_state_dict(weights, assign=True)
        self.body = body.eval()
        self.head = PlainHead(model.local_decoder)
        self.checkpointing = False

    @property
    def layers(self) -> nn.ModuleList:
        return self.body.layers

    def compile_parts(self) -> PlainL2P:
        """torch.compile each block (one graph serves all) and the head."""
        for block in [*self.body.noise_refiner, *self.body.context_refiner, *self.body.layers]:
            block.compile()
        self.head.compile()
        return self

    def forward(self, pixels: Tensor, t: Tensor, cap: Tensor) -> Tensor:
        body, p = self.body, self.patch
        dtype = body.x_pad_token.dtype
        _, _, height, width = pixels.shape
        h, w = height // p, width // p
        temb = body.t_embedder(t * body.t_scale).to(dtype)

        patches = pixels.to(dtype).reshape(1, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(1, h * w, 3 * p * p)
        x = body.all_x_embedder[f"{p}-1"](patches)
        x = torch.cat([x, body.x_pad_token.expand(1, counts.padded(h * w) - h * w, -1)], dim=1)
        text = body.cap_embedder(cap.to(dtype))[None]
        text = torch.cat([text, body.cap_pad_token.expand(1, counts.padded(len(cap)) - len(cap), -1)], dim=1)

        image_ids = torch.zeros(x.shape[1], 3, dtype=torch.int64, device=x.device)
        image_ids[: h * w, 0] = text.shape[1] + 1
        image_ids[: h * w, 1] = torch.arange(h, device=x.device).repeat_interleave(w)
        image_ids[: h * w, 2] = torch.arange(w, device=x.device).repeat(h)
        text_ids = torch.zeros(text.shape[1], 3, dtype=torch.int64, device=x.device)
        text_ids[:, 0] = torch.arange(1, text.shape[1] + 1, device=x.device)
        image_rope, text_rope = body.rope_embedder(image_ids)[None], body.rope_embedder(text_ids)[None]

        for block in body.noise_refiner:
            x = self._run(block, x, None, image_rope, temb)
        for block in body.context_refiner:
            text = self._run(block, text, None, text_rope)
        x = torch.cat([x, text], dim=1)
        rope = torch.cat([image_rope, text_rope], dim=1)
        for block in body.layers:
            x = self._run(block, x, None, rope, temb)
        features = x[:, : h * w].transpose(1, 2).reshape(1, -1, h, w).contiguous()
        return self._run(self.head, pixels, features)

    def _run(self, module: nn.Module, *inputs) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as Z-Image's public code writes it."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(weight.dtype) * weight


def rope(x: Tensor, turns: Tensor) -> Tensor:
    """RoPE as Z-Image's public code writes it: x (B, N, H, E), turns (B, N, E / 2) complex."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns.unsqueeze(2)).flatten(3).type_as(x)


def patchify(pixels: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """permute + copy + cast."""
    b, c, height, width = pixels.shape
    h, w = height // patch, width // patch
    cells = pixels.reshape(b, c, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1).contiguous()
    return cells.reshape(b, h * w, -1).to(dtype)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """permute + copy + cast."""
    b, h, w = len(tokens), height // patch, width // patch
    cells = tokens.reshape(b, h, w, patch, patch, -1).permute(0, 5, 1, 3, 2, 4).contiguous()
    return cells.reshape(b, -1, height, width).to(dtype)


def silu_mul(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y
