"""The parser of `vllm serve` of some version, run from the modules of its wheel, without its kernels.

    python3 vllm_parsers.py FOLDER < COMMANDS      FOLDER holds vllm/, COMMANDS is a JSON list of argument lists

Prints a JSON list: for each command "", or what the parser says against it. What the modules import comes from where
PYTHONPATH says: the packages of another version of vLLM do, since parsing needs little of them.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import io
import json
import os
import sys
import types
from typing import Any, List, Optional, Sequence

ABSENT = ("gguf",)  # the packages of the newest version lack what older ones imported


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are not there, with any class in them."""

    def find_spec(
        self, name: str, path: Any, target: Any = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        """The module, if it is one of those."""
        if name.split(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """As usual."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Whatever is imported of it is a class."""

        def anything(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = anything  # type: ignore[method-assign]


def objections(commands: Sequence[Sequence[str]]) -> List[str]:
    """What the parser of the vLLM that is imported says against each command."""
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.utils import FlexibleArgumentParser
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args

    parser = make_arg_parser(FlexibleArgumentParser())
    if not parser._get_positional_actions():  # until 0.10 the command itself added it
        parser.add_argument("model_tag", nargs="?")
    found = []
    for command in commands:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(sys.stderr):
                args = parser.parse_args(list(command))
                args.subparser = "serve"
                if "--chat-template" not in command:  # which must be there
                    validate_parsed_serve_args(args)
            found.append("")
        except SystemExit:
            found.append(said.getvalue()[-500:])
        except (ValueError, TypeError, KeyError, NotImplementedError) as exc:
            found.append(f"{type(exc).__name__}: {exc}"[:500])
    return found


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    os.environ.update(VLLM_PLUGINS="", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="CRITICAL")
    sys.meta_path.append(Absent())
    print(json.dumps(objections(json.load(sys.stdin))))
