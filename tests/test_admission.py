"""What names, sizes and the licence say of a model before a byte of it is moved."""

from __future__ import annotations

from typing import Tuple

import pytest

from hfship.base.card import Card
from hfship.base.errors import IntegrityError
from hfship.base.manifest import FileEntry, Manifest, make_manifest
from hfship.base.policy import Policy, PolicyException
from hfship.base.values import replace
from hfship.commands.admission import require_listed

SHA, OTHER = "ab" * 32, "cd" * 32
READ = (PolicyException("org/m", SHA, "read by Kim"),)
NO_CODE = Policy(remote_code="refuse")
NO_CODE_BUT_ONE = replace(NO_CODE, exceptions=READ)


def listed(*files: Tuple[str, str], licence: str = "") -> Manifest:
    """As the Hub lists a model: small files have no SHA-256 yet."""
    manifest = make_manifest("m", [FileEntry(path, 10, sha256) for path, sha256 in files])
    return replace(manifest, card=Card(license=licence))


@pytest.mark.parametrize(
    "manifest, policy, refused",
    [
        (listed(("x.py", "")), Policy(), False),
        (listed(("x.py", "")), NO_CODE, True),
        (listed(("x.py", SHA)), NO_CODE, True),
        (listed(("x.py", "")), NO_CODE_BUT_ONE, False),  # it is looked at when it is here
        (listed(("x.py", OTHER)), NO_CODE_BUT_ONE, True),
        (listed(("w.pt", SHA)), Policy(pickle="refuse"), True),
        (listed(("w.pt", SHA)), Policy(pickle="weights-only"), False),  # what it imports tells
        (listed(licence="mit"), Policy(licences=("mit",)), False),
        (listed(licence="agpl-3.0"), Policy(licences=("mit",)), True),
    ],
)
def test_what_a_list_tells(manifest: Manifest, policy: Policy, refused: bool) -> None:
    if not refused:
        require_listed(manifest, policy, "fetch")
        return
    with pytest.raises(IntegrityError):
        require_listed(manifest, policy, "fetch")
