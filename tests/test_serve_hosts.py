# SPDX-License-Identifier: Apache-2.0
"""One `serve` for all hosts, against hosts that are played: who is told what, what is remembered,
and what is left alone where one fails. test_site_hosts.py has hosts that are real."""

from __future__ import annotations

import argparse
import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest

from hfship.base.errors import Exit, HostError, IntegrityError, NetworkError, NotFoundError
from hfship.base.settings import ListedModel, ModelsFile
from hfship.commands import serve_hosts
from hfship.commands.context import Context
from hfship.commands.serve_hosts import Everywhere
from hfship.ops.inventory import Inventory
from hfship.serve.terms import Host, Image, Plan
from hfship.site.everywhere import Step, Work
from hfship.site.hosts import HostFacts, SiteHost
from hfship.site.record import SiteRecord, read_record, write_record
from hfship.site.spread import Placement
from hfship.site.untold import note_untold, read_untold

IMAGE = Image("vllm/vllm-openai:v0.32.0", "sha256:image")
NAMES = ("a", "b", "c")
LISTED = ListedModel(name="m", repo="org/m")


def plan_of(name: str, host: str, port: int = 8000) -> Plan:
    return Plan(
        name=name, image=IMAGE.reference, image_id=IMAGE.id, bind=f"10.0.0.{host}", port=port
    )


def step(name: str, *hosts: str) -> Step:
    return Step(name, {host: plan_of(name, host) for host in hosts})


class PlayedHost:
    """A host that answers as it is told to, and notes what it is asked."""

    def __init__(self, site: PlayedSite, host: SiteHost) -> None:
        self.host, self.name, self._site = host, host.name, site
        self.stop = threading.Event()

    def _answer(self, words: Sequence[object]) -> Any:
        line = " ".join(map(str, words))
        self._site.asked.append((self.name, line))
        answer = self._site.answers.get((self.name, line))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def asked(self, *words: object, silence_s: float = 0.0) -> Any:
        return self._answer(words)

    def hfship(self, *words: object, silence_s: float = 0.0) -> Any:
        return self._answer(words)

    def sh(self, script: str) -> Any:
        text = self._site.files.get((self.name, script.rpartition(" ")[2]))
        return SimpleNamespace(code=0 if text is not None else 1, out=text or "")

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        self._site.put[self.name, path] = (content.decode(), mode)


class PlayedSite:
    """Three hosts with the model and the image, the control host, and what was said and done."""

    def __init__(self, root: Path) -> None:
        self.answers: Dict[Tuple[str, str], Any] = {}
        self.files: Dict[Tuple[str, str], str] = {}
        self.asked: List[Tuple[str, str]] = []
        self.put: Dict[Tuple[str, str], Tuple[str, int]] = {}
        self.brought: List[Tuple[str, List[str]]] = []
        self.not_brought: Dict[str, Exception] = {}
        self.let_go: List[str] = []
        self.said: List[str] = []
        self.hidden: List[str] = []
        self.rows: Any = None
        self.facts = {name: self.fact(name) for name in NAMES}
        self.failures: Dict[str, Any] = {}
        self.hosts = [SiteHost(name, data=f"/data/{name}") for name in NAMES]
        self.deploy = root / "deploy"
        self.deploy.mkdir()

    def fact(self, name: str, **fields: Any) -> HostFacts:
        known = {"offer": Host(images=(IMAGE,)), "models": {"m": "sum"}, "free": 1, **fields}
        return HostFacts(name, **known)

    def context(self, **args: Any) -> Context:
        told: Any = SimpleNamespace(
            info=self.said.append,
            warn=lambda text: self.said.append(f"warning: {text}"),
            error=lambda error: self.said.append(f"error: {error.what}"),
            hide=self.hidden.append,
            result_of=self._result_of,
        )
        settings: Any = SimpleNamespace(
            deploy_dir=self.deploy, package_dir=Path("/packages"), transfer_dir=Path("/transfer")
        )
        file = ModelsFile(Path("/models.toml"), {}, (LISTED,), LISTED)
        given = {"plan": False, "assume_gpus": "", **args}
        return Context(argparse.Namespace(**given), settings, told, file=file)

    def _result_of(self, text: str, value: Any) -> None:
        self.said.append(text)
        self.rows = value

    def everywhere(self, work: Work, gone: Sequence[str] = ()) -> Everywhere:
        """A run that has this to do."""
        made = Everywhere(self.context(), self.hosts, Inventory(self.facts, self.failures), gone)
        made.work = work
        for one in work.steps:
            made.folders[one.name] = made.models[one.name] = one.name.partition("-")[0]
        return made

    def serve(self, **work: Any) -> Exit:
        return self.everywhere(Work(**work)).serve()

    @property
    def record(self) -> SiteRecord:
        return read_record(self.deploy)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayedSite:
    made = PlayedSite(tmp_path)

    def far_hosts(hosts: Sequence[SiteHost], _: Any) -> List[PlayedHost]:
        return [PlayedHost(made, host) for host in hosts]

    def named_archives(word: str, places: Sequence[Path], _: str) -> List[str]:
        assert places == [Path("/packages"), Path("/transfer")]
        if word == "nowhere":
            raise NotFoundError("no archive of nowhere", "", "")
        return [word, "an older one"]

    def bring(hosts: Sequence[PlayedHost], files: Any, *_: Any) -> Any:
        names = [host.name for host in hosts]
        made.brought.append((files[0], names))
        failures = {name: made.not_brought[name] for name in names if name in made.not_brought}
        return SimpleNamespace(failures=failures)

    @contextlib.contextmanager
    def drained(_: Path, name: str, __: Any) -> Iterator[None]:
        made.let_go.append(f"{name} lets go")
        yield
        made.let_go.append(f"{name} is back")

    patched: Dict[str, Any] = {
        "far_hosts": far_hosts,
        "take_inventory": lambda hosts: Inventory(
            {host.name: made.facts[host.name] for host in hosts}, made.failures
        ),
        "named_archives": named_archives,
        "files_to_push": lambda archives, _: archives,
        "bring": bring,
        "drained": drained,
        "await_up": lambda _, name: made.let_go.append(f"{name} is up"),
    }
    for name, value in patched.items():
        monkeypatch.setattr(f"hfship.commands.serve_hosts.{name}", value)
    return made


# -- starting


def test_each_host_gets_its_plan_and_key_and_starts_it(site: PlayedSite) -> None:
    assert site.serve(begin=(step("m-1", "a"), step("m-2", "b"))) == Exit.OK
    assert sorted(site.asked) == [
        ("a", "serve --planned m-1"),
        ("b", "serve --planned m-2"),
    ]
    folder = "/data/a/deploy/_site/planned/m-1"
    (env, mode), (plan, _) = site.put["a", f"{folder}/.env"], site.put["a", f"{folder}/plan.json"]
    key = site.record.keys["m"]
    assert key.startswith("sk-") and f"={key}\n" in env and mode == 0o600 and key in site.hidden
    assert '"10.0.0.a"' in plan and key not in plan
    assert site.record.places == {"m-1": ("a",), "m-2": ("b",)}
    assert site.record.addresses == {"m-1": "10.0.0.a:8000", "m-2": "10.0.0.b:8000"}
    assert [(row["name"], row["hosts"], row["state"]) for row in site.rows] == [
        ("m-1", ["a"], "healthy"),
        ("m-2", ["b"], "healthy"),
    ]
    assert site.let_go == [] and site.brought == []


def test_one_that_does_not_start_holds_no_other_up(site: PlayedSite) -> None:
    site.answers["a", "serve --planned m-1"] = HostError("a: no GPU is free", "", "")
    work = {"begin": (step("m-1", "a"), step("n", "a"), step("m-2", "b"))}
    assert site.serve(**work) == Exit.HOST
    assert ("a", "serve --planned n") in site.asked and ("b", "serve --planned m-2") in site.asked
    assert set(site.record.places) == {"n", "m-2"}
    states = {row["name"]: row.get("state") for row in site.rows[:3]}
    assert states == {"m-1": "failed", "n": "healthy", "m-2": "healthy"}
    assert "error: a: no GPU is free" in site.said


def test_what_runs_as_it_should_is_remembered_and_left_alone(site: PlayedSite) -> None:
    assert site.serve(keep=(step("m-1", "a"),)) == Exit.OK
    assert site.asked == [] and site.put == {}
    assert site.record.addresses == {"m-1": "10.0.0.a:8000"}


@pytest.mark.parametrize("lost", [True, False])
def test_a_host_that_another_control_host_took_is_told(lost: bool, site: PlayedSite) -> None:
    run = site.everywhere(Work(begin=(step("m-1", "a"),), end=(("a", "old"),)))
    run.lost = ["a"] if lost else []
    assert run.serve() == (Exit.HOST if lost else Exit.OK)
    assert ("a was taken by another control host" in site.said[-1]) == lost
    assert bool(site.asked) != lost, "nothing is done there"


# -- bringing


def test_what_hosts_lack_is_brought_once_and_unpacked_there(site: PlayedSite) -> None:
    site.facts["a"] = site.fact("a", models={})
    site.facts["b"] = site.fact("b", models={}, offer=Host())
    assert site.serve(begin=(step("m-1", "a"), step("m-2", "b"), step("m-3", "c"))) == Exit.OK
    image = "vllm-openai_v0.32.0"
    assert sorted(site.brought) == [("m", ["a", "b"]), (image, ["b"])]
    unpacked = [asked for asked in site.asked if "unpack" in asked[1]]
    assert sorted(unpacked) == [("a", "unpack m"), ("b", "unpack m"), ("b", f"unpack {image}")]
    assert site.asked.index(("b", "unpack m")) < site.asked.index(("b", "serve --planned m-2"))


@pytest.mark.parametrize("at", ["bring", "unpack"])
def test_a_host_that_gets_no_model_starts_none_of_its_copies(at: str, site: PlayedSite) -> None:
    error = NetworkError("b: no route", "", "")
    if at == "bring":
        site.not_brought["b"] = error
    else:
        site.answers["b", "unpack m"] = error
    for name in ("a", "b"):
        site.facts[name] = site.fact(name, models={})
    work = (step("m-1", "a"), step("m-2", "b"), step("m-3", "b"), step("n", "b"))
    site.facts["b"] = site.fact("b", models={"n": "sum"})
    assert site.serve(begin=work) == Exit.INCOMPLETE
    started = [asked for asked in site.asked if "serve" in asked[1]]
    assert sorted(started) == [("a", "serve --planned m-1"), ("b", "serve --planned n")]
    assert (("b", "unpack m") in site.asked) == (at == "unpack")


def test_a_model_without_an_archive_fails_where_it_is_needed(site: PlayedSite) -> None:
    work = (step("nowhere", "a"), step("m-1", "a"))
    assert site.serve(begin=work) == Exit.NOT_FOUND
    assert site.asked == [("a", "serve --planned m-1")] and site.brought == []


# -- copies over several hosts


def test_all_members_of_a_group_start(site: PlayedSite) -> None:
    assert site.serve(begin=(step("m-1", "a", "b"),)) == Exit.OK
    assert sorted(site.asked) == [("a", "serve --planned m-1"), ("b", "serve --planned m-1")]
    assert site.record.places == {"m-1": ("a", "b")}
    assert site.rows[0]["hosts"] == ["a", "b"]


def test_where_one_member_fails_all_are_stopped(site: PlayedSite) -> None:
    site.answers["b", "serve --planned m-1"] = HostError("b: out of memory", "", "")
    assert site.serve(begin=(step("m-1", "a", "b"),)) == Exit.HOST
    assert sorted(site.asked[2:]) == [("a", "stop m-1"), ("b", "stop m-1")]
    assert site.record.places == {}


def test_what_is_left_of_a_group_is_stopped_before_all_start(site: PlayedSite) -> None:
    site.facts["b"] = site.fact("b", running=frozenset({"m-1"}))
    assert site.serve(begin=(step("m-1", "a", "b"),)) == Exit.OK
    assert site.asked[0] == ("b", "stop m-1") and len(site.asked) == 3


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"models": {"m": "another"}}, Exit.INTEGRITY),
        ({"offer": Host(images=(Image(IMAGE.reference, "sha256:other"),))}, Exit.INTEGRITY),
    ],
)
def test_members_with_other_files_do_not_start(
    change: Dict[str, Any], code: Exit, site: PlayedSite
) -> None:
    run = site.everywhere(Work(begin=(step("m-1", "a", "b"),)))
    site.facts["b"] = site.fact("b", **change)  # since the plan was made
    assert run.serve() == code
    assert not [asked for asked in site.asked if "serve" in asked[1]]


# -- changing and ending


def test_copies_change_one_after_the_other_each_let_go_of(site: PlayedSite) -> None:
    assert site.serve(change=(step("m-1", "a"), step("m-2", "a", "b"))) == Exit.OK
    assert site.let_go == [
        *(f"m-1 {what}" for what in ("lets go", "is back", "is up")),
        *(f"m-2 {what}" for what in ("lets go", "is back", "is up")),
    ]
    assert site.asked[0] == ("a", "serve --planned m-1")
    assert sorted(site.asked[1:3]) == [("a", "stop m-2"), ("b", "stop m-2")]
    assert sorted(site.asked[3:]) == [("a", "serve --planned m-2"), ("b", "serve --planned m-2")]


def test_what_has_no_place_ends_when_idle_and_last(site: PlayedSite) -> None:
    work = {"begin": (step("m-1", "a"),), "end": (("b", "old"), ("c", "older"))}
    site.answers["b", "stop old --when-idle"] = HostError("b: docker does not answer", "", "")
    assert site.serve(**work) == Exit.HOST
    assert site.asked == [
        ("a", "serve --planned m-1"),
        ("b", "stop old --when-idle"),
        ("c", "stop older --when-idle"),
    ]


def test_nothing_changes_or_ends_on_a_host_that_failed(site: PlayedSite) -> None:
    site.failures["a"] = NetworkError("a does not answer", "", "")
    work = Work(
        begin=(step("m-1", "a"),),
        change=(step("m-2", "a"), step("m-3", "b", "a"), step("m-4", "c")),
        end=(("a", "old"),),
    )
    assert site.everywhere(work).serve() == Exit.INCOMPLETE
    assert site.asked == [("c", "serve --planned m-4")]


# -- keys


def test_a_key_is_the_one_that_is_remembered_or_runs_else_new(site: PlayedSite) -> None:
    write_record(site.deploy, SiteRecord(keys={"m": "sk-remembered"}))
    site.facts["b"] = site.fact("b", running=frozenset({"n-2", "m-1"}))
    site.files["b", "/data/b/deploy/n-2/.env"] = "VLLM_API_KEY=sk-runs\n"
    site.files["b", "/data/b/deploy/m-1/.env"] = "VLLM_API_KEY=sk-forgotten\n"
    for name in ("n", "o"):
        for host in NAMES:
            site.facts[host].models[name] = "sum"  # type: ignore[index]
    site.serve(begin=(step("n-1", "a"), step("o", "c")), keep=(step("n-2", "b"), step("m-1", "b")))
    keys = site.record.keys
    assert (keys["m"], keys["n"]) == ("sk-remembered", "sk-runs")
    assert len(keys["o"]) > 40 and set(site.hidden) == set(keys.values())


# -- planning


def placed(site: PlayedSite, monkeypatch: pytest.MonkeyPatch, gone: Sequence[str] = ()) -> Any:
    """The names of the copies for which a place is looked for, and the run."""
    wished: List[str] = []

    def place(wishes: Any, *_: Any) -> Placement:
        wished.extend(wish.request.name for wish in wishes)
        return Placement({}, {})

    def request_of(context: Context, word: str) -> Any:
        assert context.args.plan is True
        if word == "m-9":
            raise IntegrityError("m-9 is damaged", "", "")
        return SimpleNamespace(name=word, model=SimpleNamespace(folder=Path("/m")))

    monkeypatch.setattr("hfship.commands.serve_hosts.place", place)
    monkeypatch.setattr("hfship.commands.serve_hosts.read_request", request_of)
    monkeypatch.setattr("hfship.commands.serve_hosts.replace", replaced)
    context = site.context()
    run = Everywhere(context, site.hosts, Inventory(site.facts, site.failures), gone)
    names = ["m", "m-9"]
    run.plan({name: replaced(context, args=argparse.Namespace(names=[name])) for name in names})
    return wished, run


def replaced(value: Any, **fields: Any) -> Any:
    """`replace`, also of what is played."""
    return type(value)(**{**vars(value), **fields})


# what the host of m says -> whether a place is looked for, and what is said
STAYS: Dict[str, Tuple[Dict[str, Any], Sequence[str], bool, str]] = {
    "answers": ({}, (), True, ""),
    "silent": ({"problem": "no route", "free": 0}, (), False, "a, which does not answer"),
    "silent, and gone": ({"problem": "no route", "free": 0}, ("a",), True, ""),
    "docker is silent": ({"problem": "no docker"}, (), False, "a, whose docker does not answer"),
    "docker is silent, drained": ({"problem": "no docker", "drained": True}, (), True, ""),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_copy_stays_where_nothing_can_be_changed(
    name: str, site: PlayedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, gone, moves, said = STAYS[name]
    write_record(site.deploy, SiteRecord(places={"m": ("a", "b")}))
    site.facts["a"] = site.fact("a", **fields)
    wished, _ = placed(site, monkeypatch, gone)
    assert (wished == ["m"]) == moves
    assert bool(said) == any(f"m stays on {said}" in line for line in site.said)


def test_a_model_that_cannot_be_read_is_told_and_the_others_are_placed(
    site: PlayedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelsFile, "models", (LISTED,), raising=False)
    wished, run = placed(site, monkeypatch)
    assert wished == ["m"] and "error: m-9 is damaged" in site.said
    assert run.told() == Exit.INTEGRITY


@pytest.mark.parametrize("drain", [True, False])
def test_a_host_whose_docker_is_silent_is_a_failure_unless_it_is_drained(
    drain: bool, site: PlayedSite
) -> None:
    site.facts["a"] = site.fact("a", problem="docker does not answer")
    site.hosts[0] = SiteHost("a", data="/data/a", drain=drain)
    assert site.serve(keep=(step("m-1", "b"),)) == (Exit.OK if drain else Exit.HOST)


def test_a_plan_is_shown_and_nothing_is_asked(site: PlayedSite) -> None:
    run = site.everywhere(Work(begin=(step("m-1", "a"),)))
    run.placement = Placement({}, {"n": HostError("n finds no place", "", "")})
    assert run.told() == Exit.HOST
    assert [(row["name"], row.get("state")) for row in site.rows] == [
        ("m-1", "planned"),
        ("n", None),
    ]
    assert site.asked == [] and not (site.deploy / "_site").exists()


def test_hosts_that_are_assumed_are_idle_and_have_these_gpus(site: PlayedSite) -> None:
    inventory = serve_hosts.assumed_inventory(site.hosts, "2xH100")
    assert list(inventory.facts) == list(NAMES) and not inventory.failures
    for facts in inventory.facts.values():
        assert len(facts.offer.gpus) == 2 and facts.answers and not facts.running


def test_a_gateway_whose_host_left_the_models_file_is_told_once_and_forgotten(
    site: PlayedSite,
) -> None:
    """That of a host which is silent stays known: it has to hear of keys, too."""
    write_record(site.deploy, SiteRecord(gateways=("a", "gone")))
    note_untold(site.deploy, ["a", "gone"], ["bob"])
    site.failures["a"] = NetworkError("a does not answer", "", "")
    site.everywhere(Work())._end_gateways(["b"])
    [told] = [line for line in site.said if "gone" in line]
    assert told.startswith("warning: gone left the models file with a gateway")
    assert told.endswith("on gone: docker rm -f hfship_gateway")
    assert site.record.gateways == ("b", "a")
    assert read_untold(site.deploy) == {"a": ("bob",)}
