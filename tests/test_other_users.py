"""Other users of the machine: what cannot be read is optional, what they planted is not touched, and what they write
steers no terminal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from conftest import PYZ, Program, missing
from hfship.base.below import Refused
from hfship.base.eventlog import LogFile
from hfship.ops.jobs import JOB_FORMAT, JobRecord, free_name
from support.hub import FaultHub

THEM = 54321  # nobody has this number

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="to be other users needs root")


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that everybody may use; those of pytest are root's."""
    folder = Path(tempfile.mkdtemp(prefix="hfship-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def theirs(common: Path) -> Program:
    """hfship.pyz as another user runs it."""
    if not PYZ.exists() or not shutil.which("setpriv"):
        missing("dist/hfship.pyz (make build), and setpriv")
    shutil.copy(PYZ, common / "hfship.pyz")
    home = common / "home"
    home.mkdir()
    os.chown(home, THEM, THEM)
    user = ["setpriv", f"--reuid={THEM}", f"--regid={THEM}", "--clear-groups"]
    python = os.path.realpath(sys.executable)
    program = Program([*user, python, str(common / "hfship.pyz")], home)
    program.env = lambda extra=None: {  # type: ignore[method-assign]
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        **(extra or {}),
    }
    return program


def private(path: Path, content: str = "") -> Path:
    """A file of ours that nobody else can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o600)
    return path


# -- what cannot be read


def warnings_of(done: Any) -> List[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("place", ["HOME", "HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME"])
def test_a_token_of_somebody_else_is_not_needed(
    place: str, theirs: Program, hub: FaultHub, model: Path, common: Path
) -> None:
    hub.add(model)
    root = common / "root"
    private(root / ".cache/huggingface/token", "hf_x")
    private(root / "huggingface/token", "hf_x")
    private(root / "token", "hf_x")
    if place != "HF_TOKEN_PATH":
        root.chmod(0o700)
    value = root / "token" if place == "HF_TOKEN_PATH" else root
    env = {place: str(value), "HFSHIP_LOG_DIR": str(theirs.home / "logs")}
    done = theirs("fetch", "org/tiny", "--endpoint", hub.url, "-o", theirs.home / "m", env=env)
    said = [line for line in warnings_of(done) if "token" in line]
    assert len(said) == 1
    assert "cannot be read (Permission denied): going on without a token" in said[0]


def test_a_token_file_that_was_asked_for_is_needed(theirs: Program, common: Path) -> None:
    token = private(common / "token", "hf_x")
    done = theirs("fetch", "org/tiny", "--token-file", token, code=4)
    assert "cannot read the token file" in done.stderr


def test_the_models_and_caches_of_others_are_not_needed(
    theirs: Program, hfship: Program, hub: FaultHub, model: Path, common: Path
) -> None:
    hub.add(model)
    models = common / "models"
    models.mkdir(mode=0o777)
    models.chmod(0o777)
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", models, "--name", "closed")
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", models, "--name", "open")
    (models / "closed").chmod(0o700)
    blobs = common / "hub/models--org--tiny/blobs"
    blobs.mkdir(parents=True)
    for path in (models / "open").glob("*.safetensors"):
        path.chmod(0o600)
        entries = json.loads((models / "open/.hfship/manifest.json").read_text())["files"]
        sums = {entry["path"]: entry["sha256"] for entry in entries}
        private(blobs / sums[path.name])
        shutil.copyfile(path, blobs / sums[path.name])

    env = {"HF_HUB_CACHE": str(common / "hub"), "HFSHIP_MODELS_DIR": str(models)}
    done = theirs("fetch", "org/tiny", "--endpoint", hub.url, "--name", "mine", env=env)
    assert len(warnings_of(done)) == 1
    assert "Permission denied; it is fetched" in done.stderr
    done = theirs("pack", "--all", "-o", theirs.home / "out", env=env, code=None)
    assert f"{models / 'closed'} is left out: permission denied" in done.stderr
    assert (theirs.home / "out/mine.tar.zst").exists()


def test_clean_leaves_alone_what_it_cannot_see(theirs: Program, common: Path) -> None:
    models = common / "models"
    for name in ("closed", "half", "ours"):
        partial = models / name / ".hfship/partial/0.json"
        partial.parent.mkdir(parents=True)
        partial.write_text("{}")
        os.utime(partial, (0, 0))
    for path in [models / "half", *(models / "half").rglob("*"), models / "ours", *(models / "ours").rglob("*")]:  # fmt: skip
        owned(path)
    owned(models)
    (models / "closed").chmod(0o700)
    private(models / "half/x/y").parent.chmod(0o700)
    done = theirs("clean", "--yes", models)
    assert len(warnings_of(done)) == 2
    assert f"{models / 'half'} is left alone: {models / 'half/x'} may not" in done.stderr
    left = sorted(path.parts[-4] for path in models.glob("*/.hfship/partial/0.json"))
    assert left == ["closed", "half"]
    done = theirs("clean", "--yes", models / "half")
    assert f"{models / 'half'} is left alone" in done.stderr
    assert (models / "half/.hfship/partial/0.json").exists()


def test_a_home_of_somebody_else_stops_no_work(
    theirs: Program, hfship: Program, model: Path, common: Path
) -> None:
    """As under `docker --user`."""
    root = common / "root"
    root.mkdir(mode=0o700)
    env = {"HOME": str(root)}
    shutil.copytree(model, common / "tiny")
    hfship("pack", common / "tiny", "-o", common / "out")
    os.chown(common / "out", THEM, THEM)
    done = theirs("verify", common / "out/tiny.tar.zst", env=env)
    assert len(warnings_of(done)) == 1
    assert "the work goes on" in done.stderr
    done = theirs("verify", "tiny", env=env, code=5)
    assert f"{root}/models (permission denied)" in done.stderr
    theirs("unpack", common / "out/tiny.tar.zst", "-o", common / "out/far", env=env)
    assert theirs("watch", "--once", env=env).stdout == "no jobs yet\n"


# -- what they planted


def owned(path: Path) -> Path:
    os.chown(path, THEM, THEM, follow_symlinks=False)
    return path


@pytest.mark.parametrize("suffix", ["json", "log"])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "pipe", "folder"])
def test_a_name_with_files_of_others_is_not_taken(kind: str, suffix: str, tmp_path: Path) -> None:
    planted = tmp_path / f"fetch-m.{suffix}"
    target = tmp_path / "target"
    if kind == "file":
        planted.write_text("{}")
    elif kind == "pipe":
        os.mkfifo(planted)
    elif kind == "folder":
        planted.mkdir()
    else:
        planted.symlink_to(target)
        if kind == "link":
            target.write_text("theirs")
    owned(planted)
    assert free_name(tmp_path, JobRecord(name="fetch-m")) == "fetch-m-2"


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "pipe"])
def test_a_log_that_others_planted_is_not_written_to(kind: str, common: Path) -> None:
    log = common / "x.log"
    target = common / "target"
    if kind == "file":
        log.write_text("theirs")
    elif kind == "pipe":
        os.mkfifo(log)
    else:
        log.symlink_to(target)
        if kind == "link":
            target.write_text("theirs")
    owned(log)
    with pytest.raises(Refused, match="belongs to another user"):
        LogFile(log)
    assert not target.exists() or target.read_text() == "theirs"


def test_a_log_that_others_plant_later_is_not_written_to(common: Path) -> None:
    """While it is rotated."""
    log = common / "x.log"
    file = LogFile(log)
    event = {"time": "", "level": "info", "job": "", "stage": "", "message": "x" * (1 << 20)}
    while not (common / "x.log.1").exists():
        assert file.write(event) == ""
    log.unlink()
    log.write_text("theirs")
    owned(log)
    for _ in range(20):
        file.write(event)
    assert "theirs" in [path.read_text() for path in common.glob("x.log*")]


# -- their jobs, as root sees them

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r\n\tdone"
HOSTILE: Dict[str, Any] = {
    "stage": ESCAPES,
    "words": ["fetch", ESCAPES, "o/m"],
    "cwd": f"/home/{ESCAPES}",
    "host": ESCAPES,
    "unit": ESCAPES,
    "error": {"what": ESCAPES, "why": ESCAPES, "next": ESCAPES},
    "env": {ESCAPES: ESCAPES},
    "command": ESCAPES,
}


def plant(folder: Path, name: str, **fields: Any) -> None:
    value = {"format": JOB_FORMAT, **asdict(JobRecord(name=name)), **fields}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(value))
    owned(path)
    log = folder / f"{name}.log"
    log.write_bytes(ESCAPES.encode() + b"\n\xff\x1b[2J\n")
    owned(log)


@pytest.mark.parametrize("state", ["running", "done", "failed", "interrupted"])
def test_a_record_of_others_steers_no_terminal(state: str, hfship: Program, common: Path) -> None:
    plant(common, "fetch-m", state=state, exit_code=1, **HOSTILE)
    label = f"{THEM}:fetch-m"
    also = ["--also", str(common)]
    for words in (
        ["watch", "--once", *also],
        ["watch", "--once", "--json", *also],
        ["watch", "--json", "--interval", "1", label, *also],
        ["watch", "--interval", "1", *also],
    ):
        done = hfship(*words)
        require_harmless(done.stdout + done.stderr)
    env = {"HFSHIP_LOG_DIR": str(common)}
    for words in (["logs", label], ["stop", label]):
        done = hfship(*words, env=env, code=None)
        require_harmless(done.stdout + done.stderr)


def require_harmless(text: str) -> None:
    assert not set(text) & set("\x1b\x07\x9b\r\u202e"), text


def test_a_log_beside_a_record_of_others_is_theirs_or_not_shown(
    hfship: Program, common: Path, tmp_path: Path
) -> None:
    secret = private(tmp_path / "secret", "root:secret\n")
    env = {"HFSHIP_LOG_DIR": str(common)}
    for name in ("link", "pipe", "hard"):
        plant(common, name, state="done")
        (common / f"{name}.log").unlink()
    owned_link = common / "link.log"
    owned_link.symlink_to(secret)
    owned(owned_link)
    os.mkfifo(common / "pipe.log")
    (common / "hard.log").write_text("root:secret\n")  # as if a hard link could be made to ours
    for name in ("link", "pipe", "hard"):
        done = hfship("logs", f"{THEM}:{name}", env=env, code=5, timeout=20)
        assert "secret" not in done.stdout
        assert "there is no log" in done.stderr


def test_a_giant_log_of_others_is_not_read_whole(hfship: Program, common: Path) -> None:
    plant(common, "fetch-m", state="done")
    os.truncate(common / "fetch-m.log", 1 << 40)
    limits = ["bash", "-c", 'ulimit -v 4000000; exec "$@"', "-", *hfship.argv]
    words = ["logs", "--tail", "3", f"{THEM}:fetch-m"]
    env = hfship.env({"HFSHIP_LOG_DIR": str(common)})
    done = subprocess.run([*limits, *words], env=env, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0


def test_clean_makes_no_lock_through_a_link(hfship: Program, common: Path, tmp_path: Path) -> None:
    model = common / "m"
    (model / ".hfship").mkdir(parents=True)
    (model / "w.incomplete").write_text("x")
    for path in (model, model / ".hfship", model / "w.incomplete"):
        owned(path)
        os.utime(path, (0, 0))
    owned_link = model / ".hfship/lock"
    owned_link.symlink_to(tmp_path / "made")
    owned(owned_link)
    hfship("clean", "--dry-run", common, code=None)
    hfship("clean", "--yes", common, code=None)
    assert not (tmp_path / "made").exists()


# -- folders of the offline side


def test_doctor_says_whose_the_folders_should_be(theirs: Program, common: Path) -> None:
    closed = common / "closed"
    closed.mkdir()
    closed.chmod(0o755)
    env = {
        "HFSHIP_SITE_MODELS_DIR": str(closed),
        "HFSHIP_DEPLOY_DIR": str(closed / "deploy"),
        "HFSHIP_TRANSFER_DIR": str(closed),
        "PATH": "/usr/bin:/bin",
    }
    done = theirs("doctor", "--offline", "--json", env=env, code=None)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["packages"]["state"] == "ok", "packages are only read there"
    assert (found["models"]["state"], found["models"]["exit_code"]) == ("fail", 7)
    assert "may not be written to by " in found["models"]["note"]
    assert found["models"]["next"].startswith("sudo chown ")
    assert found["deployments"]["next"].startswith("sudo install -d -o ")
    assert "or export HFSHIP_DEPLOY_DIR=DIR" in found["deployments"]["next"]
