# SPDX-License-Identifier: Apache-2.0
"""What may stand in [policy] of a models file."""

from __future__ import annotations

from hfship.base.modelsfile import Key
from hfship.base.policy import CODE_RULES, PICKLE_RULES, READERS, read_exception


def policy_key() -> Key:
    """The table [policy], and its list [[policy.exception]]."""
    exception = {
        "repo": Key("string", "ORG/NAME, or the name of a model without repository"),
        "sha256": Key("string", "of the file"),
        "reason": Key("string", "why it may cross, and who decided"),
    }
    keys = {
        "pickle": Key("string", "files of pickled Python objects", choices=PICKLE_RULES),
        "remote_code": Key("string", "Python, programs, notebooks, archives", choices=CODE_RULES),
        "max_file": Key("string", "largest file, like 50G", READERS["max_file"]),
        "licences": Key("array", "patterns; with ! they refuse", READERS["licences"]),
        "require": Key("array", "roles that must have signed", READERS["require"]),
        "keys": Key("string", "folder of trusted keys; wins over it: HFSHIP_KEYS"),
        "scan": Key("array", "scanners: command lines, {} is the folder", READERS["scan"]),
        "custody": Key("boolean", "keep a log of who did what with a model"),
        "bom": Key("boolean", "put a bill of materials beside an archive"),
        "exception": Key(
            "tables", "files that may cross all the same", read_exception, inside=exception
        ),
    }
    return Key("object", "what may cross, and who must have signed it", inside=keys)
