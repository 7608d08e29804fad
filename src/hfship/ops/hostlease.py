# SPDX-License-Identifier: Apache-2.0
"""One control host at a time: a lease on each host of the site, while it is changed.

Owns DEPLOY_DIR/_site/lease on the hosts: JSON {"host", "pid", "start", "boot_id"} of the hfship
that changes the site from afar (base/locks.Owner); its time of modification, by the clock there,
says when it was last renewed. Beside it `lease.lock` carries an flock while the lease is looked at.

Promises: of two control hosts that begin at once, one gets the lease of a host; one that died is
forgotten after EXPIRY_S, or at once on the machine that it ran on. Nobody waits for a lease: who
finds one host in use gives all back, and of two that begin at the same moment both may.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import threading
from typing import Callable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from hfship.base.errors import HfshipError
from hfship.base.locks import (
    InUseError,
    Owner,
    boot_id,
    host_name,
    process_start,
    read_owner,
    still_runs,
)
from hfship.base.values import asdict
from hfship.ops.reach import FarHost, at_once

EXPIRY_S = 60
BEAT_S = 15.0

_TAKE_SCRIPT = """\
mkdir -p -- {folder} && cd -- {folder} || exit 73
command -v flock >/dev/null || {{ echo 'flock: not found'; exit 74; }}
exec 9>>lease.lock
flock 9
mine={mine}
if test -s lease; then
  owner=$(cat lease)
  age=$(( $(date +%s) - $(stat -c %Y lease) ))
  if test "$owner" != "$mine" && test "$owner" != {dead} && test $age -gt -{expiry} \
&& test $age -lt {expiry}
  then echo "held $age $owner"; exit 0; fi
fi
printf %s "$mine" >lease
"""
_RELEASE_SCRIPT = """\
cd -- {folder} || exit 0
exec 9>>lease.lock
flock 9
if test "$(cat lease 2>/dev/null)" = {mine}; then rm -f lease; fi
"""


def own_lease() -> str:
    """The lease of this process."""
    pid = os.getpid()
    owner = Owner(
        host_name(),
        pid,
        process_start(pid),
        boot_id(),
    )
    return json.dumps(asdict(owner))


def lease_folder(host: FarHost) -> str:
    """Where the lease lies there."""
    return f"{host.host.folders['deploy_dir']}/_site"


def take(host: FarHost, mine: str) -> None:
    """Take the lease of a host, or renew it. Raises InUseError, and HfshipError for no answer."""
    dead = ""
    for _ in range(2):
        held = _tried(host, mine, dead)
        if held is None:
            return
        owner = _owner_of(held[1])
        if not owner.is_here or still_runs(owner.pid, owner.start, owner.boot_id):
            raise _in_use(host.name, owner, held[0])
        dead = held[1]
    raise _in_use(host.name, Owner(), 0)


def _tried(host: FarHost, mine: str, dead: str) -> Optional[Tuple[int, str]]:
    """(seconds since it was renewed, the lease) of somebody else; None where it is ours now."""
    script = _TAKE_SCRIPT.format(
        folder=shlex.quote(lease_folder(host)),
        mine=shlex.quote(mine),
        dead=shlex.quote(dead),
        expiry=EXPIRY_S,
    )
    done = host.sh(script)
    held = re.search(r"^held (-?\d{1,18}) (.*)$", done.out, re.MULTILINE)
    if held:
        return int(held[1]), held[2]
    if done.code:
        raise host.at(lease_folder(host)).error(done)
    return None


def _owner_of(text: str) -> Owner:
    with contextlib.suppress(ValueError):
        return read_owner(text.encode())
    return Owner()


def _in_use(name: str, owner: Owner, age: int) -> InUseError:
    return InUseError(
        f"{name} is being changed from another control host",
        f"{owner.label}, last seen {max(0, age)} s ago",
        f"wait until it is done, or stop it; one that died is forgotten after {EXPIRY_S} s",
    )


def release(host: FarHost, mine: str) -> None:
    """Give a lease back; a host that does not answer forgets it by itself."""
    script = _RELEASE_SCRIPT.format(
        folder=shlex.quote(lease_folder(host)),
        mine=shlex.quote(mine),
    )
    with contextlib.suppress(HfshipError):
        host.sh(script)


@contextlib.contextmanager
def leased(hosts: Sequence[FarHost], on_loss: Callable[[str], None]) -> Iterator[List[HfshipError]]:
    """Hold the leases of all hosts that answer; gives the errors of those that do not. `on_loss` is
    called with the name of a host whose lease somebody else took. Raises InUseError."""
    mine = own_lease()
    held: List[FarHost] = []
    ended = threading.Event()
    try:
        answers = at_once(hosts, lambda one: take(one, mine))
        held = [one for one in hosts if answers[one.name] is None]
        failures = [one for one in answers.values() if isinstance(one, HfshipError)]
        for failure in failures:
            if isinstance(failure, InUseError):
                raise failure
        keeper = threading.Thread(
            target=_keep,
            args=(held, mine, ended, on_loss),
            daemon=True,
        )
        keeper.start()
        yield failures
    finally:
        ended.set()
        fresh = [FarHost(one.host) for one in held]  # Ctrl-C has stopped the others
        at_once(fresh, lambda one: release(one, mine), limit_s=10.0)


def _keep(
    hosts: Sequence[FarHost], mine: str, ended: threading.Event, on_loss: Callable[[str], None]
) -> None:
    """Renew the leases until they are given back."""
    beating = [FarHost(one.host) for one in hosts]
    while not ended.wait(BEAT_S):
        answers: Mapping[str, Union[None, HfshipError]]
        answers = at_once(beating, lambda one: take(one, mine), limit_s=BEAT_S)
        for name, answer in answers.items():
            if isinstance(answer, InUseError):
                on_loss(name)
