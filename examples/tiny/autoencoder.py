"""The source model's autoencoder: principal components of square patches, found in closed form.

Flat shapes need no trained one: 16 components of 8 x 8 pixels keep the mean squared error at 0.005 (in [-1, 1]). Its
latents are an orthogonal projection of the pixels, so white noise stays white and of the same size. A latent flow is
therefore the projection of a pixel flow, noise level by noise level: that is what lets a pixel model inherit the
transformer unchanged (bundle.py). It has the face that `ZImagePipeline` expects of an AutoencoderKL.

B batch, C latent channels, P side of a patch, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Linear: ``encode`` projects patches on ``basis``, ``decode`` puts them back and adds what is always there.

    Args:
        patch: P in pixels; a power of two.
        latent_channels: C.
        scaling_factor, shift_factor, block_out_channels: for the pipeline, which takes P from the number of the last.
    """

    @register_to_config
    def __init__(
        self,
        patch: int = 8,
        latent_channels: int = 16,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: Sequence[int] = (16, 16, 16, 16),
    ):
        super().__init__()
        self.basis = nn.Parameter(torch.zeros(3 * patch**2, latent_channels))  # orthonormal columns
        self.rest = nn.Parameter(torch.zeros(3 * patch**2))  # of the mean patch, what the basis doesn't hold

    @classmethod
    def fit(cls, images: Tensor, patch: int = 8, latent_channels: int = 16) -> PatchAutoencoder:
        """The components of ``images`` (B, 3, H, W) with the largest variance."""
        model = cls(patch, latent_channels)
        patches = F.pixel_unshuffle(images, patch).permute(0, 2, 3, 1).flatten(0, 2)
        mean = patches.mean(0)
        _, vectors = torch.linalg.eigh(torch.cov((patches - mean).T.double()))
        basis = vectors.flip(1)[:, :latent_channels].float()
        with torch.no_grad():
            model.basis.copy_(basis)
            model.rest.copy_(mean - basis @ (basis.T @ mean))
        return model

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H / P, W / P)."""
        return torch.einsum("ck,bchw->bkhw", self.basis, F.pixel_unshuffle(images, self.config.patch))

    @torch.no_grad()
    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """(B, C, h, w) -> (B, 3, P h, P w), as the only member of a tuple."""
        patches = torch.einsum("ck,bkhw->bchw", self.basis, latents) + self.rest[:, None, None]
        return (F.pixel_shuffle(patches, self.config.patch),)
