"""DURP: class-wise random noise, type P5 of Tao et al. 2021 (arXiv 2102.04716).

x' = project(x + rho_y),   one rho_y ~ U(-epsilon, epsilon) for each class y
"""

import functools

import jax
import jax.numpy as jnp

from jaxpoison.attacks.base import Attack, Settings, checked_images


def durp(*, epsilon: float) -> Attack:
    """Returns class-wise random noise: one draw from U(-epsilon, epsilon) for each class."""
    settings = Settings(epsilon=epsilon)
    return Attack("durp", settings.epsilon, functools.partial(_craft, settings), {})


def _craft(settings, key, victim, images, labels, progress=None):
    network, images, labels = checked_images(victim, images, labels)
    assert network.num_classes is not None  # `network_of` has seen to it
    shape = (network.num_classes, *images.shape[1:])
    epsilon = settings.epsilon
    noise = jax.random.uniform(key, shape, images.dtype, minval=-epsilon, maxval=epsilon)
    return jnp.clip(images + noise[labels], 0.0, 1.0)
