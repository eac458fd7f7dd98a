"""What attacks that move pixels share: where they start, how far they may go, how they step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def normal_start(key: jax.Array, bases: jax.Array, epsilon: float) -> jax.Array:
    """Returns bases plus N(0, epsilon^2), clipped to the budget but not to the range of pixels."""
    noise = epsilon * jax.random.normal(key, bases.shape, bases.dtype)
    return bases + jnp.clip(noise, -epsilon, epsilon)


def projection(bases: jax.Array, epsilon: float) -> Callable[[jax.Array], jax.Array]:
    """Returns the nearest point in [0, 1] within `epsilon` of `bases`, pixel by pixel."""
    low = jnp.maximum(bases - epsilon, 0.0)
    high = jnp.minimum(bases + epsilon, 1.0)
    return lambda poisons: jnp.clip(poisons, low, high)


def signed_adam(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Returns Adam on the gradient's sign, its rate cut to a tenth after 3/8, 5/8 and 7/8.

    The optimizer of the toolkit of Geiping et al. (arXiv 2009.02276).
    """
    cuts = {num_steps * part // 8: 0.1 for part in (3, 5, 7) if num_steps * part // 8}
    sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
    return optax.chain(sign, optax.adam(optax.piecewise_constant_schedule(learning_rate, cuts)))
