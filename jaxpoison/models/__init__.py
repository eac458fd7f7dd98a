"""Image classifiers in Flax Linen: a body (pixels to features) and a head (last linear layer)."""

from jaxpoison.models.classifier import Classifier as Classifier
from jaxpoison.models.mnist_cnn import mnist_cnn as mnist_cnn
from jaxpoison.models.resnet import resnet18 as resnet18
