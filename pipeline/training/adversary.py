"""Adversarial training: a discriminator that learns beside a network, and its losses.

The trainer optimises only the network. The discriminator has its own optimiser, which steps inside the network's
training step. It is not part of the module's weights: only the network is averaged, kept as the best and packed.
Checkpoints hold both.
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
    """Return the loss of a discriminator that should call all patches real, or all patches generated.

    Parameters
    ----------
    logits : torch.Tensor
        Output of the discriminator.
    real : bool
        Whether the patches should be called real.
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
    """Return the gradient penalty: the mean of ``(norm - 1) ** 2`` of the gradient norms of a discriminator.

    The gradients are taken at points on the line between a real and a generated image.

    Parameters
    ----------
    network : torch.nn.Module
        The discriminator.
    real, fake : torch.Tensor
        Real and generated images ``(N, C, H, W)``.
    share : torch.Tensor
        ``(N, 1, 1, 1)`` in [0, 1]: weight of the real image in each point.

    References
    ----------
    Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017.
    """
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(network(between).sum(), between, create_graph=True)
    return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


class ImagePool:
    """Pool of earlier generated images.

    About half of the generated images that the discriminator sees come from the pool, so that it does not forget how
    earlier ones looked.

    Parameters
    ----------
    size : int
        Number of images in the pool; with 0 the discriminator sees only the newest images.

    References
    ----------
    Shrivastava et al., "Learning from simulated and unsupervised images through adversarial training", CVPR 2017.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.images: list[Tensor] = []

    def swap(self, made: Tensor, rng: np.random.Generator) -> Tensor:
        """Return the images ``(N, C, H, W)`` to show, each with probability 1/2 exchanged for one of the pool.

        Until the pool is full, images are only added to it and none is exchanged.
        """
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
    """Autocast to the trainer's precision, with two differences.

    Autocast's copies of the weights are not cached, as they would outlive a step. float32 takes the place of float16,
    as the discriminator's gradients are not scaled.
    """
    on = torch.is_autocast_enabled(device.type)
    kind = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, kind, on and kind != torch.float16, cache_enabled=False):
        yield


class Adversary:
    """A discriminator with its optimiser (Adam with the schedule's rate and betas) and its image pool.

    Parameters
    ----------
    network : torch.nn.Module
        The discriminator.
    schedule : Schedule
        Schedule of the training.
    kind : str
        Kind of loss, see `gan_loss`.
    pool : int
        Size of the `ImagePool`.
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
        """Return the object itself: weight averaging copies the module, and only the network is to be averaged."""
        return self

    def to(self, device: torch.device) -> None:
        """Move the discriminator to a device; call this before the first step and before loading a state."""
        self.network.to(device)

    def learn(
        self, real: Tensor, fake: Tensor, step: int, rank: int = 0, mean: Callable[[Tensor], Any] | None = None
    ) -> Tensor:
        """Train the discriminator for one step and return its loss.

        The loss is the mean of those on real and on generated images, plus the weighted gradient penalty.

        Parameters
        ----------
        real, fake : torch.Tensor
            Real and generated images ``(N, C, H, W)`` in [-1, 1]; they are detached from what produced them.
        step, rank : int
            Number of the training step and of this device; random draws depend only on these and the seed.
        mean : callable, optional
            Returns the mean of a tensor over all devices, so that the discriminators of all devices stay equal.
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
        """Return the adversarial loss of the network that produced `fake`; the discriminator does not learn."""
        self.network.requires_grad_(False)
        try:
            with _precision(fake.device):
                return gan_loss(self.network(fake).float(), True, self.kind)
        finally:
            self.network.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed training needs."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pool": torch.stack(self.pool.images) if self.pool.images else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], rank: int = 0, devices: int = 1) -> None:
        """Load the state of an earlier run; of its pool, which joins those of all devices, only this device's part."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = next(self.network.parameters()).device
        pool = [] if state["pool"] is None else state["pool"].tensor_split(devices)[rank]
        self.pool.images = [image.to(device) for image in pool[: self.pool.size]]


def true_maps(targets: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return the maps that a perfect network would predict, float ``(N, C, H, W)`` in [0, 1].

    Parameters
    ----------
    targets : mapping of str to torch.Tensor
        Targets by name, see `pipeline.training.targets.Targets.unpack`.
    names : sequence of str
        Names of the maps without those of classes, see `pipeline.networks.outputs.map_names`.
    """
    return torch.stack([(targets[name] + 1) / 2 if name in ("h", "v") else targets[name] for name in names], dim=1)
