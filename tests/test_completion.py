"""Completion, asked of real shells: what bash, zsh and fish offer after a line has been typed."""

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
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Set

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import PYZ, ROOT, Program, missing
from hfship.archive.pack_plan import PROFILES
from hfship.base.manifest import Source, make_manifest, write_manifest
from hfship.commands.candidates import answer, candidates
from hfship.commands.completion import SHELLS
from hfship.commands.completion_scripts import SCRIPTS
from hfship.commands.known_names import paths_that_end
from hfship.commands.table import COMMANDS as TABLE
from hfship.ops.jobs import new_record, write_job

COMMANDS = {command.name for command in TABLE}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with something to complete, which is the current one, too; and the program."""
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    place = tmp_path_factory.mktemp("place")
    for folder in (
        "models/Qwen3-8B",
        "models/org",
        "files",
        "deploy/Llama",
        "bin",
        "transfer",
        "logs/hfship",
    ):
        (place / folder).mkdir(parents=True)
    source = Source("https://hub", "Qwen/Qwen3-8B", "main", "Qwen/Qwen3-8B", "c" * 40)
    write_manifest(place / "models/Qwen3-8B", make_manifest("Qwen3-8B", (), source))
    (place / "deploy/Llama/plan.json").write_text("{}")
    (place / "transfer/Gemma.tar.zst.0001").touch()
    (place / "transfer/Gemma.tar.zst.0002").touch()
    write_job(place / "logs/hfship", new_record("fetch-Qwen3-8B", ["fetch", "x"], False, {}))
    (place / "file.txt").touch()
    (place / "site.toml").write_text('[[model]]\nrepo = "org/Listed"\n')
    shutil.copy(PYZ, place / "hfship.pyz")
    (place / "other.py").touch()
    (place / "bin/hfship").symlink_to(place / "hfship.pyz")
    for shell, name in (("bash", "hfship.bash"), ("zsh", "bin/_hfship"), ("fish", "hfship.fish")):
        (place / name).write_text(SCRIPTS[shell])
    return place


def environment(place: Path) -> Dict[str, str]:
    return {
        "PATH": f"{place}/bin:{os.path.dirname(os.path.realpath(sys.executable))}:{os.environ['PATH']}",
        "HOME": str(place),
        "TERM": "dumb",
        "HFSHIP_TRANSFER_DIR": str(place / "transfer"),
        "HFSHIP_DEPLOY_DIR": str(place / "deploy"),
        "HFSHIP_SITE_MODELS_DIR": str(place / "site"),
    }


# ---- what fits, whatever the shell

# line -> what the shell offers of its own, words that are among those that fit, and words that are not
LINES: Dict[str, Any] = {
    "": ("none", COMMANDS, {"--help"}),
    "unp": ("none", {"unpack"}, {"pack"}),
    "nonsense ": ("none", set(), COMMANDS),
    "fetch --end": ("none", {"--endpoint"}, {"--exclude"}),
    "fetch ": ("none", {"Qwen/Qwen3-8B"}, {"Qwen3-8B"}),
    "pack ": ("files", {"Qwen3-8B", "org"}, {"Llama"}),
    "pack Qwen3-8B ": ("files", {"org"}, {"Qwen3-8B"}),
    "pack --profile ": ("none", set(PROFILES), {"Qwen3-8B"}),
    "pack --split ": ("none", {"fat32", "dvd", "bd25", "bd50"}, {"Qwen3-8B"}),
    "pack --split=f": ("none", {"--split=fat32"}, {"fat32", "--split=dvd"}),
    "pack --split = f": ("none", {"fat32"}, {"dvd"}),
    "pack --split =": ("none", {"fat32", "dvd"}, set()),
    "pack --since ": ("files", {"Gemma"}, {"1h"}),
    "push Ge": ("files", {"Gemma"}, {"Qwen3-8B"}),
    "verify ": ("files", {"Gemma", "Qwen3-8B"}, {"Llama"}),
    "unpack -o ": ("dirs", set(), {"Gemma"}),
    "serve ": ("dirs", {"Qwen3-8B"}, {"Llama"}),
    "serve --models si": ("none", {"site.toml"}, {"file.txt"}),
    "serve --models ": ("none", {"site.toml", "models/"}, {"file.txt"}),
    "serve --models site.toml ": ("dirs", {"Listed", "Qwen3-8B"}, {"org/Listed"}),
    "fetch --models site.toml o": ("none", {"org/Listed"}, set()),
    "serve m -- --enf": ("none", set(), {"--env"}),
    "serve m --gpus ": ("none", {"all"}, set()),
    "status ": ("none", {"Llama"}, {"fetch-Qwen3-8B"}),
    "status --format ": ("none", {"prometheus"}, set()),
    "stop ": ("none", {"Llama", "fetch-Qwen3-8B"}, {"Qwen3-8B"}),
    "logs -f ": ("none", {"Llama", "fetch-Qwen3-8B"}, set()),
    "logs --since ": ("none", {"1h", "7d"}, {"Gemma"}),
    "watch fe": ("none", {"fetch-Qwen3-8B"}, set()),
    "mirror ": ("dirs", set(), {"Qwen3-8B"}),
    "mirror models --tls-cert ": ("files", set(), set()),
    "clean --older-than ": ("none", {"7d"}, set()),
    "completion ": ("none", set(SHELLS), set()),
    "status --json --": ("none", {"--format"}, {"--json"}),
}


def fitting(line: str, place: Path) -> Any:
    """(what the shell offers of its own, the words that fit) at the end of a line."""
    first, *words = answer(["--", *line.split(" ")], environment(place)).splitlines()
    return first, {word.partition("\t")[0] for word in words}


@pytest.mark.parametrize("line", LINES)
def test_what_fits(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for name, value in environment(place).items():
        monkeypatch.setenv(name, value)
    shell, there, absent = LINES[line]
    found_shell, found = fitting(line, place)
    assert found_shell == shell and there <= found and not absent & found, found


def test_every_option_of_every_command_is_offered(place: Path) -> None:
    for command in TABLE:
        wanted = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", run_help(command.name)))
        assert wanted <= fitting(f"{command.name} --", place)[1], command.name


def run_help(command: str) -> str:
    """The options that --help lists."""
    argv = [sys.executable, str(ROOT / "hfship.py"), command, "--help"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return "\n".join(re.findall(r"^  (-.*?)(?:  |$)", said, re.MULTILINE))


@given(st.lists(st.text(max_size=12) | st.sampled_from(sorted(COMMANDS)), max_size=5))
def test_any_line_is_answered(words: List[str]) -> None:
    text = answer(["--", *words], {"HOME": "/nowhere"})
    first, *lines = text.splitlines() if "\x1c" not in text else text.split("\n")
    assert first in ("files", "dirs", "none") and all("\t" in line for line in lines if line)


def test_names_that_are_no_words_are_not_offered(place: Path) -> None:
    found = candidates([""], None)  # type: ignore[arg-type]
    odd = type(found)("none", (("a\nb", ""), ("c\td", ""), ("e", "")))
    assert odd.text() == "none\ne\t\n"
    assert paths_that_end("nowhere/x", (".toml",)) == []


def test_a_shell_gets_its_answer_also_in_a_broken_environment(pyz: Program, place: Path) -> None:
    env = {"HF_ENDPOINT": "no address", "HFSHIP_MODELS_FILE": "/nowhere"}
    done = pyz("completion", "--words", "--", "serve", "", env=env)
    assert done.stdout == "dirs\n" and not done.stderr


# ---- bash

# bash's own loop: fill the variables that a completion function reads, call it, print what it found.
ASK_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
compopt() { :; }
found=$(complete -p "${COMP_WORDS[0]##*/}") || exit 1
function=${found#*-F }
"${function%% *}" "$1" "${COMP_WORDS[COMP_CWORD]}" ""
printf '%s\\n' "${COMPREPLY[@]}"
"""


def bash(place: Path, *words: str, before: str = "") -> List[str]:
    script = before + ASK_BASH
    command = ["bash", "--norc", "-c", script, "bash", str(place / "hfship.bash"), *words]
    done = subprocess.run(
        command, cwd=place, env=environment(place), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


CALLS = (["hfship"], ["hfship.pyz"], ["./hfship.pyz"], ["~/hfship.pyz"], ["python3", "hfship.pyz"])


@pytest.mark.parametrize("call", [*CALLS, ["python3.11", "./hfship.pyz"]], ids=" ".join)
def test_bash_completes_commands_by_every_name_of_the_program(call: List[str], place: Path) -> None:
    if call == ["hfship.pyz"]:
        call = [str(place / "hfship.pyz")]
    if not shutil.which(call[0], path=environment(place)["PATH"]) and "/" not in call[0]:
        missing(call[0])
    assert bash(place, *call, "unp") == ["unpack"]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", COMMANDS),
        ("verify mod", {"models"}),
        ("verify fi", {"files", "file.txt"}),
        ("unpack -o fi", {"files"}),
        ("serve Q", {"Qwen3-8B"}),
        ("pack --split fa", {"fat32"}),
        ("serve --models si", {"site.toml"}),
        ("status --js", {"--json"}),
    ],
)
def test_bash_completes_names_options_and_files(line: str, expected: Set[str], place: Path) -> None:
    assert set(bash(place, "hfship", *line.split(" "))) == expected


def test_bash_leaves_other_scripts_of_python_to_what_was_there(place: Path) -> None:
    assert bash(place, "python3", "oth") == []
    loader = "_theirs() { COMPREPLY=(theirs); }; _comp_load() { complete -F _theirs python3; }\n"
    assert bash(place, "python3", "other.py", "x", before=loader) == ["theirs"]
    assert bash(place, "python3", "hfship.pyz", "unp", before=loader) == ["unpack"]


# ---- zsh


def type_into_zsh(place: Path, line: str) -> str:
    """What an interactive zsh shows after `line` and TAB TAB, in a terminal of its own."""
    if shutil.which("zsh") is None:
        missing("zsh (python3 tests/support/components.py install apt)")
    (place / ".zshrc").write_text(
        f"fpath=({place}/bin $fpath)\nautoload -Uz compinit; compinit -u -D\nPS1='> '\nunsetopt beep\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        extra = {"ZDOTDIR": str(place), "COLUMNS": "200", "LINES": "60"}
        os.execvpe("zsh", ["zsh", "-i"], {**environment(place), **extra})
    shown = read_until(terminal, "> ")
    os.write(terminal, line.encode() + b"\t\t")
    shown = read_until(terminal, None)
    os.write(terminal, b"\x15exit\n")
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown


def read_until(terminal: int, words: object, quiet_s: float = 2.0) -> str:
    """What a terminal shows until `words` come, or until it has been quiet for a while."""
    shown, deadline = "", time.monotonic() + 30
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
        ("./hfship.pyz unp", ["./hfship.pyz unpack"]),
        ("python3 hfship.pyz unp", ["python3 hfship.pyz unpack"]),
        ("hfship pack --profile ", list(PROFILES)),
        ("hfship serve Q", ["hfship serve Qwen3-8B"]),
        ("hfship verify fi", ["files", "file.txt"]),
        ("python3 oth", ["other.py"]),
    ],
)
def test_zsh_completes(line: str, words: List[str], place: Path) -> None:
    shown = type_into_zsh(place, line)
    assert all(word in shown for word in words), shown


# ---- fish


def fish(place: Path, line: str) -> List[str]:
    """What fish offers at the end of a line."""
    if shutil.which("fish") is None:
        missing("fish (python3 tests/support/components.py install apt)")
    script = f"source {place}/hfship.fish; complete -C '{line}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        cwd=place, env=environment(place), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [word.partition("\t")[0] for word in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("hfship unp", {"unpack"}),
        ("./hfship.pyz unp", {"unpack"}),
        ("python3 hfship.pyz unp", {"unpack"}),
        ("hfship ", COMMANDS),
        ("hfship serve Q", {"Qwen3-8B"}),
        ("hfship pack --split fa", {"fat32"}),
        ("hfship serve --models si", {"site.toml"}),
        ("hfship verify fi", {"files/", "file.txt"}),
        ("hfship unpack -o fi", {"files/"}),
        ("python3 oth", {"other.py"}),
    ],
)
def test_fish_completes(line: str, expected: Set[str], place: Path) -> None:
    assert expected <= set(fish(place, line))


# ---- the command


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed(shell: str, hfship: Program) -> None:
    assert hfship("completion", shell).stdout == SCRIPTS[shell]
    script = json.loads(hfship("completion", shell, "--json").stdout)["script"]
    assert script == SCRIPTS[shell].rstrip("\n")


def test_the_pyz_carries_no_other_library_for_it(pyz: Program) -> None:
    names = zipfile.ZipFile(PYZ).namelist()
    assert not [name for name in names if "shtab" in name or name.startswith("completion/")]
