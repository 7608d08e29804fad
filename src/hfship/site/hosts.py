# SPDX-License-Identifier: Apache-2.0
"""The hosts of a site: what a models file says of each, and what each says of itself.

[[host]] names a machine and how ssh reaches it. Its GPUs, memory, images and deployments are asked,
never typed: HostFacts is the answer, and the input of placement (site/spread.py). Values only.
"""

from __future__ import annotations

import re
from typing import FrozenSet, List, Mapping, Tuple

from hfship.base.errors import HostError
from hfship.base.settings import ListedModel, ModelsFile, home_path, known_fields
from hfship.base.values import dataclass, field
from hfship.serve.terms import Host, Plan

MODELS_ROLE, GATEWAY_ROLE, MONITORING_ROLE = "models", "gateway", "monitoring"
ROLES = (MODELS_ROLE, GATEWAY_ROLE, MONITORING_ROLE)
SSH_PORT = 22
DATA_FOLDER = "/data"
# What ssh takes as a name: nothing that it, or a shell behind it, would read as an option or word.
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?\Z")
ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:_-]{0,253}\Z")
USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,31}\Z")
JUMP = re.compile(r"([A-Za-z_][A-Za-z0-9._-]{0,31}@)?[A-Za-z0-9][A-Za-z0-9._-]{0,253}(:\d{1,5})?\Z")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?\Z")


@dataclass(frozen=True)
class SiteHost:
    """[[host]]: one machine of the site, and how it is reached."""

    name: str
    address: str = ""  # for ssh; "": its name
    user: str = ""  # "": as ssh's own configuration says
    port: int = 0  # of sshd; 0: as ssh's own configuration says
    key: str = ""  # file of the private key
    jump: str = ""  # [USER@]HOST[:PORT] that ssh goes through
    local: bool = False  # this machine: without ssh
    data: str = DATA_FOLDER  # has its models, deployments and transfer
    roles: Tuple[str, ...] = ROLES
    labels: Mapping[str, str] = field(default_factory=dict)
    interface: str = ""  # between hosts; "": the one that has its address
    drain: bool = False  # nothing is placed there, and what runs there moves away
    timeout: int = 0  # seconds that it may take to answer; 0: the usual time

    @property
    def reached_at(self) -> str:
        """The name or address that ssh is given."""
        return self.address or self.name

    @property
    def docker_host(self) -> str:
        """What DOCKER_HOST is set to; "" where docker is on this machine.

        >>> SiteHost("gpu1", user="ops", port=2222).docker_host
        'ssh://ops@gpu1:2222'
        >>> SiteHost("gpu1", address="2001:db8::1").docker_host
        'ssh://[2001:db8::1]'
        """
        if self.local:
            return ""
        where = self.reached_at
        if ":" in where:
            where = f"[{where}]"
        if self.user:
            where = f"{self.user}@{where}"
        if self.port:
            where = f"{where}:{self.port}"
        return f"ssh://{where}"

    @property
    def folders(self) -> Mapping[str, str]:
        """Its folders by the names of settings.

        >>> SiteHost("gpu1", data="/srv").folders["deploy_dir"]
        '/srv/deploy'
        """
        return {
            "transfer_dir": f"{self.data}/transfer",
            "site_models_dir": f"{self.data}/models/huggingface",
            "deploy_dir": f"{self.data}/deploy",
        }


@dataclass(frozen=True)
class Interface:
    """A network interface that has an address."""

    name: str
    address: str
    speed: int = 0  # Mbit/s; 0: not known


@dataclass(frozen=True)
class HostFacts:
    """What a host answered. `problem` says why it did not; then nothing else is known of it, but
    `next_step` where docker alone has the problem."""

    name: str
    problem: str = ""
    next_step: str = ""  # what mends it, there
    offer: Host = field(default_factory=Host)  # GPUs, images, memory, ports in use
    plans: Tuple[Plan, ...] = ()  # of all deployments there
    running: FrozenSet[str] = frozenset()  # names of those whose container runs
    healthy: FrozenSet[str] = frozenset()  # names of those that answer
    models: Mapping[str, str] = field(default_factory=dict)  # name -> SHA-256 of its manifest
    interfaces: Tuple[Interface, ...] = ()
    infiniband: Tuple[str, ...] = ()  # HCAs with an active port, as NCCL_IB_HCA names them
    docker: str = ""  # version of the engine
    architecture: str = ""  # as docker says: x86_64
    clock_offset_s: float = 0.0  # its clock less that of the control host
    free: int = 0  # bytes on the disk of its data folder
    drained: bool = False  # by `hfship drain`
    lease: str = ""  # the control host that works on it now; "": none

    @property
    def answers(self) -> bool:
        """Whether anything is known of it."""
        return not self.problem

    @property
    def silent(self) -> bool:
        """Whether it did not answer at all; else its docker alone may have a problem."""
        return bool(self.problem) and not self.free

    @property
    def running_plans(self) -> List[Plan]:
        """The plans of deployments that run."""
        return [plan for plan in self.plans if plan.name in self.running]


@dataclass(frozen=True)
class Placing:
    """Keys of [[model]] that say where it may run: `hosts` are the only ones, `host_labels` what a
    host must have, `nodes` how many hosts one copy spans (0: as few as hold it)."""

    hosts: Tuple[str, ...] = ()
    host_labels: Mapping[str, str] = field(default_factory=dict)
    nodes: int = 0

    def refuses(self, host: SiteHost) -> str:
        """Why a host is none for it; "" when it is one.

        >>> Placing(host_labels={"gpu": "h200"}).refuses(SiteHost("a", labels={"gpu": "a100"}))
        'has gpu = a100, not h200'
        """
        if MODELS_ROLE not in host.roles:
            return "is not for models: its roles are " + ", ".join(host.roles)
        if self.hosts and host.name not in self.hosts:
            return "is not one of its hosts: " + ", ".join(self.hosts)
        for label, wanted in self.host_labels.items():
            found = host.labels.get(label)
            if found is None:
                return f"has no label {label}, wanted is {wanted}"
            if found != wanted:
                return f"has {label} = {found}, not {wanted}"
        return ""


def site_hosts(file: ModelsFile) -> Tuple[SiteHost, ...]:
    """The [[host]]s of a models file that has no mistakes, in its order; none: this machine is the
    site."""
    hosts = []
    for table in file.tables.get("host", ()):
        values = known_fields(SiteHost, table)
        key = values.get("key")
        if key:
            folder = file.path.parent.absolute()
            path = folder / home_path(key)
            values["key"] = str(path)
        host = SiteHost(**values)
        hosts.append(host)
    return tuple(hosts)


def placing_of(model: ListedModel) -> Placing:
    """Where a model may run."""
    return Placing(**known_fields(Placing, model.copies))


def member_of(host: SiteHost, facts: HostFacts) -> Tuple[str, str, Tuple[str, ...]]:
    """(address, interface, InfiniBand's HCAs) by which other hosts reach one.

    The interface is the one that [[host]] names, or that has the address that ssh goes to, or the
    fastest. Raises HostError for one that is not there.
    """
    if not facts.interfaces:  # not known: of an assumed host
        return host.reached_at, host.interface, facts.infiniband
    there = ", ".join(f"{one.name} ({one.address})" for one in facts.interfaces)
    found = [one for one in facts.interfaces if one.name == host.interface]
    if host.interface and not found:
        what = f"{host.name} has no interface {host.interface} with an address"
        raise HostError(what, f"it has {there}", "name one of these in [[host]]")
    if not found:
        found = [one for one in facts.interfaces if one.address == host.address]
    if not found:
        found = sorted(facts.interfaces, key=lambda one: -one.speed)
    return found[0].address, found[0].name, facts.infiniband
