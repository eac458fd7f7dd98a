"""Readers: data sets by name, and labeled images in files and folders of any kind.

`load` and `read` find CIFAR-10 and MNIST; `open_source` opens what a user has.
"""

from jaxpoison.data.readers.contents import Unreadable as Unreadable
from jaxpoison.data.readers.named import MissingDataError as MissingDataError
from jaxpoison.data.readers.named import load as load
from jaxpoison.data.readers.named import read as read
from jaxpoison.data.readers.opening import open_source as open_source
from jaxpoison.data.readers.source import Batch as Batch
from jaxpoison.data.readers.source import Problem as Problem
from jaxpoison.data.readers.source import Source as Source
