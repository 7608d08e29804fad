"""Names that filesystems of Windows refuse, or hold for the same, and disks without inodes: told before the first byte."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

from conftest import Program, missing
from hfship.base.errors import DiskError
from hfship.base.filenames import doubtful_names, require_names, twins_among
from hfship.base.files import WORK_DIR, disk_error, require_inodes
from support import archives as a
from support import components
from support.hub import FaultHub

# How a disk is made and mounted; {disk} is its image, or with "loop" a device that stands for it.
DISKS = {
    "exfat": ("sbin/mkfs.exfat {image}", "sbin/mount.exfat-fuse {loop} {folder}"),
    "ntfs": ("sbin/mkntfs -q -F -f {image}", "bin/ntfs-3g {image} {folder}"),
    "ntfs of windows": (
        "sbin/mkntfs -q -F -f {image}",
        "bin/ntfs-3g -o windows_names {image} {folder}",
    ),
    "ntfs without case": (
        "sbin/mkntfs -q -F -f {image}",
        "bin/lowntfs-3g -o ignore_case {image} {folder}",
    ),
}
ODD = ["a?.txt", "sub/a|b", 'q"', "colon:", "star*"]
TWINS = ["A.txt", "a.txt", "É/x", "é/y"]
# disk -> what it refuses; names at the end that it takes although others do not
EXPECTED = {
    "exfat": (ODD, ["tail.", "con"], True),
    "ntfs": ([], [*ODD, "tail.", "blank ", "con", "A.txt", "a.txt"], False),
    "ntfs of windows": ([*ODD, "tail.", "aux.txt"], ["ü" * 120], False),
    "ntfs without case": ([], ODD, True),
}


@pytest.fixture
def fuse_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """fuse_disk(kind) -> a folder on a disk of its own."""
    if os.geteuid() != 0:
        missing("root, to mount a disk")
    root = components.require("fuse-disks")
    libraries = f"{root}/lib/x86_64-linux-gnu:{root}/usr/lib/x86_64-linux-gnu"
    loops: List[str] = []
    mounted: List[Path] = []

    def run(line: str, **places: Any) -> str:
        program, *words = line.split(" ")
        found = next(root / top / program for top in ("", "usr") if (root / top / program).exists())
        argv = [found, *(word.format(**places) for word in words)]
        done = subprocess.run(
            argv, capture_output=True, text=True, env={"LD_LIBRARY_PATH": libraries}
        )
        if done.returncode:
            missing(f"a disk by FUSE that can be mounted: {done.stderr}")
        return done.stdout

    def mount(kind: str) -> Path:
        image, folder = tmp_path / "image", tmp_path / "fuse"
        folder.mkdir()
        with image.open("wb") as stream:
            stream.truncate(40 << 20)
        make, start = DISKS[kind]
        run(make, image=image)
        loop = ""
        if "{loop}" in start:
            done = subprocess.run(
                ["losetup", "-f", "--show", image], capture_output=True, text=True
            )
            if done.returncode:
                missing(f"a loop device: {done.stderr}")
            loop = done.stdout.strip()
            loops.append(loop)
        run(start, image=image, loop=loop, folder=folder)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)
    for loop in loops:
        subprocess.run(["losetup", "-d", loop], check=False)


@pytest.mark.real
@pytest.mark.parametrize("kind", DISKS)
def test_the_filesystem_is_asked_whatever_its_type_is(
    kind: str, fuse_disk: Callable[[str], Path]
) -> None:
    folder = fuse_disk(kind) / "m"
    (folder / WORK_DIR).mkdir(parents=True)
    refused, taken, ignores_case = EXPECTED[kind]
    require_names(folder, taken, "test")
    for name in refused:
        with pytest.raises(DiskError, match="cannot hold all names") as caught:
            require_names(folder, ["fine.txt", name], "test")
        assert name in caught.value.why and "fine.txt" not in caught.value.why
    for one, other in (TWINS[:2], TWINS[2:]):
        if not ignores_case:
            require_names(folder, [one, other], "test")
            continue
        with pytest.raises(DiskError, match="ignores case") as caught:
            require_names(folder, [one, other], "test")
        assert one.split("/")[0] in caught.value.why and other.split("/")[0] in caught.value.why
    assert os.listdir(folder / WORK_DIR) == [] and os.listdir(folder) == [WORK_DIR]


@pytest.mark.real
@pytest.mark.parametrize(
    "kind, files, words",
    [
        ("exfat", ["what?.txt"], ["cannot hold all names", "what?.txt"]),
        ("ntfs of windows", ["what?.txt"], ["cannot hold all names", "what?.txt"]),
        ("exfat", ["A.txt", "a.txt"], ["ignores case", "A.txt and a.txt"]),
        ("ntfs without case", ["Sub/1", "sub/2"], ["ignores case", "Sub and sub"]),
    ],
)
def test_fetch_and_unpack_tell_it_before_the_first_byte(
    kind: str,
    files: List[str],
    words: List[str],
    fuse_disk: Callable[[str], Path],
    hub: FaultHub,
    pyz: Program,
    tmp_path: Path,
) -> None:
    content = {**a.SMALL, **{name: name.encode() for name in files}}
    repository = tmp_path / "hub" / "org" / "m"
    a.make_model(repository, content)
    archive = a.pack(repository, tmp_path / "out").path
    disk = fuse_disk(kind)
    for args in (["fetch", "org/m", "--endpoint", hub.url], ["unpack", archive]):
        said = pyz(*args, "-o", disk / "models", code=7).stderr
        assert all(word in said for word in [*words, "-o DIR"]), said
        assert not [path for path in (disk / "models").rglob("*") if path.is_file()]


@pytest.mark.parametrize("inodes, code", [(40, 7), (400, 0)])
def test_fetch_counts_inodes(
    inodes: int,
    code: int,
    hub: FaultHub,
    pyz: Program,
    tmp_path: Path,
    small_disk: Callable[..., Path],
) -> None:
    files: Dict[str, bytes] = {f"{number}.txt": b"x" for number in range(60)}
    a.make_model(tmp_path / "hub" / "org" / "m", {**a.SMALL, **files})
    disk = small_disk(20, f"nr_inodes={inodes}")
    args = ["fetch", "org/m", "--endpoint", hub.url, "-o", disk]
    said = pyz(*args, code=code).stderr
    if code:
        assert "too few inodes" in said and "needed" in said and "choose another disk" in said
        assert not list((disk / "m").glob("*.txt"))
    else:
        pyz(*args)


def test_a_disk_without_inodes_is_not_called_full(small_disk: Callable[..., Path]) -> None:
    disk = small_disk(5, "nr_inodes=20")
    with pytest.raises(OSError) as caught:
        for number in range(30):
            (disk / str(number)).touch()
    assert caught.value.errno == errno.ENOSPC
    assert "no inodes are free" in disk_error(caught.value, "write", disk / "x").what
    with pytest.raises(DiskError, match="too few inodes"):
        require_inodes(disk / "not" / "there", 1, "test", "")


@pytest.mark.parametrize(
    "name, is_doubtful",
    [
        ("model-00001-of-00002.safetensors", False),
        (".gitattributes", False),
        ("a b+c(1)[2]{3}.txt", False),
        ("a~", False),
        ("x" * 200, False),
        ("x" * 201, True),
        ("ü", True),
        ("a?", True),
        ("a*b", True),
        ("a:b", True),
        ("tail.", True),
        ("blank ", True),
        ("CON", True),
        ("con.txt", True),
        ("lpt1.bin", True),
        ("console.txt", False),
        ("config.json", False),
    ],
)
def test_names_that_are_worth_a_try(name: str, is_doubtful: bool) -> None:
    assert bool(doubtful_names([f"sub/{name}"])) is is_doubtful
    assert bool(doubtful_names([f"{name}/file"])) is is_doubtful


@pytest.mark.parametrize(
    "paths, pairs",
    [
        (["a", "b"], []),
        (["a/x", "a/y"], []),
        (["A", "a", "A"], [("A", "a")]),
        (["A", "a", "á", "Á"], [("A", "a"), ("á", "Á")]),
        (["A/x", "a/x"], [("A", "a"), ("A/x", "a/x")]),
        (["ß", "SS"], [("ß", "SS")]),
        (["e\u0301", "\u00e9"], [("e\u0301", "\u00e9")]),
    ],
)
def test_twins_are_named_both(paths: List[str], pairs: List[Any]) -> None:
    assert twins_among(paths) == pairs


def test_names_are_tried_here_and_nothing_stays(tmp_path: Path) -> None:
    trial = tmp_path / WORK_DIR / "names"
    trial.mkdir(parents=True)
    (trial / "what a killed run left?").touch()
    require_names(tmp_path, ["a?", "A?", "ü", "a:b/c*d", "con", "tail."], "test")
    assert os.listdir(tmp_path / WORK_DIR) == []
    with pytest.raises(DiskError, match="cannot hold all names"):
        require_names(tmp_path, ["ü" * 128], "test")


def test_no_name_is_tried_behind_a_link(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "m"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (folder / WORK_DIR).mkdir(parents=True)
    (folder / WORK_DIR / "names").symlink_to(elsewhere)
    with pytest.raises(DiskError, match="a symbolic link"):
        require_names(folder, ["a?"], "test")
    assert os.listdir(elsewhere) == ["precious"]
