"""What hfship says, word for word: help, results, tables, JSON and errors against the files in tests/golden.

`make golden` writes them anew; git shows then what has changed. Times, sizes of this machine's disks, ports and folders
are masked, and help is compared without its line breaks, which differ between versions of argparse.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import pytest

from conftest import ROOT, Program, free_port, missing, program
from hfship.archive.zstd import load_zstd
from hfship.commands.parser import build_parser, with_passed_on
from hfship.commands.table import COMMANDS
from hfship.commands.table import EXAMPLES as hfship_EXAMPLES
from support import components
from support.archives import tar_of
from support.hub import FaultHub
from support.make_model import make_model
from support.registry import FaultRegistry, small_image
from test_serve import Site

FOLDERS = {"models": "models", "packages": "transfer_package", "site": "site"}
GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("HFSHIP_GOLDEN") == "write"
HELP = ["", *(command.name for command in COMMANDS)]


class Step(NamedTuple):
    """One command of the story. {…} are places of the run; `play` is the machine that the fake docker plays."""

    name: str
    line: str
    code: int = 0
    play: str = ""
    before: str = ""  # shell, run in the home folder
    needs: str = ""  # a program without which it is left out


MODELS_FILE = """
[[model]]
repo = "org/tiny"
revision = "main"
[model.serve]
max_model_len = 1024
aliases = ["chat"]
[[model]]
repo = "org/nothing"
"""
WRONG_FILE = (
    MODELS_FILE.replace("revision", "revison").replace("1024", '"long"') + "[gateway]\nprt = 443\n"
)
LEFTOVERS = """
mkdir -p models/gone/.hfship/partial
touch models/gone/.hfship/verified.jsonl
head -c 1M /dev/zero | tee models/gone/.hfship/partial/c25a81432b4ff186e2d872a265ecc599ef076ea5.part > transfer_package/gone.tar.zst.0002.incomplete
touch -d '2 days ago' models/gone/.hfship/partial/* transfer_package/*.incomplete
"""
JOB_RUNS = "until grep -q fetching logs/hfship/fetch-tiny.json; do sleep 0.05; done"

# In the order in which they run; each is run a second time with --json where `JSON` names it.
STORY = [
    Step("models-example", "models --example"),
    Step("fetch-dry-run", "fetch org/tiny --dry-run"),
    Step("fetch", "fetch org/tiny"),
    Step("fetch-nothing-to-do", "fetch org/tiny"),
    Step("models", "models models.toml", before=f"cat > models.toml <<'END'\n{MODELS_FILE}END"),
    Step("fetch-image-dry-run", "fetch docker://{registry}/org/app:1 --dry-run"),
    Step("fetch-image", "fetch docker://{registry}/org/app:1 -o images"),
    Step("fetch-image-nothing-to-do", "fetch docker://{registry}/org/app:1 -o images"),
    Step("pack-image", "pack images/app_1"),
    Step("verify-image", "verify app_1"),
    Step("unpack-image", "unpack app_1 -o far"),
    Step("error-no-image", "fetch docker://{registry}/org/app:2", 5),
    Step("error-no-platform", "fetch docker://{registry}/org/app:1 --platform linux/s390x", 9),
    Step("error-no-reference", "fetch docker://ORG/app", 2),
    Step("fetch-models", "fetch --models models.toml", 5),
    Step("fetch-models-named", "fetch --models models.toml tiny"),
    Step("pack-dry-run", "pack tiny --dry-run"),
    Step("pack", "pack tiny --split 6M"),
    Step("pack-again", "pack tiny --split 6M"),
    Step("push", "push tiny ./usb", needs="rsync"),
    Step("push-again", "push tiny ./usb", needs="rsync"),
    Step("bom", "bom {models}/tiny -o {packages}/tiny.cdx.json"),
    Step("error-no-custody", "custody {models}/tiny", 5),
    Step("error-no-signing-key", "sign {models}/tiny --key none.pem", 2),
    Step("verify", "verify {packages}/tiny.tar.zst {models}/tiny"),
    Step("verify-part", "verify {packages}/tiny.tar.zst.0001"),
    Step("unpack", "unpack {packages}/tiny.tar.zst.0001"),
    Step("unpack-again", "unpack {packages}/tiny.tar.zst.0001"),
    Step("unpack-foreign", "unpack other.tar.zst"),
    Step("verify-foreign", "verify {site}/other"),
    Step("status-nothing", "status"),
    Step("serve-plan", "serve tiny --plan --gpus 0"),
    Step("serve-write-only", "serve tiny --write-only --gpus 0 --port {port}"),
    Step("serve", "serve tiny --gpus 0 --port {port}"),
    Step("status", "status"),
    Step("list", "list"),
    Step("list-wanted", "list wanted --models models.toml"),
    Step("logs", "logs tiny"),
    Step("stop", "stop tiny"),
    Step("status-stopped", "status"),
    Step("error-stopped", "status tiny", 9),
    Step("logs-stopped", "logs tiny -n 1"),
    Step("restart", "restart tiny"),
    Step("stop-again", "stop tiny"),
    Step("stop-remove", "stop tiny --remove --yes"),
    Step("key-add", "key add alice --models tiny --rate 60/min"),
    Step("key-list", "key list"),
    Step("key-suspend", "key suspend alice"),
    Step("error-no-key", "key revoke alicia --yes", 5),
    Step("key-revoke", "key revoke alice --yes"),
    Step("key-list-none", "key list"),
    Step("clean-dry-run", "clean --dry-run", before=LEFTOVERS),
    Step("error-clean", "clean", 2),
    Step("clean", "clean --yes"),
    Step("clean-again", "clean"),
    Step("doctor", "doctor --offline"),
    Step(
        "watch",
        "watch --once fetch-tiny pack-tiny verify-tiny+1 unpack-tiny unpack-other serve-tiny",
    ),
    Step("watch-one", "watch pack-tiny"),
    Step("background", "fetch org/tiny -o other --limit-rate 50k --background"),
    Step("error-job-in-the-way", "fetch org/tiny -o other", 3, before=JOB_RUNS),
    Step("stop-job", "stop fetch-tiny"),
    Step("stop-job-again", "stop fetch-tiny"),
    Step(
        "error-verify-damaged",
        "verify {models}/tiny",
        6,
        before="printf x >> models/tiny/config.json",
    ),
    Step(
        "error-verify-archive",
        "verify {packages}/tiny.tar.zst",
        6,
        before="rm transfer_package/tiny.tar.zst.0002",
    ),
    Step(
        "error-pack-unfinished",
        "pack half",
        3,
        before="mkdir -p models/half/.hfship/partial",
    ),
    Step("error-usage", "fetch", 2),
    Step("error-nothing-named", "serve", 2),
    Step("error-nothing-to-unpack", "unpack", 2),
    Step("error-no-log-named", "logs", 2),
    Step("error-other-command", "download org/tiny", 2),
    Step("error-other-option", "fetch org/tiny --max-workers 8", 2),
    Step("error-secret-option", "fetch org/tiny --token hf_secret", 2),
    Step("error-file", "fetch org/tiny config.json", 2),
    Step("error-bits", "fetch org/tiny --limit-rate 50Mb/s", 2),
    Step("help-exit-codes", "help exit codes"),
    Step("help-offline", "help offline"),
    Step("error-size", "pack tiny --split 1x", 2),
    Step("error-name", "fetch org/tiny --name a/b", 2),
    Step("error-no-repository", "fetch org/nothing", 5),
    Step("error-no-revision", "fetch org/tiny@v9", 5),
    Step("error-token", "fetch org/tiny --token-file nowhere", 4),
    Step("error-no-archive", "unpack nowhere.tar.zst", 5),
    Step("error-no-model", "serve nowhere", 5),
    Step("error-no-deployment", "logs nowhere", 5),
    Step("error-no-job", "watch nowhere", 5),
    Step("error-no-command", "fetsch org/tiny", 2),
    Step("error-no-option", "fetch org/tiny --output-dir x", 2),
    Step(
        "error-models-file",
        "fetch --models wrong.toml",
        2,
        before=f"cat > wrong.toml <<'END'\n{WRONG_FILE}END",
    ),
    Step("error-not-listed", "pack --models models.toml big", 5),
    Step("error-push", "push nowhere ./usb", 5),
    Step("error-push-target", "push tiny gpu1", 2),
    Step("error-push-nowhere", "push tiny", 2),
    Step("error-no-docker", "serve tiny", 9, "down"),
    Step("error-no-gpu", "serve tiny --gpus 7 --plan", 2),
    Step("error-mirror-folder", "mirror nowhere", 5),
]
# step -> schema of its JSON
JSON = {
    step.name: "background" if "--background" in step.line else step.line.split()[0]
    for step in STORY
    if step.name not in ("logs", "logs-stopped", "models-example")
}

MASKS = [
    # An engine that is played may have begun to answer before the first question.
    (r"(?m)^  start +started in .*\n", ""),
    (r"\((at once|started in [^\n]*\))\)", "(STARTED)"),
    (r"(: stopped \S+) by [\w-]+", r"\1 by USER"),
    (r"\bsk-[\w-]{40,}", "sk-KEY"),
    (r"python3 \S*hfship\.pyz", "hfship"),
    (r"(http://127\.0\.0\.1:)\d+", r"\1PORT"),
    (r'("port": )\d+', r"\g<1>8000"),
    (r"\b(less than )?\d+(\.\d+)? (s\b|ms\b)( ago)?", "# s"),
    (r"\b(\d+[dhm])?\d+[smh] ago", "# s ago"),
    (r"(?m)^(ok|warn) {2,}(?=\S)", r"\1  "),  # as wide as the widest state on this machine
    (r"(?m)(^  .*), push-tiny\b", r"\1"),  # where there is no rsync
    (r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\dZ", "DAY HH:MMZ"),
    (rf"process \d+ on {re.escape(socket.gethostname())}", "process # on HOST"),
    (r'("pid": )\d+', r"\1#"),
    (
        r"(?m)^(ok|warn) +(python|packages|models|deployments|clock|docker|zstd|openssl) .*",
        r"STATE  \2  FOUND",
    ),
    (r"(?m)^next +(python|packages|models|deployments|clock|docker|zstd|openssl): .*\n", ""),
    (r"(?m)^(no|\d+) problems?, (no|\d+) warnings?$", "# problems, # warnings"),
    (r"the next deployment gets .*", "the next deployment gets PORT"),
    (r"  +[\d.]+ [kMGT]?B/s", "  # MB/s"),
    (r"\b\d+ min \d\d s", "# s"),
    (r"\b\d+ h \d\d min", "# s"),
    # Columns are as wide as the masked time was; "answer" heads the last one.
    (r"(?m)(?<=\S) {2,}(?=.*(uptime|# s)|answer$)", "  "),
    (r"[\d.]+ [kMGT]?B/s", "# MB/s"),
    (r'("(?:seconds|latency_s|answer|uptime)": )[\d.]+', r"\1#"),
    (r"[\d.]+ [kMGT]B free", "# GB free"),
    (r"(default: )\d+(, one per core)", r"\1N\2"),
    (
        r"(?m)^(\d\d:\d\d:\d\dZ )?tiny: (starting|loading|opening).*\n",
        "",
    ),  # what a wait shows depends on how long it takes
]


def masked(text: str, folders: Dict[str, str]) -> str:
    """`text` without what differs from run to run."""
    for name, folder in sorted(folders.items(), key=lambda item: -len(item[1])):
        text = text.replace(folder, name)
    for pattern, replacement in MASKS:
        text = re.sub(pattern, replacement, text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def same_words(text: str) -> List[str]:
    """Help as a list of words: argparse breaks lines, and names options, in other ways in each Python.

    >>> same_words("optional arguments:\\n  -o DIR, --output DIR\\n  x") == same_words("options:\\n -o, --output DIR x")
    True
    """
    text = " ".join(text.replace("optional arguments:", "options:").split())
    text = re.sub(
        r"(?<![\w-])(--?[\w-]+) ([^\s,]+), (--?[\w-]+ \2)(?!\S)", r"\1, \3", text
    )  # -o DIR, --output DIR
    text = re.sub(r"\[(\S+) \[\1 \.\.\.\]\]", r"[\1 ...]", text)  # [NAME [NAME ...]]
    return re.sub(r"([\[\]{}|])", r" \1 ", text).split()


def compare(path: Path, said: str, words_only: bool = False) -> None:
    """Check against a golden file, or write it."""
    if WRITE:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said, encoding="utf-8")
        return
    assert path.exists(), f"{path.name} is not there yet: make golden"
    expected = path.read_text(encoding="utf-8")
    assert (same_words(said) == same_words(expected)) if words_only else (said == expected), (
        f"make golden, and look\n{said}"
    )


# -- help


@pytest.mark.parametrize("command", HELP)
def test_help(command: str, hfship: Program) -> None:
    said = hfship(*filter(None, [command]), "--help", env={"COLUMNS": "100"}).stdout
    compare(GOLDEN / "help" / f"{command or 'hfship'}.txt", masked(said, {}), words_only=True)


@pytest.mark.parametrize("python", components.pythons(), ids=lambda python: python.version)
def test_help_has_the_same_words_on_every_python(
    python: components.Interpreter, tmp_path: Path
) -> None:
    code = "import sys; sys.argv[0] = 'hfship'; from hfship.commands.parser import build_parser; p = build_parser(); print(p.format_help());"
    code += "[print(s.format_help()) for a in p._actions if isinstance(a.choices, dict) for s in a.choices.values()]"
    env = {
        "PATH": os.environ["PATH"],
        "COLUMNS": "100",
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    argv = [str(python.path), "-c", code]
    said = subprocess.run(
        argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    ).stdout
    expected = [(GOLDEN / "help" / f"{command or 'hfship'}.txt").read_text() for command in HELP]
    assert same_words(masked(said, {})) == same_words("\n".join(expected))


EXAMPLES = [line.split("#")[0] for line in hfship_EXAMPLES.splitlines()]


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_are_commands_that_the_parser_takes(line: str) -> None:
    words = shlex.split(line.split(">")[0])
    assert words[0] == "hfship"
    ours = with_passed_on(words[1:])
    assert build_parser().parse_args(ours).command == words[1]


def test_every_command_has_an_example() -> None:
    assert {line.split()[1] for line in EXAMPLES} == {command.name for command in COMMANDS}


# -- the story


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuple[Path, str, str]]:
    """A folder, and a Hub and a registry with what the story is about."""
    root = tmp_path_factory.mktemp("story")
    make_model(root / "made" / "tiny", size_mb=9, shards=2)
    with FaultHub(root / "hub") as hub, FaultRegistry() as registry:
        hub.add(root / "made" / "tiny")
        registry.add_index({"amd64": small_image(), "arm64": small_image(architecture="arm64")})
        yield root, hub.url, registry.host


@pytest.fixture(scope="module")
def story(servers: Tuple[Path, str, str]) -> Dict[str, str]:
    """The whole story as text, from source."""
    root, hub, registry = servers
    told = tell("source", root / "text", hub, registry, False)
    return {name: text for name, (text, _) in told}


@pytest.fixture(scope="module")
def values(servers: Tuple[Path, str, str]) -> Dict[str, Any]:
    """The whole story as JSON, from the built pyz."""
    root, hub, registry = servers
    told = tell("pyz", root / "json", hub, registry, True)
    return {name: value for name, (_, value) in told}


def tell(
    kind: str, root: Path, url: str, registry: str, as_json: bool
) -> Iterator[Tuple[str, Tuple[str, Any]]]:
    """(step, (text, JSON)) of the story in a fresh home."""
    site = Site(program(kind, root / "home"), root, root)
    (site.models / "m").unlink()
    home = site.hfship.home
    places = {"port": free_port(), **{name: home / folder for name, folder in FOLDERS.items()}}
    places["registry"] = registry
    (home / "transfer").mkdir()
    foreign = load_zstd().compressor(3)(
        tar_of([("other/config.json", b"{}"), ("other/w.bin", bytes(100_000))])
    )
    (home / "transfer/other.tar.zst").write_bytes(foreign)
    shown = {"HOME": str(home), "~": str(root), "REGISTRY": registry}
    try:
        for step in STORY:
            if step.needs and not shutil.which(step.needs):
                continue
            subprocess.run(["sh", "-ec", step.before or ":"], cwd=home, check=True, timeout=60)
            words = shlex.split(step.line.format(**places))
            options = ["--json"] if as_json and step.name in JSON else []
            env = {
                "HF_ENDPOINT": url,
                "COLUMNS": "100",
                "HFSHIP_STUB_GPUS": "2x H200 143771",
                **os_path(site),
            }
            done = site(*words, *options, play=step.play, code=step.code, env=env, cwd=home)
            value = json.loads(done.stdout) if options else None
            shown = {**shown, "http://hub": url}
            text = masked(f"$ hfship {step.line}\n{done.stdout}", shown)
            stderr = masked(done.stderr, shown)
            text += f"--- stderr\n{stderr}" if stderr.strip() else ""
            yield step.name, (f"{text}--- exit {done.returncode}\n", value)
    finally:  # a story that breaks off must not leave the fake docker's server behind
        if (site.state / "pid").exists():
            os.kill(int((site.state / "pid").read_text()), signal.SIGKILL)


def os_path(site: Site) -> Dict[str, str]:
    """The fake docker first, then what the system has."""
    return {"PATH": f"{site.bin}:{os.environ['PATH']}"}


@pytest.mark.parametrize("name", [step.name for step in STORY])
def test_words(name: str, story: Dict[str, str]) -> None:
    if name not in story:
        missing(next(step.needs for step in STORY if step.name == name))
    compare(GOLDEN / "said" / f"{name}.txt", story[name])


# -- JSON: docs/json.md is the contract


def schemas() -> Dict[str, Dict[str, Any]]:
    """The JSON Schemas of docs/json.md by their name."""
    blocks = re.findall(
        r"```json\n(\{.*?\n\})\n```", (ROOT / "docs/json.md").read_text(encoding="utf-8"), re.DOTALL
    )
    found = [json.loads(block) for block in blocks]
    return {schema["title"]: schema for schema in found}


KINDS: Dict[str, Any] = {
    "number": (int, float),
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def faults(value: Any, schema: Any, where: str = "") -> List[str]:
    """How `value` differs from a schema in the part of JSON Schema that docs/json.md uses. Unknown fields are faults
    here, though readers must pass over them: the document shall name every field.

    >>> faults({"a": 1, "c": 2}, {"properties": {"a": {"type": "string"}, "b": {}}, "required": ["b"]})
    ['.b is missing', '.a is not string', '.c is not documented']
    """
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = [kind for kind in kinds if isinstance(value, KINDS[kind])]
    if kinds and (not fits or (isinstance(value, bool) and "boolean" not in kinds)):
        return [f"{where} is not {' or '.join(kinds)}"]
    if ("const" in schema and value != schema["const"]) or value not in schema.get("enum", [value]):
        return [f"{where} is {value!r}"]
    if isinstance(value, list):
        return [
            fault
            for i, item in enumerate(value)
            for fault in faults(item, schema.get("items", {}), f"{where}[{i}]")
        ]
    known = schema.get("properties")
    if not isinstance(value, dict) or known is None:
        return []
    said = [
        f"{where}.{name} is missing" for name in schema.get("required", known) if name not in value
    ]
    for name, item in value.items():
        if name in known:
            said += faults(item, known[name], f"{where}.{name}")
        elif not schema.get("additionalProperties"):
            said.append(f"{where}.{name} is not documented")
    return said


@pytest.mark.parametrize("name", JSON)
def test_json_fits_its_schema(name: str, values: Dict[str, Any]) -> None:
    if name not in values:
        missing(next(step.needs for step in STORY if step.name == name))
    value, failed = values[name], next(step.code for step in STORY if step.name == name)
    for row in value if isinstance(value, list) else [value]:
        schema = schemas()[row["schema"]]
        assert row["schema"] in [f"hfship-{JSON[name]}/1"] + ["hfship-error/1"] * bool(failed)
        variants = schema.get("oneOf", [schema])
        assert [] in [faults(row, variant) for variant in variants], [
            faults(row, variant) for variant in variants
        ]


def test_every_schema_is_that_of_a_command_and_the_other_way_round() -> None:
    other = {"hfship-error", "hfship-background", "hfship-job", "hfship-site"}
    other |= {"hfship-hosts", "hfship-host", "hfship-facts"}
    other |= {"hfship-placed", "hfship-planned"}
    assert {name.split("/")[0] for name in schemas()} - other == {
        f"hfship-{c.name}" for c in COMMANDS
    } - {"hfship-logs", "hfship-drain", "hfship-undrain"}


def test_records_of_jobs_fit_their_schema(hfship: Program, model: Path, tmp_path: Path) -> None:
    hfship("pack", model, "-o", tmp_path)
    with (tmp_path / "tiny.tar.zst").open("r+b") as archive:
        archive.seek(1 << 20)
        archive.write(bytes(9))
    hfship("verify", tmp_path / "tiny.tar.zst", code=6)
    for name, state in (("pack-tiny", "done"), ("verify-tiny", "failed")):
        record = json.loads((hfship.home / f"logs/hfship/{name}.json").read_text())
        assert faults(record, schemas()["hfship-job/1"]) == [] and record["state"] == state


def test_watch_fits_its_schema_in_lines_and_when_it_resumes(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    hfship("pack", model, "-o", tmp_path)
    (jobs,) = [
        json.loads(line) for line in hfship("watch", "--json", "--interval", 1).stdout.splitlines()
    ]
    path = hfship.home / "logs/hfship/pack-tiny.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "state": "interrupted", "background": True})
    )
    rows = jobs + json.loads(hfship("watch", "--resume-all", "--json").stdout)
    assert len(rows) == 2
    for row, variant in zip(rows, schemas()["hfship-watch/1"]["oneOf"]):
        assert faults(row, variant) == []


def test_completion_mirror_and_version_fit_their_schemas(hfship: Program, tmp_path: Path) -> None:
    mirror = hfship.start("mirror", tmp_path, "--port", 0, "--json")
    try:
        lines = []
        assert mirror.stdout is not None
        while not lines or lines[-1] != "}\n":
            lines.append(mirror.stdout.readline())
    finally:
        mirror.kill()
        mirror.communicate()
    said = ["".join(lines), hfship("version", "--json").stdout]
    said += (
        [] if hfship.argv[1].endswith(".py") else [hfship("completion", "bash", "--json").stdout]
    )
    for value in map(json.loads, said):
        assert faults(value, schemas()[value["schema"]]) == []
