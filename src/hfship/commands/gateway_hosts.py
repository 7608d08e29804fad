# SPDX-License-Identifier: Apache-2.0
"""Gateways on other hosts: `hfship serve --gateway` there, and what a control host sends for it.

Hosts whose roles name the gateway have one beside that of the control host, with the same models
and keys. With `address` in [gateway], keepalived moves that one address between them
(site/keepalived.py); without, clients are given all addresses.
"""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from hfship.base.errors import (
    HfshipError,
    IncompleteError,
    NetworkError,
    NotFoundError,
    UsageError,
)
from hfship.base.files import write_below
from hfship.base.locks import FolderLock, InUseError, host_name, lock_within
from hfship.base.reading import LIST_SIZE
from hfship.base.values import replace
from hfship.ops.reach import FarHost, at_once
from hfship.serve.deployments import make_own_folder, read_own
from hfship.serve.docker import require_docker
from hfship.site.facts import interfaces
from hfship.site.gateway_files import CONTAINER, gateway_files, gateway_of
from hfship.site.gateway_run import apply_files, check_files, find_image, owner, require_network
from hfship.site.gatewayset import SET_FILE, GatewaySet, parse_set, set_text
from hfship.site.hosts import GATEWAY_ROLE, HostFacts, SiteHost, member_of, site_hosts
from hfship.site.keepalived import (
    CHECK_FILE,
    CONFIG_FILE,
    GatewayHost,
    check_text,
    keepalived_text,
)
from hfship.site.maps import key_maps, model_maps
from hfship.site.record import SITE_FOLDER, read_record
from hfship.site.store import gateway_folder, read_keys, write_files, write_keys
from hfship.site.untold import Untold, forget_untold, read_untold

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.base.settings import ModelsFile
    from hfship.commands.context import Context
    from hfship.site.settings import GatewaySettings

TELL_PATIENCE_S = 600.0  # for another hfship that tells gateways, of which one may hang
NOTE_PATIENCE_S = 20.0  # for another hfship that changes a deployment or a key


def gateway_hosts(file: ModelsFile, hosts: Sequence[SiteHost]) -> List[SiteHost]:
    """The hosts whose roles name the gateway: by default none does."""
    named = {
        table["name"] for table in file.tables["host"] if GATEWAY_ROLE in table.get("roles", ())
    }
    return [host for host in hosts if host.name in named and not host.local]


# -- on such a host


def serve_gateway(context: Context) -> None:
    """Set up the gateway that a control host put here. Raises HfshipError."""
    deploy_dir = context.settings.deploy_dir
    content = read_own(deploy_dir / SITE_FOLDER, SET_FILE, LIST_SIZE)
    if content is None:
        step = "hfship serve on the control host"
        raise NotFoundError("no control host has put a gateway here", "", step)
    wanted = parse_set(content, str(deploy_dir / SITE_FOLDER / SET_FILE))
    require_docker()
    image = find_image(wanted.settings.image)
    require_network()
    folder = gateway_folder(deploy_dir)
    with FolderLock(deploy_dir):
        gateway = gateway_of(wanted.settings, wanted.models, image.version)
        live = key_maps(wanted.models, wanted.keys)
        maps = model_maps(wanted.models, wanted.upstream)
        files = gateway_files(
            gateway,
            wanted.settings,
            image.reference,
            owner(),
            wanted.certificate,
            maps,
            live,
        )
        check_files(folder, files, image.reference)
        write_keys(folder, wanted.keys)
        done = apply_files(folder, files, live)
        write_files(folder, wanted.files, 0o644)
    context.reporter.info(f"the gateway {done.value}")
    row = {"schema": "hfship-planned/1", "name": "gateway", "state": done.value}
    context.reporter.result_of("", [{**row, "url": "", "start_s": None}])


# -- on the control host


def keep_set(deploy_dir: Path, wanted: GatewaySet) -> None:
    """Remember what was sent, so that a change of keys can be sent alone."""
    make_own_folder(deploy_dir / SITE_FOLDER)
    write_below(deploy_dir, f"{SITE_FOLDER}/{SET_FILE}", set_text(wanted), 0o600)


def read_set(deploy_dir: Path) -> GatewaySet:
    """What was sent last. Raises IntegrityError."""
    content = read_own(deploy_dir / SITE_FOLDER, SET_FILE, LIST_SIZE) or b""
    return parse_set(content, str(deploy_dir / SITE_FOLDER / SET_FILE))


def without_copy(wanted: GatewaySet, name: str) -> GatewaySet:
    """The gateway without a copy that is to restart; the only one of a model stays."""
    models = []
    for model in wanted.models:
        others = tuple(one for one in model.replicas if one.name != name)
        models.append(replace(model, replicas=others or model.replicas))
    return replace(wanted, models=tuple(models))


def send_sets(
    hosts: Sequence[FarHost], wanted: GatewaySet, files: Mapping[str, Mapping[str, str]]
) -> Dict[str, HfshipError]:
    """Have the gateways of all hosts stand on that; the errors of those that do not. `files` are
    those of each host."""

    def send(host: FarHost) -> None:
        own = replace(wanted, files=files.get(host.name, {}))
        path = f"{host.host.folders['deploy_dir']}/{SITE_FOLDER}/{SET_FILE}"
        host.put(path, set_text(own).encode(), 0o600)
        host.asked("serve", "--gateway")

    answers = at_once(hosts, send)
    return {name: one for name, one in answers.items() if isinstance(one, HfshipError)}


_END_SCRIPT = """\
found=$(docker ps -aq --filter name=^/{container}$) || exit
test -z "$found" || docker rm -f $found || exit
rm -rf -- {folder}/_gateway {folder}/{site}/{set}
"""


def end_gateways(hosts: Sequence[FarHost]) -> Dict[str, HfshipError]:
    """Have no gateway on these hosts any more, nor the keys of one; the errors of those on which
    that cannot be done."""

    def end(host: FarHost) -> None:
        folder = host.host.folders["deploy_dir"]
        script = _END_SCRIPT.format(
            container=CONTAINER,
            folder=shlex.quote(folder),
            site=SITE_FOLDER,
            set=SET_FILE,
        )
        done = host.sh(script)
        if done.code:
            raise host.at(folder).error(done)

    answers = at_once(hosts, end)
    return {name: one for name, one in answers.items() if isinstance(one, HfshipError)}


@contextlib.contextmanager
def telling(deploy_dir: Path) -> Iterator[None]:
    """Nobody else tells other gateways meanwhile: who reads the keys later is heard later, too.
    Raises InUseError, DiskError."""
    make_own_folder(deploy_dir / SITE_FOLDER)
    with lock_within(deploy_dir / SITE_FOLDER, TELL_PATIENCE_S):
        yield


def send_now(
    deploy_dir: Path,
    hosts: Sequence[FarHost],
    files: Mapping[str, Mapping[str, str]],
    wanted: Optional[GatewaySet] = None,
) -> Dict[str, HfshipError]:
    """Send these hosts a gateway, by default the one that is kept, with the keys as they are now;
    the errors of those that do not have it. `files` is as for send_sets."""
    with telling(deploy_dir):
        keys = read_keys(gateway_folder(deploy_dir))
        wanted = replace(wanted or read_set(deploy_dir), keys=keys)
        keep_set(deploy_dir, wanted)
        failures = send_sets(hosts, wanted, files)
        # A key that was changed meanwhile is still to be told: then nothing is forgotten.
        with contextlib.suppress(InUseError), lock_within(deploy_dir, NOTE_PATIENCE_S):
            if read_keys(gateway_folder(deploy_dir)) == keys:
                forget_untold(deploy_dir, {host.name for host in hosts}.difference(failures))
    return failures


def send_keys(context: Context, names: Iterable[str]) -> Dict[str, HfshipError]:
    """Send the keys as they are now to the gateways on these hosts; the errors of those that do
    not have them, which stay noted (site/untold.py)."""
    deploy_dir = context.settings.deploy_dir
    known: Dict[str, SiteHost] = {}
    if context.file:
        known = {one.name: one for one in site_hosts(context.file)}
    failures: Dict[str, HfshipError] = {}
    hosts = []
    for name in names:
        if name in known:
            hosts.append(FarHost(known[name]))
        else:
            failures[name] = _not_reached(context, name)
    failures.update(send_now(deploy_dir, hosts, {}))
    return failures


def _not_reached(context: Context, name: str) -> HfshipError:
    if context.file is None:
        step = "HFSHIP_MODELS_FILE=FILE hfship key sync"
        return UsageError(f"no models file says how {name} is reached", "", step)
    step = f"name {name} there again, then: hfship key sync"
    return NotFoundError(f"{context.file.path} has no host {name} any more", "", step)


def tell_gateways(context: Context) -> None:
    """Tell the gateways of other hosts the keys as they are now. Raises IncompleteError where one
    does not know them then."""
    deploy_dir = context.settings.deploy_dir
    names = read_record(deploy_dir).gateways
    if names:
        require_told(send_keys(context, names), read_untold(deploy_dir))


def require_told(failures: Mapping[str, HfshipError], untold: Untold) -> None:
    """Raise IncompleteError for gateways that do not know the keys as they are now.

    >>> try:
    ...     require_told({"gw2": NetworkError("gw2 does not answer")}, {"gw2": ("bob",)})
    ... except IncompleteError as exc:
    ...     print(exc.what)
    not known yet at the gateway on gw2: what changed of bob
    """
    if not failures:
        return
    keys: List[str] = []
    for host in failures:
        keys += untold.get(host, ())
    names = ", ".join(dict.fromkeys(keys)) or "keys"
    what = f"not known yet at the gateway on {', '.join(failures)}: what changed of {names}"
    reasons = dict.fromkeys(error.what for error in failures.values())
    why = "; ".join(reasons) + "\nuntil it knows, that gateway takes keys as they were"
    step = "hfship key sync     # when it answers; hfship status --repair --every 10 does that, too"
    for error in failures.values():
        if not isinstance(error, NetworkError) and error.next_step:
            step = error.next_step
    raise IncompleteError(what, why, step)


def keepalived_files(
    settings: GatewaySettings,
    hosts: Sequence[SiteHost],
    facts: Mapping[str, HostFacts],
    deploy_dir: Path,
) -> Dict[str, Dict[str, str]]:
    """The files for keepalived of each host, "" for this one, which has the address first; none
    without an address in [gateway]. Raises HostError for an interface that is not there."""
    if not settings.address:
        return {}
    here = HostFacts(host_name(), interfaces=tuple(interfaces()))
    own = SiteHost(host_name())
    members: List[Tuple[str, SiteHost, HostFacts, str]] = [("", own, here, str(deploy_dir))]
    for host in hosts:
        members.append((host.name, host, facts[host.name], host.folders["deploy_dir"]))
    table = []
    for _, host, known, _ in members:
        address, interface, _ = member_of(host, known)
        table.append(GatewayHost(host.name, address, interface))
    found = {}
    for number, (name, _, _, folder) in enumerate(members):
        check = f"{folder}/_gateway/{CHECK_FILE}"
        found[name] = {
            CONFIG_FILE: keepalived_text(settings.address, table, number, check),
            CHECK_FILE: check_text(settings.published_port, bool(settings.tls_cert)),
        }
    return found
