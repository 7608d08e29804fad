"""What the mirror serves of a folder: what is listed, as it was proven, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

from conftest import Program
from hfship.base.below import identity_of
from hfship.base.files import sha256_file
from hfship.base.manifest import Source, read_manifest, write_manifest
from hfship.hub.protocol import RemoteFile
from hfship.hub.verified import FileHasher, VerifiedLog, hash_file
from hfship.ops.catalogue import RepoCatalogue
from hfship.ops.mirror_repo import ChangedError, MirrorRepo, read_proof
from test_http import serving
from test_mirror import TINY, get, publish, wait_until

SHARD = "model-00001-of-00002.safetensors"


def same_times(path: Path, write: Callable[[Path], Any]) -> None:
    """Change a file and give it back its times, as far as a program can."""
    status = path.stat()
    write(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def link_to(target: Path) -> Callable[[Path], Any]:
    def harm(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return harm


def hard_link_to_secret(path: Path) -> None:
    secret = path.parent.parent / "secret"
    secret.write_bytes(path.read_bytes().replace(b"{", b"["))
    path.unlink()
    os.link(secret, path)


def folder_as_link(path: Path) -> None:
    """The model's folder becomes a link to one that has the same names."""
    folder = path.parent
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name("elsewhere"))
    flip_byte(folder / path.name)


# What happens to config.json while the mirror runs.
SWAPS: Dict[str, Callable[[Path], Any]] = {
    "a link to a file outside": link_to(Path("/etc/passwd")),
    "a link to a twin": lambda path: (
        shutil.copy(path, path.with_name("twin")),
        link_to(path.with_name("twin"))(path),
    ),
    "a hard link to another file": hard_link_to_secret,
    "other bytes": flip_byte,
    "other bytes, the times kept": lambda path: same_times(path, flip_byte),
    "more bytes": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "another file of the same name": lambda path: (
        path.with_name("x").write_bytes(path.read_bytes()[::-1]),
        os.replace(path.with_name("x"), path),
    ),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "the folder is a link": folder_as_link,
}


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("swap", SWAPS)
def test_what_changes_after_the_scan_is_not_served(
    swap: str, with_manifest: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, before the next scan sees it: no byte and no etag of it; and it is said."""
    monkeypatch.setattr("hfship.ops.catalogue.RESCAN_S", 3600.0)
    root = tmp_path / "site"
    folder = publish(root, "tiny", model, TINY if with_manifest else None)
    repo = "org/tiny" if with_manifest else "tiny"
    said: List[str] = []
    with serving(root) as server:
        server.catalogue._say = said.append
        url = f"{server.url}/{repo}/resolve/main/config.json"
        status, headers, content = get(url)
        assert status == 200 and content == (model / "config.json").read_bytes()
        SWAPS[swap](folder / "config.json")
        again, other, body = get(url, "HEAD")
        assert again in (503, 404) and "ETag" not in other
        again, other, body = get(url)
        if with_manifest:
            assert again in (503, 404)
        # Without one it is another version, if it is a file at all.
        assert again != 200 or other["ETag"] != headers["ETag"]
        assert b"root:" not in body
    assert any("config.json" in line and "not served" in line for line in said), said


def test_a_file_that_is_only_touched_is_served_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are read anew, and are right; the other files are not read."""
    folder = publish(tmp_path, "tiny", model, TINY)
    read: List[str] = []
    monkeypatch.setattr(
        "hfship.ops.mirror_repo.read_proof",
        lambda folder, path, *count: (read.append(path), read_proof(folder, path, *count))[1],
    )
    said: List[str] = []
    with serving(tmp_path) as server:
        server.catalogue._say = said.append
        url = f"{server.url}/org/tiny/resolve/main/config.json"
        assert get(url)[0] == 200
        read.clear()
        (folder / "config.json").chmod(0o600)
        wait_until(lambda: get(url)[0] == 200 and read)
        assert read == ["config.json"]
    assert [line.partition(" ")[0] for line in said] in ([], ["not", "new:"])


def test_bytes_that_change_while_they_are_sent_do_not_reach_their_end(
    model: Path, tmp_path: Path
) -> None:
    """The client gets fewer than it was promised: it cannot take them for the file."""
    folder = publish(tmp_path, "tiny", model, TINY)
    big = folder / "big.bin"
    big.write_bytes(bytes(48 << 20))
    (folder / ".hfship/manifest.json").unlink()
    with serving(tmp_path) as server:
        client = socket.create_connection(("127.0.0.1", server.server_address[1]))
        client.sendall(b"GET /tiny/resolve/main/big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        received = len(client.recv(1 << 10))
        with big.open("r+b") as stream:
            stream.seek(20 << 20)
            stream.write(b"other")
        while piece := client.recv(1 << 20):
            received += len(piece)
        client.close()
    assert (40 << 20) < received < (48 << 20)


# What lies beside the files of a model, and is not of it.
BESIDE: Dict[str, Callable[[Path], Any]] = {
    ".env": lambda path: path.write_text("HF_TOKEN=hf_secret"),
    ".git/config": lambda path: path.write_text("[core]"),
    ".hfd/aria2c_urls.txt": lambda path: path.write_text("hf_secret"),
    ".config.json.swp": lambda path: path.write_text("hf_secret"),
    ".cache/huggingface/token": lambda path: path.write_text("hf_secret"),
    ".hfship/notes": lambda path: path.write_text("{}"),
    "sub/.ssh/id_ed25519": lambda path: path.write_text("hf_secret"),
}


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_hidden_files_beside_a_model_are_not_served(
    name: str, with_manifest: bool, model: Path, tmp_path: Path
) -> None:
    folder = publish(tmp_path, "tiny", model, TINY if with_manifest else None)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    BESIDE[name](folder / name)
    repo = "org/tiny" if with_manifest else "tiny"
    with serving(tmp_path) as server:
        assert get(f"{server.url}/{repo}/resolve/main/{name}")[0] == 404
        tree = get(f"{server.url}/api/models/{repo}/tree/main?recursive=1")[2]
        info = get(f"{server.url}/api/models/{repo}")[2]
        assert json.loads(tree) and name.encode() not in tree + info


EXTRA: Dict[str, Callable[[Path], Any]] = {
    "a file": lambda path: path.write_text("x"),
    "a link to a file": lambda path: path.symlink_to("/etc/passwd"),
    "a link to nothing": lambda path: path.symlink_to("/nowhere"),
    "a link to a folder": lambda path: path.symlink_to("/etc"),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", EXTRA)
def test_what_no_manifest_lists_is_told_and_not_served(
    kind: str, model: Path, tmp_path: Path
) -> None:
    """The model is, as its manifest says."""
    folder = publish(tmp_path, "tiny", model, TINY)
    EXTRA[kind](folder / "extra.txt")
    said: List[str] = []
    catalogue = RepoCatalogue(tmp_path, said.append)
    repo = catalogue.find("model", "org/tiny")
    manifest = read_manifest(folder)
    assert repo and manifest and list(repo.files) == [entry.path for entry in manifest.files]
    assert "extra.txt" in catalogue.left_out["tiny: other files"]
    assert [line for line in said if "extra.txt" in line and line.startswith("not served: ")]
    (folder / "extra.txt").unlink()
    catalogue.forget()
    catalogue.index()
    assert catalogue.left_out == {}


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_model_with_links_for_files_is_not_served(
    with_manifest: bool, inside: bool, model: Path, tmp_path: Path
) -> None:
    folder = publish(tmp_path / "site", "tiny", model, TINY if with_manifest else None)
    target = folder / "generation.json" if inside else tmp_path / "outside"
    (folder / "config.json").rename(target)
    (folder / "config.json").symlink_to(target)
    catalogue = RepoCatalogue(tmp_path / "site")
    assert not catalogue.repos()
    assert "config.json is a symbolic link" in catalogue.left_out["tiny"]


def test_a_folder_of_links_is_not_served(model: Path, tmp_path: Path) -> None:
    folder = publish(tmp_path / "site", "tiny", model)
    (folder / "sub").symlink_to("/etc")
    catalogue = RepoCatalogue(tmp_path / "site")
    assert not catalogue.repos() and "sub" in catalogue.left_out["tiny"]


def test_a_model_may_lie_behind_a_link(model: Path, tmp_path: Path) -> None:
    """The models folder is the operator's: he may collect models from several disks in it."""
    publish(tmp_path / "disk", "tiny", model, TINY)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/tiny").symlink_to(tmp_path / "disk/tiny")
    with serving(tmp_path / "site") as server:
        assert get(f"{server.url}/org/tiny/resolve/main/config.json")[0] == 200


# -- whole models


def partial_manifest(folder: Path, without: str, **fields: Any) -> None:
    """The manifest of a selection, as fetch --include writes it."""
    (folder / without).unlink()
    manifest = read_manifest(folder)
    assert manifest
    kept = [entry for entry in manifest.files if entry.path != without]
    write_manifest(folder, replace(manifest, files=tuple(kept), **fields))


# what happened to a folder -> why it is not offered
PARTIAL: Dict[str, Tuple[Callable[[Path], Any], str]] = {
    "fetch recorded it": (
        lambda folder: partial_manifest(folder, "README.md", partial=("w.safetensors",)),
        "w.safetensors missing",
    ),
    "a shard that its index names": (
        lambda folder: partial_manifest(folder, SHARD),
        f"{SHARD} missing",
    ),
    "nobody has a manifest": (
        lambda folder: (shutil.rmtree(folder / ".hfship"), (folder / SHARD).unlink()),
        f"{SHARD} missing",
    ),
    "an index of other names": (
        lambda folder: (
            shutil.rmtree(folder / ".hfship"),
            (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "other.safetensors"}}'
            ),
        ),
        "other.safetensors missing",
    ),
    "an index that is none": (
        lambda folder: (
            shutil.rmtree(folder / ".hfship"),
            (folder / "model.safetensors.index.json").write_text("{}"),
        ),
        "index.json is damaged",
    ),
}


@pytest.mark.parametrize("case", PARTIAL)
def test_a_model_without_all_its_weights_is_not_offered(
    case: str, model: Path, tmp_path: Path
) -> None:
    harm, words = PARTIAL[case]
    harm(publish(tmp_path, "tiny", model, TINY))
    catalogue = RepoCatalogue(tmp_path)
    assert not catalogue.repos() and words in catalogue.left_out["tiny"]


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeros_behind_the_header(path: Path) -> None:
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header] + bytes(len(content) - header))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 1\n"
# what another program left behind -> what is said
UNFINISHED: Dict[str, Tuple[Callable[[Path], Any], str]] = {
    "aria2": (lambda f: (f / f"{SHARD}.aria2").write_bytes(b"x"), "aria2"),
    "modelscope": (
        lambda f: ((f / "._____temp").mkdir(), (f / "._____temp" / SHARD).touch()),
        "modelscope",
    ),
    "wget": (lambda f: (f / f"{SHARD}.part").touch(), "not complete"),
    "a browser": (lambda f: (f / "model.crdownload").touch(), "browser"),
    "rsync": (lambda f: (f / f".{SHARD}.aB3dE6").touch(), "rsync"),
    "huggingface_hub": (lambda f: (f / "model.safetensors.incomplete").touch(), "huggingface_hub"),
    "git without lfs": (lambda f: (f / SHARD).write_text(POINTER), "git-lfs"),
    "a shard that is cut": (lambda f: cut_in_half(f / SHARD), SHARD),
    "a shard of zeros": (lambda f: zeros_behind_the_header(f / SHARD), "zeros"),
    "a page of a proxy": (lambda f: (f / "config.json").write_text("<html>"), "not JSON"),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_what_another_program_left_unfinished_is_not_offered(
    case: str, model: Path, tmp_path: Path
) -> None:
    """Until it is finished."""
    harm, words = UNFINISHED[case]
    folder = publish(tmp_path, "tiny", model)
    harm(folder)
    catalogue = RepoCatalogue(tmp_path)
    assert not catalogue.repos() and words in catalogue.left_out["tiny"]
    shutil.rmtree(folder)
    publish(tmp_path, "tiny", model)
    catalogue.forget()
    assert catalogue.repos() and not catalogue.left_out


@pytest.mark.parametrize("case", ["aria2", "rsync", "a browser"])
def test_what_is_left_beside_a_model_with_a_manifest_does_not_matter(
    case: str, model: Path, tmp_path: Path
) -> None:
    folder = publish(tmp_path, "tiny", model, TINY)
    UNFINISHED[case][0](folder)
    catalogue = RepoCatalogue(tmp_path)
    assert catalogue.repos() and list(catalogue.left_out) == ["tiny: other files"]


def test_a_selection_that_needs_no_more_is_offered(model: Path, tmp_path: Path) -> None:
    """Files that somebody chose to do without, but no weights that others belong to."""
    folder = publish(tmp_path, "tiny", model, TINY)
    partial_manifest(folder, "README.md", left_out=1, left_out_paths=("README.md",))
    (repo,) = RepoCatalogue(tmp_path).repos()
    assert "README.md" not in repo.files and SHARD in repo.files


# -- proofs


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_changed_content_with_its_old_times_is_found_at_the_start(
    name: str, model: Path, tmp_path: Path
) -> None:
    folder = publish(tmp_path, "tiny", model, TINY)
    same_times(folder / name, flip_byte)
    catalogue = RepoCatalogue(tmp_path)
    assert not catalogue.repos() and f"{name} differs" in catalogue.left_out["tiny"]


def remember(folder: Path, name: str, sha256: str) -> None:
    """A line of verified.jsonl, as fetch writes it."""
    remote = RemoteFile(name, (folder / name).stat().st_size, "", sha256)
    hasher = FileHasher(remote)
    status = hash_file(folder / name, hasher, lambda _: None)
    VerifiedLog(folder).add(remote, status, hasher)


def test_what_fetch_proved_is_not_read_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it believed once it was touched, or came from elsewhere."""
    folder = publish(tmp_path / "site", "tiny", model, TINY)
    remember(folder, SHARD, sha256_file(folder / SHARD))
    read: List[str] = []
    monkeypatch.setattr(
        "hfship.ops.mirror_repo.read_proof",
        lambda folder, path, *count: (read.append(path), read_proof(folder, path, *count))[1],
    )
    assert RepoCatalogue(tmp_path / "site").repos() and SHARD not in read
    shutil.copytree(tmp_path / "site", tmp_path / "copy", copy_function=shutil.copy2)
    assert RepoCatalogue(tmp_path / "copy").repos() and SHARD in read
    read.clear()
    same_times(folder / SHARD, flip_byte)
    assert not RepoCatalogue(tmp_path / "site").repos() and SHARD in read


def test_a_record_of_other_content_is_not_believed(model: Path, tmp_path: Path) -> None:
    folder = publish(tmp_path, "tiny", model, TINY)
    right = sha256_file(folder / SHARD)
    flip_byte(folder / SHARD)
    remote = RemoteFile(SHARD, (folder / SHARD).stat().st_size, "", right)
    hasher = FileHasher(remote)
    status = hash_file(folder / SHARD, hasher, lambda _: None)
    VerifiedLog(folder).add(remote, status, hasher)  # whoever wrote this had proven nothing
    assert not RepoCatalogue(tmp_path).repos()


def test_a_file_that_is_written_while_it_is_read_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(3 << 20))
    identities = iter([1, 2])
    monkeypatch.setattr(
        "hfship.ops.mirror_repo.identity_of",
        lambda status: identity_of(status)._replace(ctime_ns=next(identities)),
    )
    with pytest.raises(Exception, match="not complete"):
        read_proof(tmp_path, "x.bin")


def test_opening_what_is_not_proven(model: Path, tmp_path: Path) -> None:
    folder = publish(tmp_path, "tiny", model, TINY)
    (repo,) = RepoCatalogue(tmp_path).repos()
    with repo.opened("config.json") as fd:
        assert os.read(fd, 1) == b"{"
    flip_byte(folder / "config.json")
    with pytest.raises(ChangedError, match="config.json has changed"), repo.opened("config.json"):
        pass


def test_long_proofs_hold_up_nobody(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is proven is served while the next model is still read; the others are not denied."""
    publish(tmp_path, "a", model, {**TINY, "repo": "org/a"})
    publish(tmp_path, "b", model, {**TINY, "repo": "org/b"})
    monkeypatch.setattr("hfship.ops.catalogue.FIRST_SCAN_S", 0.5)
    monkeypatch.setattr("hfship.ops.mirror_repo.LONG_READ", 1)
    go_on = threading.Event()

    def slow(folder: Path, *more: Any) -> Any:
        if folder.name == "b":
            go_on.wait(30)
        return read_proof(folder, *more)

    monkeypatch.setattr("hfship.ops.mirror_repo.read_proof", slow)
    said: List[str] = []
    with serving(tmp_path) as server:
        server.catalogue._say = said.append
        assert get(f"{server.url}/api/models/org/a")[0] == 200
        status, headers, _ = get(f"{server.url}/api/models/org/b")
        assert status == 503 and headers["Retry-After"] and not server.catalogue.is_complete
        assert "reading" in said[-1]
        go_on.set()
        wait_until(lambda: get(f"{server.url}/api/models/org/b")[0] == 200)
        assert get(f"{server.url}/api/models/org/c")[0] == 404


def test_a_withdrawn_file_is_said_by_the_running_mirror(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    """In its log, and in what it lists; --json lists what was left out from the start."""
    folder = publish(tmp_path / "site", "tiny", model, TINY)
    (folder / "notes.txt").write_text("mine")
    process = hfship.start("mirror", tmp_path / "site", "--port", 0, "--json")
    try:
        assert process.stdout
        text = ""
        while not text.endswith("}\n") or text.count("{") != text.count("}"):
            text += process.stdout.readline()
        row = json.loads(text)
        assert row["repos"] == ["org/tiny"] and "notes.txt" in row["left_out"]["tiny: other files"]
        url = row["url"]
        same_times(folder / "config.json", flip_byte)
        wait_until(lambda: get(f"{url}/api/models/org/tiny")[0] == 404)
        assert "config.json differs" in get(url)[2].decode()
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert "not served" in said and "config.json differs" in said


# -- Xet


def test_the_mirror_is_no_xet_store(model: Path, tmp_path: Path) -> None:
    """Clients would ask for a hash of Xet at a store that is not there."""
    publish(tmp_path, "tiny", model, TINY)
    with serving(tmp_path) as server:
        for path in (
            f"/org/tiny/resolve/main/{SHARD}",
            "/api/models/org/tiny",
            "/api/models/org/tiny/tree/main?recursive=1",
            "/api/models",
        ):
            status, headers, body = get(server.url + path)
            assert status == 200 and not [name for name in headers if "xet" in name.lower()]
            assert b"xet" not in body.lower() or path.endswith(SHARD)
        token = get(f"{server.url}/api/models/org/tiny/xet-read-token/main")
        assert token[0] == 404


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("gone", "sub/w has gone"),
        ("its folder is gone", "sub/w has gone"),
        ("its folder is a file", "sub/w has changed: "),
        ("its folder is a link", "sub/w has changed: "),
        ("a link", "sub/w has changed: "),
        ("a pipe", "sub/w has changed: "),
        ("other bytes", "sub/w has changed"),
    ],
)
def test_a_file_is_opened_while_it_is_what_was_proven(harm: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "m/sub/w"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    source = Source("", "m", "main", "m", "c" * 40)
    files = {"sub/w": RemoteFile("sub/w", 7, "1" * 40)}
    repo = MirrorRepo(source, tmp_path / "m", files, {"sub/w": identity_of(path.stat())})
    fds = set(os.listdir("/proc/self/fd"))
    with repo.opened("sub/w") as fd:
        assert os.read(fd, 9) == b"weights"
    if harm == "gone":
        path.unlink()
    elif harm == "other bytes":
        path.write_bytes(b"others!")
    elif harm.startswith("its folder"):
        path.parent.rename(tmp_path / "elsewhere")
        if harm == "its folder is a file":
            path.parent.write_text("x")
        elif harm == "its folder is a link":
            path.parent.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        if harm == "a link":
            path.symlink_to("/etc/hostname")
        else:
            os.mkfifo(path)
    with pytest.raises(ChangedError) as told, repo.opened("sub/w"):
        pass
    assert str(told.value).startswith(said)
    assert set(os.listdir("/proc/self/fd")) == fds
