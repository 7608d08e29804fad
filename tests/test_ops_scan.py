"""A scanner of the site on its own: what it is started with, what it says, and what that means."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Iterator, List

import pytest

from hfship.base.errors import HostError, IntegrityError
from hfship.ops.scan import Scan, scan, scan_argv


class Said:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.infos: List[str] = []
        self.clocks: List[str] = []

    def info(self, text: str) -> None:
        self.infos.append(text)

    @contextlib.contextmanager
    def clock(self, text: str) -> Iterator[None]:
        self.clocks.append(text)
        yield


@pytest.fixture
def said() -> Any:
    return Said()


def scanner(folder: Path, body: str, version: str = "echo 'scanner 1.2'; echo more") -> Path:
    path = folder / "scanner"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {version}; exit; fi\n{body}\n')
    path.chmod(0o755)
    return path


def test_what_a_scanner_said_is_kept_with_its_version(tmp_path: Path, said: Any) -> None:
    path = scanner(tmp_path, "seq 1 6; echo warned >&2")
    found = scan(f"{path} -r", tmp_path, said)
    assert found == Scan(f"{path} -r", "scanner 1.2", 0, "3; 4; 5; 6; warned", found.seconds)
    assert 0 <= found.seconds < 600
    assert said.clocks == [f"{path} looks at {tmp_path}"]
    (text,) = said.infos
    assert text.startswith(f"{tmp_path}: {path} (scanner 1.2) lets it pass, ")


@pytest.mark.parametrize(
    "version, expected",
    [
        ("echo ' 7.1 ' >&2", "7.1"),
        ("true", "version unknown"),
        ("echo 7.1; exit 1", "version unknown"),
        ("printf '%0200d' 7", "0" * 100),
        (r"printf 'a\033[31mb'", "a\ufffd[31mb"),
    ],
)
def test_the_first_line_is_the_version(
    version: str, expected: str, tmp_path: Path, said: Any
) -> None:
    path = scanner(tmp_path, "true", version)
    found = scan(str(path), tmp_path, said).version
    assert len(found) == len(expected) and "\033" not in found
    if "\ufffd" not in expected:
        assert found == expected


@pytest.mark.parametrize("code", [1, 2, 77])
def test_any_other_status_refuses(code: int, tmp_path: Path, said: Any) -> None:
    path = scanner(tmp_path, f"echo found; exit {code}")
    with pytest.raises(IntegrityError, match="refuses it") as caught:
        scan(str(path), tmp_path, said)
    assert caught.value.why == f"scanner 1.2, exit status {code}\nfound"
    assert not said.infos


def test_words_have_an_end(tmp_path: Path, said: Any) -> None:
    path = scanner(tmp_path, "printf '%0600d' 7; printf x")
    words = scan(str(path), tmp_path, said).words
    assert len(words) == 500 and words.endswith("07x")


def test_a_scanner_that_is_not_there_is_told(tmp_path: Path, said: Any) -> None:
    with pytest.raises(HostError):
        scan("/no/such/scanner {}", tmp_path, said)


def test_a_scan_is_noted_with_all_that_it_said() -> None:
    details = Scan("clamscan {}", "1.2", 0, "clean", 1.26).details()
    assert details == {
        "command": "clamscan {}",
        "version": "1.2",
        "exit": 0,
        "words": "clean",
        "seconds": 1.3,
    }


@pytest.mark.parametrize(
    "command, argv",
    [
        ("s", ["s", "/m y"]),
        ("s '{}/x' {}", ["s", "/m y/x", "/m y"]),
        ("s{} -r", ["s{}", "-r", "/m y"]),  # the program is no place for it
    ],
)
def test_the_folder_is_one_word_wherever_it_stands(command: str, argv: List[str]) -> None:
    assert scan_argv(command, Path("/m y")) == argv
