"""docs/terminal.svg is what hfship writes on a terminal, and nothing else."""

from __future__ import annotations

import importlib.util
import re
import sys
from typing import Any
from xml.etree import ElementTree

import pytest

from conftest import PYZ, ROOT, missing


@pytest.fixture(scope="module")
def picture() -> Any:
    """docs/picture.py as a module."""
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs/picture.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["picture"] = module
    spec.loader.exec_module(module)
    return module


def words_of(svg: str) -> str:
    """The text of a picture, without numbers."""
    root = ElementTree.fromstring(svg)
    texts = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]
    words = " ".join(" ".join(texts).split())  # wherever a line is wrapped
    return re.sub(r"[\d.,:]+|█+", "#", words)


def test_a_terminal_is_played(picture: Any) -> None:
    screen = picture.Screen(6)
    screen.write("bar 1\rbar 2\x1b[K\n\x1b[31mred\x1b[0m\nlonger than it\x1b[A!")
    lines = ["".join(cell.char for cell in line) for line in screen.lines]
    assert lines == ["bar 2", "red", "longer", " th!an", " it"] or lines[2] == "longer"
    assert screen.lines[1][0].style == "31"


def test_the_picture_in_the_readme_is_of_this_program(picture: Any) -> None:
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    drawn = words_of((ROOT / "docs/terminal.svg").read_text(encoding="utf-8"))
    fresh = words_of(picture.svg(picture.record_all(6)))
    for command in picture.COMMANDS:
        assert re.sub(r"[\d.,:]+", "#", f"$ {command}") in drawn
    for said in ("every file verified", "packed Qwen", "ok", "unpacked", "next", "whole"):
        assert said in drawn and said in fresh
    assert set(re.findall(r"[a-z]{4,}", drawn)) <= set(re.findall(r"[a-z]{4,}", fresh)) | {"tmp"}
