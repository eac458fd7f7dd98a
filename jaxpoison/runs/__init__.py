"""A resumable run: its folder, evidence, environment, progress, tables and pictures.

Shared by the experiments, the benchmarks and the command line. Needs JAX and rich, which draws
tables and progress; the pictures need matplotlib, from the extra `experiments`.
"""

from jaxpoison.runs._environment import environment as environment
from jaxpoison.runs._files import plain as plain
from jaxpoison.runs._files import read_json as read_json
from jaxpoison.runs._files import remove as remove
from jaxpoison.runs._files import write_json as write_json
from jaxpoison.runs._program import DiskFullError as DiskFullError
from jaxpoison.runs._program import count as count
from jaxpoison.runs._program import program as program
from jaxpoison.runs._progress import Meter as Meter
from jaxpoison.runs._progress import Stages as Stages
from jaxpoison.runs._progress import say as say
from jaxpoison.runs._run import Run as Run
from jaxpoison.runs._tables import columns as columns
from jaxpoison.runs._tables import markdown as markdown
from jaxpoison.runs._work import Work as Work
from jaxpoison.runs._work import attempt as attempt
from jaxpoison.runs._work import require_no_errors as require_no_errors
from jaxpoison.runs._work import succeeded as succeeded
from jaxpoison.runs.cache import use_compilation_cache as use_compilation_cache
from jaxpoison.runs.extras import require_extra as require_extra
