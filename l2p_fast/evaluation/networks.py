"""The networks behind FID, Inception Score and LPIPS, with weights from files that the user names.

Nothing is downloaded. Wherever one of these networks is taken, any module of the same face will do.

- Inception: torchmetrics' own wrapper of torch-fidelity's network. That package imports torchvision.
- LPIPS: AlexNet or VGG-16, whose layers are written out here, since torchmetrics builds them with torchvision and
  fetches their weights itself. The weights of the distances are those that torchmetrics ships.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, few
from ..files import near_path

INSTALL = "pip install l2p_fast[evaluate]"
BATCH = 32  # crops or images of one size in one pass


def import_torchmetrics(module: str):
    """A module of torchmetrics; a `UserError` says how to get it."""
    try:
        return importlib.import_module(f"torchmetrics.{module}")
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another PyTorch raises RuntimeError
        if importlib.util.find_spec("torchmetrics") is None:
            raise UserError(f"this score needs torchmetrics: {INSTALL}") from error
        raise UserError(f"torchmetrics can't be imported ({' '.join(str(error).split())[:200]})") from error


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file; of the latter nothing but tensors is read, so no code runs.

    Raises:
        UserError: no such file, or another kind.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file; name the weights{near_path(path)}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip each have errors of their own
        raise UserError(
            f"{path} can't be read as weights ({type(error).__name__}); give .safetensors or .pth"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no table of tensors; give the weights alone, as .safetensors or .pth")
    return state


class Inception(nn.Module):
    """Inception v3 of FID: images (B, 3, H, W) of bytes -> features (B, 2048), resized to 299 px with antialiasing."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def logits(self, features: Tensor) -> Tensor:
        """Logits without the bias (B, 1008), on which the Inception Score is computed."""
        return features @ self.network.fc.weight.T


def load_inception(path: str, device: torch.device) -> Inception:
    """torch-fidelity's Inception with the weights of ``path``: its ``weights-inception-2015-12-05-6726825d.pth``.

    Raises:
        UserError: a package is missing, or these are not its weights.
    """
    state = read_weights(path)
    if importlib.util.find_spec("torch_fidelity") is None:
        torch_version = torch.__version__.split("+")[0]  # so that pip keeps it
        raise UserError(
            "Inception needs torch-fidelity and a torchvision that fits this PyTorch: "
            f"pip install torch-fidelity torch=={torch_version}"
        )
    fid = import_torchmetrics("image.fid")
    with tempfile.NamedTemporaryFile(suffix=".pth") as copy:  # torch-fidelity would run whatever a .pth holds
        torch.save(state, copy.name)
        try:
            network = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], copy.name)
        except RuntimeError as error:
            raise UserError(
                f"{path} does not hold Inception's weights ({' '.join(str(error).split())[:120]})"
            ) from error
    return Inception(network).to(device)


# --- LPIPS -----------------------------------------------------------------------------------------------------------
# Convolutions of the backbones: index among torchvision's `features`, channels in and out, kernel, stride, padding. A
# ReLU follows each; a max-pooling (kernel, stride) stands before those that _POOLED names. _TAPS: whose outputs are
# compared.
_ALEX = ((0, 3, 64, 11, 4, 2), (3, 64, 192, 5, 1, 2), (6, 192, 384, 3, 1, 1), (8, 384, 256, 3, 1, 1),
         (10, 256, 256, 3, 1, 1))  # fmt: skip
_VGG = tuple(
    (index, before, after, 3, 1, 1)
    for index, before, after in (
        (0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256),
        (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512),
    )
)  # fmt: skip
LPIPS_LAYERS = {"alex": _ALEX, "vgg": _VGG}
_TAPS = {"alex": (0, 3, 6, 8, 10), "vgg": (2, 7, 14, 21, 28)}
_POOLED = {"alex": (3, 6), "vgg": (5, 10, 17, 24)}
_POOL = {"alex": (3, 2), "vgg": (2, 2)}


class Lpips(nn.Module):
    """Learned perceptual distance: of two images, the weighted squared differences of normalized features.

    Source: Zhang et al. 2018, as in torchmetrics.

    Args:
        kind: "alex" or "vgg".
        state: weights of the backbone, by torchvision's names (``features.0.weight``, ...).
        linear: weights of the differences, ``lin0.model.1.weight`` (1, C, 1, 1), ...; None: torchmetrics' own.
    """

    def __init__(self, kind: str, state: dict[str, Tensor], linear: dict[str, Tensor] | None = None):
        super().__init__()
        if linear is None:
            place = Path(import_torchmetrics("functional.image.lpips").__file__).parent / f"lpips_models/{kind}.pth"
            linear = read_weights(str(place))
        self.kind = kind
        self.layers = nn.ModuleDict({str(i): nn.Conv2d(a, b, k, s, p) for i, a, b, k, s, p in LPIPS_LAYERS[kind]})
        names = {f"{i}.{part}" for i in self.layers for part in ("weight", "bias")}
        state = {name.removeprefix("features."): value for name, value in state.items()}
        if lost := sorted(names - state.keys()):
            raise UserError(f"these are no weights of {kind}: features.{few(lost)} missing; give torchvision's file")
        try:
            self.layers.load_state_dict({name: state[name] for name in names})
        except RuntimeError as error:
            raise UserError(f"these are no weights of {kind} ({' '.join(str(error).split())[:160]})") from error
        for number in range(len(_TAPS[kind])):
            self.register_buffer(f"lin{number}", linear[f"lin{number}.model.1.weight"].float())
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalized features at each tap, (B, C, h, w), of images (B, 3, H, W) of bytes."""
        x, features = (images.float() / 127.5 - 1 - self.mean) / self.scale, []
        for index, conv in self.layers.items():
            if int(index) in _POOLED[self.kind]:
                x = F.max_pool2d(x, *_POOL[self.kind])
            x = conv(x).relu_()
            if int(index) in _TAPS[self.kind]:
                features.append(x / (1e-8 + x.square().sum(dim=1, keepdim=True)).sqrt())
        return features

    def distance(self, one: list[Tensor], other: list[Tensor]) -> Tensor:
        """(B,) distances of images whose features are given."""
        return sum(
            F.conv2d((a - b).square(), getattr(self, f"lin{number}")).mean(dim=(1, 2, 3))
            for number, (a, b) in enumerate(zip(one, other, strict=True))
        )


def load_lpips(path: str, device: torch.device) -> Lpips:
    """LPIPS on the backbone whose weights ``path`` holds: torchvision's AlexNet or VGG-16.

    Raises:
        UserError: no such file, or other weights.
    """
    state = read_weights(path)
    first = state.get("features.0.weight", state.get("0.weight"))
    kinds = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}
    if first is None or tuple(first.shape) not in kinds:
        raise UserError(
            f"{path} is no AlexNet and no VGG-16; give torchvision's weights of one (alexnet-owt-7be5be79.pth)"
        )
    return Lpips(kinds[tuple(first.shape)], state).to(device)
