# SPDX-License-Identifier: Apache-2.0
"""What another host says it has, asked over ssh with the hfship.pyz that lies there.

Promises: nothing is changed there. A host that cannot tell (no Python, no hfship.pyz, an older one)
ends nothing: it counts as one that has nothing, and that is said.
"""

from __future__ import annotations

import shlex
import threading
from typing import TYPE_CHECKING, Optional

from hfship.base.errors import IntegrityError
from hfship.base.manifest import MANIFEST_PATH, parse_manifest
from hfship.ops.sync_plan import FarStock, parse_stock

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest
    from hfship.base.report import Reporter
    from hfship.ops.destination import Destination

PYZ = "hfship.pyz"
# Scripts of POSIX sh: see Destination.run. What the site set for itself counts there, as it does
# for unpack: its variables, and the models file that lies beside.
_LIST_SCRIPT = """\
cd -- {folder} || exit 1
set -- list models images --json
if test -f {models}; then set -- "$@" --models {models}; fi
python3 ./{pyz} "$@" 2>&-
"""
_MANIFEST_SCRIPT = "cat -- {path} 2>&-"


def far_stock(to: Destination, models_file: str, reporter: Reporter) -> FarStock:
    """What is there. Raises what Destination.error returns where the host does not answer."""
    folder, models = shlex.quote(to.folder), shlex.quote(models_file)
    script = _LIST_SCRIPT.format(folder=folder, models=models, pyz=PYZ)
    done = to.run(script, threading.Event())
    try:
        if done.code:
            raise ValueError(f"exit status {done.code}")
        return parse_stock(done.out)
    except ValueError as exc:
        why = f"python3 {to.folder}/{PYZ} list does not work there: {exc}"
        reporter.warn(f"{to.host} cannot say what it has, so all of it travels ({why})")
    return FarStock()


def far_manifest(to: Destination, folder: str) -> Optional[Manifest]:
    """The manifest of a model there; None where it has none that can be read. Raises as
    `far_stock`."""
    script = _MANIFEST_SCRIPT.format(path=shlex.quote(f"{folder}/{MANIFEST_PATH}"))
    done = to.run(script, threading.Event())
    if done.code:
        return None
    try:
        return parse_manifest(done.out, f"{to.host}:{folder}")
    except IntegrityError:
        return None
