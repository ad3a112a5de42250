"""Adversarial training: a discriminator beside the network, and what it makes of the network's output.

The trainer optimises the network as in any training; the discriminator has an optimiser of its own, steps inside the
network's training step, and is not part of the module's weights: what is averaged, kept as the best and packed is the
network alone. Checkpoints hold both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.training.schedule import Schedule


def gan_loss(logits: Tensor, real: bool, kind: str = "vanilla") -> Tensor:
    """How far a discriminator's logits are from calling all patches real, or all made.

    Parameters
    ----------
    logits : torch.Tensor
        What the discriminator says.
    real : bool
        What it should say.
    kind : str
        ``vanilla``: binary cross-entropy. ``lsgan``: squared error of the logits to 1 or 0.

    References
    ----------
    Goodfellow et al., "Generative adversarial nets", NeurIPS 2014; Mao et al., "Least squares generative adversarial
    networks", ICCV 2017.
    """
    wanted = torch.full_like(logits, float(real))
    if kind == "lsgan":
        return functional.mse_loss(logits, wanted)
    return functional.binary_cross_entropy_with_logits(logits, wanted)


def gradient_penalty(network: nn.Module, real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Mean squared distance from 1 of the norm of a discriminator's gradient between real and made images.

    Parameters
    ----------
    network : torch.nn.Module
        The discriminator.
    real, fake : torch.Tensor
        ``(N, C, H, W)``.
    share : torch.Tensor
        ``(N, 1, 1, 1)`` in [0, 1]: where between the two.

    References
    ----------
    Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017.
    """
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(network(between).sum(), between, create_graph=True)
    return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


class ImagePool:
    """Images made before, of which the discriminator sees half, so that it does not forget.

    Parameters
    ----------
    size : int
        Images that are held; 0: the discriminator sees the newest alone.

    References
    ----------
    Shrivastava et al., "Learning from simulated and unsupervised images through adversarial training", CVPR 2017.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.images: list[Tensor] = []

    def swap(self, made: Tensor, rng: np.random.Generator) -> Tensor:
        """As many images ``(N, C, H, W)``: each the one made, or with chance one half an earlier one in its place."""
        if self.size == 0:
            return made
        shown = []
        for image in made.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
                shown.append(image)
            elif rng.random() < 0.5:
                place = int(rng.integers(self.size))
                shown.append(self.images[place])
                self.images[place] = image.clone()
            else:
                shown.append(image)
        return torch.stack(shown)


@contextmanager
def _precision(device: torch.device) -> Iterator[None]:
    """The trainer's precision, without its copies of the weights, which would outlive a step; float32 in place of
    float16, as nothing scales these gradients."""
    on = torch.is_autocast_enabled(device.type)
    kind = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, kind, on and kind != torch.float16, cache_enabled=False):
        yield


class Adversary:
    """A discriminator with its optimiser (Adam, the schedule's rate and betas) and its pool.

    Parameters
    ----------
    network : torch.nn.Module
        The discriminator.
    schedule : Schedule
        That of the training.
    kind : str
        See `gan_loss`.
    pool : int
        Images that are held, see `ImagePool`.
    penalty : float
        Weight of `gradient_penalty`; 0 for none.
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, kind: str = "vanilla", pool: int = 0, penalty: float = 0.0
    ) -> None:
        self.network = network.train()
        self.schedule = schedule
        self.kind = kind
        self.penalty = penalty
        self.pool = ImagePool(pool)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=schedule.learning_rate, betas=schedule.betas)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adversary:
        """Itself: averaged weights, a copy of all that is trained, are of the network alone."""
        return self

    def to(self, device: torch.device) -> None:
        """Bring the discriminator to a device; before it has learned or taken up a state."""
        self.network.to(device)

    def learn(
        self, real: Tensor, fake: Tensor, step: int, rank: int = 0, mean: Callable[[Tensor], Any] | None = None
    ) -> Tensor:
        """One step of the discriminator; its loss, half the sum over real and made images.

        Parameters
        ----------
        real, fake : torch.Tensor
            ``(N, C, H, W)`` in [-1, 1]; no gradient reaches whatever made them.
        step, rank : int
            Number of the training's step and of this device, on which alone depends what is drawn at random.
        mean : callable, optional
            Gives the mean of a tensor over all devices, which learn the same.
        """
        rng = np.random.default_rng([self.schedule.seed, step, rank])
        shown = self.pool.swap(fake.detach(), rng)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * self.schedule.rate_at(step)
        self.optimizer.zero_grad(set_to_none=True)
        with _precision(real.device):
            of_real, of_fake = self.network(torch.cat([real.detach(), shown])).float().chunk(2)
        loss = (gan_loss(of_real, True, self.kind) + gan_loss(of_fake, False, self.kind)) / 2
        if self.penalty > 0:
            share = torch.from_numpy(rng.random((len(real), 1, 1, 1), np.float32)).to(real.device)
            with torch.autocast(real.device.type, enabled=False):
                loss = loss + self.penalty * gradient_penalty(self.network, real.detach(), shown, share)
        loss.backward()
        if mean is not None:
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(mean(parameter.grad))
        self.optimizer.step()
        return loss.detach()

    def judge(self, fake: Tensor) -> Tensor:
        """How far images are from passing for real, the loss of what made them; the discriminator learns nothing."""
        self.network.requires_grad_(False)
        try:
            with _precision(fake.device):
                return gan_loss(self.network(fake).float(), True, self.kind)
        finally:
            self.network.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pool": torch.stack(self.pool.images) if self.pool.images else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], rank: int = 0, devices: int = 1) -> None:
        """Take up an earlier run's state; of a pool of all devices, this device's part."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = next(self.network.parameters()).device
        pool = [] if state["pool"] is None else state["pool"].tensor_split(devices)[rank]
        self.pool.images = [image.to(device) for image in pool[: self.pool.size]]


def true_maps(targets: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The maps that a perfect network would draw, float ``(N, C, H, W)`` in [0, 1]; those of classes apart.

    Parameters
    ----------
    targets : mapping of str to torch.Tensor
        See `pipeline.training.targets.Targets.unpack`.
    names : sequence of str
        See `pipeline.networks.outputs.map_names`.
    """
    return torch.stack([(targets[name] + 1) / 2 if name in ("h", "v") else targets[name] for name in names], dim=1)
