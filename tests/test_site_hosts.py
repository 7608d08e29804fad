"""A site of several hosts: real sshd, real docker, engines that play vLLM. Brought, served, cut off, drained, killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

from conftest import PYZ, missing, program
from hfship.base.manifest import MANIFEST_PATH
from support import components
from support.hosts import Host, Hosts, image_with
from support.make_model import make_model
from support.registry import FaultRegistry, Image, make_image

pytestmark = pytest.mark.real  # not alone: each host has a data root of its own

SITE = """
[defaults]
transfer_dir = "{data}/transfer"
site_models_dir = "{data}/models/huggingface"
deploy_dir = "{data}/deploy"
log_dir = "{data}/logs"
[defaults.serve]
device = "cpu"
image = "engine/vllm-openai-cpu:v0.32.0"
[gateway]
{gateway}
[[host]]
name = "gpu1"
data = "{data}"
timeout = 120
[[host]]
name = "gpu2"
data = "{data}"
timeout = 120
roles = {roles}
[[model]]
name = "small"
{copies}
[model.serve]
{serve}
"""
OPTIONS = {"gateway": "", "roles": '["models"]', "copies": "replicas = 2", "serve": ""}
ADDRESS = "10.77.0.9"  # that moves between the gateways
TWO_GATEWAYS = {
    "gateway": f'host = "0.0.0.0"\naddress = "{ADDRESS}/24"',
    "roles": '["models", "gateway"]',
    "copies": "standby = 1",
}
# A model over both hosts, beside the other one.
GROUP = """
[[model]]
name = "large"
nodes = 2
[model.serve]
device = "gpu"
image = "{image}"
"""


URL = "http://127.0.0.1:8080/v1"


def ended(load: subprocess.Popen[str]) -> Dict[str, Any]:
    """How a load fared, which ends now."""
    time.sleep(2)
    said, _ = load.communicate(timeout=90)
    fared: Dict[str, Any] = json.loads(said)
    return fared


class Site:
    """The hosts, and hfship on the control host."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.data = hosts, hosts.data
        self.key = ""
        self.file = hosts.data / "models.toml"
        control = hosts["control"]
        self.change()
        control.own(hosts.data / "hfship.pyz").write_bytes(PYZ.read_bytes())

    def argv(self, *words: Any) -> List[str]:
        return ["python3", str(self.data / "hfship.pyz"), *map(str, words)]

    def change(self, more: str = "", **options: str) -> None:
        """Change the models file: other options, and what comes behind them."""
        text = SITE.format(data=self.data, **{**OPTIONS, **options}) + more
        self.hosts["control"].own(self.file).write_text(text)

    def curl(self, model: str, *words: str, url: str = URL) -> str:
        body = json.dumps({"model": model, "messages": []})
        argv = ["curl", "-s", "-m", "20", "-H", f"Authorization: Bearer {self.key}", "-d", body]
        argv += ["-H", "Content-Type: application/json", *words, url + "/chat/completions"]
        return str(self.hosts["control"].run(argv).stdout)

    def ask(self, model: str = "small") -> Any:
        """One chat, through the gateway."""
        if not self.key:
            self.key = self("key", "add", "alice").stdout.strip()
        return json.loads(self.curl(model))

    def seconds_of_an_answer(self) -> float:
        """How long one takes that is answered."""
        status, seconds = self.curl(
            "small", "-o", "/dev/null", "-w", "%{http_code} %{time_total}"
        ).split()
        assert status == "200"
        return float(seconds)

    def longest_of(self, count: int) -> float:
        """How long the longest of some answers takes."""
        return max(self.seconds_of_an_answer() for _ in range(count))

    def containers(self, host: str) -> List[str]:
        """The IDs of those that run on a host, and serve a model."""
        return self.hosts[host].docker("ps", "-q", "--filter", "name=vllm_").split()

    def start_load(self) -> subprocess.Popen[str]:
        """OpenAI's client at work, until its stdin is closed."""
        python = components.require("openai")
        script = Path(__file__).parent / "support/openai_load.py"
        load = self.hosts["control"].start(
            [python, script, URL, "small", "4"],
            env={"API_KEY": self.key},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        time.sleep(5)
        return load

    def wait_for_replicas(self, count: int) -> None:
        """Wait until the gateway gives requests to so many."""
        for _ in range(60):
            rows = json.loads(self("status", "--site", "--json", code=None).stdout)["replicas"]
            if sum(row["state"].upper().startswith("UP") for row in rows) == count:
                return
            time.sleep(1)
        raise AssertionError(f"no {count} replicas are up")

    def __call__(self, *words: Any, code: Optional[int] = 0) -> subprocess.CompletedProcess[str]:
        """hfship on the control host, with the models file."""
        env = {"HFSHIP_MODELS_FILE": str(self.file)}
        done = self.hosts["control"].run(self.argv(*words), env=env)
        said = f"{words}: exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
        assert code is None or done.returncode == code, said
        assert "Traceback" not in done.stderr, said
        return done


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    names, gpus = ["control", "gpu1", "gpu2"], "2x H100 81559"
    with Hosts(tmp_path_factory.mktemp("s") / "h", names, gpus) as hosts:
        made = Site(hosts)
        models = hosts["control"].own(hosts.data / "models/huggingface/small")
        make_model(models, size_mb=160, shards=2)
        made("pack", "small", "--split", "70M", "-o", hosts.data / "transfer")
        yield made


def test_a_disk_that_fills_up_stops_no_other_host_and_the_next_push_goes_on(site: Site) -> None:
    transfer, gpu2 = site.data / "transfer", site.hosts["gpu2"]
    gpu2.run(["sh", "-c", f"mkdir -p {transfer} && mount -t tmpfs -o size=170m disk {transfer}"])
    first = transfer / "small.tar.zst.0002"
    words = site.argv("push", "small", "--hosts", "--bwlimit", "100M")
    env = {"HFSHIP_MODELS_FILE": str(site.file)}
    with site.hosts["control"].start(words, env=env, stdout=subprocess.PIPE) as pushing:
        wait_until(lambda: not gpu2.run(["test", "-e", first]).returncode, "a part has come")
        gpu2.run(["dd", "if=/dev/zero", f"of={transfer}/other", "bs=1M"])
        said, _ = pushing.communicate(timeout=200)
    gpu2.run(["rm", f"{transfer}/other"])
    assert pushing.returncode == 7 and "pushed to 1 of 2 hosts" in said
    assert "transfer is full: " in said and "No space left on device" in said
    before = gpu2.run(["ls", "-i", first]).stdout
    again = json.loads(site("push", "small", "--hosts", "--json").stdout)
    assert [row["exit_code"] for row in again[0]["hosts"]] == [0, 0]
    assert before and gpu2.run(["ls", "-i", first]).stdout == before, "it was not sent again"
    gpu2.run(["umount", transfer])


def test_archives_come_to_all_hosts_from_each_other_and_are_unpacked_there(site: Site) -> None:
    done = site("push", "small", "--hosts")
    assert "pushed to 2 of 2 hosts" in done.stdout and "of it from host to host" in done.stdout
    [again] = json.loads(site("push", "small", "--hosts", "--json").stdout)
    assert [(row["host"], row["exit_code"]) for row in again["hosts"]] == [("gpu1", 0), ("gpu2", 0)]
    assert "unpack: 2 of 2 hosts ok" in site("unpack", "small", "--hosts").stdout
    shards = [
        sorted(site.hosts[name].own(site.data / "models/huggingface/small").glob("*.safetensors"))
        for name in ("control", "gpu1", "gpu2")
    ]
    assert [[path.read_bytes() for path in one] for one in shards[1:]] == [
        [path.read_bytes() for path in shards[0]]
    ] * 2


def test_a_dead_host_does_not_keep_the_others_from_answering(site: Site) -> None:
    site.hosts.cut("gpu1")
    try:
        rows = json.loads(site("list", "--hosts", "--json", code=8).stdout)
        assert "gpu1: gpu1" not in site("status", "--hosts", code=8).stdout
    finally:
        site.hosts.plug_in("gpu1")
    assert [(row["host"], bool(row["problem"])) for row in rows] == [
        ("gpu1", True),
        ("gpu2", False),
    ]
    assert rows[1]["models"] == ["small"] and rows[1]["docker"]


def test_a_changed_host_key_is_refused_with_its_code(site: Site) -> None:
    known = site.hosts["control"].folder / "ssh/known_hosts"
    before = known.read_text()
    lines = before.splitlines()
    wrong = [line for line in lines if line.startswith("control,")][0].split(" ", 1)[1]
    known.write_text("".join(f"{line.split(' ', 1)[0]} {wrong}\n" for line in lines))
    try:
        done = site("list", "--hosts", "--on", "gpu1", code=4)
    finally:
        known.write_text(before)
    assert "the host key of gpu1 is not the one that is known here" in done.stdout


def test_an_unknown_host_is_named_with_the_nearest(site: Site) -> None:
    assert "did you mean gpu" in site("list", "--on", "gpu9", code=5).stderr


def test_a_site_answers_from_all_hosts_and_a_second_time_does_nothing(site: Site) -> None:
    before = [site.hosts[name].docker("ps", "-q", "--no-trunc") for name in ("gpu1", "gpu2")]
    assert not "".join(before), "nothing runs yet"
    done = site("serve")
    assert "small answers on gpu1" in done.stderr and "small.2 answers on gpu2" in done.stderr
    assert site.ask()["choices"]
    running = [site.hosts[name].docker("ps", "-q", "--no-trunc") for name in ("gpu1", "gpu2")]
    again = site("serve")
    assert "answers on" not in again.stderr and "the gateway runs as it is" in again.stderr
    assert running == [
        site.hosts[name].docker("ps", "-q", "--no-trunc") for name in ("gpu1", "gpu2")
    ]
    site.hosts["control"].own(site.data / "deploy/_site/site.json").unlink()
    site("serve")  # what the control host remembers can be lost: the keys are on the hosts
    assert site.ask()["choices"]
    assert running == [
        site.hosts[name].docker("ps", "-q", "--no-trunc") for name in ("gpu1", "gpu2")
    ]
    rows = json.loads(site("status", "--hosts", "--json").stdout)
    assert [(row["host"], row["name"], row["state"]) for row in rows] == [
        ("gpu1", "small", "healthy"),
        ("gpu2", "small.2", "healthy"),
    ]


def test_a_rolling_update_fails_no_request_of_the_openai_client(site: Site) -> None:
    load = site.start_load()
    site.change(serve='aliases = ["chat"]')
    site("serve")
    fared = ended(load)
    assert fared["failed"] == [] and fared["ok"] > 50
    assert site.ask("chat")["choices"]


def test_two_control_hosts_do_not_change_a_host_at_once(site: Site) -> None:
    lease = site.hosts["gpu2"].own(site.data / "deploy/_site/lease")
    lease.write_text('{"host": "other", "pid": 7, "start": "1", "boot_id": "b"}')
    done = site("serve", code=3)
    lease.unlink()
    assert "gpu2 is being changed from another control host" in done.stderr
    assert "process 7 on other" in done.stderr


def test_a_control_host_that_is_killed_goes_on_the_next_time(site: Site) -> None:
    site.change(serve='aliases = ["chat", "chat3"]')
    env = {"HFSHIP_MODELS_FILE": str(site.file)}
    killed = site.hosts["control"].start(site.argv("serve"), env=env, stderr=subprocess.PIPE)
    for line in killed.stderr or ():
        if "waiting until its requests are answered" in line:
            break
    site.hosts["control"].run(["pkill", "-KILL", "-f", "hfship.pyz serve"])
    killed.wait()
    done = site("serve")
    assert "answers" in done.stdout and site.ask("chat3")["choices"]


def test_a_host_that_is_cut_off_is_left_within_two_seconds(site: Site) -> None:
    site.hosts.cut("gpu1")
    try:
        worst = site.longest_of(8)
        done = site("serve", code=3)
    finally:
        site.hosts.plug_in("gpu1")
    assert worst < 2.0
    assert "small stays on gpu1, which does not answer" in done.stderr
    site.wait_for_replicas(2)


def test_a_drained_host_is_empty_and_its_copies_answer_elsewhere(site: Site) -> None:
    load = site.start_load()
    site("drain", "gpu1")
    fared = ended(load)
    assert fared["failed"] == [] and fared["ok"] > 20
    assert not site.hosts["gpu1"].docker("ps", "-q").strip()
    assert len(site.hosts["gpu2"].docker("ps", "-q").split()) == 2
    assert json.loads(site("list", "--hosts", "--json").stdout)[0]["drained"]
    site("undrain", "gpu1")
    assert not json.loads(site("list", "--hosts", "--json").stdout)[0]["drained"]


def test_what_ran_on_a_host_that_is_gone_answers_from_another_after_a_repair(site: Site) -> None:
    assert len(site.hosts["gpu2"].docker("ps", "-q").split()) == 2
    site.hosts.cut("gpu2")
    try:
        done = site("status", "--hosts", "--repair", code=None)
        assert "placing again what ran on gpu2" in done.stderr
        assert site.ask()["choices"]
        # Of two that run twice the healthy one stays; docker asks an engine after some seconds.
        healthy = ("ps", "-q", "--filter", "health=healthy")
        wait_until(
            lambda: len(site.hosts["gpu1"].docker(*healthy).split()) == 2, "both are healthy"
        )
    finally:
        site.hosts.plug_in("gpu2")
    site("serve")
    running = [site.hosts[name].docker("ps", "-q").split() for name in ("gpu1", "gpu2")]
    assert sum(map(len, running)) == 2, "each copy runs once again"
    assert site.ask()["choices"]


def test_a_host_whose_docker_is_killed_is_left_and_taken_back(site: Site) -> None:
    gpu1, before = site.hosts["gpu1"], site.containers("gpu2")
    gpu1.run(["pkill", "-KILL", "-x", "dockerd"])
    try:
        assert site.longest_of(4) < 2.0, "containers outlive their docker"
        done = site("serve", code=9)
        assert "small stays on gpu1, whose docker does not answer" in done.stderr
        assert "the docker daemon is not running" in done.stdout
        assert site.containers("gpu2") == before
        gpu1.kill_docker()  # and now they end, too
        assert site.longest_of(4) < 2.0
        done = site("status", "--hosts", code=9)
        assert "gpu1: small: cannot use docker: the docker daemon is not running" in done.stdout
    finally:
        gpu1.start_docker()
    site.wait_for_replicas(2)
    assert site.ask()["choices"] and site.containers("gpu2") == before


OLD_DOCKER = """#!/bin/sh
[ "$1" != compose ] || { echo "docker: 'compose' is not a docker command." >&2; exit 1; }
[ "$1" = version ] && echo 19.03.15 || echo '{"ServerVersion": "19.03.15"}'
"""
MUTE_DOCKER = """
import socket, time
with socket.socket(socket.AF_UNIX) as mute:
    mute.bind("/run/hung.sock")
    mute.listen(100)
    time.sleep(1000000)
"""
# Hosts whose docker is of no use, each another login on gpu2: what is said of them, what mends it.
NO_DOCKER = {
    "noprogram": ("docker is not installed", "install docker"),
    "nodaemon": ("the docker daemon is not running", "systemctl start docker"),
    "norights": ("this user may not talk to docker", "usermod -aG docker"),
    "nocompose": ("docker has no compose plugin", "install docker-compose-plugin"),
    "tooold": ("docker 19.03.15 is older than its compose plugin", "update docker to 20.10"),
}


def hosts_without_docker(host: Host) -> str:
    """Have all of NO_DOCKER on a host; the tables of the models file for them."""
    folder = host.data / "no-docker"
    link = f"mkdir -p {folder}/bin && cd {folder}/bin && ln -s /usr/bin/* . && rm -f docker*"
    host.run(["sh", "-c", link], check=True)
    old = folder / "old"
    host.own(old).mkdir()
    host.own(old / "docker").write_text(OLD_DOCKER)
    host.own(old / "docker").chmod(0o755)
    host.add_user("ops", "/srv/ops")
    for name in (*NO_DOCKER, "hangs"):  # the program is there: it is not what is looked at here
        there = "/srv/ops/data" if name == "norights" else f"{folder}/{name}"
        host.run(["install", "-D", "-m", "755", "-t", there, PYZ], check=True)
    host.run(["chown", "-R", "ops", "/srv/ops"], check=True)
    variables = {
        "noprogram": {"PATH": f"{folder}/bin"},
        "nodaemon": {"DOCKER_HOST": "unix:///run/nothing.sock"},
        "norights": {"HOME": "/srv/ops", "DOCKER_CONFIG": "/srv/ops"},
        "nocompose": {"DOCKER_CONFIG": "/nowhere"},
        "tooold": {"PATH": f"{old}:{host.env['PATH']}"},
    }
    tables = ""
    for port, name in enumerate(NO_DOCKER, 2201):
        host.add_sshd(port, {**host.env, **variables[name]})
        data, user = f"{folder}/{name}", "root"
        if name == "norights":
            data, user = "/srv/ops/data", "ops"
        tables += f'[[host]]\nname = "{name}"\naddress = "gpu2"\nport = {port}\n'
        tables += f'user = "{user}"\ndata = "{data}"\nroles = ["models"]\ntimeout = 120\n'
    variables = {**host.env, "DOCKER_HOST": "unix:///run/hung.sock"}
    host.add_sshd(2200, variables)
    host.start(["python3", "-c", MUTE_DOCKER], start_new_session=True)
    tables += '[[host]]\nname = "hangs"\naddress = "gpu2"\nport = 2200\nroles = ["models"]\n'
    return tables + f'data = "{folder}/hangs"\ntimeout = 5\n'


@pytest.mark.timeout(900)  # eight hosts on the cores of one
def test_hosts_without_docker_say_what_mends_it_and_hold_no_other(site: Site) -> None:
    more = hosts_without_docker(site.hosts["gpu2"])
    site.change(more, serve='aliases = ["chat4"]')
    done = site("serve", code=3)  # another try may reach the one that hangs
    assert "small answers on" in done.stderr and "small.2 answers on" in done.stderr
    assert site.ask("chat4")["choices"]
    told = json.loads(site("list", "--hosts", "--json", code=8).stdout)
    rows = {row["host"]: row for row in told}
    for name, (problem, step) in NO_DOCKER.items():
        assert f"{name}: " in done.stdout and problem in done.stderr, name
        assert f"on {name}: " in done.stderr and step in done.stderr, name
        assert problem in rows[name]["problem"] and step in rows[name]["next"], name
    assert not rows["gpu1"]["problem"] and not rows["gpu2"]["problem"]
    assert rows["hangs"]["problem"] == "hangs does not answer"
    assert "hangs does not answer: it took too long" in done.stderr
    assert "next  ssh -p 2200 gpu2 true" in done.stderr
    site.change(serve='aliases = ["chat4"]')


@contextlib.contextmanager
def keepalived(host: Host, site: Site) -> Iterator[None]:
    """keepalived on a host, by the files that hfship wrote there."""
    keepalived = components.require("keepalived")
    root = keepalived.parents[2]
    libraries = [str(root / top / "x86_64-linux-gnu") for top in ("lib", "usr/lib")]
    config = site.data / "deploy/_gateway/keepalived.conf"
    argv = [keepalived, "-n", "-l", "-P", "-f", config, "-p/run/k.pid", "-r/run/v.pid"]
    env = {"LD_LIBRARY_PATH": ":".join(libraries)}
    with open(host.folder / "keepalived.log", "wb") as log:
        daemon = host.start(argv, env=env, stdout=log, stderr=log)
    try:
        yield
    finally:
        host.run(["pkill", "keepalived"])
        daemon.wait()


def test_a_standby_and_a_second_gateway_take_over(site: Site) -> None:
    site.change(**TWO_GATEWAYS)
    done = site("serve")
    assert f"the gateway is at http://{ADDRESS}:8080/v1" in done.stdout
    url = f"http://{ADDRESS}:8080/v1"
    control, gpu2 = site.hosts["control"], site.hosts["gpu2"]

    def answers() -> str:
        said = site.curl("small", "-m", "1", url=url)
        return str(json.loads(said).get("id", "")) if said else ""

    with keepalived(control, site), keepalived(gpu2, site):
        active = wait_until(answers, "the address answers")
        assert active in site.hosts["gpu1"].docker("ps", "-q"), "the standby has nothing to do"
        control.docker("kill", "hfship_gateway")
        wait_until(answers, "the other gateway has the address")
        assert ADDRESS in gpu2.run(["ip", "-br", "address"]).stdout
        site.hosts.cut("gpu1")
        try:
            assert wait_until(answers, "the standby answers") != active
        finally:
            site.hosts.plug_in("gpu1")


def test_a_gateway_that_was_cut_off_learns_which_key_was_revoked(site: Site) -> None:
    site.change(**TWO_GATEWAYS)
    site("serve")
    gpu2 = site.hosts["gpu2"]
    key = site("key", "add", "leaver").stdout.strip()

    def status_at_gpu2() -> str:
        """What the gateway of gpu2 answers those on that side of the cut."""
        url = "http://127.0.0.1:8080/v1/models"
        argv = ["curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}"]
        return str(gpu2.run([*argv, "-H", f"Authorization: Bearer {key}", url]).stdout)

    wait_until(lambda: status_at_gpu2() == "200", "gpu2 knows the key")
    site.hosts.cut("gpu2")
    try:
        done = site("key", "revoke", "leaver", "--yes", code=3)
        assert "not known yet at the gateway on gpu2: what changed of leaver" in done.stderr
        assert " key sync " in done.stderr
        assert status_at_gpu2() == "200", "nobody has told it"
    finally:
        site.hosts.plug_in("gpu2")
    site("key", "sync")
    assert status_at_gpu2() == "401"


def wait_until(asked: Callable[[], Any], what: str) -> Any:
    """What `asked` says as soon as it says something."""
    deadline = time.monotonic() + 90
    while not (said := asked()):
        assert time.monotonic() < deadline, f"waited 90 s until {what}"
        time.sleep(0.1)
    return said


def bring_group_image(site: Site, folder: Path, tag: str = "v0.32.0", more: bytes = b"") -> str:
    """An image of members, which gpu1 has, and the control host as an archive; its name."""
    gpu1, transfer = site.hosts["gpu1"], site.data / "transfer"
    member = (components.TESTS / "support/member.py").read_bytes()
    start = b'#!/bin/sh\nexec python3 /usr/local/bin/member.py "$@"\n'
    files = {"usr/local/bin/member.py": member, "usr/local/bin/vllm": start}
    if more:
        files["usr/local/share/noise"] = more
    hfship = program("pyz", folder / "home")
    with FaultRegistry() as registry:
        name = f"{registry.host}/vllm/vllm-openai:{tag}"
        tar = image_with(gpu1, components.ENGINE_IMAGE, name, files)
        gpu1.run(["docker", "load"], input=tar, text=False)
        registry.add(saved_image(gpu1, name), "vllm/vllm-openai", tag)
        hfship("fetch", f"docker://{name}", "-o", folder)
    archive = site.hosts["control"].own(transfer)
    hfship("pack", folder / f"vllm-openai_{tag}", "-o", archive)
    return name


def saved_image(host: Host, name: str) -> Image:
    """An image of a host's docker, bit for bit."""
    saved = host.run(["docker", "save", name], text=False).stdout
    with tarfile.open(fileobj=io.BytesIO(saved)) as opened:
        found = {one.name: opened.extractfile(one) for one in opened if one.isfile()}
        content = {path: file.read() for path, file in found.items() if file}
    [about] = json.loads(content["manifest.json"])
    layers = [content[path] for path in about["Layers"]]
    return make_image(layers, "plain", config=content[about["Config"]])


def received(host: Host) -> int:
    """The bytes that came to a host by the wire, since it was started."""
    [told] = json.loads(host.run(["ip", "-s", "-j", "link", "show", "eth0"]).stdout)
    return int(told["stats64"]["rx"]["bytes"])


@pytest.mark.timeout(900)
def test_an_image_that_is_killed_on_its_way_goes_on_behind_the_bytes_that_came(
    site: Site, tmp_path: Path
) -> None:
    name = bring_group_image(site, tmp_path, "v0.31.0", os.urandom(64 << 20))
    word, transfer = "vllm-openai_v0.31.0", site.data / "transfer"
    control, hosts = site.hosts["control"], [site.hosts[one] for one in ("gpu1", "gpu2")]
    hosts[0].docker("rmi", name)
    site("list", "--hosts")  # has the program there
    size = sum(path.stat().st_size for path in control.own(transfer).glob(f"{word}*"))
    env = {"HFSHIP_MODELS_FILE": str(site.file)}

    def came() -> int:
        """Bytes of the archive on all hosts, whole files and what is under way."""
        files = [path for one in hosts for path in one.own(transfer).glob(f"{word}*")]
        return sum(path.stat().st_size for path in files)

    before = [received(one) for one in hosts]
    words = site.argv("push", word, "--hosts", "--bwlimit", "30M")
    with control.start(words, env=env, stdout=subprocess.DEVNULL) as pushing:
        wait_until(lambda: came() > size // 3, "a third of it has come")
        control.run(["pkill", "-KILL", "-f", "hfship.pyz push"])
        assert pushing.wait() != 0
    assert came() < 2 * size, "it was killed on its way"
    assert "pushed to 2 of 2 hosts" in site("push", word, "--hosts").stdout
    for one, then in zip(hosts, before):
        assert size <= received(one) - then < size * 1.05, "nothing came twice"
    assert "unpack: 2 of 2 hosts ok" in site("unpack", word, "--hosts").stdout


def test_a_model_larger_than_a_host_starts_and_restarts_as_one(site: Site, tmp_path: Path) -> None:
    image = bring_group_image(site, tmp_path)
    folder = site.data / "models/huggingface/large"
    make_model(site.hosts["control"].own(folder), size_mb=2)
    site("pack", "large", "-o", site.data / "transfer")
    site.change(GROUP.format(image=image))
    members = [site.hosts[name] for name in ("gpu1", "gpu2")]

    def inspected(what: str) -> List[str]:
        return [one.docker("inspect", "-f", what, "vllm_large").strip() for one in members]

    done = site("serve")
    assert not members[1].docker("ps", "-q", "--filter", "name=gateway").strip(), "not its role"
    assert "large answers on gpu1 + gpu2, at 10.77.0.2:" in done.stderr
    assert "docker has 1 of 2 layers" in done.stderr, "what is there is not sent again"
    assert len(set(inspected("{{.Image}}"))) == 1
    assert site.ask("large")["id"] == "group"
    started = inspected("{{.State.StartedAt}}")
    assert "answers on" not in site("serve").stderr
    assert inspected("{{.State.StartedAt}}") == started

    members[1].docker("kill", "vllm_large")
    words = ["--hosts", "--repair", "--hang-after", "4", "--grace", "1"]
    done = site("status", *words, code=None)
    assert "large starts again as one on gpu1, gpu2" in done.stderr
    assert site.ask("large")["id"] == "group"
    assert not set(inspected("{{.State.StartedAt}}")) & set(started), "all of it"
    record = site.hosts["control"].own(site.data / "deploy/_site/groups/large/repairs.log")
    assert record.read_text().count("restart hung: no answer") == 1

    members[1].docker("kill", "vllm_large")
    manifest = members[1].own(folder / MANIFEST_PATH)
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    done = site("serve", code=6)
    assert "the hosts of a group do not have the same model large" in done.stderr
    assert inspected("{{.State.Running}}") == ["true", "false"], "nothing was touched"
