# SPDX-License-Identifier: Apache-2.0
"""What command lines ask for: each option in its field, and what makes no sense together refused.

Each case is a function of a room of commands and what was typed. tests/golden/asked holds what
comes of it; HFSHIP_GOLDEN=write makes it anew.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
from pathlib import Path
from typing import Any, Dict, List

import pytest

from conftest import ROOT
from hfship.base.errors import HfshipError
from hfship.base.report import Reporter
from hfship.base.settings import load_settings
from hfship.commands.context import Context
from hfship.commands.parser import parse_words

GOLDEN = ROOT / "tests" / "golden" / "asked"
WRITE = os.environ.get("HFSHIP_GOLDEN") == "write"
HUB = "https://hub"
# A function, which takes the context, `args` or more, and what is typed for it.
CASES: Dict[str, List[str]] = {
    "pack.pack_options(args)": [
        "pack m -j 1",
        "pack m -j 2 --split 8G --level 3 --force --profile store",
        "pack m -j 2 --split dvd --to a --to b",
    ],
    "pack.target_folders(args, settings)": [
        "pack m",
        "pack m -o out",
        "pack m --split 8G --to a --to b",
        "pack m --to a",
        "pack m -o out --split 8G --to a",
    ],
    "pack.archives_to_recut(args, settings)": [
        "pack m",
        "pack x.tar.zst",
        "pack x.tar.zst --split 8G",
        "pack x.tar.zst x.tar.zst.0001 --join",
        "pack x --join",
        "pack x.tar.zst m --join",
        "pack x.tar.zst m --split 8G",
        "pack m x.tar.zst",
        "pack x.tar.zst --split 8G --join",
        "pack x.tar.zst --join --since y",
        "pack x.tar.zst --join --sign k",
        "pack x.tar.zst --join --name n",
        "pack x.tar.zst --join --dry-run",
    ],
    "unpacking.restore_of(context)": [
        "unpack m -j 1",
        "unpack --all -j 2",
        "unpack m -j 3 --name n --only a --only b --base d --consume --force --keep 4 -o out",
        "unpack m -j 3 --all --keep 0 --key k --wait --allow-older",
    ],
    "unpack.require_sensible(args)": [
        "unpack m",
        "unpack --all --dry-run",
        "unpack m --dry-run",
        "unpack --all --name n",
        "unpack --all --only a",
        "unpack --all --base b",
    ],
    "fetch.fetch_requests(args, HUB)": [
        "fetch o/m",
        "fetch o/m@v1 p/n --include a --exclude b --all-files --verify",
        "fetch o/m --repair --revision r --name x --repo-type dataset",
        "fetch o/m p/m",
        "fetch o/m o/n --name x",
        "fetch o/m config.json",
    ],
    "fetching.transfer_settings(args)": [
        "fetch o/m",
        "fetch o/m -j 3 --limit-rate 2M --mirror http://a/ --mirror https://b",
        "fetch o/m --mirror ftp://b",
    ],
    "fetch_image._require_no_more(context)": [
        "fetch docker://a",
        "fetch docker://a --include x",
        "fetch docker://a --all-files",
        "fetch docker://a --revision x",
        "fetch docker://a --verify",
        "fetch docker://a --engine aria2",
    ],
    "fetch_image.image_root(context)": ["fetch docker://a", "fetch docker://a -o out"],
    "clean._require_one_kind(args)": [
        "clean",
        "clean d --cache --older-than 3d",
        "clean --jobs --older-than 3d",
        "clean --images --older-than 3d",
        "clean --jobs d",
        "clean --jobs --cache",
        "clean --images --cache --old-revisions",
        "clean --jobs --images",
        "clean --kept --images",
        "clean --kept d",
    ],
    "clean._clean_options(context)": [
        "clean",
        "clean d --older-than 2h",
        "clean --cache --old-revisions",
        "clean --old-revisions",
        "clean ''",
    ],
    "serve_options.options_for(context, NAME)": [
        "serve m",
        "serve m --gpus all",
        "serve m --gpus 0,2 --env A=b=c --env D= --served-model-name x --alias y --reset",
        "serve m -tp 2 -pp 3 --replicas 4 -ep --concurrency 5 --gpu-memory-utilization 0.5",
        "serve m --max-model-len 6 --max-num-seqs 7 --dtype half --kv-cache-dtype fp8",
        "serve m --trust-remote-code --no-tools --shm-size 1G --host 0.0.0.0 --port 9000",
        "serve m --shm-size much",
        "serve m --timeout 8 --extra-arg=--a --extra-arg b --image i --device cpu --allow-changed f",
    ],
    "serve.require_sensible(args)": [
        "serve m",
        "serve m --plan --explain --assume-gpus 2xH100",
        "serve m --explain",
        "serve m --assume-gpus 2xH100",
        "serve m --rollback",
        "serve m --rollback --plan",
        "serve m --port 1 --name n --served-model-name s",
        "serve m n --port 1",
        "serve m n --name n",
        "serve m n --served-model-name s",
        "serve m n",
    ],
    "serve_model.purpose_of(args)": ["serve m", "serve m --plan", "serve m --write-only"],
    "push.ssh_typed(args)": [
        "push m h:/d",
        "push m h:/d -p 3 -i k --ssh-option A=b --ssh-option C=d",
    ],
    "push.ssh_command(args)": ["push m h:/d", "push m h:/d -p 3 -i k --ssh-option A=b"],
    "push._require_target(context)": [
        "push x.tar.zst h:/d",
        "push x h:/d",
        "push x y/",
        "push x.tar.zst",
        "push h:/d",
        "push y x.tar.zst",
    ],
    "mirror._mirror_words(args, FOLDER)": [
        "mirror",
        "mirror --port 1 --host h --token-file t --tls-cert c --tls-key k --access-log l",
    ],
    "mirror._mirrored_folder(context)": ["mirror", "mirror ~/out", "mirror nowhere"],
    "mirror._check_options(args)": [
        "mirror",
        "mirror --host ''",
        "mirror --tls-cert c --tls-key k",
        "mirror --tls-key k",
        "mirror --access-log log",
        "mirror --access-log /dev/null/log",
    ],
    "hosts_carry._options_there(context)": [
        "unpack m",
        "unpack m --only a --only b --keep 0 --force --consume --allow-older",
        "unpack m -o d",
        "unpack m --base d",
        "unpack m --name d",
        "unpack m --wait",
    ],
    "key.asked_rights(context, NAME)": [
        "key add m",
        "key add m --models a,b --rate 6 --streams 2 --ops",
    ],
    "status_formats.require_format(context)": [
        "status",
        "status --format prometheus -o f",
        "status -o f",
        "status --format prometheus --json",
    ],
    "export.export_folder(context)": ["export monitoring d", "export monitoring"],
    "names.log_folders(context)": ["watch", "watch --also x --also y", "watch --log-dir l"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an archive, in a home of its own."""
    for name in [name for name in os.environ if name.startswith(("HF", "HUGGING", "XDG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LOG", "DEPLOY", "TRANSFER", "SITE_MODELS"):
        monkeypatch.setenv(f"HFSHIP_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.tar.zst").write_bytes(b"x")
    (tmp_path / "models").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


def outcome(function: str, line: str, here: Path) -> str:
    """What a function makes of a command line, or its error."""
    name, _, arguments = function.rstrip(")").partition("(")
    room, _, own = name.partition(".")
    try:
        args, asked = parse_words(shlex.split(line))
        settings = load_settings(os.environ)
        context = Context(args, settings, Reporter("none", -1), asked)
        known = {
            "context": context,
            "args": args,
            "settings": settings,
            "HUB": HUB,
            "NAME": "m",
            "FOLDER": here / "d",
        }
        values = [known[word] for word in arguments.split(", ")]
        made: Any = getattr(importlib.import_module(f"hfship.commands.{room}"), own)(*values)
    except HfshipError as exc:
        return f"{type(exc).__name__}: {exc.what} | {exc.why} | {exc.next_step}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(made))


@pytest.mark.parametrize("function", CASES)
def test_what_is_typed_is_what_is_asked_for(function: str, here: Path) -> None:
    lines = [f"== {function}"]
    for line in CASES[function]:
        said = outcome(function, line, here).replace(str(here), "HERE")
        lines += [f"$ {line}", said]
    page = "\n".join(lines) + "\n"
    path = GOLDEN / f"{function.partition('(')[0]}.txt"
    if WRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(page, encoding="utf-8")
    assert page == path.read_text(encoding="utf-8")
