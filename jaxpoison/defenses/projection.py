"""Orthogonal projection: taking out of the images what a linear model can tell classes by.

    W = weights [D, K] of a softmax regression from pixels to labels, on the set as collected
    x' = x - Q Q^T x,      W = Q R

Against class-wise perturbations, which are the most predictive linear features of their set. After
Sandoval-Segura et al. 2023 (arXiv 2305.19254, section 4.4).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxpoison.data import check, to_float
from jaxpoison.training.heads import HeadRecipe, fit_head
from jaxpoison.training.hooks import Defense, Info

REGRESSION = HeadRecipe(
    epochs=20, batch_size=128, learning_rate=1e-3, milestones=(), initial_scale=0.0
)
"""How the softmax regression is trained."""


def orthogonal_projection(recipe: HeadRecipe = REGRESSION) -> Defense:
    """Returns the defense that removes the span of a linear classifier's weights from all images.

    The classifier is trained in `init` on the images and labels as collected, centered by their
    mean; the mean itself stays. Pixels may leave [0, 1]. Images that a defense before it has
    changed or added are projected as well.

    Args:
      recipe: how the classifier is trained.

    Raises:
      TypeError: for a recipe of another kind. ValueError: from `init`, for a bad training set.
    """
    if not isinstance(recipe, HeadRecipe):
        raise TypeError(f"recipe is a {type(recipe).__name__}; expected a training.HeadRecipe")
    return Defense(functools.partial(_init, recipe), _on_epoch)


def _init(recipe, key, dataset, num_epochs):
    check(dataset)
    return _directions(recipe, int(jnp.max(dataset.labels)) + 1, key, dataset)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _directions(recipe, num_classes, key, dataset):
    """Returns the mean image [D] and the directions to take out, orthonormal [D, K]."""
    pixels = to_float(dataset.images).reshape(len(dataset.labels), -1)
    mean = jnp.mean(pixels, axis=0)
    head = fit_head(key, pixels - mean, dataset.labels, num_classes=num_classes, recipe=recipe)
    return mean, jnp.linalg.qr(head["kernel"])[0].astype(pixels.dtype)


def _on_epoch(state, epoch, train_state, dataset):
    return state, project(state, dataset), Info(changed=epoch == 0)


@jax.jit
def project(state, dataset):
    """Returns the set with `directions` taken out of its centered images."""
    mean, directions = state
    images = to_float(dataset.images)
    pixels = images.reshape(len(images), -1)
    parts = jnp.matmul(pixels - mean, directions, precision=lax.Precision.HIGHEST)
    pixels = pixels - jnp.matmul(parts, directions.T, precision=lax.Precision.HIGHEST)
    return dataset._replace(images=pixels.reshape(images.shape))
