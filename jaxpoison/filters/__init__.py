"""Filters that find poisons in a training set: characteristic vectors and detectors on features.

The filter of De Gaspari, Hitaj and Mancini (arXiv 2403.13523) measures what each example does to
the BatchNorm layers of a network and flags those nearer to another class than to their own.
`CharacteristicVectorFilter` does all of it; the functions compose under `jit`, `vmap` and `grad`.
"""

from jaxpoison.filters.attribution import trusted_attribution as trusted_attribution
from jaxpoison.filters.centroids import Centroids as Centroids
from jaxpoison.filters.centroids import fit_centroids as fit_centroids
from jaxpoison.filters.centroids import shrink as shrink
from jaxpoison.filters.characteristic import (
    CharacteristicVectorFilter as CharacteristicVectorFilter,
)
from jaxpoison.filters.clustering import activation_clustering as activation_clustering
from jaxpoison.filters.confident import confident_learning as confident_learning
from jaxpoison.filters.distances import Mahalanobis as Mahalanobis
from jaxpoison.filters.distances import centroid_distances as centroid_distances
from jaxpoison.filters.distances import fisher_weights as fisher_weights
from jaxpoison.filters.distances import fit_mahalanobis as fit_mahalanobis
from jaxpoison.filters.distances import layer_weights as layer_weights
from jaxpoison.filters.extraction import Block as Block
from jaxpoison.filters.extraction import CharVec as CharVec
from jaxpoison.filters.extraction import apply_and_extract as apply_and_extract
from jaxpoison.filters.extraction import extract_charvec as extract_charvec
from jaxpoison.filters.feature_centroids import feature_centroid as feature_centroid
from jaxpoison.filters.feature_centroids import l2_centroid as l2_centroid
from jaxpoison.filters.layers import layer_clustering as layer_clustering
from jaxpoison.filters.limits import detectable_shift as detectable_shift
from jaxpoison.filters.limits import p_max as p_max
from jaxpoison.filters.nearest import filter_vectors as filter_vectors
from jaxpoison.filters.nearest import nearest_centroid_filter as nearest_centroid_filter
from jaxpoison.filters.neighbors import deep_knn as deep_knn
from jaxpoison.filters.result import ContaminationWarning as ContaminationWarning
from jaxpoison.filters.result import FilterResult as FilterResult
from jaxpoison.filters.settings import PAPER as PAPER
from jaxpoison.filters.settings import FilterSettings as FilterSettings
from jaxpoison.filters.spectral import spectral_signatures as spectral_signatures
from jaxpoison.filters.spectre import spectre as spectre
