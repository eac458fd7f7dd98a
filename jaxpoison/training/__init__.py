"""Training an image classifier on one device or many, with a defense in the loop."""

from jaxpoison.training._fit import Transfer as Transfer
from jaxpoison.training._fit import fit as fit
from jaxpoison.training.checkpoints import Checkpoints as Checkpoints
from jaxpoison.training.heads import HEAD as HEAD
from jaxpoison.training.heads import HeadRecipe as HeadRecipe
from jaxpoison.training.heads import fit_defended_head as fit_defended_head
from jaxpoison.training.heads import fit_head as fit_head
from jaxpoison.training.recipe import CIFAR10 as CIFAR10
from jaxpoison.training.recipe import FAST as FAST
from jaxpoison.training.recipe import MNIST as MNIST
from jaxpoison.training.recipe import MNIST_FAST as MNIST_FAST
from jaxpoison.training.recipe import Recipe as Recipe
from jaxpoison.training.state import TrainState as TrainState
from jaxpoison.training.state import init_state as init_state
