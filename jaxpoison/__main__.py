"""`python -m jaxpoison`."""

import sys

from jaxpoison.cli import main

if __name__ == "__main__":
    sys.exit(main())
