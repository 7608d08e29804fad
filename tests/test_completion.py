"""Completion, asked of real shells: what bash and zsh offer after a line has been typed."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import List, Set

import pytest
from conftest import PYZ, ROOT, Program, missing

import hfship

# bash's own loop: fill the variables that a completion function reads, call it, print what it found.
ASK_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
compopt() { :; }
found=$(complete -p "${COMP_WORDS[0]##*/}") || exit 1
function=${found#*-F }
"${function%% *}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts of the built pyz: hfship.bash and _hfship, as their help says to install them."""
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    folder = tmp_path_factory.mktemp("completion")
    for shell, name in (("bash", "hfship.bash"), ("zsh", "_hfship")):
        done = subprocess.run([sys.executable, str(PYZ), "completion", shell], capture_output=True, check=True)
        (folder / name).write_bytes(done.stdout)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A current folder with something to complete."""
    (tmp_path / "models").mkdir()
    (tmp_path / "model.tar.zst").touch()
    return tmp_path


def bash(scripts: Path, place: Path, *words: str) -> List[str]:
    command = ["bash", "--norc", "-c", ASK_BASH, "bash", str(scripts / "hfship.bash"), *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


COMMANDS = {command.name for command in hfship.COMMANDS}


@pytest.mark.parametrize("program", ["hfship", "hfship.pyz", "./hfship.pyz", "/opt/hfship.pyz"])
def test_bash_completes_commands_by_every_name_of_the_program(program: str, scripts: Path, place: Path) -> None:
    assert set(bash(scripts, place, program, "")) == COMMANDS
    assert bash(scripts, place, program, "unp") == ["unpack"]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("fetch --end", {"--endpoint"}),
        ("pack --profile ", set(hfship.PROFILES)),
        ("pack --profile s", {name for name in hfship.PROFILES if name.startswith("s")}),
        ("completion ", set(hfship.SHELLS)),
        ("verify mod", {"models", "model.tar.zst"}),
        ("unpack -o mod", {"models"}),
        ("mirror mod", {"models"}),
        ("mirror models --tls-cert mod", {"models", "model.tar.zst"}),
        ("status --js", {"--json"}),
    ],
)
def test_bash_completes_options_choices_and_files(line: str, expected: Set[str], scripts: Path, place: Path) -> None:
    assert set(bash(scripts, place, "hfship", *line.split(" "))) == expected


def test_bash_offers_every_option_of_every_command(scripts: Path, place: Path) -> None:
    for command in hfship.COMMANDS:
        wanted = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", run_help(command.name)))
        assert wanted <= set(bash(scripts, place, "hfship", command.name, "--")), command.name


def run_help(command: str) -> str:
    """The options that --help lists."""
    argv = [sys.executable, str(ROOT / "hfship.py"), command, "--help"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return "\n".join(re.findall(r"^  (-.*?)(?:  |$)", said, re.MULTILINE))


def type_into_zsh(scripts: Path, place: Path, line: str) -> str:
    """What an interactive zsh shows after `line` and TAB TAB, in a terminal of its own."""
    if shutil.which("zsh") is None:
        missing("zsh (python3 tests/components.py install apt)")
    (place / ".zshrc").write_text(
        f"fpath=({scripts} $fpath)\nautoload -Uz compinit; compinit -u -D\nPS1='> '\nunsetopt beep\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        environ = {"PATH": os.environ["PATH"], "ZDOTDIR": str(place), "HOME": str(place), "TERM": "dumb"}
        os.execvpe("zsh", ["zsh", "-i"], {**environ, "COLUMNS": "200", "LINES": "60"})
    shown = read_until(terminal, "> ")
    os.write(terminal, line.encode() + b"\t\t")
    shown = read_until(terminal, None)
    os.write(terminal, b"\x15exit\n")
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown


def read_until(terminal: int, words: object, quiet_s: float = 1.0) -> str:
    """What a terminal shows until `words` come, or until it has been quiet for a while."""
    shown, deadline = "", time.monotonic() + 20
    while time.monotonic() < deadline and not (words and str(words) in shown):
        if not select.select([terminal], [], [], quiet_s)[0] and words is None:
            break
        try:
            shown += os.read(terminal, 65536).decode(errors="replace")
        except OSError:
            break
    return shown


@pytest.mark.parametrize(
    "line, words",
    [
        ("hfship ", sorted(COMMANDS)),
        ("./hfship.pyz un", ["./hfship.pyz unpack"]),
        ("hfship.pyz pack --prof", ["--profile"]),
        ("hfship pack --profile ", list(hfship.PROFILES)),
        ("hfship verify mod", ["model.tar.zst", "models"]),
    ],
)
def test_zsh_completes(line: str, words: List[str], scripts: Path, place: Path) -> None:
    shutil.copy(PYZ, place / "hfship.pyz")
    shown = type_into_zsh(scripts, place, line)
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize("shell", hfship.SHELLS)
def test_source_says_where_the_scripts_are(shell: str, tmp_path: Path, pyz: Program) -> None:
    done = Program([sys.executable, str(ROOT / "hfship.py")], tmp_path)("completion", shell, code=9)
    assert "dist/hfship.pyz" in done.stderr
    assert json.loads(pyz("completion", shell, "--json").stdout)["script"] == pyz("completion", shell).stdout[:-1]


def test_the_pyz_does_not_carry_the_library(pyz: Program) -> None:
    import zipfile

    names = zipfile.ZipFile(PYZ).namelist()
    assert [name for name in names if name.startswith("completion/")] == ["completion/bash", "completion/zsh"]
    assert not [name for name in names if "shtab" in name]
