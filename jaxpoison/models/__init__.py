"""Image classifiers in Flax Linen: a body (pixels to features) and a head (last linear layer)."""

from jaxpoison.models._efficientnet import EFFICIENTNET_STAGES as EFFICIENTNET_STAGES
from jaxpoison.models._efficientnet import efficientnet_lite0 as efficientnet_lite0
from jaxpoison.models._fast_cnn import fast_cnn as fast_cnn
from jaxpoison.models._mnist_cnn import mnist_cnn as mnist_cnn
from jaxpoison.models._pretrained import PRETRAINED as PRETRAINED
from jaxpoison.models._pretrained import Pretrained as Pretrained
from jaxpoison.models._pretrained import load_efficientnet_lite0 as load_efficientnet_lite0
from jaxpoison.models._pretrained import load_pretrained as load_pretrained
from jaxpoison.models._pretrained import read_variables as read_variables
from jaxpoison.models._pretrained import write_variables as write_variables
from jaxpoison.models.classifier import Classifier as Classifier
from jaxpoison.models.densenet import densenet121 as densenet121
from jaxpoison.models.mobilenet import mobilenet_v2 as mobilenet_v2
from jaxpoison.models.resnet import resnet18 as resnet18
from jaxpoison.models.resnet import resnet50 as resnet50
from jaxpoison.models.unet import UNet as UNet
from jaxpoison.models.vgg import vgg16 as vgg16
