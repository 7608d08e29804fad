"""A site from one models file: real Docker, real HAProxy, engines that play vLLM. Set up, changed, killed, restarted."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from conftest import program
from hfship.site.gateway_run import haproxy_images, tag_version
from support import components
from support.inside import Inside, docker_inside, fared
from support.make_model import make_model

pytestmark = [pytest.mark.real, pytest.mark.alone]

SITE = """
[defaults.serve]
device = "cpu"
image = "engine/vllm-openai-cpu:v0.32.0"
[gateway]
host = "127.0.0.1"
port = 8080
{gateway}
[[model]]
name = "big"
standby = 1
serve.aliases = ["chat"{alias}]
[[model]]
name = "small"
replicas = 2
[[model]]
name = "night"
mode = "on-demand"
[[key]]
name = "alice"
models = ["big"]
rate = "{rate}/min"
{more}
"""


class Site:
    """The models file, and what it led to."""

    def __init__(self, inside: Inside, home: Path) -> None:
        self.inside, self.home = inside, home
        self.file = home / "models.toml"
        self.keys: Dict[str, str] = {}
        self.folder = home / "deploy/_gateway"

    def write(self, gateway: str = "", alias: str = "", rate: int = 600, more: str = "") -> None:
        self.file.write_text(SITE.format(gateway=gateway, alias=alias, rate=rate, more=more))

    def serve(self, *names: str, code: int = 0) -> str:
        done = self.inside("serve", "--models", self.file, *names, code=code, timeout=240)
        return str(done.stdout + done.stderr)

    def container(self, name: str) -> str:
        return self.inside.docker("inspect", "-f", "{{.Id}} {{.State.StartedAt}}", name).strip()

    def ask(self, model: str, key: str = "alice", path: str = "/v1/chat/completions") -> Any:
        body = json.dumps({"model": model, "messages": []})
        words = [
            "-H",
            f"Authorization: Bearer {self.keys[key]}",
            "-H",
            "Content-Type: application/json",
        ]
        return json.loads(self.inside.curl(*words, "-d", body, f"http://127.0.0.1:8080{path}"))

    def view(self) -> Any:
        """The site as `status` sees it."""
        return json.loads(self.inside("status", "--site", "--json", code=None).stdout)

    def wait_for(self, replica: int) -> None:
        """Until the gateway sends clients to a replica; it asks docker's DNS every few seconds."""
        for _ in range(40):
            if self.view()["replicas"][replica]["serves"]:
                return
            subprocess.run(["sleep", "0.5"], check=True)
        raise AssertionError(self.view())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    components.require("site-images")
    root = tmp_path_factory.mktemp("site")
    hfship = program("pyz", root / "home")
    for name in ("big", "small", "night"):
        make_model(hfship.home / "site" / name, size_mb=1, shards=1)
    with docker_inside(hfship, root) as inside:
        made = Site(inside, hfship.home)
        made.write()
        made.said = made.serve()  # type: ignore[attr-defined]
        for key in ("alice", "bob"):
            words = ["--models", "big", "--rate", "600/min"] if key == "alice" else []
            made.keys[key] = inside("key", "add", key, *words).stdout.strip()
        yield made


def test_one_file_is_a_whole_site(site: Site) -> None:
    said = site.said  # type: ignore[attr-defined]
    assert "the gateway was started: http://127.0.0.1:8080/v1" in said
    assert "there is no key alice yet: " in said and "key add alice" in said
    running = site.inside.docker("ps", "--format", "{{.Names}}").split()
    assert set(running) == {
        "vllm_big",
        "vllm_big.2",
        "vllm_small",
        "vllm_small.2",
        "hfship_gateway",
    }
    ports = site.inside.docker("ps", "--format", "{{.Names}} {{.Ports}}")
    assert re.findall(r"(\S+) 127\.0\.0\.1:(\d+)->", ports) == [("hfship_gateway", "8080")], (
        "vLLM has no port here"
    )
    assert site.ask("chat")["choices"] and site.ask("small", "bob")["choices"]
    assert site.ask("small")["error"]["code"] == "model_not_found"
    assert site.ask("night", "bob")["error"]["code"] == "model_asleep"
    keys = {
        re.search(r"KEY=(\S+)", (site.home / "deploy" / name / ".env").read_text())[1]
        for name in ("big", "big.2")
    }  # type: ignore[index]
    assert len(keys) == 1


def test_a_second_time_does_nothing(site: Site) -> None:
    names = ("vllm_big", "vllm_big.2", "vllm_small", "vllm_small.2", "hfship_gateway")
    before = [site.container(name) for name in names]
    files = times_of(site.folder)
    said = site.serve()
    assert "the gateway runs as it is" in said and "waiting until" not in said
    assert [site.container(name) for name in names] == before
    assert times_of(site.folder) == files


def times_of(folder: Path) -> Dict[Path, int]:
    """When each file of the gateway was written, but for the count of what keys did."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "usage.json"]
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_plan_says_what_would_change_and_changes_nothing(site: Site) -> None:
    site.write(rate=2, alias=', "talk"')
    said = site.inside("serve", "--models", site.file, "--plan").stdout
    _, _, plan = said.partition("site at http://127.0.0.1:8080/v1")
    assert "big.2    runs, standby" in plan and "night    new, on demand" in plan, plan
    assert "alice: rate 600 -> 2" in plan and "stays as it is" in plan
    site.write(gateway='max_body = "1MiB"')
    said = site.inside("serve", "--models", site.file, "--plan").stdout
    assert "max_body 4194304 -> 1048576" in said and "keys: as they are" in said
    site.write()


def test_a_change_of_rights_takes_no_reload(site: Site) -> None:
    site.write(rate=2)
    assert "its keys were replaced" in site.serve("big")
    said = [site.ask("big").get("error", {}).get("code") for _ in range(3)]
    # What was accepted in the minute before counts, too.
    assert said[-1] == "rate_limit_exceeded" and set(said[:-1]) <= {None, said[-1]}
    site.write()


def test_no_stream_is_lost_by_a_reload_and_a_rolling_restart(site: Site) -> None:
    """Each replica restarts with another alias; before, what it has is answered."""
    load = site.inside.start_load(8080, "small", 40, 300, 20, key=site.keys["bob"])
    text = site.file.read_text().replace(
        'name = "small"', 'name = "small"\nserve.aliases = ["tiny"]'
    )
    site.file.write_text(text)
    before = [site.container(name) for name in ("vllm_small", "vllm_small.2")]
    assert "was reloaded" in site.serve("small")
    assert not set(before) & {site.container(name) for name in ("vllm_small", "vllm_small.2")}
    outcome = fared(load)
    assert (outcome["streams"]["whole"], outcome["small"]["statuses"]) == (40, [200]), outcome
    assert outcome["small"]["whole"] == outcome["small"]["sent"], outcome
    assert site.ask("tiny", "bob")["choices"]


def test_when_a_replica_dies_the_standby_answers(site: Site) -> None:
    """kill -9 of the engine, and no new request fails; docker's restart policy would bring it back at once."""
    site.inside.docker("update", "--restart", "no", "vllm_big")
    pid = site.inside.docker("inspect", "-f", "{{.State.Pid}}", "vllm_big").strip()
    load = site.inside.start_load(8080, "big", 0, 0, 6, key=site.keys["bob"])
    subprocess.run(["sleep", "1.5"], check=True)
    subprocess.run(["kill", "-9", pid], check=True)
    killed_at = time.perf_counter()
    outcome = fared(load)["small"]
    # What the engine had in its hands when it died ends with an error; nothing after that.
    assert outcome["last_broken_at"] < killed_at and outcome["whole"] > 20, outcome
    assert outcome["slowest_s"] < 10 and len(outcome["by"]) == 2, outcome
    site.inside.docker("start", "vllm_big")


def test_clients_leave_an_engine_that_hangs_within_ten_seconds(site: Site) -> None:
    """SIGSTOP: no request waits longer; then the engine is proven to hang, restarted, and serves."""
    site.wait_for(0)  # it was killed in the test before
    words = ("status", "--repair", "--every", "1", "--hang-after", "8", "--grace", "1")
    watchdog = site.inside.start(*words, stderr=subprocess.PIPE)
    assert watchdog.stderr and "looking after" in watchdog.stderr.readline()
    try:
        load = site.inside.start_load(8080, "big", 0, 0, 12, key=site.keys["bob"])
        subprocess.run(["sleep", "1.5"], check=True)
        pid = site.inside.docker("inspect", "-f", "{{.State.Pid}}", "vllm_big").strip()
        # With `init` the engine is a child of it.
        top = site.inside.docker("top", "vllm_big", "-eo", "pid").split()[1:]
        subprocess.run(["kill", "-STOP", *{pid, *top}], check=True)
        outcome = fared(load)["small"]
        assert outcome["slowest_s"] <= 10 and len(outcome["by"]) == 2, outcome
        for _ in range(40):
            subprocess.run(["sleep", "1"], check=True)
            view = site.view()
            if not view["troubles"] and (site.home / "deploy/big/repairs.log").exists():
                break
        assert view["replicas"][0]["serves"], view
        repairs = (site.home / "deploy/big/repairs.log").read_text()
        assert " restart hung: no answer and no step of the engine" in repairs
    finally:
        watchdog.terminate()
        watchdog.wait(20)


def test_the_page_is_behind_the_gateway(site: Site) -> None:
    secret = site.inside("key", "add", "operator", "--models", "big", "--ops").stdout.strip()
    page = site.inside.start("watch", "--site", "--page")
    try:
        for _ in range(100):
            words = ["-u", f"me:{secret}", "-H", "Accept: text/html", "http://127.0.0.1:8080/ops"]
            shown = site.inside.curl(*words)
            if "<table>" in shown:
                break
            subprocess.run(["sleep", "0.2"], check=True)
        assert "<td>big.2</td><td>standby</td><td>UP</td>" in shown, shown
        refused = site.inside.curl("-u", f"me:{site.keys['bob']}", "http://127.0.0.1:8080/ops")
        assert "does not open the page" in refused
    finally:
        page.terminate()
        page.wait(20)


MONITORING = """[monitoring]
webhook = "http://127.0.0.1:1/nobody"
"""


def ask_monitoring(site: Site, address: str, path: str) -> Any:
    """What an API of Prometheus or Alertmanager has to say; None while it says nothing."""
    try:
        return json.loads(site.inside.curl(f"http://{address}{path}"))["data"]
    except (ValueError, KeyError):
        return None


def test_monitoring_watches_the_site(site: Site) -> None:
    """Prometheus, node exporter and Alertmanager, as docker starts them from our compose file."""
    components.require("monitoring-images")
    site.write(more=MONITORING)
    said = site.serve("big")
    assert "monitoring was set up: Prometheus at http://127.0.0.1:9090" in said
    textfile = site.home / "deploy/_monitoring/data/textfile/hfship.prom"
    site.inside("status", "--format", "prometheus", "-o", textfile)
    jobs: Dict[str, set] = {}
    for _ in range(90):
        targets = ask_monitoring(site, "127.0.0.1:9090", "/api/v1/targets") or {"activeTargets": []}
        jobs = {}
        for target in targets["activeTargets"]:
            jobs.setdefault(target["labels"]["job"], set()).add(target["health"])
        if jobs.get("gateway") == jobs.get("node") == {"up"}:
            break
        subprocess.run(["sleep", "1"], check=True)
    assert jobs["gateway"] == jobs["node"] == {"up"} and "vllm" in jobs, jobs
    question = "/api/v1/query?query=hfship_deployment_state"
    names: set = set()
    for _ in range(30):  # the first answer of node exporter may be older than the file
        found = ask_monitoring(site, "127.0.0.1:9090", question) or {"result": []}
        names = {row["metric"]["name"] for row in found["result"]}
        if names:
            break
        subprocess.run(["sleep", "1"], check=True)
    assert names >= {"big", "small"}, names
    managers = ask_monitoring(site, "127.0.0.1:9090", "/api/v1/alertmanagers")
    (manager,) = managers["activeAlertmanagers"]
    assert manager["url"].startswith("http://alertmanager:9093/")
    state = site.inside.docker(
        "inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "hfship_monitoring-alertmanager-1"
    )
    assert state.strip() == "running 0"
    assert "monitoring runs as it is" in site.serve("big")
    site.write()


WRONG = {
    "an image that is not there": ('image = "haproxy:9"', 9, "haproxy:9"),
    "a certificate that is not there": (
        'tls_cert = "nowhere.pem"',
        2,
        "cannot use the certificate",
    ),
    "an image of something else": (f'image = "{components.ENGINE_IMAGE}"', 9, "haproxy"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_touches_nothing(case: str, site: Site) -> None:
    line, code, said = WRONG[case]
    before = {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()}
    ran = site.inside.docker("ps", "--format", "{{.ID}}")
    site.write(gateway=line)
    assert said in site.serve("big", code=code)
    assert {path: path.read_bytes() for path in before} == before
    assert site.inside.docker("ps", "--format", "{{.ID}}") == ran
    site.write()
    assert site.ask("big", "bob")["choices"]


def test_models_on_demand_take_turns(site: Site) -> None:
    """`night` comes when `small` has answered what it had; then it is the other way round."""
    load = site.inside.start_load(8080, "small", 10, 60, key=site.keys["bob"])
    subprocess.run(["sleep", "1"], check=True)
    site.serve("night", "--instead-of", "small")
    assert fared(load)["streams"]["whole"] == 10
    assert site.ask("night", "bob")["choices"]
    assert site.ask("small", "bob")["error"]["code"] == "model_unavailable"
    running = site.inside.docker("ps", "--format", "{{.Names}}").split()
    assert "vllm_night" in running and not {"vllm_small", "vllm_small.2"} & set(running)
    view = json.loads(site.inside("status", "--site", "--json", code=9).stdout)
    assert view["troubles"] == ["small: no replica answers; its clients get 503"]


def test_a_container_that_is_restarted_has_its_keys(site: Site) -> None:
    site.inside("key", "suspend", "alice")
    site.inside.docker("restart", "-t", "2", "hfship_gateway")
    for _ in range(50):
        subprocess.run(["sleep", "0.2"], check=True)
        if site.inside.curl("http://127.0.0.1:8080/health") == "ok":
            break
    assert site.ask("big")["error"]["code"] == "suspended_api_key"
    site.inside("key", "resume", "alice")
    rows = {
        row["name"]: row
        for row in json.loads(site.inside("key", "list", "--usage", "--json").stdout)
    }
    assert rows["bob"]["requests"] > 100 and rows["alice"]["refused"] > 0


def make_certificate(folder: Path, name: str, days: int) -> None:
    key, request, cert = (str(folder / f"{name}.{kind}") for kind in ("key", "csr", "pem"))
    new = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=site"]
    subprocess.run([*new, "-keyout", key, "-out", request], check=True, capture_output=True)
    sign = ["openssl", "x509", "-req", "-in", request, "-signkey", key, "-days", str(days)]
    subprocess.run([*sign, "-out", cert], check=True, capture_output=True)


def test_tls_and_what_sends_clients_there(site: Site) -> None:
    make_certificate(site.home, "good", 90)
    make_certificate(site.home, "old", -1)
    site.write(gateway='tls_cert = "old.pem"\ntls_key = "old.key"')
    assert "has expired" in site.serve("big", code=2)
    site.write(gateway='tls_cert = "good.pem"\ntls_key = "old.key"')
    assert "cannot use the certificate" in site.serve("big", code=2)
    assert site.ask("big", "bob")["choices"]
    site.write(gateway='http_port = 8081\ntls_cert = "good.pem"\ntls_key = "good.key"')
    assert "https://127.0.0.1:8080/v1" in site.serve("big")
    header = ["-H", f"Authorization: Bearer {site.keys['bob']}"]
    for version in ("--http1.1", "--http2"):
        models = site.inside.curl(version, *header, "https://127.0.0.1:8080/v1/models")
        assert "small" in models and "night" in models
    moved = site.inside.curl("-i", "http://127.0.0.1:8081/v1/models?key=x")
    assert " 308 " in moved and "location: https://127.0.0.1:8080/v1/models\n" in moved.lower()


def test_images_of_haproxy_are_found_by_name() -> None:
    def row(repository: str, tag: str) -> str:
        return json.dumps({"Repository": repository, "Tag": tag})

    rows = [
        row("haproxytech/haproxy-alpine", "3.2"),
        row("host:5000/haproxy", "3.4.7"),
        row("my-haproxy-exporter", "9"),
        row("haproxy", "latest"),
    ]
    assert haproxy_images("\n".join(["warning", *rows])) == [
        "host:5000/haproxy:3.4.7",
        "haproxytech/haproxy-alpine:3.2",
        "haproxy:latest",
    ]
    assert tag_version("v3.10") > tag_version("3.9.1")
