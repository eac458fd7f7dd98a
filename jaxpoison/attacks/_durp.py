"""DURP: class-wise random noise, type P5 of Tao et al. 2021 (arXiv 2102.04716).

x' = project(x + rho_y),   one rho_y ~ U(-epsilon, epsilon) for each class y
"""

import jax
import jax.numpy as jnp

from jaxpoison.attacks.base import Attack, check_epsilon


def durp(*, epsilon: float) -> Attack:
    """Returns class-wise random noise: one draw from U(-epsilon, epsilon) for each class."""
    check_epsilon(epsilon)

    def craft(key, victim, images, labels, progress=None):
        shape = (victim.model.num_classes, *images.shape[1:])
        noise = jax.random.uniform(key, shape, minval=-epsilon, maxval=epsilon)
        return jnp.clip(images + noise[labels], 0.0, 1.0)

    return Attack("durp", epsilon, craft, {})
