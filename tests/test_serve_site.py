# SPDX-License-Identifier: Apache-2.0
"""`serve` of a models file with a [gateway]: in which order, and what is said; test_gateway_run.py
has it with docker and HAProxy."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest

from hfship.base.errors import Exit, HfshipError, HostError, IntegrityError
from hfship.base.settings import ListedModel, ModelsFile
from hfship.commands import serve_site
from hfship.commands.serve_site import address_of
from hfship.serve.terms import Plan
from hfship.site.gateway_run import Applied, HaproxyImage
from hfship.site.settings import GatewaySettings
from hfship.site.store import gateway_folder, gateway_text, read_keys, read_rights, write_keys
from hfship.site.terms import AccessKey, Gateway, GatewayModel, Replica

IMAGE = HaproxyImage("haproxy:3", (3, 4))
BIG = ListedModel("big", "org/big@main", copies={"standby": 1}, serve={"aliases": ["chat"]})
NIGHT = ListedModel("night", copies={"mode": "on-demand"})
GATEWAY = {"host": "127.0.0.1", "port": 9000, "image": "mine:1"}
KEYS = ({"name": "alice", "rate": "6/min"}, {"name": "bob", "models": ["big"], "ops": True})


class Site:
    """What is deployed and listed here, and what was done and said."""

    def __init__(self, folder: Path) -> None:
        self.deploy = folder
        self.did: List[Any] = []
        self.said: List[str] = []
        self.keys = {"big": "sk-big", "big.2": "sk-other"}
        self.plans = {name: Plan(name=name, served_names=("big",)) for name in self.keys}
        self.tables: Dict[str, Any] = {"gateway": {**GATEWAY}, "key": KEYS}
        self.monitoring: Optional[HfshipError] = None
        self.no_image: Optional[HfshipError] = None

    def context(self, **args: Any) -> Any:
        models = (BIG, NIGHT)
        file = ModelsFile(self.deploy / "m.toml", {}, models, BIG, tables=self.tables)
        given = {"write_only": False, "plan": False, "json": False, **args}
        reporter = SimpleNamespace(
            info=self.said.append,
            warn=lambda text: self.said.append(f"warning: {text}"),
            result=lambda text: self.said.append(f"result: {text}"),
            clock=self.clock,
        )
        settings = SimpleNamespace(deploy_dir=self.deploy)
        return SimpleNamespace(
            args=SimpleNamespace(**given), settings=settings, reporter=reporter, file=file
        )

    @contextlib.contextmanager
    def clock(self, text: str, limit_s: float = 0) -> Iterator[None]:
        self.did.append(text.partition(":")[0])
        yield

    def deployments(self, *_: Any) -> Any:
        found = [SimpleNamespace(plan=self.plans[name], key=self.keys[name]) for name in self.plans]
        return found, {}

    def find_image(self, name: str) -> HaproxyImage:
        self.did.append(f"image {name}")
        if self.no_image:
            raise self.no_image
        return IMAGE

    def check(self, folder: Path, files: Any, image: str) -> None:
        self.did.append(f"check {image}")

    def keep_usage(self, folder: Path) -> None:
        self.did.append("usage")

    def apply(self, folder: Path, files: Any, live: Any) -> Applied:
        self.did.append(("apply", files.secret["maps/upstream.map"]))
        return Applied.RELOAD

    def set_up_monitoring(self, folder: Path, settings: Any, models: Any) -> str:
        self.did.append(("watch", settings.retention, [one.name for one in models]))
        if self.monitoring:
            raise self.monitoring
        return "monitoring runs"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    gateway_folder(tmp_path).mkdir(mode=0o700)
    write_keys(gateway_folder(tmp_path), (AccessKey("alice", "5e" * 32, rate=1),))
    patched: Dict[str, Any] = {
        "require_docker": lambda: made.did.append("docker"),
        "read_certificate": lambda cert, key: made.did.append(f"certificate {cert}{key}") or "",
        "find_image": made.find_image,
        "require_network": lambda: made.did.append("network"),
        "list_deployments": made.deployments,
        "running_among": {"big"}.intersection,
        "check_files": made.check,
        "apply_files": made.apply,
        "keep_usage": made.keep_usage,
        "set_up_monitoring": made.set_up_monitoring,
        "owner": lambda: "7:8",
        "gateway_warnings": lambda gateway: [f"of {gateway.version}"],
    }
    for name, fake in patched.items():
        monkeypatch.setattr(serve_site, name, fake)
    return made


BEFORE = ["docker", "certificate ", "image mine:1", "network"]
UPSTREAM = "be_big sk-big\nbe_night none\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [(Exit.OK, None), (Exit.INCOMPLETE, None), (Exit.OK, IntegrityError("big is damaged", "", ""))],
)
def test_the_gateway_is_proven_first_and_put_last_whatever_became_of_the_models(
    code: Exit, error: Optional[HfshipError], site: Site
) -> None:
    def serve_models() -> Exit:
        assert site.did == BEFORE
        site.did.append("models")
        if error:
            raise error
        return code

    if error:
        with pytest.raises(IntegrityError):
            serve_site.serve_site(site.context(), serve_models)
    else:
        assert serve_site.serve_site(site.context(), serve_models) == code
    *first, applied = site.did
    assert first == [*BEFORE, "models", "gateway", "check haproxy:3", "usage"]
    assert applied == ("apply", UPSTREAM)
    [alice] = read_keys(gateway_folder(site.deploy))
    assert alice.rate == 6, "as the models file says"
    rights = read_rights(gateway_folder(site.deploy))
    everything = {"models": ("*",), "rate": 6}
    assert rights == {"alice": everything, "bob": {"models": ("big",), "ops": True}}
    assert site.said == [
        "warning: of (3, 4)",
        "warning: there is no key bob yet: hfship key add bob",
        "the gateway was reloaded: http://127.0.0.1:9000/v1",
    ]


@pytest.mark.parametrize("args", [{"write_only": True}, {}])
def test_the_models_alone_are_served_without_a_gateway(args: Any, site: Site) -> None:
    if not args:
        del site.tables["gateway"]
    assert serve_site.serve_site(site.context(**args), lambda: Exit.NOT_FOUND) == Exit.NOT_FOUND
    context = site.context(**args)
    context.file = None
    assert serve_site.serve_site(context, lambda: Exit.NOT_FOUND) == Exit.NOT_FOUND
    assert site.did == site.said == []


def test_who_has_no_key_is_told_how_to_make_one(site: Site) -> None:
    write_keys(gateway_folder(site.deploy), ())
    site.tables["key"] = ()
    serve_site.serve_site(site.context(), lambda: Exit.OK)
    assert "nobody has a key yet: hfship key add NAME" in site.said
    assert not any("there is no key" in line for line in site.said)


@pytest.mark.parametrize("fails", [False, True])
def test_monitoring_that_fails_is_told_and_holds_nothing_up(fails: bool, site: Site) -> None:
    site.tables["monitoring"] = {"retention": "9d"}
    if fails:
        site.monitoring = HostError("no Prometheus", "none there", "bring it")
    assert serve_site.serve_site(site.context(), lambda: Exit.OK) == Exit.OK
    assert site.did[-2:] == ["monitoring", ("watch", "9d", ["big", "night"])]
    told = "warning: no Prometheus; none there; bring it" if fails else "monitoring runs"
    assert told in site.said and site.said[-1].startswith("the gateway was reloaded")


# -- --plan


PLAN = """\
site at http://127.0.0.1:9000/v1
  replicas
    big    runs
    big.2  does not run, standby
    night  new, on demand
  gateway
    haproxy:3  changes:
      it is new
  keys
    alice: rate 1 -> 6
    bob: to be made by hfship key add bob"""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_plan_says_what_would_become_of_the_site(as_json: bool, site: Site) -> None:
    context = site.context(plan=True, json=as_json)
    assert serve_site.serve_site(context, lambda: Exit.HOST) == Exit.HOST
    assert site.said == [PLAN if as_json else f"result: {PLAN}"]
    assert site.did == ["image mine:1", "certificate "], "nothing is changed"


def planned(site: Site) -> List[str]:
    """The lines of a plan."""
    serve_site.tell_plan(site.context(), GatewaySettings(**GATEWAY))
    [said] = site.said
    return said.splitlines()


def test_a_plan_that_changes_nothing_says_so(site: Site) -> None:
    site.tables["key"] = ()
    names = ("big", "org/big", "chat")
    replicas = (Replica("big", "vllm_big:8000"), Replica("big.2", "vllm_big.2:8000", True))
    models = (
        GatewayModel("big", names, replicas),
        GatewayModel("night", ("night",), (Replica("night", "vllm_night:8000"),), mode="on-demand"),
    )
    site.plans = {}
    gateway = Gateway(models, IMAGE.version)
    (gateway_folder(site.deploy) / "gateway.json").write_text(gateway_text(gateway))
    lines = planned(site)
    assert "    haproxy:3  stays as it is" in lines and lines[-1] == "  keys: as they are"
    assert [line.split()[1:] for line in lines[2:5]] == [
        ["new"],
        ["new,", "standby"],
        ["new,", "on", "demand"],
    ]


def test_a_gateway_that_cannot_be_is_told_and_the_plan_goes_on(site: Site) -> None:
    site.no_image = HostError("no image of HAProxy", "docker has none", "")
    lines = planned(site)
    assert "    cannot be: no image of HAProxy  docker has none" in lines
    assert "    alice: rate 1 -> 6" in lines


# -- where clients find it

ADDRESSES: List[Tuple[Dict[str, Any], str]] = [
    ({"host": "127.0.0.1"}, "http://127.0.0.1:8080/v1"),
    ({"host": "10.0.0.5", "port": 80}, "http://10.0.0.5:80/v1"),
    ({"tls_cert": "c"}, "https://control:8443/v1"),
    ({"host": "0.0.0.0"}, "http://control:8080/v1"),
    ({"host": "::"}, "http://control:8080/v1"),
    ({"host": "2001:db8::1"}, "http://[2001:db8::1]:8080/v1"),
    ({"host": "0.0.0.0", "address": "10.0.0.9/24"}, "http://10.0.0.9:8080/v1"),
]


@pytest.mark.parametrize(("fields", "address"), ADDRESSES)
def test_the_address_of_a_site(
    fields: Dict[str, Any], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_site, "host_name", lambda: "control")
    assert address_of(GatewaySettings(**fields)) == address
