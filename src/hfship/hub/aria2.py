# SPDX-License-Identifier: Apache-2.0
"""The download by aria2c, for sites that want it.

Owns the command line of aria2c and its orders. Promises: the token is in no argument and goes to
the Hub's own origin only; what aria2c brought is hashed by us before it counts.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, List, Sequence

from hfship import __version__
from hfship.base.errors import IntegrityError, NetworkError
from hfship.base.files import filesystem_of, make_dir
from hfship.base.processes import Completed, run_program
from hfship.base.progress import BAR_INTERVAL_S
from hfship.base.redaction import redact
from hfship.base.text import counted
from hfship.hub.answers import ca_variable
from hfship.hub.partial import PartialFile, accept_file
from hfship.hub.protocol import origin
from hfship.hub.reader import FileAddress

if TYPE_CHECKING:
    from hfship.base.files import Filesystem
    from hfship.base.progress import Stage
    from hfship.hub.download_state import TransferSettings
    from hfship.hub.partial import Transfer
    from hfship.hub.transport import Transport

ARIA2_ROUNDS = 5  # a signed address lives about an hour; each round signs anew and goes on
ARIA2_CONNECTIONS = 16  # the most that aria2c opens to a server
ARIA2 = (
    "aria2c",
    "--no-conf=true",  # what ~/.aria2/aria2.conf says is of other downloads, hooks included
    "--no-netrc=true",
    # What comes is content, whatever it claims to be: no further addresses, no peers, no ports.
    "--follow-metalink=false",
    "--follow-torrent=false",
    "--enable-dht=false",
    "--enable-dht6=false",
    "--enable-peer-exchange=false",
    "--bt-enable-lpd=false",
    "--bt-save-metadata=false",
    "--enable-rpc=false",
    "--remote-time=false",
    "--continue=true",
    "--auto-file-renaming=false",
    "--allow-overwrite=true",
    "--file-allocation=none",
    "--min-split-size=1M",
    "--max-tries=5",
    "--retry-wait=2",
    "--connect-timeout=10",
    "--timeout=15",
    "--summary-interval=0",
    "--console-log-level=error",
    "--download-result=hide",
    f"--user-agent=hfship/{__version__}",
    "--input-file=-",
    "--max-concurrent-downloads=2",
)


def fetch_with_aria2(
    client: Transport, transfers: Sequence[Transfer], stage: Stage, settings: TransferSettings
) -> None:
    """Let an installed aria2c bring the files.

    Raises HostError without aria2c, NetworkError when it does not finish, IntegrityError when a
    file arrives damaged.
    """
    for transfer in transfers:
        path = transfer.work_file
        make_dir(path.parent)
        ours = path.exists() and not control_file(transfer).exists()
        if ours:
            path.unlink()  # begun by ourselves: aria2c would take it for complete

    with _watch_growth(transfers, stage):
        _run_rounds(client, transfers, settings)

    filesystem = filesystem_of(transfers[0].folder)
    for transfer in transfers:
        _verify(transfer, filesystem)


def _run_rounds(
    client: Transport, transfers: Sequence[Transfer], settings: TransferSettings
) -> None:
    """Run aria2c until it has brought all files. Raises NetworkError after ARIA2_ROUNDS."""
    pending = list(transfers)
    for _ in range(ARIA2_ROUNDS):
        done = run_aria2(client, pending, settings)
        pending = [transfer for transfer in pending if not _is_finished(transfer)]
        if not pending:
            return

    count = counted(len(pending), "file")
    said = done.err or done.out
    raise NetworkError(
        f"aria2c did not finish {count}",
        redact(said.strip()[-500:]),
        "run the same command again: it goes on",
    )


def run_aria2(
    client: Transport, transfers: Sequence[Transfer], settings: TransferSettings
) -> Completed:
    """One round of aria2c over the given files. It reads its orders from a pipe: they hold the
    token."""
    urls = []
    for transfer in transfers:
        address = FileAddress(client, transfer, client.endpoint)
        urls.append(address.locate())

    orders = aria2_orders(transfers, urls, client.endpoint, client.authorization)
    wanted = settings.connections or ARIA2_CONNECTIONS
    connections = min(ARIA2_CONNECTIONS, wanted)
    argv = [
        *ARIA2,
        f"--split={connections}",
        f"--max-connection-per-server={connections}",
        f"--stop-with-process={os.getpid()}",
    ]
    bundle = os.environ.get(ca_variable(os.environ), "")
    if os.path.isfile(bundle):
        argv.append(f"--ca-certificate={bundle}")
    if settings.limit_bps:
        argv.append(f"--max-overall-download-limit={int(settings.limit_bps)}")
    # A proxy may want the password that no other program is given.
    return run_program(argv, orders, client.proxies.for_children())


def aria2_orders(
    transfers: Sequence[Transfer], urls: Sequence[str], endpoint: str, authorization: str
) -> str:
    """What aria2c is to fetch, in the format of its --input-file: signed addresses, where to write,
    and `authorization` for the Hub's own origin only. aria2c would send a header on to the CDN that
    it is redirected to (aria2/aria2#1176)."""
    lines: List[str] = []
    for transfer, url in zip(transfers, urls):
        path = transfer.work_file
        folder = path.parent.absolute()
        lines += [
            url,
            f"  dir={folder}",
            f"  out={path.name}",
        ]
        at_hub = origin(url) == origin(endpoint)
        if authorization and at_hub:
            lines.append(f"  header=Authorization: {authorization}")

    lines.append("")
    return "\n".join(lines)


def control_file(transfer: Transfer) -> Path:
    """Where aria2c keeps what it has of an unfinished file."""
    path = transfer.work_file
    return path.with_name(f"{path.name}.aria2")


def _is_finished(transfer: Transfer) -> bool:
    if control_file(transfer).exists():
        return False
    return transfer.work_file.exists()


def _verify(transfer: Transfer, filesystem: Filesystem) -> None:
    """Hash what aria2c brought; a right file gets its name, a wrong one is removed. Raises
    IntegrityError."""
    path, remote = transfer.work_file, transfer.remote
    step = "run the same command again, without --engine aria2"
    came = path.lstat()
    is_whole = stat.S_ISREG(came.st_mode) and came.st_size == remote.size
    if not is_whole:
        path.unlink()
        brought = f"it brought {came.st_size} bytes of {remote.size}"
        raise IntegrityError(f"{remote.path} does not come whole through aria2c", brought, step)

    partial = PartialFile(transfer, filesystem)
    partial.hash_up_to(remote.size)
    if not partial.hasher.matches():
        path.unlink()
        raise IntegrityError(f"{remote.path} arrives damaged through aria2c", "", step)

    accept_file(partial)


@contextlib.contextmanager
def _watch_growth(transfers: Sequence[Transfer], stage: Stage) -> Iterator[None]:
    """Count the blocks that another program writes as progress."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(BAR_INTERVAL_S):
            allocated = sum(transfer.allocated for transfer in transfers)
            stage.add(allocated - stage.done)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
