# SPDX-License-Identifier: Apache-2.0
"""What a models file may say of hosts: keys of [[host]], those of [[model]] that say where it may
run, and mistakes that only the whole file shows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Pattern, Sequence

from hfship.base.errors import nearest
from hfship.base.modelsfile import Key, Mistake
from hfship.commands.options import port_number, positive_number
from hfship.site.hosts import (
    ADDRESS,
    HOST_NAME,
    JUMP,
    LABEL,
    MODELS_ROLE,
    ROLES,
    SSH_PORT,
    USER,
    SiteHost,
    placing_of,
    site_hosts,
)

if TYPE_CHECKING:
    from hfship.base.settings import ModelsFile

MOST_NODES = 64
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,14}\Z")  # IFNAMSIZ of Linux
# What the shells of hosts and their docker take without quotes.
_FOLDER = re.compile(r"/[A-Za-z0-9._/+-]*[A-Za-z0-9._+-]\Z")


def _matching(about: str, pattern: Pattern[str], expected: str) -> Key:
    """A key whose text ssh, docker and shells take as it is."""

    def read(text: str) -> str:
        if not pattern.match(text):
            raise ValueError(f"{text[:60]!r} is not {expected}")
        return text

    return Key("string", about, read)


def _data_folder(text: str) -> str:
    if not _FOLDER.match(text) or ".." in text.split("/"):
        raise ValueError(f"{text[:60]!r} is not an absolute path without blanks")
    return text


def _roles(value: List[Any]) -> List[str]:
    for role in value:
        if role not in ROLES:
            raise ValueError(f"{role!r:.40} is not one of: {', '.join(ROLES)}")
    if not value:
        raise ValueError("a host without a role is of no use: leave it out")
    return value


def _labels(value: Mapping[str, Any]) -> Mapping[str, str]:
    for label, text in value.items():
        if not LABEL.match(label) or not isinstance(text, str) or not LABEL.match(text):
            raise ValueError(f'{label[:40]} = {text!r:.40} is not a label, like gpu = "h200"')
    return value


def _host_names(value: List[Any]) -> List[str]:
    if not value or not all(isinstance(item, str) for item in value):
        raise ValueError('expects names of hosts, like ["gpu1", "gpu2"]')
    return value


def _nodes(value: int) -> int:
    if not 1 <= value <= MOST_NODES:
        raise ValueError(f"{value} is not from 1 to {MOST_NODES}")
    return value


def host_key() -> Key:
    """[[host]]."""
    inside = {
        "name": _matching("of the machine, for people and tables", HOST_NAME, "a name of a host"),
        "address": _matching("for ssh (default: its name)", ADDRESS, "an address of a host"),
        "user": _matching("for ssh (default: as ssh is configured)", USER, "a name of a user"),
        "port": Key("integer", "of sshd (default: 22)", lambda value: port_number(str(value))),
        "key": Key("string", "file of the private key for ssh"),
        "jump": _matching("host that ssh goes through", JUMP, "like ops@bastion:22"),
        "local": Key("boolean", "this machine: without ssh"),
        "data": Key("string", "has its models and deployments (default: /data)", _data_folder),
        "roles": Key("array", "of models, gateway, monitoring (default: all)", _roles),
        "labels": Key("object", 'what models ask for, like { gpu = "h200" }', _labels),
        "interface": _matching("between hosts (default: asked)", _INTERFACE, "an interface"),
        "drain": Key("boolean", "nothing is placed there; what runs there moves away"),
        "timeout": Key(
            "integer", "seconds to answer (20)", lambda value: positive_number(str(value))
        ),
    }
    return Key("tables", "a machine that models run on", inside=inside)


def placing_keys() -> Dict[str, Key]:
    """Keys of [[model]]: where it may run."""
    return {
        "hosts": Key("array", "names of the only hosts that it may run on", _host_names),
        "host_labels": Key("object", "labels that its hosts must have", _labels),
        "nodes": Key("integer", "hosts that one copy spans (default: as few as hold it)", _nodes),
    }


# -- mistakes that only the whole file shows


def host_mistakes(file: ModelsFile) -> Iterator[Mistake]:
    """What does not go together in the hosts of a models file."""
    tables = file.tables.get("host")
    if tables is None:
        yield from _without_hosts(file)
        return
    for index, table in enumerate(tables):
        if "name" not in table:
            yield Mistake(("host", index), "has no name")
            return

    hosts = site_hosts(file)
    yield from _same_twice(hosts)
    yield from _nowhere(file, hosts)


def _without_hosts(file: ModelsFile) -> Iterator[Mistake]:
    for index, model in enumerate(file.models):
        for key in placing_keys():
            if key in model.copies:
                yield Mistake(("model", index, key), "needs a [[host]]")


def _same_twice(hosts: Sequence[SiteHost]) -> Iterator[Mistake]:
    """Hosts that a word, or ssh, could not tell apart: their GPUs would be given away twice."""
    called: Dict[str, str] = {}
    reached: Dict[str, str] = {}
    for index, host in enumerate(hosts):
        folded = host.name.casefold()
        if folded in called:
            yield Mistake(("host", index, "name"), f"another host is called {called[folded]}, too")
        called[folded] = host.name

        place = "this machine"
        if not host.local:
            through = f" through {host.jump}" if host.jump else ""
            place = f"{host.reached_at} port {host.port or SSH_PORT}{through}"
        if place in reached:
            yield Mistake(("host", index), f"{reached[place]} is {place}, too")
        reached[place] = host.name
    if not any(MODELS_ROLE in host.roles for host in hosts):
        yield Mistake(("host",), "no host has the role models")


def _nowhere(file: ModelsFile, hosts: Sequence[SiteHost]) -> Iterator[Mistake]:
    """Models that no host could ever take."""
    names = [host.name for host in hosts]
    for index, model in enumerate(file.models):
        placing = placing_of(model)
        unknown = [name for name in placing.hosts if name not in names]
        for name in unknown:
            what = f"no host is called {name}{nearest(name, names)}"
            yield Mistake(("model", index, "hosts"), what)
        refused = [placing.refuses(host) for host in hosts]
        fitting = refused.count("")
        if unknown:
            continue
        if not fitting:
            reasons = "; ".join(f"{name} {why}" for name, why in zip(names, refused))
            yield Mistake(("model", index), f"no host may run it: {reasons}")
        elif placing.nodes > fitting:
            what = f"{placing.nodes} hosts are wanted for a copy, {fitting} may run it"
            yield Mistake(("model", index, "nodes"), what)
