"""docs/runbook.sh, as an operator would run it: on both sides, and where something is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator

import pytest

from conftest import PYZ, ROOT, missing
from support.hub import FaultHub

RUNBOOK = ROOT / "docs/runbook.sh"
STUBS = Path(__file__).parent / "stubs"


@pytest.fixture
def side(tmp_path: Path, hub: FaultHub) -> Iterator[Dict[str, str]]:
    """The environment of an operator with hfship, jq, a Hub and a docker."""
    for tool in ("jq", "rsync"):
        if not shutil.which(tool):
            missing(tool)
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    tools = tmp_path / "bin"
    tools.mkdir()
    shutil.copy2(PYZ, tools / "hfship")
    for name, stub in (("docker", "fake-docker"), ("nvidia-smi", "nvidia-smi")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUBS / stub}" "$@"\n')
        (tools / name).chmod(0o755)
    folders = {"TRANSFER": "transfer", "SITE_MODELS": "site", "DEPLOY": "deploy"}
    yield {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "HF_ENDPOINT": hub.url,
        "FAKE_STATE": str(tmp_path),
        "RUNBOOK_PAUSE": "0",
        **{f"HFSHIP_{name}_DIR": str(tmp_path / folder) for name, folder in folders.items()},
    }
    if (tmp_path / "pid").exists():
        subprocess.run(["kill", (tmp_path / "pid").read_text()], check=False)


def run(side: Dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(RUNBOOK), *words],
        cwd=side["HOME"],
        env=side,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_both_sides(side: Dict[str, str], published: Path, tmp_path: Path) -> None:
    medium = tmp_path / "usb"
    sent = run(side, "send", "org/tiny", str(medium))
    assert sent.returncode == 0, sent.stderr
    name, commit, state = sent.stdout.splitlines()[-1].split()
    assert (name, state) == ("tiny", "whole") and len(commit) == 12
    assert not (tmp_path / "site").exists()

    part = next(medium.glob("tiny.tar.zst.0*"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-70_000] + bytes(100) + whole[-69_900:])
    damaged = run(side, "take", "org/tiny", str(medium))
    assert damaged.returncode == 6
    assert f"copy again: {part.name}" in damaged.stderr
    assert not (tmp_path / "site/tiny").exists()

    part.write_bytes(whole)
    taken = run(side, "take", "org/tiny", str(medium))
    assert taken.returncode == 0, taken.stderr
    assert taken.stdout.splitlines()[-1].split() == ["tiny", commit, "whole"]
    again = run(side, "take", "org/tiny", str(medium))
    assert again.returncode == 0, again.stderr


def test_what_cannot_be_helped_ends_with_its_code(side: Dict[str, str]) -> None:
    done = run(side, "send", "org/nothing", "usb")
    assert done.returncode == 5 and "was not found" in done.stderr
    done = run(side, "take", "org/nothing", "usb")
    assert done.returncode == 6, done.stderr


def test_it_is_short_and_plain_sh() -> None:
    text = RUNBOOK.read_text()
    assert len(text.splitlines()) <= 40 and text.startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(RUNBOOK)], check=True)
