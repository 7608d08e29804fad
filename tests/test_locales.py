"""Whatever the locale: names are UTF-8 on disk, and everything can be said."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Dict, List

import pytest

from conftest import Program, missing
from support.hub import FaultHub

NAME = "模型-é-Ω.txt"
CHARMAPS = {"zh_CN": "GBK", "en_US": "ISO-8859-1", "ja_JP": "EUC-JP"}
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.fixture(scope="session")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Dict[str, str]]:
    """The environment for each locale; those of other encodings are made here."""
    if not shutil.which("localedef") or not Path("/usr/share/i18n/charmaps/GBK.gz").exists():
        missing("localedef with its sources (Debian: locales)")
    folder = tmp_path_factory.mktemp("locales")
    found = {"C": {"LC_ALL": "C"}, "POSIX": {"LC_ALL": "POSIX"}, "ASCII": ASCII}
    for language, charmap in CHARMAPS.items():
        made = folder / f"{language}.{charmap}"
        command = ["localedef", "-i", language, "-f", charmap, str(made)]
        subprocess.run(command, check=True, capture_output=True)
        found[charmap] = {"LC_ALL": made.name, "LOCPATH": str(folder)}
    return found


LOCALES = ["C", "POSIX", "ASCII", *CHARMAPS.values()]


@pytest.mark.parametrize("name", LOCALES)
def test_names_are_utf8_in_any_locale(
    name: str, locales: Dict[str, Dict[str, str]], pyz: Program, hub: FaultHub, tmp_path: Path
) -> None:
    env = locales[name]
    repo = hub.root / "org" / "m"
    (repo / "ü").mkdir(parents=True)
    (repo / "ü" / NAME).write_text("x")
    (repo / "config.json").write_text("{}")
    pyz("fetch", "org/m", "--endpoint", hub.url, "-o", tmp_path, env=env)
    assert os.listdir(os.fsencode(tmp_path / "m" / "ü")) == [NAME.encode()]
    pyz("pack", tmp_path / "m", "-o", tmp_path / "out", env=env)
    pyz("unpack", tmp_path / "out/m.tar.zst", "-o", tmp_path / "far", env=env)
    assert os.listdir(os.fsencode(tmp_path / "far/m/ü")) == [NAME.encode()]

    (tmp_path / "far/m/ü" / NAME).write_text("y")
    said = pyz("verify", tmp_path / "far/m", code=6, env=env, encoding="utf-8")
    assert NAME in said.stderr
    said = pyz("verify", tmp_path / "far/m", "--json", code=6, env=env, encoding="utf-8")
    assert NAME in json.dumps(json.loads(said.stdout), ensure_ascii=False)


@pytest.mark.parametrize("flags", [[], ["-E"], ["-I"], ["-u", "-W", "error"]])
def test_the_second_start_has_the_words_of_the_first(
    flags: List[str], locales: Dict[str, Dict[str, str]], hfship: Program
) -> None:
    """Byte for byte, and under flags of Python that pass over its variables."""
    python, script = hfship.argv
    word = b"\xc4\xe3-\xff-" + NAME.encode()  # GBK, nothing, UTF-8
    argv = [python.encode(), *[flag.encode() for flag in flags], script.encode(), b"verify", word]
    env = {**hfship.env(), **locales["GBK"]}
    done = subprocess.run(argv, env=env, capture_output=True, check=False)
    assert done.returncode == 5
    assert rb"\udcc4\udce3-\udcff-" + NAME.encode() in done.stderr


def test_a_terminal_gets_its_encoding(locales: Dict[str, Dict[str, str]], pyz: Program) -> None:
    def shown(env: Dict[str, str]) -> bytes:
        pid, terminal = pty.fork()
        if pid == 0:
            os.execve(pyz.argv[0], [*pyz.argv, "verify", "模型"], pyz.env(env))
        text = b""
        try:
            while piece := os.read(terminal, 4096):
                text += piece
        except OSError:  # the end of a terminal
            pass
        os.waitpid(pid, 0)
        os.close(terminal)
        return text

    assert "模型".encode() in shown({"LC_ALL": "C.UTF-8"})
    assert "模型".encode() in shown(locales["C"])
    assert "模型".encode("gbk") in shown(locales["GBK"])
    assert rb"\u6a21\u578b" in shown(locales["ISO-8859-1"])


def test_a_job_in_a_foreign_locale(
    locales: Dict[str, Dict[str, str]], pyz: Program, hub: FaultHub, model: Path, tmp_path: Path
) -> None:
    """Its record has the words that were typed, Ctrl-C ends it, nohup's SIGHUP stays ignored."""
    hub.add(model)
    command = ["fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "模型"]

    def ignore_hangup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    options = {"env": locales["GBK"], "preexec_fn": ignore_hangup}
    with pyz.start(*command, "--limit-rate", "20k", **options) as process:
        record = pyz.home / "logs/hfship/fetch-tiny.json"
        for _ in range(600):
            if record.exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    kept = json.loads(record.read_text())
    assert kept["words"][:5] == ["fetch", "org/tiny", "--endpoint", hub.url, "-o"]
    assert kept["words"][5] == str(tmp_path / "模型")
    assert kept["pid"] == process.pid


def test_nothing_starts_twice_in_utf8(pyz: Program, tmp_path: Path) -> None:
    """It would cost every start some 15 ms."""
    trace = tmp_path / "trace"
    script = f"import sys; open({str(trace)!r}, 'a').write('x')\n"
    (tmp_path / "sitecustomize.py").write_text(script)
    for env in ({"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}, {"PYTHONUTF8": "1"}):
        pyz("version", env={**env, "PYTHONPATH": str(tmp_path)})
    starts = len(trace.read_text())
    assert starts == 3
    pyz("version", env={**ASCII, "PYTHONPATH": str(tmp_path)})
    assert len(trace.read_text()) == starts + 2
