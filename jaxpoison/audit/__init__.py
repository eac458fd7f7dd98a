"""Audits of training sets: what is mislabeled, poisoned or broken, and how sure.

`audit` does all of it for arrays or a path, `jaxpoison audit` for a folder on the command line.
`explain` and `jaxpoison explain` go the other way, from one prediction to the training images.
"""

from jaxpoison.audit._audit import Audit as Audit
from jaxpoison.audit._audit import Settings as Settings
from jaxpoison.audit._audit import audit as audit
from jaxpoison.audit._explain import Explanation as Explanation
from jaxpoison.audit._explain import Removal as Removal
from jaxpoison.audit._explain import explain as explain
