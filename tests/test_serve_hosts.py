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
from hfship.commands.gateway_hosts import keep_set
from hfship.commands.serve_hosts import Everywhere
from hfship.ops.inventory import Inventory
from hfship.ops.push import PUSH_JOBS
from hfship.serve.survey import Purpose
from hfship.serve.terms import Host, Image, Plan
from hfship.site.everywhere import Step, Work
from hfship.site.gatewayset import GatewaySet
from hfship.site.hosts import HostFacts, SiteHost
from hfship.site.record import SiteRecord, read_record, write_record
from hfship.site.settings import GatewaySettings
from hfship.site.spread import Placed, Placement
from hfship.site.store import gateway_text
from hfship.site.terms import Gateway, GatewayModel, Replica
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
        patient = words[0] == "serve" or "--when-idle" in words  # they say something now and then
        assert silence_s == (serve_hosts.ANSWER_S if patient else 0.0)
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
        self.silent_now: Dict[str, Any] = {}  # since the first look at all
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
        self.text = ""
        settings: Any = SimpleNamespace(
            deploy_dir=self.deploy, package_dir=Path("/packages"), transfer_dir=Path("/transfer")
        )
        file = ModelsFile(Path("/models.toml"), {}, (LISTED,), LISTED)
        given = {"plan": False, "assume_gpus": "", **args}
        return Context(argparse.Namespace(**given), settings, told, file=file)

    def _result_of(self, text: str, value: Any) -> None:
        self.said.append(text)
        self.text, self.rows = text, value

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

    def bring(hosts: Sequence[PlayedHost], files: Any, jobs: int, limit_bps: int, _: Any) -> Any:
        names = [host.name for host in hosts]
        [archive] = files  # the newest
        assert jobs == PUSH_JOBS and limit_bps == 0
        made.brought.append((archive, names))
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
            {host.name: made.facts[host.name] for host in hosts},
            {**made.failures, **made.silent_now},
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
    [failed] = site.rows[3:]
    assert failed["name"] == "m-1" and failed["error"]["what"] == "a: no GPU is free"
    assert "error: a: no GPU is free" in site.said
    assert [line.split() for line in site.text.splitlines()[1:]] == [
        ["m-1", "a", "10.0.0.a:8000", "a:", "no", "GPU", "is", "free"],
        ["n", "a", "10.0.0.a:8000", "answers"],
        ["m-2", "b", "10.0.0.b:8000", "answers"],
    ]


def test_copies_of_a_host_that_failed_are_told_with_its_error(site: PlayedSite) -> None:
    site.failures["a"] = NetworkError("a does not answer", "", "")
    assert site.serve(keep=(step("m-1", "a"), step("m-2", "b"))) == Exit.INCOMPLETE
    assert [row.get("state") for row in site.rows] == ["failed", "healthy", None]
    table, _, line = site.text.rpartition("\n")
    assert line == "a does not answer" and "m-1" in table


def test_a_host_that_breaks_off_holds_no_other_up(
    site: PlayedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(run: Everywhere, host: PlayedHost, step: Step) -> Any:
        return run._start(host, step)  # type: ignore[arg-type]

    monkeypatch.setattr(Everywhere, "_try", begun)  # what it raises is the answer of the host
    site.answers["a", "serve --planned m-1"] = NetworkError("a broke off", "", "")
    work = {"begin": (step("m-1", "a"), step("n", "a"), step("m-2", "b"))}
    assert site.serve(**work) == Exit.INCOMPLETE
    assert set(site.record.places) == {"m-2"} and "error: a broke off" in site.said


def test_what_finds_no_place_is_told_and_the_rest_is_served(site: PlayedSite) -> None:
    run = site.everywhere(Work(begin=(step("m-1", "a"),)))
    run.placement = Placement({}, {"n": HostError("n finds no place", "", "")}, warnings=("w",))
    assert run.serve() == Exit.HOST
    assert site.said[1:3] == ["warning: w", "error: n finds no place"]
    assert site.asked == [("a", "serve --planned m-1")]
    assert [row["name"] for row in site.rows] == ["m-1", "n"]


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


@pytest.mark.parametrize(
    ("change", "silent"), [({"models": {}}, False), ({"offer": Host()}, False), ({}, True)]
)
def test_members_are_looked_at_again_before_they_start(
    change: Dict[str, Any], silent: bool, site: PlayedSite
) -> None:
    run = site.everywhere(Work(begin=(step("m-1", "a", "b"),)))
    site.facts["b"] = site.fact("b", **change)
    if silent:
        site.silent_now["b"] = NetworkError("b does not answer", "", "")
    assert run.serve() == (Exit.INCOMPLETE if silent else Exit.HOST)
    assert not [asked for asked in site.asked if "serve" in asked[1]]
    said = "b does not answer" if silent else "is not on b"
    assert any(said in line for line in site.said if line.startswith("error: "))


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
    assert "error: b: docker does not answer" in site.said


def test_a_copy_that_failed_is_not_ended_where_it_runs_until_now(site: PlayedSite) -> None:
    """The only one of a model that answers would be gone."""
    site.answers["a", "serve --planned m-1"] = HostError("a: no GPU is free", "", "")
    work = {"begin": (step("m-1", "a"),), "end": (("b", "m-1"), ("b", "old"))}
    assert site.serve(**work) == Exit.HOST
    assert site.asked[1:] == [("b", "stop old --when-idle")]


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


def test_a_key_is_kept_before_a_host_is_told_it(site: PlayedSite) -> None:
    """What is killed then, and served again, is not started anew for another key."""

    class Killed(BaseException):
        """As SIGKILL would."""

    def start(run: Everywhere, *_: Any) -> None:
        assert site.record.keys == run.record.keys != {}
        raise Killed

    run = site.everywhere(Work(begin=(step("m-1", "a"),)))
    run._begin = lambda: start(run)  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run.serve()


# -- planning


class Planned:
    """What is asked of placement, which gives `placement`, for these names of one model."""

    def __init__(self, site: PlayedSite, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.wishes: List[Any] = []
        self.placement = Placement({}, {})
        self.decided: List[Any] = []
        for name in ("place", "decide", "read_request"):
            monkeypatch.setattr(f"hfship.commands.serve_hosts.{name}", getattr(self, name))
        monkeypatch.setattr("hfship.commands.serve_hosts.replace", replaced)

    def place(self, wishes: Any, hosts: Any, facts: Any, plan_of: Any) -> Placement:
        self.wishes.extend(wishes)
        assert hosts is self.site.hosts and list(facts) == list(self.site.facts)
        self.decided.append(plan_of("request", "left", None))
        return self.placement

    def decide(self, *words: Any) -> Any:
        *words, quiet, known = words
        quiet.info("said to nobody")
        assert known(IMAGE) is IMAGE
        return words

    def read_request(self, context: Context, word: str) -> Any:
        context.reporter.info("said to nobody")
        assert context.args.plan is True
        if word == "m-9":
            raise IntegrityError("m-9 is damaged", "", "")
        folder = SimpleNamespace(folder=self.site.deploy / f"{word}-folder")
        return SimpleNamespace(name=word, model=folder, network="hfship", purpose=None)

    def run(self, *names: str, gone: Sequence[str] = (), **copies: int) -> Everywhere:
        """Plan deployments of the model m."""
        listed = ListedModel(name="m", repo="org/m", copies=copies)
        file = ModelsFile(Path("/models.toml"), {}, (listed,), listed)
        context = replaced(self.site.context(), file=file)
        made = Everywhere(
            context, self.site.hosts, Inventory(self.site.facts, self.site.failures), gone
        )
        runs = {name: replaced(context, args=argparse.Namespace(names=[name])) for name in names}
        made.plan(runs)
        return made

    @property
    def wished(self) -> List[str]:
        """The names of the copies for which a place is looked for."""
        return [wish.request.name for wish in self.wishes]


@pytest.fixture
def planned(
    site: PlayedSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Planned]:
    yield Planned(site, monkeypatch)
    assert "".join(capsys.readouterr()) == "" and "said to nobody" not in site.said


def replaced(value: Any, **fields: Any) -> Any:
    """`replace`, also of what is played."""
    return type(value)(**{**vars(value), **fields})


# what the host of m says -> whether a place is looked for, and what is said
STAYS: Dict[str, Tuple[Dict[str, Any], Sequence[str], bool, str]] = {
    "answers": ({}, (), True, ""),
    "silent": ({"problem": "no route", "free": 0}, (), False, "b, which does not answer"),
    "silent, and gone": ({"problem": "no route", "free": 0}, ("b",), True, ""),
    "docker is silent": ({"problem": "no docker"}, (), False, "b, whose docker does not answer"),
    "docker is silent, drained": ({"problem": "no docker", "drained": True}, (), True, ""),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_copy_stays_where_nothing_can_be_changed(
    name: str, site: PlayedSite, planned: Planned
) -> None:
    """The others are placed. A host that left the models file is none."""
    fields, gone, moves, said = STAYS[name]
    write_record(site.deploy, SiteRecord(places={"m": ("left", "a", "b", "c")}))
    site.facts["b"] = site.fact("b", **fields)
    planned.run("m", "m.2", replicas=2, gone=gone)
    assert planned.wished == (["m", "m.2"] if moves else ["m.2"])
    assert bool(said) == any(f"m stays on {said}" in line for line in site.said)


def test_a_copy_stays_only_by_what_was_said_of_its_own_hosts(
    site: PlayedSite, planned: Planned
) -> None:
    write_record(site.deploy, SiteRecord(places={"m": ("a",)}))
    site.facts["b"] = site.fact("b", problem="no route", free=0)
    planned.run("m")
    assert planned.wished == ["m"]


def test_a_model_that_cannot_be_read_is_told_and_the_others_are_placed(
    site: PlayedSite, planned: Planned
) -> None:
    run = planned.run("m-9", "m")
    assert planned.wished == ["m"] and "error: m-9 is damaged" in site.said
    assert run.told() == Exit.INTEGRITY


def test_what_is_wished_for_is_a_copy_of_a_model(site: PlayedSite, planned: Planned) -> None:
    """On its host's own network, by a plan that is only shown yet."""
    run = planned.run("m", "m.2", "m.3", replicas=2, standby=1)
    wishes = [(one.request.name, one.model, one.standby) for one in planned.wishes]
    assert wishes == [("m", "m", False), ("m.2", "m", False), ("m.3", "m", True)]
    for wish in planned.wishes:
        assert (wish.request.network, wish.request.purpose) == ("", Purpose.SHOW)
    assert run.models == dict.fromkeys(planned.wished, "m")
    assert run.folders == {name: f"{name}-folder" for name in planned.wished}
    assert planned.decided == [["request", "left", None]]


def test_what_is_placed_is_to_be_done(site: PlayedSite, planned: Planned) -> None:
    site.facts["b"] = site.fact("b", offer=Host(images=(IMAGE,)))
    placed = Placed(("b",), (plan_of("m", "x"),))
    planned.placement = Placement({"m": placed}, {}, surplus=(("c", "old"),))
    run = planned.run("m")
    [step] = run.work.begin
    assert (step.name, step.head, run.work.end) == ("m", "b", (("c", "old"),))
    assert step.plans["b"].model_dir == "/data/b/models/huggingface/m-folder"
    assert run.placement is planned.placement


def test_every_host_whose_docker_is_silent_is_told(site: PlayedSite) -> None:
    """One that is silent as a whole is told by the inventory."""
    site.facts["a"] = site.fact("a", problem="no route", free=0)
    site.facts["c"] = site.fact("c", problem="docker is down", next_step="systemctl start docker")
    run = site.everywhere(Work())
    [(name, error)] = run.failures
    assert (name, error.what) == ("c", "c: docker is down")
    assert error.next_step == "on c: systemctl start docker; then run the same command again"


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
    assert site.text.endswith("\n\nnote  n finds no place:\nstart m-1")
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


# -- the gateways before them


class PlayedGateways:
    """The gateway of this host and those of others: what they were put before, and were told."""

    def __init__(self, site: PlayedSite, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.log: List[Any] = []
        self.put: List[Dict[str, Any]] = []
        self.not_sent: Dict[str, Any] = {}
        self.not_ended: Dict[str, Any] = {}
        self.tables: Dict[str, Any] = {"gateway": {"host": "10.0.0.9"}, "host": []}
        patched: Dict[str, Any] = {
            "read_certificate": lambda cert, key: f"PEM {cert} {key}",
            "find_image": lambda name: f"image {name}",
            "require_network": lambda: self.log.append("network"),
            "put_gateway": self.put_gateway,
            "keepalived_files": self.keepalived_files,
            "send_now": self.send_now,
            "send_sets": self.send_sets,
            "end_gateways": self.end_gateways,
        }
        for name, value in patched.items():
            monkeypatch.setattr(f"hfship.commands.serve_hosts.{name}", value)

    def put_gateway(
        self, _: Any, settings: Any, image: str, certificate: str, models: Any, keys: Any
    ) -> None:
        addresses = {one.name: one.address for model in models for one in model.replicas}
        names = [model.names for model in models]
        found = {"image": image, "certificate": certificate, "addresses": addresses, "names": names}
        self.put.append(found)
        assert settings.host == "10.0.0.9" and set(keys) == set(self.site.record.keys)

    def keepalived_files(self, settings: Any, hosts: Any, facts: Any, deploy: Path) -> Any:
        assert (facts, deploy) == (self.site.facts, self.site.deploy)
        return {name: {"keepalived.conf": f"of {name}"} for name in ["", *(h.name for h in hosts)]}

    def send_now(self, deploy: Path, hosts: Any, files: Any, wanted: Any) -> Dict[str, Any]:
        names = [one.name for one in hosts]
        assert set(files) == {"", *names} and deploy == self.site.deploy
        self.log.append(("sent", names, [one.name for one in wanted.models]))
        assert wanted.upstream == self.site.record.keys and wanted.certificate == "PEM c.pem k.pem"
        return self.not_sent

    def send_sets(self, hosts: Any, wanted: Any, files: Any) -> Dict[str, Any]:
        replicas = [one.name for model in wanted.models for one in model.replicas]
        self.log.append(("told", [one.name for one in hosts], replicas))
        assert set(files) == {"", *(one.name for one in hosts)}
        return {}

    def end_gateways(self, hosts: Any) -> Dict[str, Any]:
        names = [one.name for one in hosts]
        if names:
            self.log.append(("ended", names))
        return {name: self.not_ended[name] for name in names if name in self.not_ended}

    def roles(self, *names: str) -> None:
        """Have these hosts named as gateways."""
        self.tables["host"] = [{"name": name, "roles": ["gateway"]} for name in names]

    def run(self, work: Work, copies: int = 1) -> Everywhere:
        """A run with [gateway] in the models file."""
        listed = ListedModel(name="m", repo="org/m", copies={"replicas": copies})
        made = self.site.everywhere(work)
        made.context = replaced(
            made.context,
            file=ModelsFile(Path("/models.toml"), {}, (listed,), listed, tables=self.tables),
        )
        return made


@pytest.fixture
def gateways(site: PlayedSite, monkeypatch: pytest.MonkeyPatch) -> PlayedGateways:
    made = PlayedGateways(site, monkeypatch)
    made.tables["gateway"] = {
        "host": "10.0.0.9",
        "image": "haproxy:3",
        "tls_cert": "c.pem",
        "tls_key": "k.pem",
    }
    monkeypatch.setattr(
        "hfship.commands.serve_hosts.read_certificate",
        lambda cert, key: f"PEM {Path(cert).name} {Path(key).name}",
    )
    return made


def test_a_gateway_is_put_before_what_runs_and_again_when_all_is_done(
    site: PlayedSite, gateways: PlayedGateways
) -> None:
    assert gateways.run(Work(begin=(step("m", "a"),))).serve() == Exit.OK
    put = {
        "image": "image haproxy:3",
        "certificate": "PEM c.pem k.pem",
        "addresses": {"m": "10.0.0.a:8000"},
        "names": [()],
    }
    assert gateways.put == [put, put] and gateways.log == ["network"]
    assert site.said[-1].endswith("\nthe gateway is at https://10.0.0.9:8443/v1")


def test_without_a_gateway_none_is_put(site: PlayedSite, gateways: PlayedGateways) -> None:
    del gateways.tables["gateway"]
    assert gateways.run(Work(begin=(step("m", "a"),))).serve() == Exit.OK
    assert gateways.put == gateways.log == [] and "the gateway" not in site.said[-1]


def test_a_gateway_knows_copies_that_run_also_where_nobody_answers(
    site: PlayedSite, gateways: PlayedGateways
) -> None:
    """m is on a host that is silent, m.2 is started, m.3 runs on a host that tells its plan; m.4 was
    never served, and where m.5 is reached nobody remembers."""
    replicas = (Replica("m", "x:1"), Replica("m.2", "x:2"))
    models = (GatewayModel("m", ("m", "org/m", "chat"), replicas),)
    folder = site.deploy / "_gateway"
    folder.mkdir(mode=0o700)
    (folder / "gateway.json").write_text(gateway_text(Gateway(models, (3, 4))))
    site.facts["b"] = site.fact("b", plans=(plan_of("m.3", "b"), plan_of("m.5", "b")))
    known = {name: f"{name}:1" for name in ("m", "m.3")}
    write_record(site.deploy, SiteRecord(addresses=known))
    assert gateways.run(Work(begin=(step("m.2", "a"),)), copies=5).serve() == Exit.OK
    assert gateways.put[0]["addresses"] == {**known, "m.2": "10.0.0.a:8000"}
    assert gateways.put[0]["names"] == [("m", "org/m", "chat")], "as clients call it until now"


def test_the_gateways_of_other_hosts_are_sent_the_same(
    site: PlayedSite, gateways: PlayedGateways
) -> None:
    """One that failed is not asked now; one whose role is gone is ended."""
    gateways.roles("a", "b")
    write_record(site.deploy, SiteRecord(gateways=("b", "c")))
    site.failures["b"] = NetworkError("b does not answer", "", "")
    run = gateways.run(Work(begin=(step("m", "a"),)))
    assert run.serve() == Exit.INCOMPLETE
    sent = ("sent", ["a"], ["m"])
    assert gateways.log == ["network", ("ended", ["c"]), sent, sent]
    assert site.record.gateways == ("a", "b") and run.gateways == ["a"]
    assert set(read_untold(site.deploy)) == {"a", "b"}, "until they know"
    own = site.deploy / "_gateway/keepalived.conf"
    assert own.read_text() == "of " and own.stat().st_mode & 0o777 == 0o644
    assert "c: its gateway was stopped, and its keys were removed" in site.said


def test_a_gateway_that_does_not_end_stays_known(
    site: PlayedSite, gateways: PlayedGateways
) -> None:
    write_record(site.deploy, SiteRecord(gateways=("a", "b")))
    note_untold(site.deploy, ["a", "b"], ["bob"])
    gateways.not_ended["b"] = HostError("b: docker is stuck", "", "")
    run = gateways.run(Work())
    run._end_gateways([])
    assert site.record.gateways == ("b",) and read_untold(site.deploy) == {"b": ("bob",)}
    assert run.failures == [("b", gateways.not_ended["b"])]
    assert [line for line in site.said if line.startswith("error")] == ["error: b: docker is stuck"]
    assert "a: its gateway was stopped, and its keys were removed" in site.said


def test_a_gateway_that_is_not_reached_fails_the_run(
    site: PlayedSite, gateways: PlayedGateways
) -> None:
    gateways.roles("a", "c")
    gateways.not_sent["c"] = HostError("c: no image of HAProxy", "", "")
    assert gateways.run(Work(begin=(step("m", "a"),))).serve() == Exit.HOST
    assert "error: c: no image of HAProxy" in site.said
    assert gateways.log[-1] == ("sent", ["a"], ["m"]), "the second time without it"


def test_every_gateway_lets_go_of_a_copy_that_changes(
    site: PlayedSite, gateways: PlayedGateways
) -> None:
    replicas = (Replica("m", "x:1"), Replica("m.2", "x:2"))
    kept = GatewaySet(GatewaySettings(), (GatewayModel("m", ("m",), replicas),), ())
    keep_set(site.deploy, kept)
    run = gateways.run(Work())
    run.gateways, run.files = ["a", "c"], {name: {} for name in ("", "a", "c")}
    with run._let_go("m"):
        assert gateways.log == [("told", ["a", "c"], ["m.2"])]
        assert site.let_go == ["m lets go"]
    assert gateways.log[1:] == [("told", ["a", "c"], ["m", "m.2"])]
    assert site.let_go == ["m lets go", "m is back", "m is up"]


# -- one run


@pytest.mark.parametrize("plan", [True, False])
def test_hosts_are_leased_while_something_is_done(
    plan: bool, site: PlayedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: List[str] = []

    @contextlib.contextmanager
    def leased(hosts: Sequence[PlayedHost], lost: Any) -> Iterator[None]:
        log.append("leased " + " ".join(one.name for one in hosts))
        lost("c")
        yield
        log.append("given back")

    def take_inventory(hosts: Sequence[PlayedHost]) -> Inventory:
        log.append("asked " + " ".join(one.name for one in hosts))
        return Inventory(site.facts, {})

    def plan_runs(run: Everywhere, runs: Any) -> None:
        log.append(f"planned {list(runs)}, gone {run.gone}")
        run.work = Work(keep=(step("m", "a"),))
        run.folders["m"] = run.models["m"] = "m"

    monkeypatch.setattr("hfship.commands.serve_hosts.leased", leased)
    monkeypatch.setattr("hfship.commands.serve_hosts.take_inventory", take_inventory)
    monkeypatch.setattr(Everywhere, "plan", plan_runs)
    context = site.context(plan=plan)
    hosts = [{"name": name, "data": f"/data/{name}"} for name in NAMES]
    file = ModelsFile(Path("/models.toml"), {}, (LISTED,), LISTED, tables={"host": hosts})
    code = serve_hosts.serve_on_hosts(replaced(context, file=file), {"m": context}, ["b"])
    asked = ["asked a b c", "planned ['m'], gone ['b']"]
    if plan:
        assert (code, log) == (Exit.OK, asked)
        assert [row["state"] for row in site.rows] == ["planned"]
    else:
        assert log == ["leased a b c", *asked, "given back"]
        assert code == Exit.HOST and "c was taken by another control host" in site.said[-1]
        assert [row.get("state") for row in site.rows] == ["healthy", None]


def test_a_plan_for_gpus_that_are_assumed_asks_nobody(
    site: PlayedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: List[Any] = []
    monkeypatch.setattr(Everywhere, "plan", lambda run, _: found.append(run.inventory.facts))
    monkeypatch.setattr("hfship.commands.serve_hosts.take_inventory", lambda _: 1 // 0)
    file = ModelsFile(Path("/m"), {}, (LISTED,), LISTED, tables={"host": [{"name": "a"}]})
    context = replaced(site.context(plan=True, assume_gpus="2xH100"), file=file)
    assert serve_hosts.serve_on_hosts(context, {}) == Exit.OK
    [facts] = found
    assert list(facts) == ["a"] and facts["a"].name == "a" and len(facts["a"].offer.gpus) == 2


def test_what_is_wrong_with_a_host_is_said_with_its_next_step(site: PlayedSite) -> None:
    site.failures["a"] = NetworkError("no route", "to a", "ssh a\nping a")
    site.failures["b"] = HostError("b is odd", "", "")
    site.failures["c"] = HostError("cannot read it", "", "")
    site.everywhere(Work())
    assert site.said == [
        "warning: a: no route: to a\n  next  ssh a\n        ping a",
        "warning: b is odd",
        "warning: c: cannot read it",
    ]


def test_what_hosts_say_is_told_under_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    said: List[str] = []
    reporter: Any = SimpleNamespace(info=said.append)
    [far] = serve_hosts.far_hosts([SiteHost("a")], reporter)
    far._say("12:00:00Z loading")
    far._say("  next  hfship logs m")
    assert (far.name, said) == ("a", ["a: loading"])


def test_a_placed_copy_says_where_it_is() -> None:
    plans = {"b": replaced(plan_of("m", "b"), gpus=("GPU-1", "GPU-2")), "a": plan_of("m", "a")}
    assert serve_hosts.placed_row(Step("m", plans)) == {
        "schema": "hfship-placed/1",
        "name": "m",
        "hosts": ["b", "a"],
        "address": "10.0.0.b:8000",
        "gpus": ["GPU-1", "GPU-2"],
    }
