"""Toy networks that several files of tests train, and the mesh of one device that most need."""

import flax.linen as nn
import jax

from jaxpoison import models
from jaxpoison.core import devices


def one_device():
    """Spreading such small work over eight devices would be most of its cost."""
    return devices.data_mesh(jax.devices()[:1])


class Tanh(nn.Module):
    """tanh of a linear map of the pixels: smooth, and compiled in no time."""

    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        return nn.tanh(nn.Dense(self.width)(x.reshape(x.shape[0], -1)))


class Normed(nn.Module):
    """A convolution with Flax's BatchNorm, averaged over the image."""

    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(self.width, (3, 3))(x))
        return nn.relu(x).mean((1, 2))


class Strided(nn.Module):
    """A convolution with our BatchNorm, at half the size, averaged over the image."""

    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = models.layers.Conv(self.width, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(models.layers.BatchNorm(use_running_average=not train)(x))
        return x.mean(axis=(1, 2))


def classifier(body, num_classes=3, **settings):
    """Returns a body of this module with a linear head."""
    return models.Classifier(body, num_features=body.width, num_classes=num_classes, **settings)
