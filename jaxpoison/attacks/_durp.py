"""DURP: class-wise random noise, type P5 of Tao et al. 2021 (arXiv 2102.04716).

x' = project(x + rho_y),   one rho_y for each class y:
    rho_y ~ U(-epsilon, epsilon) in every pixel (linf), or of length epsilon in any direction (l2)
"""

import dataclasses
import functools

import jax.numpy as jnp

from jaxpoison.attacks.base import Attack, Settings, checked_images
from jaxpoison.data import balls


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Durp(Settings):
    norm: balls.Norm

    def __post_init__(self):
        balls.check_norm(self.norm)
        super().__post_init__()

    @property
    def most(self) -> float:
        """The largest budget that makes sense."""
        return balls.largest_budget(self.norm)


def durp(*, epsilon: float, norm: balls.Norm = "linf") -> Attack:
    """Returns class-wise random noise, one draw for each class.

    Args:
      epsilon: budget in units of [0, 1]: of each pixel, or with norm="l2" the length of the noise
        of an image, as Tao et al. have it (0.5 on CIFAR-10).
      norm: "linf" or "l2".

    Raises:
      ValueError: for settings out of range.
    """
    settings = _Durp(epsilon=epsilon, norm=norm)
    craft = functools.partial(_craft, settings)
    return Attack("durp", settings.epsilon, craft, settings.for_archives())


def _craft(settings, key, victim, images, labels, progress=None):
    network, images, labels = checked_images(victim, images, labels)
    assert network.num_classes is not None  # `network_of` has seen to it
    like = jnp.zeros((network.num_classes, *images.shape[1:]), images.dtype)
    noise = balls.random_change(key, like, settings.epsilon, settings.norm)
    return jnp.clip(images + noise[labels], 0.0, 1.0)
