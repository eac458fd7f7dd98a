"""Matrix-free products with the curvature of a mean loss, u -> C u.

    Hessian       H = (1/N) sum_i d^2 l_i / d theta^2
    Gauss-Newton  G = (1/N) sum_i J_i^T (d^2 l_i / d f_i^2) J_i,    J_i = d f_i / d theta

H is exact but indefinite for most networks; G drops the curvature of the network itself, is
positive semi-definite for a loss convex in the outputs, and equals H where the outputs are linear
in the parameters (a last layer). Forward-over-reverse products follow Pearlmutter 1994, the
Gauss-Newton product Schraudolph 2002.

A curvature is a function `curvature(params, batch, weights) -> (u -> sum_i weights_i C_i u)`:
bring your own by writing one. `product` turns it into the mean over a data set, in chunks and over
devices. `linear_head` is the closed form for a last layer; `with_l2` adds a penalty on the weights.

`ekfac` and `kfac` approximate the Gauss-Newton matrix by blocks that can be inverted: one Kronecker
product for each layer of a *tapped* function, which hands its linear layers to a tap. They are
solved with by `solvers.ekfac`, or precondition `solvers.cg`, whose answers are exact.
"""

from jaxpoison.core.batches import LossFn as LossFn
from jaxpoison.core.kronecker import DenseBlock as DenseBlock
from jaxpoison.core.kronecker import DiagonalBlock as DiagonalBlock
from jaxpoison.core.kronecker import KroneckerFactors as KroneckerFactors
from jaxpoison.core.kronecker import LayerBlock as LayerBlock
from jaxpoison.core.layers import ConvLayer as ConvLayer
from jaxpoison.core.layers import DenseLayer as DenseLayer
from jaxpoison.core.layers import Tap as Tap
from jaxpoison.core.layers import TappedFn as TappedFn
from jaxpoison.core.layers import no_tap as no_tap
from jaxpoison.curvature._exact import gauss_newton as gauss_newton
from jaxpoison.curvature._exact import hessian as hessian
from jaxpoison.curvature._exact import linear_head as linear_head
from jaxpoison.curvature._exact import with_l2 as with_l2
from jaxpoison.curvature._kronecker import ekfac as ekfac
from jaxpoison.curvature._kronecker import kfac as kfac
from jaxpoison.curvature._losses import cross_entropy as cross_entropy
from jaxpoison.curvature._product import minibatch_product as minibatch_product
from jaxpoison.curvature._product import product as product
from jaxpoison.curvature.base import Curvature as Curvature
