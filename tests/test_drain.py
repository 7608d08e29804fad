# SPDX-License-Identifier: Apache-2.0
"""`drain` and `undrain`: what is done on the hosts, and that the rest is served again; test_site_hosts.py
has real hosts."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import pytest

from hfship.base.errors import Exit, HfshipError, NetworkError
from hfship.base.processes import Completed
from hfship.base.report import Reporter
from hfship.commands import drain
from hfship.commands.run import guarded, run_line
from hfship.ops.reach import FarHost

FILE = """
[[host]]
name = "gpu1"
data = "{data}/1"
[[host]]
name = "gpu2"
data = "{data}/2"
[[model]]
name = "m"
"""


class Site:
    """The hosts gpu1 and gpu2, whose folders are here, and what was served again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.silent: Dict[str, HfshipError] = {}
        self.refuses = ""
        self.served: List[Any] = []
        self.code = Exit.OK

    def sh(self, host: FarHost, script: str) -> Completed:
        if host.name in self.silent:
            raise self.silent[host.name]
        if host.name == self.refuses:
            return Completed(1, "", "mkdir: cannot create directory: Permission denied")
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        return Completed(done.returncode, done.stdout, done.stderr)

    def serve(self, context: Any, runs: Mapping[str, Any], gone: Sequence[str]) -> Exit:
        self.served.append((context.args, sorted(runs), list(gone)))
        return self.code

    def run(self, *words: str) -> Tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        reporter = Reporter("plain", 0, out, err, as_json="--json" in words)
        code, _ = guarded(reporter, lambda: run_line([*words], reporter))
        return code, out.getvalue(), err.getvalue()

    @property
    def drained(self) -> List[bool]:
        """Whether each of the hosts has the file."""
        folders = (self.folder / "1", self.folder / "2")
        return [(folder / "deploy/_site/drained").exists() for folder in folders]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    (tmp_path / "models.toml").write_text(FILE.format(data=tmp_path))
    monkeypatch.setenv("HFSHIP_MODELS_FILE", str(tmp_path / "models.toml"))
    monkeypatch.setattr(FarHost, "sh", lambda host, script: made.sh(host, script))
    monkeypatch.setattr(drain, "serve_on_hosts", made.serve)
    return made


def test_a_host_that_is_drained_is_served_without(site: Site) -> None:
    site.code = Exit.INCOMPLETE
    code, out, _ = site.run("drain", "gpu1", "--json")
    assert (code, out, site.drained) == (3, "", [True, False])
    [(args, runs, gone)] = site.served
    assert (runs, gone, args.command, args.plan) == (["m"], [], "serve", False)
    assert args.json is True and args.models_file == str(site.folder / "models.toml")
    code, out, err = site.run("undrain", "gpu1")
    assert (code, site.drained, len(site.served)) == (0, [False, False], 1)
    assert "takes models" in out and "undrain: 1 of 1 host ok" in out
    assert f"hfship serve --models {site.folder}/models.toml     # places models there" in err


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_nothing_is_served_where_a_host_could_not_be_told(verb: str, site: Site) -> None:
    site.silent["gpu2"] = NetworkError("gpu2 does not answer", "", "")
    code, out, err = site.run(verb, "gpu1", "gpu2", "--json")
    assert (code, site.served) == (3, []) and "places models" not in err
    assert site.drained == [verb == "drain", False]
    [value] = json.loads(out)
    first, second = value["hosts"]
    assert (value["schema"], value["command"]) == ("hfship-hosts/1", verb)
    assert (first["host"], first["exit_code"]) == ("gpu1", 0)
    state = "drained" if verb == "drain" else "takes models"
    assert first["results"] == [{"name": "", "state": state}]
    assert (second["host"], second["exit_code"]) == ("gpu2", 8)


def test_a_folder_that_cannot_be_written_is_an_error(site: Site) -> None:
    site.refuses = "gpu1"
    code, out, _ = site.run("drain", "gpu1")
    assert code != 0 and "Permission denied" in out and site.served == []


def test_both_commands_need_hosts_of_a_models_file(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.run("drain")[0] == site.run("undrain")[0] == 2
    assert site.run("drain", "gpu9")[0] == 5
    path = str(site.folder / "models.toml")
    monkeypatch.delenv("HFSHIP_MODELS_FILE")
    code, _, err = site.run("undrain", "gpu1")
    assert code == 2 and "none is given" in err
    assert site.run("undrain", "gpu1", "--models", path)[0] == 0
