#!/usr/bin/env python3
"""docs/terminal.svg: a picture of a terminal, made from a run that is recorded here and now.

    python3 docs/picture.py [MEGABYTES]      (make picture)

Runs fetch, pack, verify, unpack and list of dist/hfship.pyz, under the name hfship, on a terminal
of 88 columns (a pty), with a Hub on loopback that has a stand-in of a model. What they write, bars
and colours included, goes through the little terminal below, and what stands on its screen at the
end is drawn. Nothing of it is typed in here: a picture of what hfship never said cannot be made.
"""

from __future__ import annotations

import fcntl
import html
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from support.hub import FaultHub  # noqa: E402
from support.make_model import make_model  # noqa: E402

COLUMNS, LINES = 88, 60
REPO = "Qwen/Qwen3-8B"
COMMANDS = (
    "hfship fetch Qwen/Qwen3-8B",
    "hfship pack Qwen3-8B",
    "hfship verify transfer_package/Qwen3-8B.tar.zst",
    "hfship unpack transfer_package/Qwen3-8B.tar.zst",
    "hfship list models packages",
)

# -- a little terminal


class Cell(NamedTuple):
    """A character on the screen, and the SGR codes that it was written with."""

    char: str = " "
    style: str = ""


_PIECE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|\x1b.|[^\x1b\r\n]", re.DOTALL)


class Screen:
    """What a terminal shows of what is written to it: lines that grow downwards.

    >>> screen = Screen(8)
    >>> screen.write("ab\\rc\\x1b[32md\\x1b[0m\\ne\\x1b[K")
    >>> ["".join(cell.char for cell in line).rstrip() for line in screen.lines]
    ['cd', 'e']
    >>> screen.lines[0][1].style
    '32'
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: List[List[Cell]] = [[]]
        self._row = self._column = 0
        self._style = ""

    def write(self, text: str) -> None:
        """Take what a program writes."""
        for piece in _PIECE.finditer(text):
            word = piece[0]
            if word == "\r":
                self._column = 0
            elif word == "\n":
                self._down()
            elif piece[2]:
                self._control(piece[1], piece[2])
            elif not word.startswith("\x1b"):
                self._put(word)

    def _down(self) -> None:
        self._row += 1
        self._column = 0
        while len(self.lines) <= self._row:
            self.lines.append([])

    def _control(self, argument: str, letter: str) -> None:
        if letter == "m":
            self._style = "" if argument in ("", "0") else argument
        elif letter == "K":
            del self.lines[self._row][self._column :]
        elif letter == "A":
            self._row = max(self._row - int(argument or 1), 0)

    def _put(self, char: str) -> None:
        if self._column >= self.columns:
            self._down()
        line = self.lines[self._row]
        while len(line) <= self._column:
            line.append(Cell())
        line[self._column] = Cell(char, self._style)
        self._column += 1


# -- the run


def record(argv: List[str], env: Dict[str, str], cwd: Path) -> str:
    """What a command writes to a terminal of COLUMNS columns. Raises RuntimeError if it fails."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    process = subprocess.Popen(
        argv, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=env, start_new_session=True
    )
    os.close(slave)
    said = b""
    while True:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:  # EIO: nobody has the other end open
            break
        said += piece
    os.close(master)
    if process.wait():
        raise RuntimeError(f"{argv}: exit {process.returncode}\n{said.decode()}")
    return said.decode("utf-8").replace("\r\n", "\n")


def record_all(megabytes: int) -> Screen:
    """The commands, one after the other, as somebody would see them who types them."""
    screen = Screen(COLUMNS)
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        home, tools = root / "home", root / "bin"
        home.mkdir()
        tools.mkdir()
        shutil.copy2(ROOT / "dist/hfship.pyz", tools / "hfship")
        make_model(root / "made/m", size_mb=megabytes, shards=5)
        with FaultHub(root / "hub") as hub:
            hub.add(root / "made/m", REPO)
            shutil.rmtree(root / "made")
            env = {
                "PATH": f"{tools}:{os.environ['PATH']}",
                "HOME": str(home),
                "LANG": "C.UTF-8",
                "TERM": "xterm-256color",
                "HF_ENDPOINT": hub.url,
                "HFSHIP_SITE_MODELS_DIR": str(home / "site"),
                "HFSHIP_TRANSFER_DIR": str(home / "transfer"),
            }
            for command in COMMANDS:
                screen.write(f"\x1b[1m$ {command}\x1b[0m\n")
                said = record(["sh", "-c", command], env, home)
                screen.write(
                    said.replace(f"{home}/site", "/data/models/huggingface").replace(
                        f"{home}/", "~/"
                    )
                )
    return screen


# -- the picture

CHAR, LINE, MARGIN, TOP = 8.4, 19, 18, 46  # pixels of a font of 14
INK = {"": "#d5d9e0", "32": "#8fd18f", "33": "#e6c46a", "31": "#ef7f78", "1": "#ffffff"}
INK["1;31"] = INK["31"]
NO_BREAK = "\u00a0"  # of two common spaces browsers show one


def runs_of(line: List[Cell]) -> List[Tuple[int, str, str]]:
    """(column, text, style) of the parts of a line that have one style."""
    runs: List[Tuple[int, str, str]] = []
    for column, cell in enumerate(line):
        if runs and runs[-1][2] == cell.style:
            start, text, style = runs[-1]
            runs[-1] = (start, text + cell.char, style)
        else:
            runs.append((column, cell.char, cell.style))
    return [(start, text.rstrip(), style) for start, text, style in runs if text.strip()]


def svg(screen: Screen) -> str:
    """The screen as SVG, whose text can be searched and copied."""
    lines = screen.lines
    while lines and not lines[-1]:
        lines = lines[:-1]
    width = round(COLUMNS * CHAR + 2 * MARGIN)
    height = TOP + len(lines) * LINE + MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="hfship in a terminal">',
        f'<rect width="{width}" height="{height}" rx="9" fill="#20242b"/>',
    ]
    for number, colour in enumerate(("#ef7f78", "#e6c46a", "#8fd18f")):
        out.append(f'<circle cx="{MARGIN + 6 + number * 20}" cy="20" r="6" fill="{colour}"/>')
    font = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    out.append(f'<g font-family="{font}" font-size="14" xml:space="preserve">')
    for row, line in enumerate(lines):
        y = TOP + row * LINE + 10
        for column, text, style in runs_of(line):
            x = MARGIN + column * CHAR
            bold = ' font-weight="bold"' if style.startswith("1") else ""
            length = len(text) * CHAR
            out.append(
                f'<text x="{x:.1f}" y="{y}" fill="{INK.get(style, INK[""])}"{bold} '
                f'textLength="{length:.1f}">{html.escape(text).replace(" ", NO_BREAK)}</text>'
            )
    return "\n".join([*out, "</g>", "</svg>", ""])


def main() -> None:
    """Record, and draw."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    target = ROOT / "docs" / "terminal.svg"
    target.write_text(svg(record_all(megabytes)), encoding="utf-8")
    sys.stdout.write(f"{target}\n")


if __name__ == "__main__":
    main()
