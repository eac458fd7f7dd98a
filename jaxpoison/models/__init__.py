"""Image classifiers in Flax Linen: a body (pixels to features) and a head (last linear layer)."""

from jaxpoison.models._mnist_cnn import mnist_cnn as mnist_cnn
from jaxpoison.models.classifier import Classifier as Classifier
from jaxpoison.models.densenet import densenet121 as densenet121
from jaxpoison.models.mobilenet import mobilenet_v2 as mobilenet_v2
from jaxpoison.models.resnet import resnet18 as resnet18
from jaxpoison.models.resnet import resnet50 as resnet50
from jaxpoison.models.unet import UNet as UNet
