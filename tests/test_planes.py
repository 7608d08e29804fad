"""Profile `smallest`: floats in byte planes, restored by hfship and by restore.py alone."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfship.archive.layout import index_at, stream_layout
from hfship.archive.opening import open_archive
from hfship.archive.pack_plan import PROFILES
from hfship.archive.planes import PLANE_WIDTHS, join_planes, split_planes
from hfship.archive.restore_script import PLANES_BLOCK, RESTORE_PY, RESTORE_PYS
from hfship.archive.zstd import ZstdError
from hfship.base.errors import IntegrityError
from support import archives as a


def floats(kind, count, seed=0):
    """Weights like those of a model: gaussian in sign and exponent, in bf16, f16 or f32."""
    chance = random.Random(seed)
    code, width = {"bf16": ("f", 2), "f16": ("e", 2), "f32": ("f", 4)}[kind]
    drawn = bytes(struct.pack(f">{code}", chance.gauss(0, 0.02))[0] for _ in range(256))
    made = bytearray(width * count)
    made[width - 1 :: width] = chance.randbytes(count).translate(drawn)
    for place in range(width - 1):
        made[place::width] = chance.randbytes(count)
    return bytes(made)


BF16 = floats("bf16", 2_700_000)
FILES = {
    **a.SMALL,
    "bf16.safetensors": BF16[: (5 << 20) + 1],
    "f32.safetensors": floats("f32", 600_000)[:-3],
    "f16.bin": floats("f16", 600_000),
    "noise.gguf": a.noise(PLANES_BLOCK + 1),
    "zeros.pt": bytes(9 << 20),
    "block.bin": BF16[:PLANES_BLOCK],
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("planes")
    a.make_model(root / "m", FILES)
    return root / "m", a.pack(root / "m", root / "out", profile="smallest")


@given(st.binary(max_size=50), st.sampled_from(PLANE_WIDTHS))
def test_planes_survive_the_round_trip(block, width):
    assert bytes(join_planes(split_planes(block, width))) == block


@given(st.binary(min_size=1, max_size=50))
def test_any_planes_join_or_are_refused(planes):
    try:
        assert len(join_planes(planes)) == len(planes) - 1
    except ZstdError:
        assert planes[-1] not in PLANE_WIDTHS


def test_floats_become_smaller_than_zstd_makes_them(tmp_path):
    a.make_model(tmp_path / "m", {"w": BF16})
    smallest = a.pack(tmp_path / "m", tmp_path / "1", profile="smallest").path.stat().st_size
    standard = a.pack(tmp_path / "m", tmp_path / "2").path.stat().st_size
    store = a.pack(tmp_path / "m", tmp_path / "3", profile="store").path.stat().st_size
    assert (
        smallest
        < 0.68 * len(BF16)
        < 0.75 * len(BF16)
        < standard
        < len(BF16)
        < store
        < 1.01 * len(BF16)
    )


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("split", [None, 4_400_000])
def test_every_profile_comes_back_and_does_not_depend_on_threads(packed, tmp_path, profile, split):
    for jobs in (1, 5):
        files = a.pack(packed[0], tmp_path / f"out{jobs}", profile=profile, split=split, jobs=jobs)
    assert [p.read_bytes() for p in a.files_in(tmp_path / "out1").paths] == [
        p.read_bytes() for p in files.paths
    ]
    assert a.verify(files) == []
    a.unpack(files, tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == FILES


def test_holes_are_not_stored(tmp_path):
    a.make_model(tmp_path / "m", {"w": bytes(30 << 20)})
    assert a.pack(tmp_path / "m", tmp_path / "out", profile="store").path.stat().st_size < 10_000


def test_restore_py_makes_the_files_without_hfship(packed, tmp_path):
    subprocess.run(["tar", "--zstd", "-xf", packed[1].path], check=True, cwd=tmp_path)
    assert (tmp_path / "m/bf16.safetensors.planes").exists() and not (
        tmp_path / "m/bf16.safetensors"
    ).exists()
    argv = [sys.executable, "-I", tmp_path / "m/.hfship/restore.py"]
    assert (
        f"{len(FILES)} files, 0 wrong"
        in subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    )
    (tmp_path / "m/.hfship/restore.py").unlink()
    assert a.tree(tmp_path / "m") == FILES


def test_restore_py_names_what_is_wrong(packed, tmp_path):
    subprocess.run(["tar", "--zstd", "-xf", packed[1].path], check=True, cwd=tmp_path)
    with (tmp_path / "m/f32.safetensors.planes").open("r+b") as stream:
        stream.write(b"XX")
    argv = [sys.executable, tmp_path / "m/.hfship/restore.py"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "1 wrong or missing f32.safetensors" in done.stdout


def test_damage_in_planes_names_file_and_byte_range(packed, tmp_path):
    _, files = packed
    archive = open_archive(files)
    start = next(s.start for s in archive.segments if s.what == "m/bf16.safetensors.planes")
    frame = archive.frames[index_at([(f.start,) for f in archive.frames], start) + 1]
    with a.flipped(files.path, frame.offset + 1000):
        (damage,) = a.verify(files)
        assert damage.files == (("bf16.safetensors", 2 << 20, (4 << 20) - 1),)
        with pytest.raises(IntegrityError):
            a.unpack(files, tmp_path / "un")
    assert a.unpack(files, tmp_path / "un").written == 1


# In the order of RESTORE_PYS: what pack writes, and what hfship 0.1.0 wrote.
_, OF_2_MIB, OF_4_MIB = RESTORE_PYS


@pytest.mark.parametrize(
    "evil", ["path", "absolute", "link", "folder link", "planes link", "target link"]
)
def test_restore_py_writes_nothing_outside_its_folder(evil, tmp_path):
    model, outside = tmp_path / "m", tmp_path / "outside"
    (model / ".hfship").mkdir(parents=True)
    outside.mkdir()
    path = {"path": "../outside/w", "absolute": str(outside / "w"), "folder link": "sub/w"}.get(
        evil, "w"
    )
    planes = bytes(split_planes(BF16[: 2 << 20], 2))
    if evil == "folder link":
        (model / "sub").symlink_to(outside)
    elif evil == "target link":
        (model / "w.incomplete").symlink_to(outside / "w")
    elif evil == "link":
        (model / "w").symlink_to(outside / "w")
    place = Path(os.path.normpath(model / f"{path}.planes"))
    if evil == "planes link":
        place.symlink_to(outside / "w.planes")
        place = outside / "w.planes"
    place.write_bytes(planes)
    files = [{"path": path, "sha256": "0" * 64}]
    (model / ".hfship/manifest.json").write_text(json.dumps({"files": files}))
    before = sorted(outside.iterdir())
    (model / ".hfship/restore.py").write_bytes(RESTORE_PY)
    done = subprocess.run(
        [sys.executable, model / ".hfship/restore.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "1 files, 1 wrong or missing" in done.stdout, done.stderr
    assert sorted(outside.iterdir()) == before


@pytest.mark.parametrize(
    "restore, width, shift, says",
    [
        (RESTORE_PY, 2, 0, None),
        (OF_4_MIB, 2, 0, None),
        (OF_2_MIB, 2, 0, None),
        (RESTORE_PY, 2, 9, "is not one block of planes"),
        (RESTORE_PY, 1, 0, "SHA-256"),
        (RESTORE_PY, 3, 0, "elements of 3 bytes"),
        (RESTORE_PY.replace(b"wrong", b"WRONG"), 2, 0, "not the one of this format"),
    ],
)
def test_planes_that_others_made_are_read_or_refused(restore, width, shift, says, tmp_path):
    block = RESTORE_PYS.get(restore, 2 << 20)
    content = BF16[:block]
    manifest = a.make_model(tmp_path / "m", {"w": content})
    known = restore if restore in RESTORE_PYS else RESTORE_PY
    layout = stream_layout(manifest, manifest.to_json().encode(), known)
    planes = bytes(split_planes(content, 2)[:-1]) + bytes([width])
    stream = b"".join(planes if s.entry else s.known for s in layout)
    (weight,) = [s for s in layout if s.entry]
    cuts = [0, weight.start, weight.stop + shift, len(stream)]
    files = a.seal(stream.replace(known, restore), tmp_path / "m.tar.zst", cuts=cuts)
    damages = a.verify(files)
    assert damages == [] if says is None else says in damages[0].what
    if says:
        with pytest.raises(IntegrityError):
            a.unpack(files, tmp_path / "un")


def test_a_name_that_planes_would_take_is_refused(tmp_path, hfship):
    a.make_model(tmp_path / "m", {"w": BF16, "w.planes": b"mine"})
    assert (
        "w.planes"
        in hfship(
            "pack", tmp_path / "m", "-o", tmp_path / "out", "--profile", "smallest", code=2
        ).stderr
    )
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out")


def test_command_line(hfship, packed, tmp_path):
    hfship("pack", packed[0], "-o", tmp_path / "out", "--profile", "smallest", "-j", "3")
    assert (tmp_path / "out/m.tar.zst").read_bytes() == packed[1].path.read_bytes()
    hfship("verify", tmp_path / "out")
    hfship("unpack", tmp_path / "out", "-o", tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == FILES
