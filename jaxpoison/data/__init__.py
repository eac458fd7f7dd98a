"""Images to train on: loading, checking, splitting and augmenting them."""

from jaxpoison.data.augment import random_translate_flip as random_translate_flip
from jaxpoison.data.dataset import Dataset as Dataset
from jaxpoison.data.dataset import Splits as Splits
from jaxpoison.data.dataset import as_dataset as as_dataset
from jaxpoison.data.dataset import check as check
from jaxpoison.data.dataset import check_alike as check_alike
from jaxpoison.data.dataset import check_trusted as check_trusted
from jaxpoison.data.dataset import split as split
from jaxpoison.data.embedded import load_embedded as load_embedded
from jaxpoison.data.pixels import to_float as to_float
from jaxpoison.data.readers import Problem as Problem
from jaxpoison.data.readers import Source as Source
from jaxpoison.data.readers import load as load
from jaxpoison.data.readers import open_source as open_source
