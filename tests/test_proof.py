"""What is served: as the manifest lists it, as it was signed, and as it was when it was read."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import pytest

from conftest import missing
from hfship.base.errors import HfshipError, HostError, IntegrityError
from hfship.base.manifest import Manifest
from hfship.serve import proof
from hfship.serve.model_folder import require_complete
from hfship.serve.proof import (
    PROVEN_FILE,
    PROVEN_FORMAT,
    TrustedFolder,
    hash_below,
    prove_content,
    read_proven,
    refuse_changed,
    trust_folder,
    unproven,
    write_proven,
)
from support import archives as a

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "modeling.py": b"code",
    "sub/x.json": b"[]",
}


class Served:
    """A model with a manifest, and the folder of its deployment."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder, self.deployment = tmp_path / "models/m", tmp_path / "deploy/m"
        self.manifest: Manifest = a.make_model(self.folder, FILES)
        self.warnings: List[str] = []

    def trust(self, allowed: Sequence[str] = ()) -> TrustedFolder:
        require_complete(self.folder, allowed)
        return trust_folder(self.folder, self.manifest, allowed, None, a.QUIET)

    def read(self, allowed: Sequence[str] = ()) -> List[str]:
        """Serve it once; which files were read for that."""
        trusted = self.trust(allowed)
        unread = unproven(trusted, read_proven(self.deployment))
        prove_content(trusted, unread, self.deployment, a.QUIET)
        return [entry.path for entry in unread]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.delenv("HFSHIP_KEY", raising=False)
    made = Served(tmp_path)
    time.sleep(2 * proof.SETTLED_NS / 1e9)
    return made


def same_size(path: Path) -> None:
    """Other bytes, of the same size and with the same time."""
    before = path.stat()
    path.write_bytes(path.read_bytes().swapcase()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


TOUCHED: Dict[str, Callable[[Path], Any]] = {
    "mode": lambda path: path.chmod(0o600),
    "time": lambda path: os.utime(path),
    "another file with the same bytes": replaced,
}


def test_content_is_read_once(served: Served) -> None:
    assert served.read() == sorted(FILES)
    assert served.read() == []


@pytest.mark.parametrize("case", TOUCHED)
def test_a_file_that_was_touched_is_read_again(case: str, served: Served) -> None:
    served.read()
    TOUCHED[case](served.folder / "modeling.py")
    time.sleep(2 * proof.SETTLED_NS / 1e9)
    assert served.read() == ["modeling.py"]
    assert served.read() == []


def test_a_file_that_was_written_a_moment_ago_is_not_remembered(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "SETTLED_NS", 3_600_000_000_000)
    served.read()
    assert served.read() == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_an_edit_that_keeps_size_and_time_is_found(name: str, served: Served) -> None:
    served.read()
    same_size(served.folder / name)
    if name == "config.json":  # two bytes: "}{"
        assert (served.folder / name).read_bytes() != FILES[name]
    with pytest.raises(IntegrityError, match=name):
        served.read()
    with pytest.raises(IntegrityError, match=name):  # and not forgotten
        served.read()
    if name == "model.safetensors":
        with pytest.raises(IntegrityError, match="is damaged"):
            served.read([name])
    else:
        assert served.read([name]) == []


RECORDS: Dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "of other fields": b'{"format": "hfship-proven/1", "files": {"config.json": {"size": 2}}}',
    "of no numbers": b'{"format": "hfship-proven/1", "files": {"config.json": 7}}',
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_is_none_proves_nothing(case: str, served: Served) -> None:
    served.read()
    (served.deployment / PROVEN_FILE).write_bytes(RECORDS[case])
    assert served.read() == sorted(FILES)


def test_the_record_of_another_user_is_refused(served: Served) -> None:
    if os.geteuid():
        missing("root, to give a file to another user")
    served.read()
    os.chown(served.deployment / PROVEN_FILE, 4242, 4242)
    with pytest.raises(HostError, match="belongs to user 4242"):
        served.read()


def test_a_copy_is_read_though_its_record_came_along(served: Served, tmp_path: Path) -> None:
    served.read()
    served.folder.rename(tmp_path / "models/away")
    a.make_model(served.folder, FILES)
    time.sleep(2 * proof.SETTLED_NS / 1e9)
    assert served.read() == sorted(FILES)


EXTRA: Dict[str, bool] = {  # file -> whether it is refused
    "NOTES.txt": False,
    ".git/config": False,
    ".DS_Store": False,
    "model.safetensors.incomplete": False,
    "o200k_base.tiktoken": False,
    "extra.safetensors": True,
    "sub/pytorch_model.bin": True,
    "model.safetensors.index.json": True,
    "configuration_x.py": True,
    "sub/deep/er.PY": True,
    "__pycache__/modeling.cpython-311.pyc": True,
    "chat_template.jinja": True,
    "chat_template.json": True,
    "additional_chat_templates/tool.jinja": True,
    "tokenizer_config.json": True,
    "scheduler.pkl": True,
}


@pytest.mark.parametrize("name", EXTRA)
def test_files_beside_the_listed_ones(name: str, served: Served) -> None:
    path = served.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    if not EXTRA[name]:
        assert len(served.trust().entries) == len(FILES)
        return
    with pytest.raises(IntegrityError, match="1 file that nobody vouches for") as caught:
        served.trust()
    assert name in caught.value.why and f"--allow-changed {name}" in caught.value.next_step
    assert len(served.trust([name]).entries) == len(FILES)


def linked(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to(path.with_name("aside"))


def linked_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("aside"))
    path.parent.symlink_to(path.parent.with_name("aside"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


UNUSUAL: Dict[str, Tuple[str, Callable[[Path], Any], str]] = {
    "a link": ("config.json", linked, "cannot be served"),
    "a link to weights": ("model.safetensors", linked, "cannot be served"),
    "a link to a folder": ("sub/x.json", linked_folder, "cannot be served"),
    "a pipe": ("config.json", piped, "cannot be served"),
    "nothing": ("sub/x.json", lambda path: path.unlink(), "is missing"),
    "no folder": ("sub/x.json", lambda path: path.parent.rename(path.parent.parent / "s"), "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_only_plain_files_are_served(case: str, served: Served) -> None:
    name, make, said = UNUSUAL[case]
    make(served.folder / name)
    with pytest.raises(HfshipError, match=said):
        served.trust()


LEFT: Dict[str, Tuple[str, bytes, str]] = {
    "aria2": ("model.safetensors.aria2", b"x", "not complete"),
    "modelscope": ("._____temp/model.safetensors", b"x", "not complete"),
    "git-lfs": ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\noid x\n", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_a_folder_that_nobody_vouches_for_must_look_whole(case: str, tmp_path: Path) -> None:
    name, content, said = LEFT[case]
    folder = tmp_path / "m"
    (folder / name).parent.mkdir(parents=True)
    (folder / "config.json").write_bytes(b'{"a": 1}')
    assert trust_folder(folder, None, (), None, a.QUIET) == TrustedFolder(folder)
    (folder / name).write_bytes(content)
    with pytest.raises(HfshipError, match=said) as caught:
        trust_folder(folder, None, (), None, a.QUIET)
    assert name in caught.value.why


# -- what is written, and what is said


class Said:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: List[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_what_was_proven_is_written_for_programs_and_read_back(served: Served) -> None:
    served.read()
    proven = read_proven(served.deployment)
    assert sorted(proven) == sorted(FILES)
    path = served.deployment / PROVEN_FILE
    value = json.loads(path.read_text())
    assert value["format"] == PROVEN_FORMAT and path.stat().st_mode & 0o777 == 0o600
    row = value["files"]["model.safetensors"]
    assert row["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert row["size"] == 7 and len(path.read_text().splitlines()) > len(FILES), "for people, too"
    other = served.deployment.parent / "n"
    write_proven(other, proven)
    assert read_proven(other) == proven


def test_what_is_wrong_is_not_remembered_and_what_is_right_is(served: Served) -> None:
    served.read()
    same_size(served.folder / "modeling.py")
    os.utime(served.folder / "config.json")
    time.sleep(2 * proof.SETTLED_NS / 1e9)
    with pytest.raises(IntegrityError, match="modeling.py"):
        served.read()
    assert sorted(read_proven(served.deployment)) == sorted(set(FILES) - {"modeling.py"})


def test_bytes_are_counted_as_they_are_read(served: Served) -> None:
    counted: List[int] = []
    file = hash_below(served.folder, "model.safetensors", counted.append)
    assert sum(counted) == 7 and file.settled
    assert file.sha256 == hashlib.sha256(b"weights").hexdigest()


def test_a_small_folder_is_read_as_a_whole(served: Served) -> None:
    trusted = served.trust()
    refuse_changed(trusted)
    same_size(served.folder / "modeling.py")
    with pytest.raises(IntegrityError, match="modeling.py is changed") as caught:
        refuse_changed(trusted)
    assert caught.value.why == "SHA-256 other than in the manifest"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda _: None, ""),
        (lambda folder: os.chown(folder, 4242, 4242), "is of user 4242, or open to others"),
        (lambda folder: os.chown(folder / "config.json", 4242, 4242), "is of user 4242, or open"),
        (lambda folder: (folder / "config.json").chmod(0o666), "or open to others"),
    ],
)
def test_who_else_can_change_what_is_served_is_said(
    change: Callable[[Path], Any], says: str, served: Served
) -> None:
    if os.geteuid():
        missing("root, to give a file to another user")
    change(served.folder)
    said = Said()
    trust_folder(served.folder, served.manifest, (), None, said)  # type: ignore[arg-type]
    assert len(said.warnings) == bool(says) and says in "".join(said.warnings)
