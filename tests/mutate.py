#!/usr/bin/env python3
"""What the tests would miss: small faults, put into the rooms one at a time.

    make mutate [N=100] [SEED=0] [ROOM="archive/verify.py hub/ranges.py"]

A line is drawn at random, then one of the faults that it can have (support/mutants.py), and the
tests that call its function run on it: which these are, and what each takes, is measured once for
each test file of the drawn rooms, by a run of it (support/judging.py, traced.py), and kept in
build/mutate/; for rooms all over that takes at first as long as the suite. Tests of real components (`alone`, `real`, `slow`) judge nothing.

The quick tests come first, until those that are left would take more processor time than --budget:
which tests judge a mutant does not depend on what else the machine does. The first that fails
decides, if it passes without the fault; one that took long, or hung, must fail a second time, too. A
test that fails without a fault judges nothing; it is named. A mutant that no test could judge is
shown as such, and noticed by none. No fault is put into texts for people, and none into the plain
numbers of a module: these are tuned, not right.

Each worker has a copy of the checkout, in which dist/hfship.pyz only runs the source: so programs
that tests start are faulty, also where the suite runs the built pyz; tests that look into that file
fail without a fault and judge nothing. What was judged is kept in build/mutate/judged-SEED.json: the same call goes on there, with --again also with
the survivors, and a survivor is shown as a patch at the end.

mutmut (3.8) does not fit: it picks the mutant by an environment variable, which programs under test
do not inherit here, and mutants import mutmut, which raises in their folders. Nor does cosmic-ray
(8.7): it edits the checkout in place, knows one test command for all modules, draws no sample, and
neither removes statements nor changes what is returned.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import (
    Any,
    Dict,
    FrozenSet,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from support.mutants import SOURCE, Mutant, diff_of, draw

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "mutate"
TRACED = ROOT / "tests" / "support" / "traced.py"

# Test files of the rooms, beside tests/test_ROOM.py and tests/test_FLOOR_ROOM.py.
TESTS: Dict[str, str] = {
    "base/safetensors": "facts",
    "ops/hostlease": "reach",
    "site/gatewayset": "keepalived",
    "commands/gateway_hosts": "keepalived",
    "site/everywhere": "site_hosts",
    "site/record": "site_hosts",
    "commands/serve_hosts": "site_hosts",
    "commands/drain": "site_hosts",
    "ops/inventory": "reach site_hosts",
    "ops/bring": "site_hosts",
    "commands/hosts_carry": "site_hosts",
    "base/weights": "facts select wholeness",
    "base/content": "manifest layout",
    "base/eventlog": "report jobs",
    "base/modelsfile": "models",
    "base/card": "code_files",
    "base/pickles": "checkpoints",
    "base/network": "fetch mirror hub_client",
    "base/output": "report",
    "base/progress": "report fetch",
    "base/pyz": "completion pyz",
    "base/redaction": "report",
    "base/runstate": "report jobs",
    "base/text": "report plan golden",
    "serve/in_image": "preflight",
    "ops/page": "mirror_page site_page",
    "ops/doctor_gateway": "doctor_site",
    "serve/xid": "metrics",
    "commands/guard": "silence gateway_run",
    "site/readings": "overview site_page",
    "commands/serve_host": "spread",
    "commands/serve_check": "preflight",
    "base/colours": "report",
    "ops/stock": "listing",
    "base/listeners": "doctor_site",
    "serve/holders": "doctor_site",
    "commands/candidates": "completion",
    "commands/completion_scripts": "completion",
    "commands/known_names": "completion",
    "commands/status_formats": "metrics",
    "ops/joblog": "job_history jobs",
    "commands/clean_jobs": "job_history",
    "commands/installing": "service",
    "base/imagefacts": "registry",
    "hub/image": "registry",
    "commands/clean_images": "images",
    "commands/clean_kept": "update",
    "commands/image_details": "registry",
    "hub/modelpack": "registry_push model_layers",
    "ops/model_forms": "registry_push",
    "commands/push_registry": "registry_push",
    "commands/bundles": "bundle",
    "commands/serve_bundle": "bundle",
    "archive/kept": "update",
    "commands/restore": "signatures approval code_files",
    "commands/rollback": "update serve serve_bundle",
    "archive/layer_tars": "model_layers",
    "commands/fetch_layers": "model_layers",
    "ops/sync_plan": "sync",
    "ops/far_side": "sync",
    "commands/unpacking": "unpack update",
    "serve/engines": "images",
    "serve/image_load": "images",
    "commands/unpack_image": "images",
    "hub/registry_login": "registry",
    "hub/registry_protocol": "registry",
    "commands/fetch_image": "registry",
    "commands/fetching": "fetch registry",
    "commands/registries": "registry",
    "site/admin": "keys gateway",
    "site/gateway_files": "gateway_run",
    "site/rules": "monitoring",
    "site/timers": "monitoring",
    "commands/site": "overview",
    "commands/swap": "gateway_run",
    "site/dashboards": "monitoring",
    "site/monitoring_run": "monitoring",
    "commands/export": "monitoring",
    "site/rolling": "gateway_run",
    "commands/serve_site": "gateway_run",
    "site/store": "keys",
    "commands/key": "keys",
    "site/maps": "gateway keys",
    "site/settings": "sitekeys",
    "site/hosts": "hosts",
    "commands/export_kubernetes": "kubernetes",
    "site/spread": "places spread",
    "site/groups": "nodes places",
    "commands/hostkeys": "hosts",
    "site/facts": "reach site_hosts",
    "site/terms": "gateway",
    "commands/repairing": "watchdog serve",
    "serve/stop": "serve",
    "hub/aria2": "fetch",
    "hub/cache": "wholeness",
    "hub/client": "fetch",
    "hub/connections": "fetch",
    "hub/download": "fetch",
    "hub/download_state": "fetch",
    "hub/gate": "hub_client fetch",
    "hub/partial": "fetch",
    "hub/protocol": "hub_client fetch mirror",
    "hub/answers": "hub_client proxy_hubs",
    "hub/reader": "fetch",
    "hub/repair": "fetch",
    "hub/retry": "hub_client fetch",
    "hub/select": "select fetch",
    "hub/session": "hub_client proxy_hubs",
    "hub/transport": "hub_client fetch",
    "hub/verified": "partial fetch",
    "archive/consumed": "media",
    "commands/approving": "approval",
    "commands/record": "custody",
    "archive/damage": "archive_files",
    "archive/flush": "pack unpack",
    "archive/folder_check": "unpack media",
    "archive/frames": "formats",
    "archive/lanes": "layout schedule",
    "archive/layout": "planes formats",
    "archive/media": "archive_files",
    "archive/opening": "media unpack frames",
    "archive/pack_journal": "pack media",
    "archive/pack_manifest": "wholeness pack",
    "archive/pack_plan": "pack content",
    "archive/pack_run": "pack media workers",
    "archive/pack_schedule": "part_cut media",
    "archive/part_places": "part_cut media",
    "archive/part_writer": "pack media",
    "archive/pipe": "unpack foreign",
    "archive/reader": "media unpack",
    "archive/restore_script": "planes formats",
    "archive/sidecars": "pack pyz",
    "archive/signature": "signatures",
    "archive/stream_check": "unpack media",
    "archive/streams": "foreign unpack",
    "archive/tree": "unpack media",
    "archive/unpack": "media faults",
    "archive/unpack_foreign": "foreign",
    "archive/check": "unpack media workers",
    "archive/recut": "recut",
    "archive/repair": "media unpack",
    "archive/verify": "unpack media",
    "archive/work_folder": "unpack faults",
    "serve/cards": "parallel plan",
    "serve/choices": "parallel",
    "serve/config_values": "facts",
    "serve/deployments": "deploy serve",
    "serve/docker": "status serve",
    "serve/files": "deploy",
    "serve/explain": "parallel",
    "serve/facts": "facts zoo",
    "serve/fit": "plan zoo",
    "serve/gpus": "plan parallel",
    "serve/image_notes": "preflight",
    "serve/images": "plan",
    "serve/layers": "state_cache facts zoo",
    "serve/mistral": "facts",
    "serve/messages": "serve",
    "serve/model_folder": "facts",
    "serve/split_rules": "plan parallel zoo",
    "serve/start": "serve",
    "serve/state_cache": "state_cache zoo",
    "serve/status": "serve",
    "serve/terms": "plan",
    "serve/vllm": "plan",
    "ops/background": "jobs",
    "ops/catalogue": "mirror",
    "ops/http_request": "http",
    "ops/http_server": "http mirror",
    "ops/hub_api": "mirror",
    "ops/certificate": "doctor",
    "ops/doctor_hub": "doctor",
    "ops/keeper": "jobs",
    "ops/probe": "doctor",
    "ops/destination": "push",
    "ops/watch": "jobs",
    "commands/admission": "code_files",
    "commands/policykeys": "policy",
    "commands/context": "models errors",
    "commands/modelskeys": "models",
    "commands/names": "errors models",
    "commands/options": "errors fetch",
    "commands/parser": "errors golden",
    "commands/results": "report golden",
    "commands/run": "errors models",
    "commands/runs": "models",
    "commands/serve": "serve models",
    "commands/serve_model": "serve",
    "commands/serve_options": "serve",
    "commands/serve_results": "serve golden",
    "commands/status": "serve",
    "commands/table": "completion errors",
    "commands/verify": "unpack media",
    "commands/version": "golden",
    "commands/watch": "jobs commands_watch",
}

# And of all rooms of a floor; and those that hold all that these make.
FLOOR_TESTS = {
    "commands": ["arguments", "asked", "golden"],
    "serve": ["texts"],
    "site": ["texts"],
    "ops": ["golden"],
}

# Seconds of a clock: for any test, beyond a multiple of what it took; for a whole run beyond that of
# its tests; and for the tests of a file to be mapped. Seconds of a processor: who takes longer may
# have failed by chance; what a test costs besides itself, and its file; and the tests to begin with.
TEST_LIMIT_S, RUN_LIMIT_S, MAP_LIMIT_S = 60, 900, 7200
SLOW_S, TEST_S, FILE_S, FIRST_S = 1.0, 0.02, 0.5, 8.0
TIMES_SLOWER = 20
FILES_AT_ONCE = 3
EVERYWHERE = "not alone and not real and not slow"  # -m: tests that need no real component
# A room that more test files import than these is everybody's: its own alone are its tests.
MOST_IMPORTERS = 10

# Programs of a worker are in namespaces of their own, where that is allowed: nothing outlives its
# mutant, a mutant that signals the wrong process hits none of ours, and two workers can use one
# port. The shell stays: it is the init there, and buries what others leave.
NAMESPACES = ["unshare", "--pid", "--mount", "--net", "--fork", "--kill-child", "--mount-proc"]
NETWORK = "ip link set lo up; ip address add 192.0.2.1/32 dev lo"  # as in tests/conftest.py
INSIDE = ["sh", "-c", f'{NETWORK}; "$0" "$@"; exit $?']


class Outcome(NamedTuple):
    """What the tests made of a mutant."""

    verdict: str  # "killed", "hung", "survived" or "not judged"
    by: str  # the test that noticed, or why none could
    seconds: float = 0.0  # of a clock


NOTICED = ("killed", "hung")
BAD = ("failed", "hung")  # outcomes of tests


# -- the tests of a room


def targets_of(room: str, tests: Sequence[str], source: str) -> List[str]:
    """Arguments of pytest for a room: its examples, files of its name, those of TESTS, the hostile
    input for any of these or for the floor, and files that import the room.

    >>> targets_of("hub/aria2.py", ["tests/test_fetch.py", "tests/test_hub_aria2.py"], "")
    ['tests/test_hub_aria2.py', 'tests/test_fetch.py']
    >>> targets_of("hub/aria2.py", ["tests/test_aria2.py", "tests/fuzz/test_hub.py"], "")
    ['tests/test_aria2.py', 'tests/fuzz/test_hub.py']
    """
    name = room[: -len(".py")]
    floor, _, own = name.rpartition("/")
    names = [own, name.replace("/", "_"), *FLOOR_TESTS.get(floor, []), *TESTS.get(name, "").split()]
    if "def json(self" in source or "def text(self" in source:
        names.append("results")
    files = [f"tests/test_{one}.py" for one in names]
    files += [f"tests/fuzz/test_{one}.py" for one in [*names, floor]]
    examples = [f"{SOURCE}/{room}"] if ">>> " in source else []
    files = [one for one in files if one in tests]
    return list(dict.fromkeys([*examples, *files, *importers_of(name, tests)]))


def importers_of(name: str, tests: Sequence[str]) -> List[str]:
    """Test files that import a room, or patch it; none where that is every second one."""
    dotted = f"hfship.{name.replace('/', '.')}"
    found = [path for path in tests if dotted in rooms_named_in(path)]
    return found if len(found) <= MOST_IMPORTERS else []


@functools.lru_cache(maxsize=None)
def rooms_named_in(path: str) -> FrozenSet[str]:
    """The rooms that a test file names, as hfship.FLOOR.ROOM; none where it is not there."""
    if not (ROOT / path).exists():
        return frozenset()
    return frozenset(re.findall(r"\bhfship(?:\.\w+){1,2}", (ROOT / path).read_text("utf-8")))


# -- which tests call which function


class Test(NamedTuple):
    """A test as it ran without a fault: seconds of a processor and of a clock."""

    name: str
    cpu_s: float
    wall_s: float
    saw: FrozenSet[str]  # "archive/verify.py check_parts"
    shared: Mapping[str, float]  # fixtures that others of its file use, too, and what each takes

    @property
    def file(self) -> str:
        """Where it stands."""
        return self.name.partition("::")[0]

    @property
    def first_s(self) -> float:
        """What it takes as the first of its file, of a processor."""
        return self.cpu_s + sum(self.shared.values())


def function_of(name: str) -> str:
    """A test with all its parameters: where one of them needs what is not here, so do the others.

    >>> function_of("tests/test_a.py::test_b[c-d]")
    'tests/test_a.py::test_b'
    """
    return name.partition("[")[0]


def slowness(seconds: float) -> int:
    """Tests of about the same duration stay together, with their fixtures."""
    return sum(seconds > bound for bound in (0.1, 1, 5))


def tests_for(mutant: Mutant, tests: Sequence[Test], own: Sequence[str]) -> List[Test]:
    """Those that call a function, in the order in which they are to run: the quick ones first, of
    these those of the room, and those that call little else. What stands outside all functions is
    everybody's who calls one of the room; what no test calls, is left to the tests of the room.
    """
    called = f"{mutant.room} {mutant.function}"
    found = [test for test in tests if called in test.saw]
    if not found:
        of_room = f"{mutant.room} "
        found = [test for test in tests if any(one.startswith(of_room) for one in test.saw)]
    if not found:
        found = [test for test in tests if test.file in own]
    return sorted(
        found, key=lambda test: (slowness(test.first_s), test.file not in own, len(test.saw))
    )


def within(tests: Sequence[Test], budget_s: float) -> List[Test]:
    """As many tests as a budget of processor seconds allows, at least one."""
    taken: List[Test] = []
    set_up: Set[Tuple[str, str]] = set()
    for test in tests:
        costs = {"": FILE_S, **test.shared}
        new = [one for one in costs if (test.file, one) not in set_up]
        budget_s -= TEST_S + test.cpu_s + sum(costs[one] for one in new)
        if taken and budget_s < 0:
            break
        taken.append(test)
        set_up.update((test.file, one) for one in new)
    return taken


class Map:
    """What is known of the tests, a file of ours for each file of theirs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, target: str) -> Path:
        return self._folder / (target.replace("/", ".") + ".json")

    def is_known(self, target: str, again: bool) -> bool:
        """Whether a test file was mapped as it is now; with `again` without a failure, too."""
        known = load(self._path(target))
        if known.get("digest") != digest_of(target):
            return False
        bad = [name for name, note in known["tests"].items() if note["outcome"] in BAD]
        return not (again and bad)

    def keep(self, target: str, notes: Dict[str, Any]) -> None:
        """Note what a run of a test file said."""
        text = json.dumps({"digest": digest_of(target), "tests": notes})
        self._path(target).write_text(text)

    def tests(self, targets: Sequence[str]) -> List[Test]:
        """The tests of some files that passed."""
        found = []
        for target in targets:
            for name, note in load(self._path(target)).get("tests", {}).items():
                if note["outcome"] == "passed":
                    saw = frozenset(map(sys.intern, note["saw"]))
                    shared = note.get("shared", {})
                    found.append(Test(name, note["cpu"], note["wall"], saw, shared))
        return found


def digest_of(target: str) -> str:
    """The text of a test file, or of all rooms, whose examples are tests."""
    paths = [ROOT / target] if target.endswith(".py") else sorted((ROOT / target).rglob("*.py"))
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def load(path: Path) -> Dict[str, Any]:
    """What a file of ours holds, where there is one."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


# -- running them


class Run(NamedTuple):
    """A run of pytest."""

    code: Optional[int]  # None: too slow
    said: str
    notes: Dict[str, Dict[str, Any]]

    def failed(self) -> str:
        """The test that failed, of a run that ends there; "" for none."""
        bad = [name for name, note in self.notes.items() if note["outcome"] in BAD]
        return next(iter(bad), "")


class Runner:
    """Copies of the checkout, one for each worker, and the tests that run in them."""

    def __init__(self, folder: Path, workers: int, budget_s: float, traced: bool) -> None:
        self.folder, self._budget_s = folder, budget_s
        self._copies: queue.Queue[Path] = queue.Queue()
        for number in range(workers):
            copy = folder / f"copy{number}"
            copy_checkout(copy)
            stand_in_pyz(copy)
            if traced:
                package = copy / SOURCE / "__init__.py"
                package.write_text(package.read_text("utf-8") + TRACED.read_text("utf-8"))
            self._copies.put(copy)
        works = subprocess.run([*NAMESPACES, *INSIDE, "true"], capture_output=True, check=False)
        self._prefix = [*NAMESPACES, *INSIDE] if works.returncode == 0 else []
        if not self._prefix:
            print(
                "no namespaces here: programs that tests leave behind may disturb others",
                file=sys.stderr,
            )
        self._running: Set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._sound: Dict[str, bool] = {}  # a test that failed: whether it passes without a fault

    def measure(self, targets: Sequence[str]) -> Run:
        """Run test files, and note what each test calls."""
        copy = self._copies.get()
        try:
            seen = copy / ".mutate-seen"
            shutil.rmtree(seen, ignore_errors=True)
            seen.mkdir()
            plan = {"map": True, "limit": RUN_LIMIT_S}
            options = ["-m", EVERYWHERE, *targets]
            return self._pytest(copy, options, plan, MAP_LIMIT_S)
        finally:
            self._copies.put(copy)

    def judge(self, mutant: Mutant, tests: Sequence[Test]) -> Outcome:
        """Run tests on a mutant, until one notices it: the first few, and only if these pass the
        rest, as files that are not read cost nothing."""
        started = time.monotonic()
        chosen = within(tests, self._budget_s)
        first = within(chosen, FIRST_S)
        copy = self._copies.get()
        passed = 0
        verdict, by = "not judged", "no test"
        try:
            for part in filter(None, (first, chosen[len(first) :])):
                verdict, by, count = self._verdict(copy, mutant, part)
                passed += count
                if verdict in NOTICED:
                    break
        finally:
            self._copies.put(copy)
        if verdict == "survived" or (verdict == "not judged" and passed):
            verdict, by = "survived", f"{passed} tests passed of {len(tests)} that call it"
        return Outcome(verdict, by, round(time.monotonic() - started, 1))

    def _verdict(self, copy: Path, mutant: Mutant, tests: Sequence[Test]) -> Tuple[str, str, int]:
        """What some tests say, the reason, and how many of them passed."""
        path = copy / SOURCE / mutant.room
        source = path.read_text("utf-8")
        faulty = mutant.applied(source)
        passed = 0
        while tests:
            run = self._run(copy, path, faulty, tests)
            passed += [note["outcome"] for note in run.notes.values()].count("passed")
            name = run.failed()
            if not name:
                return (*self._end_of(run, copy, path, source, tests), passed)
            place = [test.name for test in tests].index(name)
            if self._is_proof(copy, path, source, faulty, tests[place], run.notes[name]):
                return ("hung" if run.notes[name]["outcome"] == "hung" else "killed"), name, passed
            tests = tests[place + 1 :]
        return ("survived" if passed else "not judged"), "no test", passed

    def _end_of(
        self, run: Run, copy: Path, path: Path, source: str, tests: Sequence[Test]
    ) -> Tuple[str, str]:
        """The verdict of a run in which no test failed."""
        if run.code is None:
            return "not judged", "the run did not end"
        if run.code == 0:
            return "survived", ""
        if self._run(copy, path, source, tests[:1]).code != 0:
            return "not judged", f"pytest ends with {run.code} also without the fault"
        return "killed", run.said.strip().rpartition("\n")[2]  # the tests could not be loaded

    def _is_proof(
        self, copy: Path, path: Path, source: str, faulty: str, test: Test, note: Dict[str, Any]
    ) -> bool:
        """Whether it is the fault that a test fails of: without it it passes, and what may have
        failed by chance fails again.
        """
        by_chance = note["outcome"] == "hung" or max(note["cpu"], test.first_s) > SLOW_S
        if by_chance or test.name not in self._sound:
            without = self._run(copy, path, source, [test]).notes.get(test.name, {})
            self._sound[test.name] = without.get("outcome") == "passed"
        if not self._sound[test.name]:
            print(f"  fails without a fault: {test.name}", flush=True)
            return False
        return not by_chance or self._run(copy, path, faulty, [test]).failed() == test.name

    def _run(self, copy: Path, path: Path, source: str, tests: Sequence[Test]) -> Run:
        """Run tests with a text of a room, until one fails."""
        sound = [test for test in tests if self._sound.get(test.name, True)]
        wanted = {
            test.name: TEST_LIMIT_S + TIMES_SLOWER * test.first_s + 2 * test.wall_s
            for test in sound
        }
        limit_s = RUN_LIMIT_S + sum(wanted.values())
        files = dict.fromkeys(test.file for test in sound)
        before = path.read_text("utf-8")
        try:
            put_room(path, source)
            return self._pytest(copy, ["-x", *files], {"map": False, "wanted": wanted}, limit_s)
        finally:
            put_room(path, before)

    def _pytest(
        self, copy: Path, arguments: Sequence[str], plan: Dict[str, Any], limit_s: float
    ) -> Run:
        """Run pytest in a copy."""
        planned, noted = copy / ".mutate-plan.json", copy / ".mutate-notes.json"
        planned.write_text(json.dumps(plan))
        noted.write_text("{}")
        options = ["-q", "--tb=line", "-p", "no:cacheprovider", "-p", "support.judging"]
        kept = self.folder / copy.name.replace("copy", "tmp")
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        settings = {
            "PYTHONPATH": str(copy / "tests"),
            "TMPDIR": str(kept),
            "MUTATE_PLAN": str(planned),
            "MUTATE_NOTES": str(noted),
            "HFSHIP_TEST_PYZ": "source",  # tests/conftest.py
            "HFSHIP_TEST_FORK": "1",
        }
        pytest = [*self._prefix, sys.executable, "-m", "pytest", "--hypothesis-seed=0"]
        process = subprocess.Popen(
            [*pytest, *options, *arguments],
            cwd=copy,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._running.add(process)
        try:
            if self._stopped:
                raise KeyboardInterrupt
            said, _ = process.communicate(timeout=limit_s)
            return Run(process.returncode, said.decode("utf-8", "replace"), load(noted))
        except subprocess.TimeoutExpired:
            return Run(None, "", load(noted))
        finally:
            end(process)
            self._running.discard(process)

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        self._stopped = True
        for process in list(self._running):
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program with its session (and with its namespaces, where it has some)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def copy_checkout(copy: Path) -> None:
    """What git knows or could know: no builds, environments and caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def stand_in_pyz(copy: Path) -> None:
    """Have something that runs the source where tests ask for the built file."""
    script = str(copy / "hfship.py")
    lines = [
        "import runpy, sys",
        f"sys.argv[0] = {script!r}",
        "runpy.run_path(sys.argv[0], run_name='__main__')",
    ]
    built = copy / "dist" / "hfship.pyz"
    built.parent.mkdir()
    with zipfile.ZipFile(built, "w") as archive:
        archive.writestr("__main__.py", "\n".join(lines) + "\n")


def put_room(path: Path, source: str) -> None:
    """Write a room, and remove its bytecode: a fault may have the size and second of what was."""
    path.write_text(source, "utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


# -- as a program


@contextlib.contextmanager
def running(workers: int, budget_s: float, traced: bool = False) -> Iterator[Runner]:
    """Copies of the checkout that are gone at the end, with all that runs there."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        runner = Runner(Path(folder), workers, budget_s, traced)
        try:
            yield runner
        finally:
            runner.stop()


def make_map(known: Map, targets: Sequence[str], workers: int, again: bool) -> None:
    """Run the test files that are not known as they are now, several at a time, as each run costs
    seconds by itself; those of a run that did not end one by one."""
    missing = [target for target in targets if not known.is_known(target, again)]
    groups = [missing[at : at + FILES_AT_ONCE] for at in range(0, len(missing), FILES_AT_ONCE)]
    if not missing:
        return
    with ThreadPoolExecutor(workers) as pool, running(workers, 0, traced=True) as runner:

        def measure(group: Sequence[str]) -> str:
            run = runner.measure(group)
            if run.code not in (0, 1, 5):
                if len(group) == 1:
                    return f"{group[0]}: pytest ends with {run.code}"
                return "\n".join(measure([target]) for target in group)
            return "\n".join(keep(target, run.notes) for target in group)

        def keep(target: str, notes: Dict[str, Dict[str, Any]]) -> str:
            own = {
                name: note
                for name, note in notes.items()
                if name.startswith((f"{target}::", f"{target}/"))
            }
            known.keep(target, own)
            outcomes = [note["outcome"] for note in own.values()]
            counts = [f"{outcomes.count(one)} {one}" for one in sorted(set(outcomes))]
            cpu_s = sum(note["cpu"] for note in own.values())
            return f"map {target}: {', '.join(counts)}; {cpu_s:.0f} s"

        for number, said in enumerate(pool.map(measure, groups), start=1):
            print(f"{said}\nmapped {number} of {len(groups)}", flush=True)


class Judged:
    """The outcomes of a draw, kept as they come."""

    def __init__(self, path: Path, sources: Dict[str, str]) -> None:
        self._path, self._sources = path, sources
        self._all: Dict[str, Any] = load(path)
        self._lock = threading.Lock()

    def _key(self, mutant: Mutant) -> str:
        room = hashlib.sha256(self._sources[mutant.room].encode()).hexdigest()[:16]
        return f"{room} {mutant.room}:{mutant.line} {mutant.start}-{mutant.stop} {mutant.text}"

    def outcome(self, mutant: Mutant) -> Optional[Outcome]:
        """What is known of a mutant."""
        found = self._all.get(self._key(mutant))
        return Outcome(*found) if found else None

    def keep(self, mutant: Mutant, outcome: Outcome) -> None:
        """Note what became of a mutant. Safe to share."""
        with self._lock:
            self._all[self._key(mutant)] = list(outcome)
            fresh = self._path.with_suffix(".next")
            fresh.write_text(json.dumps(self._all, indent=1))
            fresh.replace(self._path)


def report(outcomes: Dict[Mutant, Outcome], sources: Dict[str, str]) -> None:
    """The survivors as patches, and the totals."""
    for mutant, outcome in outcomes.items():
        if outcome.verdict not in NOTICED:
            print(f"\n{outcome.verdict}: {outcome.by}")
            print(diff_of(mutant, sources[mutant.room]), end="")
    verdicts = [outcome.verdict for outcome in outcomes.values()]
    counts = [f"{verdicts.count(word)} {word}" for word in (*NOTICED, "survived", "not judged")]
    noticed = sum(verdict in NOTICED for verdict in verdicts)
    print(f"\n{len(verdicts)} mutants: {', '.join(counts)}; noticed {noticed}")


def asked_for(arguments: Sequence[str]) -> argparse.Namespace:
    """What is to be done."""
    parser = argparse.ArgumentParser(
        description="put small faults into the rooms, and see what the tests notice"
    )
    parser.add_argument("-n", type=int, default=100, metavar="N", help="mutants (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="another draw (default: 0)")
    parser.add_argument(
        "--room", action="append", metavar="FLOOR/ROOM.py", help="only of these (default: of all)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=60,
        metavar="S",
        help="processor seconds of the tests that judge one mutant (default: 60)",
    )
    parser.add_argument("--workers", type=int, default=2, help="at a time (default: 2)")
    parser.add_argument(
        "--again",
        action="store_true",
        help="judge survivors, and map test files with failures, a second time",
    )
    parser.add_argument(
        "--list", action="store_true", help="show the mutants as patches, run nothing"
    )
    parser.add_argument(
        "--map", action="store_true", help="only measure which tests call which function"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Draw, run, report. Exit code 0 whatever survives: survivors are for people to look at."""
    options = asked_for(arguments)
    rooms = options.room or [
        path.relative_to(ROOT / SOURCE).as_posix() for path in (ROOT / SOURCE).rglob("*.py")
    ]
    sources = {room: (ROOT / SOURCE / room).read_text("utf-8") for room in rooms}
    mutants = draw(sources, options.n, options.seed)
    if options.list:
        for mutant in mutants:
            print(diff_of(mutant, sources[mutant.room]))
        return 0
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    own = {room: targets_of(room, files, sources[room]) for room in {one.room for one in mutants}}
    needed = Counter(target for one in mutants for target in own[one.room] if target in files)
    known = Map(KEPT / "map")
    often_first = [target for target, _ in needed.most_common()]
    make_map(known, [SOURCE.as_posix(), *often_first], options.workers, options.again)
    if options.map:
        return 0
    judged = Judged(KEPT / f"judged-{options.seed}.json", sources)
    done = ("survived",) if options.again else ()
    outcomes = {
        mutant: outcome
        for mutant in mutants
        for outcome in [judged.outcome(mutant)]
        if outcome and outcome.verdict not in (*done, "not judged")
    }
    tests = known.tests([SOURCE.as_posix(), *files])
    left = [mutant for mutant in mutants if mutant not in outcomes]
    with running(options.workers, options.budget) as runner:
        pool = ThreadPoolExecutor(options.workers)

        def judge(mutant: Mutant) -> Outcome:
            outcome = runner.judge(mutant, tests_for(mutant, tests, own[mutant.room]))
            judged.keep(mutant, outcome)
            return outcome

        try:
            for mutant, outcome in zip(left, pool.map(judge, left)):
                outcomes[mutant] = outcome
                place = f"{mutant.room}:{mutant.line}: {mutant.what}"
                head = f"[{len(outcomes)}/{len(mutants)}] {outcome.verdict:10}"
                print(f"{head} {outcome.seconds:5.1f} s  {place}  {outcome.by}", flush=True)
        finally:
            runner.stop()
            pool.shutdown()
    report(outcomes, sources)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
