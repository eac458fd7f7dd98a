"""Audits of training sets: what is mislabeled, poisoned or broken, and how sure.

`audit` does all of it for arrays or a path, `jaxpoison audit` for a folder on the command line.
"""

from jaxpoison.audit._audit import Audit as Audit
from jaxpoison.audit._audit import Settings as Settings
from jaxpoison.audit._audit import audit as audit
