# SPDX-License-Identifier: Apache-2.0
"""`hfship mirror`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, List, Optional, Sequence, Tuple

from hfship.base.errors import Exit, NotFoundError, UsageError
from hfship.base.eventlog import open_log
from hfship.base.files import disk_errors
from hfship.base.locks import host_name
from hfship.base.pyz import own_file
from hfship.base.settings import checked_token, home_path, read_token_file
from hfship.base.values import replace
from hfship.commands.options import any_port

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.base.settings import Token
    from hfship.commands.context import Context
    from hfship.ops.http_server import HttpServer
    from hfship.ops.mirror import MirrorServer


def mirror_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mirror`."""
    add = parser.add_argument
    folder = "folder with NAME/ or ORG/NAME/ (default: the models folder)"
    add("folder", nargs="?", metavar="DIR", help=folder)
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    port = "port, 0 for any free one (default: %(default)s)"
    add("--port", type=any_port, default=8090, help=port)
    token = (
        "clients must send the token in this file "
        "(default: HFSHIP_MIRROR_TOKEN, else none is asked for)"
    )
    add("--token-file", type=home_path, metavar="FILE", help=token)
    add(
        "--tls-cert", type=home_path, metavar="FILE", help="serve https with this certificate (PEM)"
    )
    add("--tls-key", type=home_path, metavar="FILE", help="its key (default: in the same file)")
    log = "append a line per request, combined format"
    add("--access-log", type=home_path, metavar="FILE", help=log)
    install = "start it at boot, with these options: ask, and install a systemd unit; or print one"
    add("--install", action="store_true", help=install)
    add("-y", "--yes", action="store_true", help="with --install: do not ask")


def cmd_mirror(context: Context) -> Exit:
    """Serve until interrupted."""
    from hfship.ops.catalogue import RepoCatalogue
    from hfship.ops.mirror import MirrorServer, load_tls
    from hfship.ops.proof_record import record_path

    args, reporter = context.args, context.reporter
    folder = _mirrored_folder(context)
    _check_options(args)
    if args.install:
        return _install(context, folder)

    progress = partial(_hashing, reporter)
    catalogue = RepoCatalogue(folder, reporter.info, record_path(folder), progress=progress)
    token = _clients_token(args)
    tls = load_tls(args.tls_cert, args.tls_key) if args.tls_cert else None
    _allow_many_clients()
    address = (args.host, args.port)
    with MirrorServer(
        address,
        catalogue,
        reporter,
        token=token,
        tls=tls,
        access_log=args.access_log,
    ) as server:
        reporter.run.begin_phase("serving")  # it listens: the job has begun
        what = "what was not proven on this machine is read, which takes a while"
        reporter.info(f"looking through {folder}; {what}")
        names = [repo.repo for repo in catalogue.repos()]
        if not catalogue.is_complete:
            reporter.info("the others are served as soon as they are read")
        elif not names:
            later = "new ones are found while the mirror runs"
            reporter.warn(f"{folder} holds no whole model yet; {later}")
        row = {"url": server.url, "folder": str(folder), "repos": names}
        listed = ", ".join(names) or "nothing yet"
        text = f"serving {folder} at {server.url}: {listed}"
        reporter.result_of(text, {**row, "left_out": catalogue.left_out})
        reporter.info(f"use it with: {_use_it_with(server, names)}")
        serve_until_interrupted(server, args.background)

    return Exit.OK


@contextlib.contextmanager
def _hashing(reporter: Reporter, name: str, size: int) -> Iterator[Callable[[int], None]]:
    """The bar of a model that is read; what was read is remembered when it is stopped."""
    with reporter.stage(f"hashing {name}", size) as stage:
        yield stage.add


def _install(context: Context, folder: Path) -> Exit:
    """Have the mirror started at boot, or print how. Raises UsageError, DiskError, HostError."""
    from hfship.commands.installing import install_or_print
    from hfship.ops.service import Service, current_user, install_text

    if os.environ.get("HFSHIP_MIRROR_TOKEN") and not context.args.token_file:
        what = "the unit would not have HFSHIP_MIRROR_TOKEN"
        step = "put the token into a file that only you can read, and give --token-file FILE"
        raise UsageError(what, "no secret is written into a unit, which everybody can read", step)

    words = (*_own_words(), "mirror", *_mirror_words(context.args, folder))
    about = f"Models of {folder} as a private Hub"
    of_user = Service("hfship-mirror", about, words, stays=True)
    of_system = replace(of_user, user=current_user())
    return install_or_print(context, of_user, install_text(of_system, home_path("~")))


def _own_words() -> Tuple[str, ...]:
    return sys.executable, str(own_file())


def _mirror_words(args: argparse.Namespace, folder: Path) -> List[str]:
    """The arguments of a mirror like this one, wherever it is started from."""
    words = [str(folder.absolute()), "--host", args.host, "--port", str(args.port)]
    for option in ("token_file", "tls_cert", "tls_key", "access_log"):
        path = getattr(args, option)
        if path:
            words += [f"--{option.replace('_', '-')}", str(path.absolute())]
    return words


def _mirrored_folder(context: Context) -> Path:
    """The folder that is asked for, or that of the models here. Raises NotFoundError."""
    settings = context.settings
    if context.args.folder:
        folder = home_path(context.args.folder)
    elif settings.site_models_dir.is_dir():
        folder = settings.site_models_dir
    else:
        folder = settings.models_dir

    if not folder.is_dir():
        step = "hfship mirror DIR, with DIR holding NAME/ or ORG/NAME/"
        raise NotFoundError(f"there is no folder {folder}", "", step)

    return folder


def _check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is hashed. Raises UsageError, DiskError."""
    if not args.host:  # an unset variable of a script; to the system it means all addresses
        step = "--host 127.0.0.1, or --host 0.0.0.0 for all addresses"
        raise UsageError("--host is empty", "", step)
    if args.tls_key and not args.tls_cert:
        step = "give both, or one --tls-cert that holds both"
        raise UsageError("--tls-key is nothing without --tls-cert", "", step)
    if args.access_log:
        with disk_errors("write", args.access_log, "give --access-log another FILE"):
            os.close(open_log(args.access_log))


def _clients_token(args: argparse.Namespace) -> Optional[Token]:
    """What clients must send. Raises AuthError, UsageError."""
    if args.token_file:
        return read_token_file(args.token_file)
    value = os.environ.get("HFSHIP_MIRROR_TOKEN", "").strip()
    if value:
        return checked_token(value, "environment variable HFSHIP_MIRROR_TOKEN")
    return None


def _allow_many_clients() -> None:
    """Raise the limit of open files: each client needs two, its connection and a file."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _use_it_with(server: MirrorServer, names: Sequence[str]) -> str:
    """A command for a client, as it would be typed on another machine."""
    url = re.sub(r"//(0\.0\.0\.0|\[::\])", f"//{host_name()}", server.url)
    secret = "HF_TOKEN=... " if server.token else ""
    name = names[0] if names else "ORG/NAME"
    return f"{secret}HF_ENDPOINT={url} hf download {name}"


def serve_until_interrupted(server: HttpServer, is_background: bool) -> None:
    """Serve until somebody stops it.

    In the background a signal that is not from `stop` (SIGINT) comes from the end of the machine:
    it is raised again, and `watch --resume-all` starts the mirror after it.
    """
    from hfship.ops.catalogue import STOP_GRACE_S

    interrupted = KeyboardInterrupt()
    # In another thread: an interrupt in the middle of an accept would cut the connection that it
    # accepted.
    try:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        while True:
            time.sleep(0.2)  # a signal that another thread received is seen at the next turn
    except KeyboardInterrupt as exc:
        interrupted = exc

    with contextlib.suppress(KeyboardInterrupt):
        server.drain(STOP_GRACE_S)

    if is_background and type(interrupted) is not KeyboardInterrupt:
        raise interrupted
