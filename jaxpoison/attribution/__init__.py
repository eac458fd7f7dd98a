"""Attribution by other rules than one solved system, with the signs of `influence`.

    tracin               gradients' products along the training path
    datainf              the mean of the inverses of single examples, in closed form
    project_gradients    gradients in a random space of few dimensions; `projected_scores` in it
    project_layers       the same for whole networks, layer by layer, on both sides of each kernel
    Store                projected gradients of a whole training set, on disk

A positive score is harmful: training more on the example raises the group's loss. Scores of these
methods have units of their own and are to be ranked; `influence` gives changes of the loss.
"""

from jaxpoison.attribution._datainf import datainf as datainf
from jaxpoison.attribution._layers import project_layers as project_layers
from jaxpoison.attribution._projection import project_gradients as project_gradients
from jaxpoison.attribution._projection import projected_scores as projected_scores
from jaxpoison.attribution._store import Store as Store
from jaxpoison.attribution._tracin import tracin as tracin
