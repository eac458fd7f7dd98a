"""What the experiments share. Scripts lie in the folder above, which Python puts on the path."""

import sys

from jaxpoison.runs import require_extra

try:
    require_extra("experiments", "tyro", "matplotlib", "sklearn")
except ImportError as error:
    sys.exit(f"error: {error}")
