# SPDX-License-Identifier: Apache-2.0
"""What docker and HAProxy are told when files of a gateway change, on a docker that notes it; the
real ones are in test_gateway_run.py."""

from __future__ import annotations

import json
import os
import ssl
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Sequence

import pytest

from hfship.base.errors import HostError, UsageError
from hfship.site import gateway_run
from hfship.site.admin import GatewayDownError
from hfship.site.gateway_files import GatewayFiles
from hfship.site.gateway_run import Applied, HaproxyImage, apply_files, check_files, find_image

FILES = GatewayFiles(
    {"haproxy.cfg": "config", "docker-compose.yml": "compose"},
    {"maps/keys.map": "5e alice\n"},
    "gen2",
)
MAPS = {"keys": {"5e": "alice"}}


class Docker:
    """A docker with a container of the gateway, or none; and the HAProxy in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.container = "id1 running"
        self.after = "id1 running"  # once it was started
        self.generations = ["gen2"]
        self.told: List[str] = []
        self.refuses = ""
        self.now = 0.0

    def __call__(self, words: Sequence[str], about: str, timeout_s: float = 0) -> str:
        line = " ".join(words).replace(str(self.folder), "F")
        if words[:2] == ["container", "inspect"]:
            if not self.container:
                raise HostError("no such container", "", "")
            return self.container
        self.told.append(line)
        if self.refuses and self.refuses in line:
            raise HostError("refused", "", "")
        if "up" in words:
            self.container = self.after
        return ""

    def generation(self, folder: Path) -> str:
        found = self.generations.pop(0) if len(self.generations) > 1 else self.generations[0]
        if not found:
            raise GatewayDownError("down", "", "")
        return found

    def sleep(self, seconds: float) -> None:
        self.now += seconds


UP = "compose -p hfship_gateway -f F/docker-compose.yml up -d"
RELOAD = "kill --signal USR2 hfship_gateway"


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Docker(tmp_path / "g")
    made.folder.mkdir(mode=0o700)
    patched: Dict[str, Any] = {
        "docker": made,
        "generation": made.generation,
        "replace_maps": lambda _, maps: made.told.append(f"maps {sorted(maps)}"),
        "program_lines": lambda argv: iter(["{json", "[NOTICE] n", f"[ALERT] {argv[-1]}"]),
        "time": SimpleNamespace(monotonic=lambda: made.now, sleep=made.sleep),
    }
    for name, value in patched.items():
        monkeypatch.setattr(f"hfship.site.gateway_run.{name}", value)
    return made


@pytest.mark.parametrize(
    ("before", "after", "generations", "same_files", "applied", "told"),
    [
        ("id1 running", "id1 running", ["gen2"], True, Applied.NOTHING, [UP]),
        ("id1 running", "id1 running", ["gen2"], False, Applied.KEYS, [UP, "maps ['keys']"]),
        (
            "id1 running",
            "id1 running",
            ["gen1", "gen1", "gen2"],
            True,
            Applied.RELOAD,
            [UP, RELOAD],
        ),
        ("id1 running", "id2 running", ["gen2"], True, Applied.START, [UP]),
        ("", "id1 running", ["", "", "gen2"], True, Applied.START, [UP]),
        ("id1 exited", "id1 running", ["", "gen2"], True, Applied.START, [UP]),
    ],
)
def test_no_more_is_done_than_has_to_be(
    before: str,
    after: str,
    generations: List[str],
    same_files: bool,
    applied: Applied,
    told: List[str],
    docker: Any,
) -> None:
    if same_files:
        docker.generations = ["gen2"]
        apply_files(docker.folder, FILES, MAPS)
        docker.told.clear()
    docker.container, docker.after, docker.generations = before, after, generations
    assert apply_files(docker.folder, FILES, MAPS) is applied
    assert docker.told == told
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in docker.folder.rglob("*")
        if path.is_file()
    }
    assert modes == {"haproxy.cfg": 0o644, "docker-compose.yml": 0o644, "keys.map": 0o600}
    assert stat.S_IMODE((docker.folder / "run").stat().st_mode) == 0o700


def test_files_that_cannot_be_run_by_go_back(docker: Any) -> None:
    apply_files(docker.folder, FILES, MAPS)
    later = GatewayFiles({"haproxy.cfg": "other"}, {"maps/keys.map": "6f bob\n"}, "gen3")
    docker.refuses = "up -d"
    with pytest.raises(HostError):
        apply_files(docker.folder, later, MAPS)
    assert (docker.folder / "haproxy.cfg").read_text() == "config"
    assert (docker.folder / "maps/keys.map").read_text() == "5e alice\n"
    assert stat.S_IMODE((docker.folder / "maps/keys.map").stat().st_mode) == 0o600


def test_a_configuration_that_is_never_taken_is_told_with_the_log(docker: Any) -> None:
    docker.generations = ["gen1"]
    with pytest.raises(HostError, match="does not take its configuration") as caught:
        apply_files(docker.folder, FILES, MAPS)
    assert caught.value.why == "[ALERT] hfship_gateway"
    assert gateway_run.READY_S < docker.now < gateway_run.READY_S + 1


@pytest.mark.parametrize("there", [True, False])
def test_the_network_of_the_site_is_made_once(there: bool, docker: Any) -> None:
    docker.refuses = "" if there else "inspect"
    gateway_run.require_network()
    made = [] if there else ["network create --internal hfship"]
    assert docker.told == ["network inspect hfship", *made]


@pytest.mark.parametrize("code", [0, 1])
def test_files_are_checked_before_they_count(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: List[str], timeout_s: float) -> Any:
        runs.append(argv)
        for one in (tmp_path / "g/next").rglob("*.*"):
            seen[one.name] = one.read_text()
            assert stat.S_IMODE(one.stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "g").stat().st_mode) & 0o007 == 0
        return SimpleNamespace(code=code, err="[NOTICE] n\n[ALERT] bad\n", out="")

    runs: List[List[str]] = []
    seen: Dict[str, str] = {}
    monkeypatch.setattr("hfship.site.gateway_run.run_program", run)
    if code:
        with pytest.raises(HostError) as caught:
            check_files(tmp_path / "g", FILES, "haproxy:3.2")
        assert caught.value.why == "[ALERT] bad"
    else:
        check_files(tmp_path / "g", FILES, "haproxy:3.2")
    assert seen == {"haproxy.cfg": "config", "keys.map": "5e alice\n"}
    assert not (tmp_path / "g/next").exists()
    (argv,) = runs
    mount = f"type=bind,source={tmp_path / 'g/next'},target=/gateway,readonly"
    said = " ".join(argv)
    user = f"{os.geteuid()}:{os.getegid()}"
    assert said.startswith(f"docker run --rm --network none --pull never --user {user} --mount")
    assert f"--mount {mount} --entrypoint haproxy haproxy:3.2 -c -f /gateway/haproxy.cfg" in said


LISTED = [("haproxy", "2.8"), ("x/haproxy-alpine", "3.4"), ("nginx", "9"), ("haproxy", "<none>")]


@pytest.mark.parametrize(
    ("wanted", "images", "says", "found"),
    [
        ("", LISTED, "HAProxy version 3.4.7", HaproxyImage("x/haproxy-alpine:3.4", (3, 4))),
        ("my:1", [], "HAProxy version 2.6.1", HaproxyImage("my:1", (2, 6))),
        ("", [("nginx", "9")], "", "docker has no image of HAProxy, which the gateway is"),
        ("my:1", [], "HAProxy version 2.5.9", "my:1 is too old for the gateway"),
        ("my:1", [], "nginx", "this is not an image of HAProxy"),
    ],
)
def test_the_image_of_the_gateway(
    wanted: str, images: Any, says: str, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def docker(words: List[str], about: str) -> str:
        if words[0] == "image":
            rows = [{"Repository": name, "Tag": tag} for name, tag in images]
            return "\n".join(["warning", *map(json.dumps, rows)])
        assert words[-2:] == [wanted or "x/haproxy-alpine:3.4", "-v"]
        return says

    monkeypatch.setattr("hfship.site.gateway_run.docker", docker)
    if isinstance(found, HaproxyImage):
        assert find_image(wanted) == found
        assert bool(gateway_run.image_warning(found)) is (found.version < (3, 4))
    else:
        with pytest.raises(HostError, match=found):
            find_image(wanted)


@pytest.mark.parametrize(
    ("key", "days", "error", "text"),
    [
        ("", 5.0, None, "CERT\n\n"),
        ("k", 0.5, None, "CERT\nKEY\n"),
        ("k", None, None, "CERT\nKEY\n"),
        ("k", 0.0, None, UsageError),
        ("k", -3.0, None, UsageError),
        ("k", 5.0, ssl.SSLError("key values mismatch"), UsageError),
        ("k", 5.0, ValueError("its path has a NUL"), UsageError),
    ],
)
def test_a_certificate_that_no_client_would_take_is_refused(
    key: str, days: Any, error: Any, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tls:
        def __init__(self, _: Any) -> None:
            pass

        def load_cert_chain(self, cert: str, key: Any, password: str) -> None:
            loaded.append((Path(cert).name, key and Path(key).name, password))
            if error:
                raise error

    loaded: List[Any] = []
    (tmp_path / "c").write_text("CERT\n\n")
    (tmp_path / "k").write_text("KEY\n")
    monkeypatch.setattr(ssl, "SSLContext", Tls)
    monkeypatch.setattr("hfship.site.gateway_run.days_left", lambda _: days)
    path = str(tmp_path / key) if key else ""
    if text is UsageError:
        with pytest.raises(UsageError) as caught:
            gateway_run.read_certificate(str(tmp_path / "c"), path)
        assert error or f"it ended {-days:.0f} days ago" in caught.value.why
    else:
        assert gateway_run.read_certificate(str(tmp_path / "c"), path) == text
    assert loaded == [("c", key or None, "")]
    assert gateway_run.read_certificate("", "") == ""


def test_days_are_those_that_openssl_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = SimpleNamespace(out="notAfter=Jan  2 00:00:00 2030 GMT\n")
    day_before = float(ssl.cert_time_to_seconds("Jan  1 00:00:00 2030 GMT"))
    monkeypatch.setattr("hfship.site.gateway_run.run_program", lambda *_, **__: ends)
    monkeypatch.setattr("hfship.site.gateway_run.time.time", lambda: day_before)
    assert gateway_run.days_left("c") == 1.0
    ends.out = "no certificate"
    assert gateway_run.days_left("c") is None


@pytest.mark.parametrize("since", ["", "2026-01-31T04:05:06Z"])
def test_the_access_log_is_read_from_a_time_on(since: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.site.gateway_run.program_lines", iter)
    words = ["--since", since] if since else []
    expected = ["docker", "logs", "--timestamps", *words, "hfship_gateway"]
    assert list(gateway_run.access_log(since)) == expected
