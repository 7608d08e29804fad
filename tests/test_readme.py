"""Every command of the READMEs is run, block by block, as a reader would type it.

A run has a fresh home folder with hfship.pyz in it, a Hub on loopback that offers Qwen/Qwen3-8B (a small model of that
name), the real `hf` client and a docker. Blocks marked `sh`, `bash` or `console` run in order, each as one shell script
that ends at the first command that fails. In `console` blocks the lines after `$ ` are commands, and every other line
must be printed by them, numbers aside. The only way around is a rule below, which says why and must be in use.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

import pytest

from conftest import PYZ, ROOT, free_port, missing
from hfship.base.errors import UsageError
from hfship.commands.parser import build_parser, with_passed_on
from hfship.commands.table import COMMANDS
from support import components
from support.hub import FaultHub
from support.make_model import make_model

READMES = [path for path in (ROOT / "README.md", ROOT / "README.zh-CN.md") if path.exists()]
SHELLS = ("sh", "bash", "console")
OTHERS = ("text", "toml", "json", "ini", "yaml")  # what may stand in a block that is not run
REPO = "Qwen/Qwen3-8B"


class Rule(NamedTuple):
    """How a line is run otherwise than it stands there, and why."""

    pattern: str
    instead: str
    why: str


RULES = [
    Rule(
        r"^make (\w+)",
        rf"make -n -C {ROOT} \1",
        "the suite runs demo and build elsewhere, and `make test` is the suite",
    ),
    Rule(r"\bsudo ", "", "the folders of the run are the reader's own"),
    Rule(r"/usr/local/bin/", "$HOME/bin/", "the machine that runs the suite stays as it is"),
    Rule(r"\b8000\b", "$SERVE_PORT", "the port may be taken on the machine that runs the suite"),
    Rule(r"\bHOST\b", "127.0.0.1", "a name that stands for the reader's machine"),
    Rule(r"\b8090\b", "$MIRROR_PORT", "the port may be taken on the machine that runs the suite"),
    Rule(
        r"\bops@gpu1:", "", "a host that takes the reader's key: tests/test_push.py has a real sshd"
    ),
    Rule(r"(?<![\w.~])/(data|media)/", r"$SITE/\1/", "the folders of a site, which need root"),
    Rule(r"^(.* mirror .*)$", r"background \1", "serves until it is stopped"),
    Rule(
        r"^(hfship (?:watch --site|status --repair --install).*)$",
        r"\1 --help",
        "needs the gateway of a site, and systemd: tests/test_gateway_run.py, tests/test_service.py",
    ),
    Rule(r"^(.* logs .*-f\b.*)$", r"interrupted \1", "follows until Ctrl-C"),
]

# What the blocks need beyond a shell: servers stay up until the run is over, and followers get their Ctrl-C.
PRELUDE = """
set -eo pipefail
background() {
  setsid "$@" >> "$HOME/background.log" 2>&1 & echo $! >> "$HOME/background.pids"
  for _ in $(seq 300); do (: < /dev/tcp/127.0.0.1/$MIRROR_PORT) 2>/dev/null && return; sleep 0.1; done; return 1
}
interrupted() { timeout --preserve-status -s INT 5 "$@" || [ $? = 130 ]; }
"""


class Block(NamedTuple):
    """One fenced block of a document."""

    language: str
    line: int
    text: str

    @property
    def commands(self) -> List[str]:
        """The lines that are typed, without comments; a command over several lines is one."""
        text = self.text.replace("\\\n", " ")
        lines = [
            line
            for line in text.splitlines()
            if self.language != "console" or line.startswith("$ ")
        ]
        typed = [
            re.sub(r"(^|\s+)#( .*|$)", "", line[2:] if self.language == "console" else line)
            for line in lines
        ]
        return [line.strip() for line in typed if line.strip()]

    @property
    def shown(self) -> List[str]:
        """The output that a `console` block shows; a line of dots stands for what it leaves out."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "console" else []
        return [
            line
            for line in lines
            if line.strip() and not line.startswith("$ ") and line.strip(" .…")
        ]


def blocks(text: str) -> List[Block]:
    """The fenced blocks of a Markdown text.

    >>> blocks("a\\n```sh\\nls  # why\\n```\\n")[0].commands
    ['ls']
    >>> blocks("```console\\n$ ls -l\\ntotal 0\\n...\\n```\\n")[0].shown
    ['total 0']
    """
    found = []
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append(Block(match[1], text.count("\n", 0, match.start()) + 1, match[2]))
    return found


def as_run(line: str) -> str:
    """A command after the rules."""
    for rule in RULES:
        line = re.sub(rule.pattern, rule.instead, line)
    return line


def blurred(line: str) -> str:
    """A line of output without its numbers, hashes and column widths.

    >>> blurred("fetched  29.5 GB in 12 s (1.1 GB/s)") == blurred("fetched 3.1 MB in 0.2 s (15 MB/s)")
    True
    """
    line = re.sub(r"\b[0-9a-f]{7,}\b", "#", line.replace("less than ", ""))
    return " ".join(re.sub(r"\d[\d.,:]*( [kMGT]?B\b| min\b| h\b| s\b)*", "#", line).split())


def typed(path: Path) -> List[Block]:
    return [block for block in blocks(path.read_text(encoding="utf-8")) if block.language in SHELLS]


# -- what the documents are held to


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_no_command_hides_in_a_block_that_is_not_run(readme: Path) -> None:
    for block in blocks(readme.read_text(encoding="utf-8")):
        assert block.language in (*SHELLS, *OTHERS, ""), (
            f"line {block.line}: what is a block of {block.language}?"
        )
        if block.language not in SHELLS:
            hidden = re.findall(
                r"(?m)^\s*(?:\$ |sudo |python3 |hfship |hf |make |docker ).*", block.text
            )
            assert not hidden, f"line {block.line}: mark the block as sh, or as console"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_commands_in_the_text_are_commands_that_the_parser_takes(readme: Path) -> None:
    """`fetch --verify REPO` in a table or a sentence: every option exists, every value is one."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", readme.read_text(encoding="utf-8"))
    names = "|".join(command.name for command in COMMANDS)
    for text in re.findall(rf"(?<!`)`(?:hfship |python3 hfship\.pyz )?((?:{names}) [^`]*)`", prose):
        ours = list(with_passed_on(shlex.split(text)))
        needs = (
            ours[:1] + (["NAME"] if len(ours) == 1 or ours[-1].startswith("-") else []) + ours[1:]
        )
        for words in (ours, needs, [*ours, "NAME"]):
            try:
                build_parser().parse_args(words)
                break
            except (SystemExit, UsageError):
                continue
        else:
            pytest.fail(f"{readme.name}: {text!r} is no command")


def test_both_languages_have_the_same_commands() -> None:
    commands = [[(block.language, block.commands) for block in typed(path)] for path in READMES]
    assert all(of_one == commands[0] for of_one in commands)


def test_every_rule_is_needed() -> None:
    lines = [line for path in READMES for block in typed(path) for line in block.commands]
    assert [
        rule for rule in RULES if not any(re.search(rule.pattern, line) for line in lines)
    ] == []


# -- the run


Printed = List[Tuple[Block, str]]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[str, str]]:
    """The environment of somebody who has hfship.pyz, a Hub and a docker, and nothing else of ours."""
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    tmp_path = tmp_path_factory.mktemp("reader")
    home, site, tools = (tmp_path / name for name in ("home", "site", "bin"))
    for folder in (
        home,
        home / "bin",
        tools,
        site / "media/usb",
    ):
        folder.mkdir(parents=True)
    shutil.copy2(PYZ, home / "hfship.pyz")
    (tools / "hf").symlink_to(components.require("hf"))
    (tools / "python3").symlink_to(sys.executable)
    path = [str(tools), str(home / "bin"), os.environ["PATH"]]
    if os.environ.get("HFSHIP_README_DOCKER") != "real":
        stubs = Path(__file__).parent / "stubs"
        for name, stub in (("docker", "fake-docker"), ("nvidia-smi", "nvidia-smi")):
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stubs / stub}" "$@"\n')
            (tools / name).chmod(0o755)
    port, serve_port = free_port(), free_port()
    make_model(tmp_path / "made" / "m", size_mb=9, shards=2)
    keep = ("DOCKER_HOST", "DOCKER_CONFIG", "HFSHIP_STUB_GPUS")
    environ = {key: os.environ[key] for key in keep if key in os.environ}
    environ.update(
        HOME=str(home),
        PATH=os.pathsep.join(path),
        SITE=str(site),
        MIRROR_PORT=str(port),
        SERVE_PORT=str(serve_port),
        LANG="C.UTF-8",
    )
    environ.update(
        FAKE_STATE=str(tmp_path), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", NO_COLOR="1"
    )
    folders = {"TRANSFER": "transfer", "SITE_MODELS": "models/huggingface", "DEPLOY": "deploy"}
    environ.update(
        {f"HFSHIP_{name}_DIR": str(site / "data" / folder) for name, folder in folders.items()}
    )
    with FaultHub(tmp_path / "hub") as hub:
        hub.add(tmp_path / "made" / "m", REPO)
        yield {**environ, "HF_ENDPOINT": hub.url}
    for left in (
        home / "background.pids",
        tmp_path / "pid",
    ):  # servers, and the fake docker's after a failure
        for pid in left.read_text().split() if left.exists() else ():
            subprocess.run(["kill", pid], check=False)


def run_blocks(found: List[Block], environ: Dict[str, str]) -> Printed:
    """Run blocks in order; what each of them printed. Fails at the first that does not end well."""
    printed = []
    for block in found:
        script = PRELUDE + "".join(f"{as_run(line)}\n" for line in block.commands)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=environ["HOME"],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        lines = "\n".join(as_run(line) for line in block.commands)
        assert done.returncode == 0, (
            f"block at line {block.line}: exit {done.returncode}\n{lines}\n---\n{done.stdout}"
        )
        printed.append((block, done.stdout))
    return printed


@pytest.fixture(scope="module")
def printed(reader: Dict[str, str]) -> Printed:
    """What the commands of README.md print: README.zh-CN.md has the same ones."""
    return run_blocks(typed(READMES[0]), reader)


@pytest.mark.real
@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_command_works_as_it_stands(
    readme: Path, printed: Printed, reader: Dict[str, str]
) -> None:
    shown = typed(readme)
    assert [block.commands for block in shown] == [block.commands for block, _ in printed]
    hold_to_what_was_printed([(block, said) for block, (_, said) in zip(shown, printed)], reader)


def hold_to_what_was_printed(printed: Printed, environ: Dict[str, str]) -> None:
    """Every line that a block shows was printed by its commands, numbers aside."""
    for block, said in printed:
        lines = {
            blurred(line)
            for line in said.replace(environ["SITE"], "").replace(environ["HOME"], "~").splitlines()
        }
        absent = [line for line in block.shown if blurred(line) not in lines]
        assert not absent, (
            f"block at line {block.line} shows what is not printed: {absent}\n---\n{said}"
        )


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.alone
def test_every_command_works_with_a_real_docker_and_vllm() -> None:
    """The same beside a Docker engine and the vLLM image, in a network namespace that has only loopback."""
    components.require("vllm-image")
    case = f"{Path(__file__).name}::{test_every_command_works_as_it_stands.__name__}[README.md]"
    argv = components.with_docker_argv(
        [sys.executable, "-m", "pytest", "-q", "-x", f"{Path(__file__).parent}/{case}"]
    )
    env = {
        **os.environ,
        "HFSHIP_README_DOCKER": "real",
        "HFSHIP_STUB_GPUS": "none",
        "HFSHIP_REQUIRE_ALL": "1",
    }
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "text, words",
    [
        ("```sh\ntrue\nfalse\ntrue\n```\n", "block at line 1: exit 1"),
        ("```sh\ncat nothing | cat\n```\n", "nothing"),
        ("```console\n$ echo one 1\none 2\n$ echo two\nthree\n```\n", "['three']"),
    ],
)
def test_the_harness_can_fail(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    environ = {"HOME": str(tmp_path), "SITE": "/site", "PATH": os.environ["PATH"]}
    with pytest.raises(AssertionError) as caught:
        hold_to_what_was_printed(run_blocks(typed(tmp_path / "README.md"), environ), environ)
    assert words in str(caught.value)
