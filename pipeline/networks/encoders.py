"""Pretrained encoders: fetch their weights, or read them from a file."""

from __future__ import annotations

import errno
import io
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

IMAGENET = "imagenet"
"""Value of ``encoder_weights`` that fetches the usual ImageNet weights."""

CLASSIFIERS = ("fc.", "_fc.", "classifier.", "last_linear.", "head.", "conv10.")
"""Prefixes of the names of tensors that only an ImageNet classifier needs."""

OF_FILES = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that come from the folder to which downloads are written, not from the connection."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a file, without running code from it.

    Parameters
    ----------
    path : pathlib.Path
        ``.safetensors``, ``.npz``, or a file of `torch.save` that holds a state dict (or one under ``state_dict``).

    Raises
    ------
    PipelineError
        When the file is missing, damaged or holds anything else.
    OSError
        When reading the file fails, whatever it holds.
    """
    hint = "give a .safetensors, .npz, .pt or .pth file of weights, imagenet, or null"
    if not path.is_file():
        raise PipelineError(f"encoder_weights {path}: no such file", hint)
    # Read all bytes first: the libraries would report an I/O error as a damaged file.
    stream = io.BytesIO(path.read_bytes())
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return load(stream.getvalue())
        if path.suffix == ".npz":
            import numpy as np

            with np.load(stream, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        value = torch.load(stream, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise PipelineError(f"encoder_weights {path} cannot be read: {_first(error)}", hint) from None
    except Exception as error:
        if type(error).__name__ not in ("SafetensorError", "BadZipFile"):
            raise
        raise PipelineError(f"encoder_weights {path} cannot be read: {_first(error)}", hint) from None
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
        raise PipelineError(f"encoder_weights {path} holds no state dict", hint)
    return {str(name): tensor for name, tensor in value.items()}


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def encoder_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors of an encoder, and name them as the encoder does.

    Prefixes of wrappers and the tensors of a classifier are dropped. Of a whole segmentation network, such as a model
    package, only the encoder is kept.
    """
    for prefix in ("module.", "network.", "model."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for prefix in ("encoder.", "backbone.body."):
        if any(name.startswith(prefix) for name in state):
            state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(CLASSIFIERS)}


def load_encoder(
    encoder: nn.Module,
    weights: str | None,
    fetch: Mapping[str, Callable[[], dict[str, Tensor]]],
    name: str,
    translate: Callable[[dict[str, Tensor]], dict[str, Tensor]] = encoder_part,
) -> None:
    """Load pretrained weights into an encoder.

    Parameters
    ----------
    encoder : torch.nn.Module
        The encoder.
    weights : str or None
        A key of `fetch`, a file, or None for none.
    fetch : mapping of str to callable
        Functions that fetch a state dict from the internet, by the value of `weights` that stands for it, such as
        ``imagenet``.
    name : str
        The encoder's name, for messages.
    translate : callable
        Converts the state dict to the encoder's own names.

    Raises
    ------
    PipelineError
        When the weights cannot be fetched or read, or belong to another network.
    OSError
        When a disk or a file server fails.
    """
    if weights is None:
        return
    if weights in fetch:
        try:
            state = fetch[weights]()
        except PipelineError:
            raise
        except Exception as error:  # the libraries raise whatever their transport raises
            if isinstance(error, OSError) and error.errno in OF_FILES:
                raise
            log.debug("fetching the weights of %s", name, exc_info=True)
            raise PipelineError(
                f"encoder_weights {weights}: the weights of {name} cannot be fetched: {_first(error)}",
                "connect this machine to the internet, give encoder_weights a file, or set it to null",
            ) from None
    else:
        state = read_state(Path(weights).expanduser())
    state = translate(state)
    own = {n: t for n, t in encoder.state_dict().items() if not n.endswith("num_batches_tracked")}
    wrong = [n for n, t in own.items() if n not in state or state[n].shape != t.shape]
    if wrong:
        raise PipelineError(
            f"encoder_weights {weights}: {len(wrong)} of {len(own)} tensors of {name} are missing or of another shape, "
            f"first {wrong[0]}",
            f"give the weights of {name}, or set encoder_weights to null",
        )
    encoder.load_state_dict({n: state[n] for n in own}, strict=False)


class ResNet34Encoder(nn.Module):
    """torchvision's ResNet-34 without its classifier; feature maps at 1/4, 1/8, 1/16 and 1/32.

    Parameters
    ----------
    weights : str or None
        ``imagenet``, a file with torchvision's names, or None.

    References
    ----------
    He et al., "Deep residual learning for image recognition", CVPR 2016.
    """

    channels = (64, 128, 256, 512)

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        from torchvision.models import ResNet34_Weights, resnet34

        network = resnet34(weights=None)
        self.conv1, self.bn1, self.maxpool = network.conv1, network.bn1, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            network.layer1, network.layer2, network.layer3, network.layer4,
        )  # fmt: skip
        load_encoder(
            self,
            weights,
            {IMAGENET: lambda: dict(ResNet34_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True))},
            "ResNet-34",
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features
