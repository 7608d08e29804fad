"""Folders that another program left unfinished, and what of a folder never travels."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from conftest import Program
from hfship.archive.pack_manifest import PRIVATE
from hfship.base import wholeness
from hfship.base.errors import IncompleteError, IntegrityError
from hfship.base.manifest import read_manifest
from hfship.base.wholeness import _wrong_with, find_faults, leftovers, require_whole
from support import archives as a

MB = 1 << 20
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"
)
XET = b"# xet version 0\nfilesize = 123\nhash = 'abc'\n"
TOKEN = b"hf_" + b"AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"


def torch_file(size: int = 40_000) -> bytes:
    """What torch.save makes: a zip that is not compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data/0", a.noise(size))
    return stream.getvalue()


def index(*shards: str) -> bytes:
    weight_map = {f"w{number}": shard for number, shard in enumerate(shards)}
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
WHOLE: Dict[str, bytes] = {
    "config.json": b'{"model_type": "tiny"}',
    "model.safetensors.index.json": index(*SHARDS),
    SHARDS[0]: a.tensors(a.noise(MB, 1)),
    SHARDS[1]: a.tensors(a.noise(MB, 2)),
    "2_Dense/pytorch_model.bin": torch_file(),
    "tokenizer.model": bytes(50_000),  # whatever: no weights
    "training_args.bin": b"\x80\x02",
    "weights.gguf": a.noise(5000),
}
CUT = WHOLE[SHARDS[1]][:-1000]
GAP = WHOLE[SHARDS[0]][: MB // 2] + bytes(MB // 2)
SEGMENT = WHOLE[SHARDS[0]][:300_000] + bytes(200_000) + WHOLE[SHARDS[0]][500_000:]
HTML = b"<!DOCTYPE html><html>please log in</html>" * 50

# What is wrong: files that are there instead of, or besides, those of WHOLE (None: is missing), the
# exit code, and the file that is named.
FAULTS: Dict[str, Tuple[Dict[str, Any], int, str]] = {
    "aria2, with room reserved": ({f"{SHARDS[1]}.aria2": b"\0"}, 3, f"{SHARDS[1]}.aria2"),
    "modelscope": ({f"._____temp/{SHARDS[1]}": b"x"}, 3, f"._____temp/{SHARDS[1]}"),
    "curl": ({"x.safetensors.part": b"x"}, 3, "x.safetensors.part"),
    "Chrome": ({"Unconfirmed 1234.crdownload": b"x"}, 3, "Unconfirmed 1234.crdownload"),
    "rsync": ({f".{SHARDS[1]}.aB3dE9": b"x"}, 3, f".{SHARDS[1]}.aB3dE9"),
    "rsync, partial folder": ({f".rsync-partial/{SHARDS[1]}": b"x"}, 3, ".rsync-partial/"),
    "rclone": ({f"{SHARDS[1]}.1b2c3d4e.partial": b"x"}, 3, ".partial"),
    "the AWS client": ({f"{SHARDS[1]}.6D3bE1fA": b"x"}, 3, f"{SHARDS[1]}.6D3bE1fA"),
    "in a folder": ({"sub/deep/w.bin.aria2": b""}, 3, "sub/deep/w.bin.aria2"),
    "a shard is missing": ({SHARDS[1]: None}, 3, SHARDS[1]),
    "a shard, without an index": (
        {SHARDS[1]: None, "model.safetensors.index.json": None}, 3, SHARDS[1],
    ),
    "a shard of pickles": (
        {"p/pytorch_model.bin.index.json": index("a.bin", "b.bin"), "p/a.bin": torch_file()}, 3, "p/b.bin",
    ),
    "cut": ({SHARDS[1]: CUT}, 6, f"{SHARDS[1]} is damaged: the file is cut"),
    "cut in its header": ({SHARDS[1]: CUT[:50]}, 6, f"{SHARDS[1]} is damaged: the file is cut"),
    "empty": ({SHARDS[1]: b""}, 6, f"{SHARDS[1]} is damaged"),
    "too long": ({SHARDS[1]: WHOLE[SHARDS[1]] + b"x" * 10}, 6, f"{SHARDS[1]} is damaged"),
    "a page instead": ({SHARDS[1]: HTML}, 6, f"{SHARDS[1]} is damaged"),
    "zeros only": ({SHARDS[1]: bytes(MB)}, 6, f"{SHARDS[1]} is damaged"),
    "zeros behind the header": ({SHARDS[0]: a.tensors(bytes(MB))}, 6, f"{SHARDS[0]} has nothing but zeros"),
    "few zeros behind a header": ({SHARDS[0]: a.tensors(bytes(9000))}, 6, f"{SHARDS[0]} has nothing but zeros"),
    "the second half did not arrive": ({SHARDS[0]: GAP}, 6, f"{SHARDS[0]} has nothing but zeros"),
    "a segment did not arrive": ({SHARDS[0]: SEGMENT}, 6, f"{SHARDS[0]} has nothing but zeros"),
    "git-lfs": ({SHARDS[1]: POINTER}, 6, f"{SHARDS[1]} is a pointer of git-lfs"),
    "git-lfs, small files": ({"tokenizer.model": POINTER}, 6, "tokenizer.model is a pointer of git-lfs"),
    "git-lfs, gguf": ({"weights.gguf": POINTER}, 6, "weights.gguf is a pointer of git-lfs"),
    "git-xet": ({SHARDS[1]: XET}, 6, f"{SHARDS[1]} is a pointer of git-xet"),
    "a pickle is cut": ({"2_Dense/pytorch_model.bin": torch_file()[:-5000]}, 6, "2_Dense/pytorch_model.bin is cut"),
    "an index of nothing": ({"model.safetensors.index.json": b"[]"}, 6, "model.safetensors.index.json is no index"),
    "a page as config.json": ({"config.json": HTML}, 6, "config.json is not JSON"),
}  # fmt: skip


def made(folder: Path, changes: Dict[str, Any]) -> Path:
    for path, content in {**WHOLE, **changes}.items():
        if content is None:
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def faults_in(folder: Path) -> List[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return [fault.text() for fault in find_faults(folder, sizes)]


def test_whole_models_have_no_faults(tmp_path: Path) -> None:
    biases = a.tensors(a.noise(100_000) + bytes(8_000) + a.noise(900_000))
    others = {
        "biases.safetensors": biases,
        "consolidated.safetensors.index.json": index("consolidated-00001-of-00009.safetensors"),
        "pytorch_model.bin.index.json": index("pytorch_model-00001-of-00009.bin"),
        ".gitattributes": b"*.bin filter=lfs",
        ".eslintrc.config": b"{}",
        "empty": b"",
    }
    assert faults_in(made(tmp_path / "m", others)) == []


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, tmp_path: Path) -> None:
    changes, _, says = FAULTS[name]
    found = faults_in(made(tmp_path / "m", changes))
    assert any(says in one for one in found), found


@pytest.mark.parametrize(
    "name", ["aria2, with room reserved", "cut", "git-lfs", "a shard is missing"]
)
def test_what_is_not_whole_is_not_packed_but_by_force(
    name: str, hfship: Program, tmp_path: Path
) -> None:
    changes, code, says = FAULTS[name]
    model = made(tmp_path / "m", changes)
    before = sorted(os.listdir(model))
    command = ("pack", model, "-o", tmp_path / "out")
    done = hfship(*command, code=code)
    assert says in done.stderr and "--force" in done.stderr
    assert sorted(os.listdir(model)) == before and not (tmp_path / "out").exists()
    assert says in hfship("verify", model, code=code).stderr
    done = hfship(*command, "--force")
    assert says in done.stderr
    archive = tmp_path / "out" / "m.tar.zst"
    for said in (
        hfship("unpack", archive, "-o", tmp_path / "un").stdout,
        hfship("verify", model).stdout,
        hfship("verify", archive).stdout,
    ):
        assert says in said and ("packed by force" in said or "partial" in said)


@pytest.mark.parametrize(
    "name", ["curl", "zeros behind the header", "a shard is missing", "git-lfs"]
)
def test_archives_of_other_programs_are_looked_at(
    name: str, hfship: Program, tmp_path: Path
) -> None:
    changes, code, says = FAULTS[name]
    made(tmp_path / "m", changes)
    archive = tmp_path / "m.tar.zst"
    subprocess.run(["tar", "--zstd", "-cf", archive, "m"], check=True, cwd=tmp_path)
    command = ("unpack", archive, "-o", tmp_path / "un")
    done = hfship(*command, code=code)
    assert says in done.stderr and "--force" in done.stderr
    assert says in hfship("verify", tmp_path / "un" / "m", code=code).stderr
    hfship(*command, "--force")


def test_what_a_manifest_lists_may_be_anything_but_a_gap(pyz: Program, tmp_path: Path) -> None:
    """Whoever made the manifest looked at it, or meant it."""
    a.make_model(tmp_path / "m", {"w.safetensors": a.noise(5000), "config.json": b"edited"})
    pyz("pack", tmp_path / "m", "-o", tmp_path / "out")
    pyz("unpack", tmp_path / "out/m.tar.zst", "-o", tmp_path / "un")
    cut = WHOLE[SHARDS[0]][:-5]
    a.make_model(tmp_path / "n", {"w.safetensors": cut})
    assert "w.safetensors is damaged" in pyz("pack", tmp_path / "n", code=6).stderr
    assert "w.safetensors is damaged" in pyz("verify", tmp_path / "n", code=6).stderr


def test_a_whole_model_without_manifest_is_no_damage(hfship: Program, tmp_path: Path) -> None:
    model = made(tmp_path / "m", {})
    assert "neither archives nor" in hfship("verify", model, code=2).stderr
    hfship("pack", model, "-o", tmp_path / "out")
    assert "force" not in hfship("verify", model).stdout


# -- what never travels

KEPT_BACK = [
    ".hfd/aria2c_urls.txt", ".env", ".env.local", ".git/config", "sub/.git/HEAD", ".ssh/id_ed25519", ".config.json.swp",
    "sub/.notes.swo", "README.md~", "#README.md#", ".#README.md", ".netrc", ".cache/huggingface/token", ".DS_Store",
    "._model.safetensors", "__pycache__/modeling.cpython-311.pyc", ".ipynb_checkpoints/a.ipynb", ".svn/entries", ".hg/x",
    ".bash_history", "Thumbs.db",
]  # fmt: skip
TRAVELS = [
    "config.json", ".gitattributes", ".gitignore", "environment.yml", "env", "a.env.json", "swap.swp.txt", ".github/a.yml",
    "hfd/x", "sub/git/config", ".cache/other/x", "a~b",
]  # fmt: skip


def test_what_never_travels() -> None:
    assert [path for path in KEPT_BACK if not PRIVATE.search(path)] == []
    assert [path for path in TRAVELS if PRIVATE.search(path)] == []


def test_private_files_stay_and_are_told(hfship: Program, tmp_path: Path) -> None:
    private = dict.fromkeys((".hfd/repo_metadata", ".env", ".a.json.swp"), b"token=" + TOKEN)
    model = made(tmp_path / "m", private)
    done = hfship("pack", model, "-o", tmp_path / "out")
    assert all(path in done.stderr for path in private)
    listed = subprocess.run(
        ["tar", "--zstd", "-tf", tmp_path / "out" / "m.tar.zst"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert not any(path in listed for path in private) and "config.json" in listed


@pytest.mark.parametrize(
    "content, stops",
    [
        (b"export HF_TOKEN=" + TOKEN + b"\n", True),
        (b"https://user:" + TOKEN + b"@huggingface.co/org/m", True),
        (b"api_org_" + TOKEN[3:], True),
        (b"hf_" + b"x" * 34, False),  # instructions
        (b"hf_transfer is fast, hf_hub_download(repo_id=1)", False),
        (b"\0" + TOKEN, False),  # no text
        (TOKEN.ljust(2 * MB), False),
    ],
)
def test_a_token_stops_pack(content: bytes, stops: bool, pyz: Program, tmp_path: Path) -> None:
    model = made(tmp_path / "m", {"sub/notes.txt": content})
    command = ("pack", model, "-o", tmp_path / "out")
    done = pyz(*command, code=2 if stops else 0)
    assert TOKEN.decode() not in done.stderr
    if stops:
        assert "it stands in sub/notes.txt" in done.stderr
        pyz(*command, "--force")


def test_what_the_hub_published_is_packed_as_it_is(
    pyz: Program, hub: Any, published: Path, tmp_path: Path
) -> None:
    (published / "notes.txt").write_bytes(TOKEN)
    (published / "w.safetensors.aria2").write_bytes(b"x")
    pyz("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    done = pyz("pack", tmp_path / "tiny", "-o", tmp_path / "out")
    assert "stands in notes.txt, as published" in done.stderr
    manifest = read_manifest(tmp_path / "tiny")
    assert manifest and not manifest.faults


@pytest.mark.parametrize("path", [".env", ".hfd/x"])
def test_private_files_in_an_older_manifest_are_named(
    path: str, pyz: Program, tmp_path: Path
) -> None:
    a.make_model(tmp_path / "m", {"config.json": b"{}", path: b"x"})
    done = pyz("pack", tmp_path / "m", "-o", tmp_path / "out", code=2)
    assert path in done.stderr
    pyz("pack", tmp_path / "m", "-o", tmp_path / "out", "--force")


# -- huggingface_hub's cache


COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


def cache_of(root: Path, files: Dict[str, bytes], commit: str = COMMIT, ref: str = "main") -> Path:
    """A repository in the cache, as huggingface_hub lays it out."""
    repository = root / "models--org--tiny-1.0"
    for path, content in files.items():
        etag = hashlib.sha256(content).hexdigest()
        if len(content) < MB:
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = repository / "blobs" / etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = repository / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    (repository / ".no_exist" / commit).mkdir(parents=True)
    (repository / ".no_exist" / commit / "adapter_config.json").touch()
    return repository


def everything_in(folder: Path) -> List[Tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("inside", ["", f"snapshots/{COMMIT}"])
def test_a_repository_of_the_hub_s_cache_is_packed_as_its_model(
    inside: str, hfship: Program, tmp_path: Path
) -> None:
    cache = cache_of(tmp_path, {**WHOLE, "copy.json": WHOLE["config.json"]})
    before = everything_in(cache)
    hfship("pack", cache / inside, "-o", tmp_path / "out")
    assert everything_in(cache) == before
    assert (
        "commit 0123456"
        in hfship("unpack", tmp_path / "out/tiny-1.0.tar.zst", "-o", tmp_path / "un").stdout
    )
    manifest = read_manifest(tmp_path / "un" / "tiny-1.0")
    assert manifest and manifest.source
    source = manifest.source
    assert (source.repo, source.commit) == ("org/tiny-1.0", COMMIT)
    assert source.revision == ("main" if not inside else COMMIT)
    assert [entry.path for entry in manifest.files] == sorted([*WHOLE, "copy.json"])


def test_which_commit_of_a_cache_is_meant(pyz: Program, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, {"config.json": b"{}"}, ref="")
    pyz("pack", cache, "-o", tmp_path / "one")  # there is but one
    cache_of(tmp_path, {"config.json": b"{ }"}, OTHER, ref="")
    several = pyz("pack", cache, "-o", tmp_path / "two", code=2).stderr
    assert f"snapshots/{COMMIT}" in several and f"snapshots/{OTHER}" in several
    (cache / "refs" / "pr").mkdir(parents=True)
    (cache / "refs" / "pr" / "1").write_text(COMMIT)
    (cache / "refs" / "main").write_text(OTHER)
    pyz("pack", cache, "-o", tmp_path / "two", "--name", "mine")
    pyz("unpack", tmp_path / "two/mine.tar.zst", "-o", tmp_path / "un")
    assert (tmp_path / "un/mine/config.json").read_bytes() == b"{ }"


@pytest.mark.parametrize("victim, code", [("config.json", 6), (SHARDS[0], 6)])
def test_blobs_of_a_cache_are_proven(victim: str, code: int, pyz: Program, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, WHOLE)
    path = cache / "snapshots" / COMMIT / victim
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if victim == "config.json":
        content[:] = b'{"model_type": "tinY"}'
    path.write_bytes(content)
    done = pyz("pack", cache, "-o", tmp_path / "out", code=code)
    assert f"{victim} is not what its blob says" in done.stderr


def test_what_hf_did_not_download_is_recorded(pyz: Program, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, {"config.json": b"{}"})
    (cache / "trees").mkdir()
    tree = {"format_version": 1, "files": {"config.json": {}, "model.safetensors": {}}}
    (cache / "trees" / f"{COMMIT}.json").write_text(json.dumps(tree))
    pyz("pack", cache, "-o", tmp_path / "out")
    done = pyz("unpack", tmp_path / "out" / "tiny-1.0.tar.zst", "-o", tmp_path / "un")
    assert "left out: model.safetensors" in done.stdout


def test_a_download_into_the_cache_must_be_finished(pyz: Program, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, WHOLE)
    (cache / "blobs" / "abc.incomplete").write_bytes(b"x")
    assert "abc.incomplete" in pyz("pack", cache, "-o", tmp_path / "out", code=3).stderr
    pyz("pack", cache, "-o", tmp_path / "out", "--force")


def test_what_hfship_itself_has_under_way_is_no_program_s_leftover(tmp_path: Path) -> None:
    """Other folders are looked through, in the order of their names."""
    for name in (".hfship/w.aria2", "b/w.aria2", "a/w.aria2", "a/w.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [fault.path for fault in leftovers(tmp_path)] == ["a/w.aria2", "b/w.aria2"]


@pytest.mark.parametrize(
    "content, begins",
    [
        ((8).to_bytes(8, "little") + b"{", True),
        ((100_000_000).to_bytes(8, "little") + b"{", True),
        ((100_000_001).to_bytes(8, "little") + b"{", False),  # MAX_HEADER_SIZE of safetensors
        ((0).to_bytes(8, "little") + b"{", False),
        ((8).to_bytes(8, "little") + b"[", False),
    ],
)
def test_how_a_file_of_safetensors_begins(content: bytes, begins: bool, tmp_path: Path) -> None:
    """Of what the Hub lists under that name, nothing else is called damaged: it may be a text."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert bool(_wrong_with(path, path.name, 5000, listed=True)) == begins
    assert _wrong_with(path, path.name, 5000, listed=False)


LEFTOVERS = {
    "aria2": "a.aria2 a.bin.aria2__temp",
    "modelscope": "._____temp/a d/._____temp/b/c",
    "huggingface_hub or hfship": "a.incomplete",
    "another program": "a.part a.partial a.filepart",
    "a browser": "a.crdownload a.opdownload a.download",
    "a torrent client": "a.!qB a.!ut a.!bt",
    "rsync": ".a.safetensors.Ab12Cd d/.a.pt.abcdef .a.pth.abcdef .rsync-partial/a d/.~tmp~/a",
    "the AWS client": "a.bin.0a1B2c3D d/a.json.00000000",
    "a cloud's client": ".azDownload-a d/.azDownload-b a_.gstmp",
    "": "a.bin aria2 a.aria2.bin a.parts a.exe.Ab12Cd .a.bin.Ab12C a.bin.0a1B2c3G a.bin.0a1B2c3"
    " x._____temp/a x.~tmp~/a a.gstmp incomplete qB a.Ab12Cd",
}


@pytest.mark.parametrize("program", LEFTOVERS)
def test_what_each_program_leaves(program: str, tmp_path: Path) -> None:
    for path in LEFTOVERS[program].split():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = {fault.path: fault for fault in leftovers(tmp_path)}
    assert sorted(found) == (sorted(LEFTOVERS[program].split()) if program else [])
    for fault in found.values():
        assert fault.why == f"tells that {program} has not finished" and fault.unfinished
        assert not fault.is_missing


def test_what_a_manifest_lists_is_no_leftover(tmp_path: Path) -> None:
    for name in ("a.part", "b.part"):
        (tmp_path / name).touch()
    sizes = {"a.part": 0}
    assert [one.path for one in find_faults(tmp_path, sizes, listed=True)] == ["b.part"]
    assert [one.path for one in find_faults(tmp_path, sizes)] == ["a.part", "b.part"]


def test_faults_are_told_by_who_can_mend_them(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(POINTER)
    sizes = {"a.bin": len(POINTER)}
    with pytest.raises(IntegrityError) as damaged:
        require_whole(tmp_path, sizes, "take another")
    error = damaged.value
    assert (error.what, error.next_step) == (f"{tmp_path} is damaged", "take another")
    assert error.why == "a.bin is a pointer of git-lfs: git lfs pull brings it"
    for number in range(25):
        (tmp_path / f"{number:02}.part").touch()
    with pytest.raises(IncompleteError) as incomplete:
        require_whole(tmp_path, sizes, "wait")
    assert incomplete.value.what == f"{tmp_path} is not complete yet"
    assert len(incomplete.value.why.split("\n")) == 21
    (tmp_path / "a.bin").write_bytes(b"x")
    for path in tmp_path.glob("*.part"):
        path.unlink()
    require_whole(tmp_path, {"a.bin": 1}, "")


def test_a_missing_shard_is_told_as_that(tmp_path: Path) -> None:
    made(tmp_path, {SHARDS[1]: None})
    sizes = {path: len(content) for path, content in WHOLE.items() if path != SHARDS[1]}
    (fault,) = find_faults(tmp_path, sizes)
    assert (fault.path, fault.unfinished, fault.is_missing) == (SHARDS[1], True, True)
    assert fault.text() == f"{SHARDS[1]} is missing: an index or its series names it"


@pytest.mark.parametrize("size, told", [(1024, True), (1025, False)])
def test_a_pointer_is_small(size: int, told: bool, tmp_path: Path) -> None:
    for name, start in (("a", POINTER), ("b", XET)):
        (tmp_path / name).write_bytes(start.ljust(size))
        found = _wrong_with(tmp_path / name, name, size, listed=True)
        assert ("is a pointer of git-" in found) == told


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth"])
@pytest.mark.parametrize("comment", [0, 0xFFFF])
def test_the_directory_of_a_pickle_is_looked_for_behind_its_comment(
    name: str, comment: int, tmp_path: Path
) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data/0", bytes(100_000))
        archive.comment = b"c" * comment
    path = tmp_path / name
    for content, whole in [
        (stream.getvalue(), True),
        (stream.getvalue() + b"x", comment == 0),
        (stream.getvalue()[: -22 - comment], False),
        (b"\x80\x02" + bytes(5000), True),
    ]:
        path.write_bytes(content)
        found = _wrong_with(path, name, len(content), listed=False)
        assert found == ("" if whole else "is cut: the directory at the end of the file is missing")
    assert _wrong_with(path, "a.other", 5000, listed=False) == ""


def test_a_configuration_that_a_manifest_lists_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{".ljust(2000))
    found = _wrong_with(path, "config.json", 2000, listed=False)
    assert found.startswith("is not JSON: Expecting")
    assert _wrong_with(path, "config.json", 2000, listed=True) == ""
    assert _wrong_with(path, "sub/config.json", 2000, listed=False) == ""


KB = 1 << 10


@pytest.mark.parametrize(
    "spans, total, found",
    [
        ([], 4 * MB, None),
        ([(0, 4 * MB)], 4 * MB, True),
        ([(MB, MB + 100 * KB)], 4 * MB, True),
        ([(MB, MB + 50 * KB)], 4 * MB, None),  # less than a 64th of it
        ([(0, 16 * KB)], 16 * KB, True),
        ([(0, 8 * KB)], 8 * KB, True),  # all of it
        ([(0, 12 * KB)], 40 * KB, None),
        ([(0, 3 * KB)], 3 * KB, None),  # too little to be looked at
        ([(k * 40 * KB, k * 40 * KB + 20 * KB) for k in range(50)], 4 * MB, None),
    ],
)
def test_a_gap_is_long(spans: Any, total: int, found: Any) -> None:
    data = bytearray(b"x" * (total + 7))
    for start, stop in spans:
        data[7 + start : 7 + stop] = bytes(stop - start)
    read = lambda at, size: bytes(data[at : at + size])  # noqa: E731
    gap = wholeness._gap_in(read, 7, total + 7)
    assert (gap is not None) == bool(found)
    if gap:
        ((start, stop),) = spans
        assert 7 + start <= gap[0] < gap[1] <= 7 + stop
