"""Errors, reporting, settings, files and the manifest: what every other section stands on."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import io
import json
import os
import pty
import re
import socket
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest
from conftest import ROOT, Program
from hypothesis import given
from hypothesis import strategies as st

import hfship

# -- the command line


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ([], 2, "the commands are: fetch, "),
        (["nonsense"], 2, "there is no command nonsense\n"),
        (["fetsh", "org/x"], 2, "did you mean fetch?"),
        (["fetch"], 2, "fetch Qwen/Qwen3-8B"),
        (["fetch", "org/x", "--limit-rate", "fast"], 2, "is not a size"),
        (["fetch", "org/x", "--endpoint", "ftp://x"], 2, "not an http"),
        (["fetch", "org/x", "-j", "0"], 2, "--jobs"),
        (["verify", "nowhere.tar.zst"], 5, "nowhere.tar.zst"),
        (["unpack", "nowhere.tar.zst"], 5, "nowhere.tar.zst"),
        (["pack", "nothing"], 5, "nothing"),
        (["serve", "nothing"], 5, "nothing"),
        (["status", "nothing"], 5, "nothing"),
    ],
)
def test_exit_codes(arguments: List[str], code: int, words: str, hfship: Program) -> None:
    assert words in hfship(*arguments, code=code).stderr


def test_every_command_explains_itself(hfship: Program) -> None:
    listing = hfship("--help").stdout
    commands = re.findall(r"^  ([a-z]+) ", listing, re.MULTILINE)
    assert len(commands) >= 10 and "exit codes" in listing
    for command in commands:
        assert "examples:" in hfship(command, "--help").stdout


def test_json_errors_are_events(hfship: Program) -> None:
    done = hfship("verify", "nowhere.tar.zst", "--progress", "json", code=5)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert events[-1]["event"] == "error" and events[-1]["exit_code"] == 5 and events[-1]["next"]


CASES: Dict[str, Any] = {  # arguments, environment, exit code
    "NAME is empty": (["pack", ""], {}, 2),
    "rate is no size": (["fetch", "x/y", "--limit-rate", "abc"], {}, 2),
    "models folder is a file": (["verify", "m"], {"HFSHIP_MODELS_DIR": "/dev/null"}, 5),
    "settings are no folder": (["fetch", "x/y", "--dry-run"], {"HF_ENDPOINT": "http://h:abc"}, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_json_errors_are_results(name: str, hfship: Program) -> None:
    arguments, env, code = CASES[name]
    done = hfship(*arguments, "--json", env=env, code=code)
    value = json.loads(done.stdout)
    row = value[0] if isinstance(value, list) else value
    assert row["exit_code"] == code and row["error"]["what"] in done.stderr


def test_what_the_system_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()

    def work() -> int:
        raise PermissionError(13, "Permission denied", b"/m\xff")

    assert hfship.guarded(hfship.Reporter("none", 0, io.StringIO(), err), work)[0] == 7
    assert "cannot use /m\udcff: permission denied" in err.getvalue()


def test_a_reader_that_goes_away_does_not_change_the_exit_code(hfship: Program) -> None:
    """The work goes on: of two models the second is the damaged one."""
    for name, content in (("good", "a"), ("bad", "b")):
        folder = hfship.home / name
        (folder / ".hfship").mkdir(parents=True)
        (folder / "f").write_text(content)
        (folder / ".hfship/manifest.json").write_text(json.dumps({**GOOD, "name": name, "files": [A_FILE]}))
    reader, writer = os.pipe()
    os.close(reader)
    argv = [*hfship.argv, "verify", str(hfship.home / "good"), str(hfship.home / "bad")]
    done = subprocess.run(argv, env=hfship.env(), stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 6 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("target, code", [("/dev/full", 7), ("-", 0)])
def test_a_result_that_cannot_be_written(target: str, code: int, hfship: Program) -> None:
    """A full disk is said; a stdout that the caller closed is not our business."""
    redirect = "1>&-" if target == "-" else f"> {target}"
    argv = ["sh", "-c", f'exec "$@" {redirect}', "sh", *hfship.argv, "version"]
    done = subprocess.run(argv, env=hfship.env(), stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


A_STAGE = """
import sys, time, hfship
with hfship.Reporter("bar").stage("pack", 40) as stage:
    for _ in range(40):
        time.sleep(0.05)
        stage.add(1)
print("done")
"""


def test_a_terminal_that_closes_below_the_bar_stops_nothing() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    argv = [sys.executable, "-c", A_STAGE]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        while b"pack" not in os.read(ours, 1000):
            pass
        os.close(ours)
        assert process.communicate(timeout=30)[0] == "done\n" and process.returncode == 0


# -- reporting

SECRETS = [
    "Authorization: Bearer hf_abcdefghijklmnop",
    "token hf_abcdefghijklmnopqrstuvwxyzABCDEFGH in a text",
    "VLLM_API_KEY=sk-abcdefghijklmnop_qrstuvwxyz-ABCDEFGHIJKLMNO",
    "https://us.aws.cdn.hf.co/x?Expires=1&Signature=abcdefghijklmnop&Key-Pair-Id=K",
    "http://user:abcdefghijklmnop@proxy:3128/",
]


@pytest.mark.parametrize("progress", ["plain", "json"])
@pytest.mark.parametrize("text", SECRETS)
def test_secrets_never_reach_any_output(text: str, progress: str, tmp_path: Path) -> None:
    out, err, log = io.StringIO(), io.StringIO(), tmp_path / "log"
    reporter = hfship.Reporter(progress, 1, out, err)
    reporter.open_log(log, "text")
    for say in (reporter.result, reporter.info, reporter.warn, reporter.detail):
        say(text)
    reporter.error(hfship.NetworkError(text, text, text))
    reporter.event("x", text=text)
    assert "abcdefghijklmnop" not in out.getvalue() + err.getvalue() + log.read_text()


def test_results_and_paths_stay_exact() -> None:
    out = io.StringIO()
    reporter = hfship.Reporter("plain", 0, out)
    value = {"path": "/hf_packages/sk-embedding-v2/m.tar.zst", "note": "HTTP 500 \"see http://h/x?y='1'\""}
    reporter.result_json(value)
    assert json.loads(out.getvalue()) == {"schema": "", **value, "note": "HTTP 500 \"see http://h/x?***'1'\""}


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_cannot_be_shown_end_nothing(encoding: str) -> None:
    out = io.BytesIO()
    reporter = hfship.Reporter("plain", 0, io.TextIOWrapper(out, encoding), io.TextIOWrapper(io.BytesIO(), encoding))
    name = "mod\xe8le-\udcff\x9b31m\x1b[2J"
    reporter.info(name)
    reporter.result(name)
    text = out.getvalue()
    assert b"\x1b" not in text and text.endswith(b"le-\\udcff?31m?[2J\n")
    reporter.result_json({"path": name})
    assert json.loads(out.getvalue()[len(text) :].decode(encoding))["path"] == name


def test_commands_are_known_by_name() -> None:
    assert "|".join(command.name for command in hfship.COMMANDS) == hfship.VERBS
    text = "no GPU that hfship knows: hfship serve m"
    assert hfship.as_typed(text) == text.replace("hfship serve", hfship.program_name() + " serve")


def test_a_deploy_folder_that_may_not_be_read_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(hfship.HostError, match="cannot read"):
        hfship.list_deployments(tmp_path, hfship.Reporter("none", -1))


def test_other_programs_get_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in hfship.run_program(["env"]).out
    assert "hf_secret" in hfship.run_program(["env"], env={"HF_TOKEN": "hf_secret"}).out


@pytest.mark.parametrize(
    "url", ["http://h:abc", "http://[::1", "http://a..b", "ftp://h", "http://", "http://h\n", "http://h:70000", "h"]
)
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(hfship.UsageError, match="is not an http"):
        hfship.load_settings({}, url)


def test_an_endpoint_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(hfship.UsageError, match="user name") as caught:
        hfship.load_settings({"HF_ENDPOINT": "http://bob:hunter2@hub"})
    assert "hunter2" not in caught.value.text()


def test_registered_secrets_are_hidden_whatever_they_look_like() -> None:
    err = io.StringIO()
    reporter = hfship.Reporter("plain", 0, err=err)
    reporter.hide("plain words")
    reporter.info("these are plain words")
    assert err.getvalue() == "these are ***\n"


def test_a_bug_is_told_without_secrets() -> None:
    err = io.StringIO()
    reporter = hfship.Reporter(progress="none", err=err)
    reporter.hide("plain words")
    try:
        try:
            raise ValueError("GET https://cdn/x?Signature=abcdef")
        except ValueError as exc:
            raise KeyError("plain words") from exc
    except KeyError as exc:
        reporter.bug(KeyError, exc, exc.__traceback__)
    said = err.getvalue()
    assert "Traceback" in said and "test_core.py" in said and "KeyError" in said and "https://cdn/x" in said
    assert "abcdef" not in said and "plain words" not in said


def test_a_token_does_not_show_in_its_repr() -> None:
    assert "secret" not in repr(hfship.Token("secret", "here"))


# -- settings


@pytest.mark.parametrize(
    "env, expected",
    [
        ({"HF_TOKEN": " hf_a \n"}, ("hf_a", "environment variable HF_TOKEN")),
        ({"HUGGING_FACE_HUB_TOKEN": "hf_b"}, ("hf_b", "environment variable HUGGING_FACE_HUB_TOKEN")),
        ({"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "hf_b"}, ("hf_b", "environment variable HUGGING_FACE_HUB_TOKEN")),
        ({"HF_TOKEN": "hf_a", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, None),
        ({"HF_TOKEN_PATH": "{tmp}/token"}, ("hf_file", "file {tmp}/token")),
        ({"HF_HOME": "{tmp}"}, ("hf_file", "file {tmp}/token")),
        ({"XDG_CACHE_HOME": "{tmp}/cache"}, ("hf_xdg", "file {tmp}/cache/huggingface/token")),
        ({"HF_HOME": "{tmp}/nowhere"}, None),
    ],
)
def test_token_sources(env: Dict[str, str], expected: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_file\n")
    (tmp_path / "cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "cache" / "huggingface" / "token").write_text("hf_xdg")
    found = hfship.find_token({key: value.format(tmp=tmp_path) for key, value in env.items()})
    assert (found and (found.value, found.source)) == (expected and (expected[0], expected[1].format(tmp=tmp_path)))


def test_folders_come_from_the_environment() -> None:
    settings = hfship.load_settings({"HFSHIP_MODELS_DIR": "~/m", "HF_ENDPOINT": "http://mirror/"})
    assert settings.models_dir == Path.home() / "m" and settings.endpoint == "http://mirror"
    assert settings.site_models_dir == Path("/data/models/huggingface")


# -- files


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "x"
    hfship.atomic_write(target, "old", 0o600)
    assert target.stat().st_mode & 0o777 == 0o600
    (tmp_path / "folder").mkdir()
    with pytest.raises(hfship.DiskError):
        hfship.atomic_write(tmp_path / "folder", "new")
    assert target.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["folder", "x"]


def test_room_is_checked_against_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    hfship.require_room(tmp_path / "a" / "b", 1, 1, "test", "")
    with pytest.raises(hfship.DiskError, match="needed"):
        hfship.require_room(tmp_path / "a" / "b", 1 << 60, 1, "test", "")


def test_missing_program_is_named() -> None:
    with pytest.raises(hfship.HostError, match="no-such-program is not installed"):
        hfship.run_program(["no-such-program"])


def test_a_lock_is_exclusive_and_released(tmp_path: Path) -> None:
    with hfship.FolderLock(tmp_path), pytest.raises(hfship.IncompleteError, match="in use"), hfship.FolderLock(
        tmp_path
    ):
        pass
    with hfship.FolderLock(tmp_path):
        pass
    assert os.listdir(tmp_path / ".hfship") == ["lock"]


@pytest.mark.parametrize(
    "owner, age_s, outcome",
    [
        ({"host": "{here}", "pid": 1, "start": "{start}", "boot_id": "{boot}"}, 999, "in use"),
        ({"host": "{here}", "pid": 1, "start": "12345", "boot_id": "{boot}"}, 0, "taken"),  # the pid was reused
        ({"host": "{here}", "pid": 1, "start": "{start}", "boot_id": "before"}, 0, "taken"),  # rebooted since
        ({"host": "another", "pid": 1, "start": "1", "boot_id": "x"}, 5, "in use"),
        ({"host": "another", "pid": 1, "start": "1", "boot_id": "x"}, 70, "taken, doubtful"),
        ({"host": "another", "pid": 1, "start": "1", "boot_id": "{boot}"}, 0, "taken"),  # a container that is gone
        ("garbage", 70, "taken"),  # whoever lives would have seen it
        ("", 5, "in use"),
        ("[" * 100_000, 70, "taken"),
        ({"host": "{here}", "pid": "abc", "start": "", "boot_id": "{boot}"}, 5, "in use"),
    ],
)
def test_a_lease_ends_with_its_owner(owner: Any, age_s: float, outcome: str, tmp_path: Path) -> None:
    """The lease decides where flock does nothing, as on some network filesystems."""
    (tmp_path / ".hfship").mkdir()
    here = {"{here}": socket.gethostname(), "{start}": hfship.process_start(1), "{boot}": hfship.boot_id()}
    lease = tmp_path / ".hfship" / "lease"
    if isinstance(owner, dict):
        owner = json.dumps({key: here.get(value, value) for key, value in owner.items()})
    lease.write_text(owner)
    os.utime(lease, (time.time() - age_s,) * 2)
    if outcome == "in use":
        with pytest.raises(hfship.IncompleteError, match="in use"), hfship.FolderLock(tmp_path):
            pass
    else:
        with hfship.FolderLock(tmp_path) as lock:
            assert lock.doubtful == ("doubtful" in outcome)


def test_a_full_disk_leaves_no_torn_lease(small_disk: Any) -> None:
    disk = small_disk(1)
    (disk / ".hfship").mkdir()
    (disk / ".hfship" / "lock").touch()
    with pytest.raises(OSError, match="No space"):
        (disk / "filler").write_bytes(bytes(2 << 20))
    with pytest.raises(hfship.DiskError, match="full"), hfship.FolderLock(disk):
        pass
    assert os.listdir(disk / ".hfship") == ["lock"]


def test_whoever_lost_the_lease_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hfship, "LEASE_BEAT_S", 0.01)
    lost = threading.Event()
    with hfship.FolderLock(tmp_path, lost.set):
        (tmp_path / ".hfship" / "lease").write_text('{"host": "another"}')
        assert lost.wait(5)
    assert (tmp_path / ".hfship" / "lease").exists()  # it is not ours to remove


# -- manifest

entries = st.builds(
    hfship.FileEntry,
    st.from_regex(r"[a-zA-Z0-9_ü-]{1,8}(/[a-z.]{3,8}){0,2}", fullmatch=True),
    st.integers(0, 2**50),
    st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)


@given(st.lists(entries, max_size=8, unique_by=lambda entry: entry.path))
def test_manifest_survives_its_text(files: List[Any]) -> None:
    try:
        hfship.check_distinct_paths(entry.path for entry in files)
        for entry in files:
            hfship.check_relative_path(entry.path)
    except ValueError:
        return
    manifest = hfship.make_manifest("m", files)
    assert hfship.parse_manifest(manifest.to_json(), "here") == manifest
    assert hfship.parse_manifest(manifest.to_json(), "here").to_json() == manifest.to_json()


SOURCE = {"endpoint": "https://hub", "repo": "a/b", "revision": "main", "resolved_repo": "a/b", "commit": "0" * 40}
WRONG_SOURCES: List[Dict[str, Any]] = [
    {"repo": "--trust-remote-code"},
    {"repo": 7},
    {"resolved_repo": "../../x?y"},
    {"commit": "0" * 40 + "\r\nSet-Cookie: x"},
    {"commit": "0" * 40 + "\n"},
    {"repo_type": "planet"},
    {"license": ["mit"]},
    {"revision": "v\x1b[2J"},
    {"gated": None},
]
A_FILE = {"path": "f", "size": 1, "sha256": hashlib.sha256(b"a").hexdigest()}
GOOD = {
    "format": "hfship-manifest/1",
    "name": "m",
    "source": None,
    "files": [{"path": "a", "size": 1, "sha256": "0" * 64}],
    "totals": {"files": 1, "bytes": 1},
}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "hfship-manifest/2"},
        {"name": "../m"},
        {"files": [{"path": "../a", "size": 1, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": -1, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": True, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": 1, "sha256": "0" * 63}]},
        {"files": [{"path": "a", "size": 1, "sha256": "0" * 64}] * 2},
        {"files": [{"path": p, "size": 1, "sha256": "0" * 64} for p in ("a", "a/b")]},
        {"files": None},
        {"source": {"surprise": 1}},
        {"name": "evil\n"},
        {"files": [{"path": "a", "size": 1, "sha256": "0" * 64 + "\n"}]},
        *({"source": {**SOURCE, **change}} for change in WRONG_SOURCES),
    ],
)
def test_a_lying_manifest_is_refused(change: Dict[str, Any]) -> None:
    hfship.parse_manifest(json.dumps({**GOOD, "source": SOURCE}), "here")
    with pytest.raises(hfship.IntegrityError):
        hfship.parse_manifest(json.dumps({**GOOD, **change}), "here")


def test_a_deep_manifest_is_refused() -> None:
    with pytest.raises(hfship.IntegrityError):
        hfship.parse_manifest("[" * 100_000, "here")


@given(st.binary(max_size=200))
def test_garbage_is_no_manifest(text: bytes) -> None:
    with pytest.raises(hfship.IntegrityError):
        hfship.parse_manifest(text, "here")


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(hfship.DiskError, match="secret: permission denied"):
        hfship.content_files(tmp_path)


def test_content_leaves_out_what_is_not_the_model(tmp_path: Path) -> None:
    for path in ("a/b", "c", ".hfship/x", ".cache/huggingface/y", ".git/z", "d.incomplete"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert hfship.content_files(tmp_path) == [("a/b", 1), ("c", 1), ("link", 1)]
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(hfship.IntegrityError, match="not a file"):
        hfship.content_files(tmp_path)


# -- the house rules


def functions() -> Dict[str, int]:
    """Lines of each function of hfship.py, without its docstring."""
    tree = ast.parse((ROOT / "hfship.py").read_text())
    sizes = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            sizes[f"{node.name}:{node.lineno}"] = (node.end_lineno or 0) - node.lineno + 1
    return sizes


def test_functions_stay_small() -> None:
    sizes = functions()
    assert max(sizes.values()) <= 60, max(sizes, key=lambda name: sizes[name])
    assert statistics.median(sizes.values()) <= 12


def test_sections_use_only_those_above() -> None:
    """The file reads like a book: names at module level are defined before the sections that use them in defaults,
    bases and decorators (Python itself checks that), and sections are in order."""
    numbers = [int(n) for n in re.findall(r"^# §(\d+) ", (ROOT / "hfship.py").read_text(), re.MULTILINE)]
    assert numbers == sorted(numbers) and len(numbers) == len(set(numbers))


def test_only_the_reporter_prints() -> None:
    tree = ast.parse((ROOT / "hfship.py").read_text())
    reporter = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Reporter")
    inside = range(reporter.lineno, (reporter.end_lineno or 0) + 1)
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Name) and node.id == "print"), f"line {node.lineno} prints"
        if isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr") and isinstance(node.value, ast.Name):
            assert node.value.id != "sys" or node.lineno in inside, f"line {node.lineno} writes by itself"


@pytest.mark.parametrize("doing, step", [("write", "-o DIR"), ("read", "as its owner"), ("use", "as its owner")])
def test_no_other_folder_is_proposed_where_a_command_takes_none(doing: str, step: str) -> None:
    assert step in hfship.disk_error(PermissionError(13, "Permission denied"), doing, Path("/x")).next_step


@pytest.mark.parametrize("words, code", [("unpack -o out", 5), ("verify", 2), ("push m", 2), ("clean --yes", 2)])
def test_an_unset_variable_does_not_mean_the_current_folder(
    words: str, code: int, model: Path, hfship: Program, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    hfship("pack", model, "-o", here, "--name", "m")
    left = here / "x.tar.zst.incomplete"
    left.touch()
    os.utime(left, (0, 0))
    before = sorted(here.iterdir())
    hfship(*words.split(), "", code=code, cwd=here)
    assert sorted(here.iterdir()) == before
