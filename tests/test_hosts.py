"""The hosts of a site in a models file: what they mean, and mistakes that are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import List, Tuple

import pytest

from hfship.base.errors import HostError, UsageError
from hfship.base.modelsfile import read_models_file
from hfship.base.settings import ModelsFile
from hfship.base.values import replace
from hfship.commands.modelskeys import models_schema
from hfship.commands.sitekeys import site_mistakes
from hfship.serve.terms import Gpu, Host, Image
from hfship.site.facts import _json_of, _offer_of
from hfship.site.hosts import (
    HostFacts,
    Interface,
    Placing,
    SiteHost,
    member_of,
    placing_of,
    site_hosts,
)

SCHEMA = models_schema()
OFFER = Host(
    gpus=(Gpu(0, "GPU-1", "H200", 143, 1, (9, 0), "580", True, "0:1", True),),
    images=(Image("vllm/vllm-openai:v0.32.0", "sha256:1", (0, 32, 0), True, "12.8", ("vllm",)),),
    memory=5,
    taken_ports=frozenset([8000]),
    gpu_problem="none",
    cdi=frozenset(["nvidia.com/gpu=0"]),
    held=7,
    running=frozenset(["m"]),
)


def test_what_a_host_offers_is_read_as_it_was_told() -> None:
    blank = Host()
    same = [name for name in vars(OFFER) if getattr(OFFER, name) == getattr(blank, name)]
    assert not same, "every field is to be told"
    told = json.loads(json.dumps(_json_of(OFFER)))
    # What runs is told for the host as a whole; what is held is asked anew.
    assert replace(_offer_of(told), running=OFFER.running, held=OFFER.held) == OFFER


FOUND = (
    Interface("eth0", "10.0.0.1", 1000),
    Interface("ib0", "10.1.0.1", 400000),
    Interface("eth1", "10.2.0.1", 25000),
)
# [[host]] -> the address and interface by which other hosts reach it
MEMBERS: List[Tuple[SiteHost, Tuple[Interface, ...], Tuple[str, str]]] = [
    (SiteHost("a", interface="eth1"), FOUND, ("10.2.0.1", "eth1")),
    (SiteHost("a", address="10.0.0.1", interface="eth1"), FOUND, ("10.2.0.1", "eth1")),
    (SiteHost("a", address="10.0.0.1"), FOUND, ("10.0.0.1", "eth0")),
    (SiteHost("a", address="a.site"), FOUND, ("10.1.0.1", "ib0")),
    (SiteHost("a"), FOUND, ("10.1.0.1", "ib0")),
    (SiteHost("a"), FOUND[:1], ("10.0.0.1", "eth0")),
    (SiteHost("a", interface="ib7"), (), ("a", "ib7")),
    (SiteHost("a", address="a.site"), (), ("a.site", "")),
]


@pytest.mark.parametrize(("host", "interfaces", "reached"), MEMBERS)
def test_how_other_hosts_reach_one(
    host: SiteHost, interfaces: Tuple[Interface, ...], reached: Tuple[str, str]
) -> None:
    facts = HostFacts("a", interfaces=interfaces, infiniband=("mlx5_0",))
    assert member_of(host, facts) == (*reached, ("mlx5_0",))


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(HostError, match="a has no interface ib7 with an address") as caught:
        member_of(SiteHost("a", interface="ib7"), HostFacts("a", interfaces=FOUND[:2]))
    assert caught.value.why == "it has eth0 (10.0.0.1), ib0 (10.1.0.1)"


@pytest.mark.parametrize(
    ("problem", "free", "answers", "silent"),
    [
        ("", 5, True, False),
        ("", 0, True, False),
        ("no route", 0, False, True),
        ("docker is down", 5, False, False),
    ],
)
def test_a_host_that_answers_may_have_a_full_disk(
    problem: str, free: int, answers: bool, silent: bool
) -> None:
    facts = HostFacts("a", problem=problem, free=free)
    assert (facts.answers, facts.silent) == (answers, silent)


def read(folder: Path, text: str) -> ModelsFile:
    path = folder / "models.toml"
    path.write_text(text, encoding="utf-8")
    return read_models_file(path, SCHEMA, (site_mistakes,))


SITE = """
[[host]]
name = "gpu1"
address = "10.0.0.1"
user = "ops"
port = 2222
key = "keys/site"
jump = "ops@bastion:22"
data = "/srv/llm"
roles = ["models"]
labels = { gpu = "h200", rack = "r1" }
interface = "ib0"
drain = true
timeout = 5
[[host]]
name = "gpu2"
local = true
labels = { gpu = "h200" }
[[model]]
name = "big"
hosts = ["gpu1", "gpu2"]
host_labels = { gpu = "h200" }
nodes = 2
"""


def test_what_the_hosts_of_a_file_mean(tmp_path: Path) -> None:
    file = read(tmp_path, SITE)
    one, two = site_hosts(file)
    assert one == SiteHost(
        "gpu1", "10.0.0.1", "ops", 2222, str(tmp_path / "keys/site"), "ops@bastion:22", False,
        "/srv/llm", ("models",), {"gpu": "h200", "rack": "r1"}, "ib0", True, 5,
    )  # fmt: skip
    assert one.docker_host == "ssh://ops@10.0.0.1:2222" and two.docker_host == ""
    assert two.reached_at == "gpu2" and two.roles == ("models", "gateway", "monitoring")
    assert placing_of(file.models[0]) == Placing(("gpu1", "gpu2"), {"gpu": "h200"}, 2)
    assert site_hosts(read(tmp_path, '[[model]]\nname = "a"')) == ()
    assert HostFacts("gpu1").answers and not HostFacts("gpu1", "no route to host").answers


def test_a_host_that_is_no_place_says_why() -> None:
    host = SiteHost("a", labels={"gpu": "a100"}, roles=("gateway",))
    assert Placing().refuses(host) == "is not for models: its roles are gateway"
    plain = SiteHost("a", labels={"gpu": "a100"})
    assert Placing().refuses(plain) == ""
    assert Placing(hosts=("b",)).refuses(plain) == "is not one of its hosts: b"
    assert Placing(host_labels={"rack": "1"}).refuses(plain) == "has no label rack, wanted is 1"


H = '[[host]]\nname = "gpu1"\n'
H2 = '[[host]]\nname = "gpu2"\n'
A = '[[model]]\nname = "a"\n'
MISTAKES: List[Tuple[str, str]] = [
    ("[[host]]\nport = 22", "models.toml:1: host 1: has no name"),
    ("[host]\nname = 1", "models.toml:1: host: expects a list of tables"),
    (H + 'nmae = "x"', "models.toml:3: host 1: nmae: is not a key; did you mean name?"),
    ('[[host]]\nname = "-oProxyCommand=x"', "host 1: name: '-oProxyCommand=x' is not a name of a host"),
    (H + 'address = "a b"', "host 1: address: 'a b' is not an address of a host"),
    (H + 'address = "-x"', "host 1: address: '-x' is not an address of a host"),
    (H + 'user = "a;b"', "host 1: user: 'a;b' is not a name of a user"),
    (H + 'user = "-l"', "host 1: user: '-l' is not a name of a user"),
    (H + "port = 0", "host 1: port: '0' is not a port"),
    (H + 'jump = "-J x"', "host 1: jump: '-J x' is not like ops@bastion:22"),
    (H + 'data = "data"', "host 1: data: 'data' is not an absolute path without blanks"),
    (H + 'data = "/data dir"', "'/data dir' is not an absolute path"),
    (H + 'data = "/a/../b"', "'/a/../b' is not an absolute path"),
    (H + "roles = []", "host 1: roles: a host without a role is of no use"),
    (H + 'roles = ["gpu"]', "'gpu' is not one of: models, gateway, monitoring"),
    (H + "labels = { gpu = 1 }", 'host 1: labels: gpu = 1 is not a label, like gpu = "h200"'),
    (H + 'interface = "eth0; x"', "host 1: interface: 'eth0; x' is not an interface"),
    (H + "timeout = 0", "host 1: timeout: '0' is not"),
    (H + H, "models.toml:4: host 2: name: another host is called gpu1, too"),
    (H + '[[host]]\nname = "GPU1"', "host 2: name: another host is called gpu1, too"),
    (H + H2 + 'address = "gpu1"', "models.toml:3: host 2: gpu1 is gpu1 port 22, too"),
    (H + "local = true\n" + H2 + "local = true", "host 2: gpu1 is this machine, too"),
    (H + 'roles = ["gateway"]', "host: no host has the role models"),
    (A + 'hosts = ["gpu1"]', "models.toml:3: model 1: hosts: needs a [[host]]"),
    (A + "nodes = 2", "models.toml:3: model 1: nodes: needs a [[host]]"),
    (H + A + 'hosts = ["gpu2"]', "models.toml:5: model 1: hosts: no host is called gpu2; did you mean gpu1?"),
    (H + A + "hosts = []", "model 1: hosts: expects names of hosts"),
    (H + A + "nodes = 0", "model 1: nodes: 0 is not from 1 to 64"),
    (H + A + "nodes = 2", "models.toml:5: model 1: nodes: 2 hosts are wanted for a copy, 1 may run it"),
    (H + A + 'host_labels = { gpu = "h200" }', "model 1: no host may run it: gpu1 has no label gpu, wanted is h200"),
]  # fmt: skip


@pytest.mark.parametrize("text, said", MISTAKES, ids=[said for _, said in MISTAKES])
def test_mistakes_are_named_with_file_line_and_key(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert said in caught.value.text()


RIGHT = [
    H + '[[host]]\nname = "gpu1b"\naddress = "gpu1"\nport = 2222',
    H + H2 + A + "serve = { gpus = [0], port = 8001 }\n[[model]]\nname = \"b\"\nserve = { gpus = [0], port = 8001 }",
]  # fmt: skip


@pytest.mark.parametrize("text", RIGHT)
def test_what_goes_together(text: str, tmp_path: Path) -> None:
    read(tmp_path, text)
