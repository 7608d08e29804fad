"""doctor: each thing that stops a fetch is named, with its exit code and its way out, within seconds."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from conftest import ROOT, Program, free_port, missing
from hfship.base.report import Reporter
from hfship.commands.run import main
from hfship.ops.probe import Probe
from support import components
from support.hub import FaultHub
from support.network import ConnectProxy, make_certificate


def doctor(
    hfship: Program, *args: Any, code: Optional[int] = 0, **options: Any
) -> Dict[str, Dict[str, Any]]:
    """check -> finding."""
    findings = json.loads(hfship("doctor", "--json", *args, code=code, **options).stdout)
    return {finding["check"]: finding for finding in findings}


@pytest.fixture
def hub(hub: FaultHub, model: Path) -> FaultHub:
    hub.add(model)
    return hub


def test_all_is_well(hub: FaultHub, hfship: Program) -> None:
    hub.faults.token = "hf_right1234"
    env = {"HF_TOKEN": "hf_right1234"}
    found = doctor(hfship, "org/tiny", "--endpoint", hub.url, env=env)
    states = {
        check: found[check]["state"]
        for check in ("proxy", "dns", "hub", "clock", "token", "repository", "speed")
    }
    assert set(states.values()) == {"ok"}
    assert found["speed"]["note"].endswith("from localhost"), "the CDN, not the Hub"
    said = hfship("doctor", "org/tiny", "--endpoint", hub.url, env=env)
    assert "hf_right1234" not in said.stdout + said.stderr and "repository" in said.stdout
    assert not re.search(r"\S {12,}\S", said.stdout), (
        "a text that begins with a number is no number"
    )


# fault -> (settings of the Hub, environment, arguments, exit code, failing check, words)
FAULTS: Dict[str, Any] = {
    "no such host": ({}, {}, ["--endpoint", "http://nowhere.invalid"], 8, "dns", "has no address"),
    "nobody listens": ({}, {}, ["--endpoint", "http://127.0.0.1:{closed}"], 8, "hub", "efused"),
    "dead proxy": (
        {},
        {"HTTP_PROXY": "http://me:secret@127.0.0.1:{closed}"},
        [],
        8,
        "proxy",
        "efused",
    ),
    "login page": ({"html": True}, {}, [], 8, "hub", "does not answer like a Hub"),
    "unavailable": ({"unavailable": 99}, {}, [], 8, "hub", "answered 503"),
    "wrong token": (
        {"token": "hf_right1234"},
        {"HF_TOKEN": "hf_wrong1234"},
        [],
        4,
        "token",
        "refuses the token",
    ),
    "broken token": ({}, {"HF_TOKEN": "two words"}, [], 4, "hub", "not a token"),
    "gated": ({"gated": True}, {}, ["org/tiny"], 4, "repository", "is gated"),
    "no such repository": ({}, {}, ["org/nothing"], 5, "repository", "was not found"),
    "no such revision": ({}, {}, ["org/tiny@v9"], 5, "repository", "no revision"),
    "clock far off": ({"clock_ahead_s": 4000}, {}, [], 9, "clock", "behind"),
    "CDN refuses": ({"expires_s": -10}, {}, ["org/tiny"], 8, "speed", "answered 403"),
    "dead mirror": ({}, {}, ["org/tiny", "--mirror", "http://127.0.0.1:{closed}"], 8, "mirror", ""),
    "no folder": ({}, {"HFSHIP_MODELS_DIR": "/proc/models"}, [], 7, "disk", "cannot write"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stops_a_fetch_is_named(
    fault: str,
    hub: FaultHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faults, env, args, code, check, words = FAULTS[fault]
    for name, value in faults.items():
        setattr(hub.faults, name, value)
    port = str(free_port())
    arguments = ["doctor", "--json", *(arg.replace("{closed}", port) for arg in args)]
    arguments += [] if "--endpoint" in args else ["--endpoint", hub.url]
    monkeypatch.setattr("hfship.ops.doctor.PROGRAMS", ())
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name, value in env.items():
        monkeypatch.setenv(name, value.replace("{closed}", port))
    assert main(arguments) == code
    said = capsys.readouterr()
    failing = [finding for finding in json.loads(said.out) if finding["state"] == "fail"]
    assert failing[0]["check"].split()[0] == check and words in failing[0]["note"], failing
    assert failing[0]["next"] and failing[0]["exit_code"] == code
    assert "secret" not in said.out + said.err


@pytest.mark.parametrize("ahead, state", [(0, "ok"), (200, "warn"), (-200, "warn")])
def test_the_clock(ahead: float, state: str, hub: FaultHub, pyz: Program) -> None:
    hub.faults.clock_ahead_s = ahead
    assert doctor(pyz, "--endpoint", hub.url)["clock"]["state"] == state


def test_mirrors_are_compared(hub: FaultHub, model: Path, pyz: Program, tmp_path: Path) -> None:
    with FaultHub(tmp_path / "same") as same, FaultHub(tmp_path / "other") as other:
        same.add(model)
        changed = shutil.copytree(
            model, tmp_path / "changed", ignore=shutil.ignore_patterns(".hfship")
        )
        (changed / "config.json").write_text("{}")
        other.add(changed)
        args = ["org/tiny", "--endpoint", hub.url, "--mirror", same.url, "--mirror", other.url]
        found = doctor(pyz, *args)
        assert (
            found[f"mirror {same.url}"]["state"] == "ok"
            and "B/s" in found[f"mirror {same.url}"]["note"]
        )
        assert found[f"mirror {other.url}"]["state"] == "warn"
        args[2] = f"http://127.0.0.1:{free_port()}"
        found = doctor(pyz, *args, code=8)
        assert found[f"mirror {same.url}"]["state"] == "ok", (
            "a mirror may be reached when the Hub is not"
        )


snoop = partial(make_certificate, subject="/O=Snoop Ltd/CN=x")


@pytest.mark.parametrize("address", ["", "http://127.0.0.1:{port}", "127.0.0.1:{port}"])
def test_who_signs_is_told(address: str, model: Path, pyz: Program, tmp_path: Path) -> None:
    """Also through a proxy, whose address may lack its scheme."""
    with FaultHub(tmp_path / "hub2", snoop(tmp_path).both) as hub, ConnectProxy() as proxy:
        hub.add(model)
        env = {}
        if address:
            env = {"HTTPS_PROXY": address.format(port=proxy.port), "NO_PROXY": ""}
        found = doctor(pyz, "--endpoint", hub.url, env=env, code=8)
        assert "Snoop Ltd" in found["tls"]["note"] and "SSL_CERT_FILE" in found["tls"]["next"]
        env["SSL_CERT_FILE"] = str(tmp_path / "cert.pem")
        tls = doctor(pyz, "--endpoint", hub.url, env=env)["tls"]
        assert (
            tls["state"] == "warn"
            and "signed by Snoop Ltd" in tls["note"]
            and "opens TLS" in tls["note"]
        )
        assert bool(proxy.asked) == bool(address)


def test_a_certificate_that_ends_soon(model: Path, pyz: Program, tmp_path: Path) -> None:
    with FaultHub(tmp_path / "hub2", snoop(tmp_path, days=2).both) as hub:
        env = {"SSL_CERT_FILE": str(tmp_path / "cert.pem")}
        assert "renew" in doctor(pyz, "--endpoint", hub.url, env=env)["tls"]["next"]
        env = {"SSL_CERT_FILE": str(tmp_path / "nothing")}
        assert (
            "correct SSL_CERT_FILE"
            in doctor(pyz, "--endpoint", hub.url, env=env, code=8)["tls"]["next"]
        )


def test_a_name_server_that_never_answers_costs_seconds(pyz: Program, tmp_path: Path) -> None:
    """A real resolver asks a silent server several times, 5 s each."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        missing("root, unshare and ip")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:30\n")
    silent = (
        "import socket, time; s = socket.socket(2, 2); s.bind(('127.0.0.1', 53)); time.sleep(60)"
    )
    script = f'ip link set lo up; mount --bind {tmp_path}/resolv.conf /etc/resolv.conf; "$1" -c "{silent}" & shift; "$@"; code=$?; kill $!; exit $code'
    argv = [
        "unshare",
        "-n",
        "-m",
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        *pyz.argv,
        "doctor",
        "--json",
    ]
    done = subprocess.run(argv, env=pyz.env(), capture_output=True, text=True, timeout=25)
    assert done.returncode == 8, done.stderr
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert "no answer in" in found["dns"]["note"] and "hub" not in found


OLD = [python for python in components.pythons() if python.version.startswith(("3.8.", "3.9."))]


@pytest.mark.parametrize("python", OLD, ids=lambda python: python.version)
def test_a_python_that_is_too_old_for_the_network_is_said_first(
    python: components.Interpreter, hub: FaultHub, pyz: Program
) -> None:
    old = Program([str(python.path), pyz.argv[-1]], pyz.home)
    found = doctor(old, "--endpoint", hub.url, code=9)
    assert not {"proxy", "dns", "hub"} & found.keys() and found["python"]["state"] == "fail"
    assert "need 3.10" in found["python"]["note"] and "python3" in found["python"]["next"]
    assert doctor(old, "--offline", code=None)["python"]["state"] == "warn"


@pytest.mark.parametrize("args, env", [(["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"})])
def test_the_far_side_leaves_the_network_alone(
    args: List[str], env: Dict[str, str], hfship: Program
) -> None:
    found = doctor(hfship, *args, env=env, code=None)
    assert "dns" not in found and found["python"]["state"] == "ok" and "openssl" in found
    refused = hfship("doctor", "org/tiny", *args, env=env, code=2)
    assert "over the network alone" in refused.stderr


def test_the_far_side_needs_no_tls(tmp_path: Path) -> None:
    """A Python that was built without OpenSSL."""
    program = Program([], tmp_path)
    script = (
        "import sys; sys.modules['_ssl'] = None; sys.path.insert(0, sys.argv.pop(1))\n"
        "from hfship.commands.run import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", script, str(ROOT / "src"), "doctor", "--offline", "--json"]
    done = subprocess.run(argv, env=program.env(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (0, 9), done.stderr
    checks = {found["check"] for found in json.loads(done.stdout)}
    assert {"python", "models", "docker", "openssl"} <= checks


def test_this_machine(pyz: Program, tmp_path: Path) -> None:
    """A limit on file sizes, as FAT has one; and programs that are missing or do not work."""
    (tmp_path / "rsync").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "rsync").chmod(0o755)
    limit = (50 << 20, 50 << 20)
    done = pyz(
        "doctor", "--json", code=None, env={"PATH": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert "files up to 52.4 MB" in found["disk"]["note"] and "--split" in found["disk"]["next"]
    assert found["rsync"]["state"] == "warn" and "ends with 3" in found["rsync"]["note"]
    assert found["zstd"]["state"] == "warn" and "not installed" in found["zstd"]["note"]


def test_a_clock_ticks_while_a_probe_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.base.progress.CLOCK_INTERVAL_S", 0.02)
    err = io.StringIO()
    Probe("x", lambda: str(time.sleep(0.2))).run(Reporter("bar", 0, io.StringIO(), err))
    assert "looking at x 0:00 of at most 0:05" in err.getvalue()


def test_a_probe_that_hangs_is_left_behind() -> None:
    never = threading.Event()
    found = Probe("x", lambda: str(never.wait(60)), 0.05).run(Reporter("none"))
    assert found.state == "fail" and "no answer" in found.text
    never.set()
