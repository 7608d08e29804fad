# SPDX-License-Identifier: Apache-2.0
"""What a command gets, and a row of the command table."""

from __future__ import annotations

import argparse
import gc
import importlib
import types
from typing import TYPE_CHECKING, Any, Mapping, Optional

from hfship.base.values import dataclass, field

if TYPE_CHECKING:
    from hfship.base.errors import Exit
    from hfship.base.report import Reporter
    from hfship.base.settings import ModelsFile, Settings
    from hfship.site.spread import Placement


@dataclass(frozen=True)
class Context:
    """What a command gets: its arguments, the settings and the one reporter.

    `asked` are the arguments that the command line or a models file gave; `listed` says that a
    models file has the model.
    """

    args: argparse.Namespace
    settings: Settings
    reporter: Reporter
    asked: Mapping[str, Any] = field(default_factory=dict)
    file: Optional[ModelsFile] = None
    listed: bool = False
    together: Optional[Placement] = None  # the plans of all models that one `serve` serves


@dataclass(frozen=True)
class Command:
    """One row of the command table.

    `models` is the dest of the words that mean models, for which a models file can stand; "" where
    there are none.
    """

    name: str
    summary: str
    room: str  # of hfship.commands; imported when its arguments or its work are asked for
    models: str = ""
    job: bool = False  # has a record and a log, and runs in the background when asked to

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Give a parser the arguments of this command."""
        add_arguments = getattr(self._module(), f"{self.name}_arguments")
        add_arguments(parser)

    def run(self, context: Context) -> Exit:
        """Do what the command is for."""
        run = getattr(self._module(), f"cmd_{self.name}")
        if not gc.isenabled():  # the launcher collects no garbage: what is imported stays
            gc.freeze()
            gc.enable()
        code: Exit = run(context)
        return code

    def _module(self) -> types.ModuleType:
        return importlib.import_module(f"hfship.commands.{self.room}")


# Options that a models file may set of each model or, for all, in [defaults].
MODEL_OPTIONS = {
    "fetch": ("revision", "repo_type", "include", "exclude", "all_files"),
    "pack": ("profile", "split", "level"),
}
# Options that it may set in [defaults] alone.
DEFAULT_OPTIONS = {"fetch": ("mirror", "limit_rate")}
# Of `serve` it may set all but these, which are for one call.
CALL_OPTIONS = (
    "help",
    "no_preflight",
    "plan",
    "explain",
    "write_only",
    "reset",
    "instead_of",
    "rollback",
    "assume_gpus",
    "planned",
    "gateway",
)
