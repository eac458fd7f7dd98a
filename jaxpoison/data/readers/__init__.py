"""Readers of data sets from files: .npz, tensorflow-datasets, and the original archives."""

from jaxpoison.data.readers.named import MissingDataError as MissingDataError
from jaxpoison.data.readers.named import load as load
from jaxpoison.data.readers.named import read as read
