"""The site's own scanners: before pack, after unpack, noted with version and time."""

import json

import pytest

from support import archives as a

SCANNER = """#!/bin/sh
if [ "$1" = --version ]; then echo "scanner 1.2.3"; exit 0; fi
echo "looking at $1"
if grep -rq EICAR "$1"; then echo "$1: EICAR FOUND"; exit 1; fi
echo clean
"""


@pytest.fixture
def scanner(tmp_path):
    path = tmp_path / "bin dir" / "scanner"
    path.parent.mkdir()
    path.write_text(SCANNER)
    path.chmod(0o755)
    return path


def env_with(scanner):
    return {"HFSHIP_POLICY_SCAN": f"'{scanner}' {{}}", "HFSHIP_POLICY_CUSTODY": "true"}


def scans(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["details"] for line in lines if line["event"] == "scanned"]


def test_a_scan_is_done_on_both_sides_and_noted(scanner, tmp_path, hfship):
    a.make_model(tmp_path / "m", a.SMALL)
    env = env_with(scanner)
    done = hfship("pack", tmp_path / "m", "-o", tmp_path / "out", env=env)
    assert "(scanner 1.2.3) lets it pass" in done.stderr
    (noted,) = scans(tmp_path / "out/m.tar.zst.custody.jsonl")
    assert noted["version"] == "scanner 1.2.3"
    assert noted["exit"] == 0
    assert noted["words"].endswith("clean")
    hfship("unpack", tmp_path / "out/m.tar.zst", "-o", tmp_path / "un", env=env)
    there = scans(tmp_path / "un/m/.hfship/custody.jsonl")
    assert len(there) == 2  # that of the sender, and the one that was done here
    assert "un/m~incomplete" in there[1]["words"]


def test_what_a_scanner_refuses_is_not_packed_and_gets_no_name(scanner, tmp_path, hfship):
    a.make_model(tmp_path / "m", {**a.SMALL, "notes.txt": b"EICAR"})
    env = env_with(scanner)
    done = hfship("pack", tmp_path / "m", "-o", tmp_path / "out", env=env, code=6)
    assert "EICAR FOUND" in done.stderr
    assert not (tmp_path / "out").exists()
    # The sender says that it was scanned; here it is looked at all the same.
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out", env={"HFSHIP_POLICY_SCAN": "true {}"})
    hfship("unpack", tmp_path / "out/m.tar.zst", "-o", tmp_path / "un", env=env, code=6)
    assert not (tmp_path / "un/m").exists()


@pytest.mark.parametrize(("line", "code"), [("no-such-scanner {}", 9), ("false", 6)])
def test_a_scanner_that_cannot_work_lets_nothing_pass(line, code, tmp_path, hfship):
    a.make_model(tmp_path / "m", a.SMALL)
    hfship(
        "pack", tmp_path / "m", "-o", tmp_path / "out", env={"HFSHIP_POLICY_SCAN": line}, code=code
    )
    assert not (tmp_path / "out").exists()
