# SPDX-License-Identifier: Apache-2.0
"""`hfship version`."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import TYPE_CHECKING, Any, Dict, Tuple

from hfship import __version__
from hfship.base.errors import Exit, HostError
from hfship.base.pyz import own_file, verify_own_file
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.commands.context import Context


@dataclass(frozen=True)
class Fact:
    """The version of a part, and where it comes from."""

    name: str
    version: str
    origin: str

    def text(self) -> str:
        """One line, whatever the origin says."""
        origin = self.origin.replace("\n", "; ")
        return f"{self.name:<7} {self.version} ({origin})"


@dataclass(frozen=True)
class Versions:
    """What this hfship is made of."""

    facts: Tuple[Fact, ...]

    def text(self) -> str:
        """A line for each part."""
        return "\n".join(fact.text() for fact in self.facts)

    def json(self) -> Dict[str, Any]:
        """The parts for --json: docs/json.md."""
        value = {}
        for fact in self.facts:
            value[fact.name] = {"version": fact.version, "origin": fact.origin}
        return value


def version_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of version."""
    parser.add_argument(
        "--verify", action="store_true", help="prove that this file is as it was built"
    )


def cmd_version(context: Context) -> Exit:
    """Version, Python, zstd backend, and with --verify the proof that this file is whole."""
    path = own_file()
    facts = [
        Fact("hfship", __version__, str(path)),
        Fact("python", platform.python_version(), sys.executable),
        _zstd_fact(),
    ]
    if context.args.verify:
        facts.append(_verify_fact(path))
    versions = Versions(tuple(facts))
    context.reporter.result_of(versions.text(), versions.json())
    return Exit.OK


def _zstd_fact() -> Fact:
    """The zstd backend in use, or why there is none."""
    from hfship.archive.zstd import load_zstd

    try:
        zstd = load_zstd()
    except HostError as exc:
        return Fact("zstd", "none", f"{exc.what}: {exc.why}")
    return Fact("zstd", zstd.name, zstd.origin)


def _verify_fact(path: Path) -> Fact:
    """The proof that the pyz at `path` is as it was built. Raises IntegrityError if it is not."""
    if path.name == "hfship.py":
        return Fact("verify", "nothing to verify", "hfship.py runs from source")
    return Fact("verify", "as it was built", f"sha256 {verify_own_file(path)}")
