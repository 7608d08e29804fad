"""Files that can run code: what they are, what the policy of a site makes of them, on both sides."""

import json
import pickle
import shutil

import pytest

from hfship.base import code_files
from hfship.base.code_files import (
    CodeFile,
    Decision,
    decide,
    look_at_folder,
    look_at_list,
    names_of,
    refusal,
)
from hfship.base.manifest import FileEntry, Source, make_manifest, read_manifest
from hfship.base.policy import Policy, PolicyException
from support import archives as a

EVIL = b"\x80\x02cposix\nsystem\n(S'true'\ntR."
ONLY = pickle.dumps({"w": [1.0]}, 2)


def seen(tmp_path, files):
    """What is found of files: path -> (kind, what is said)."""
    for path, content in files.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
    entries = [FileEntry(path, (tmp_path / path).stat().st_size, "0" * 64) for path in files]
    found = look_at_folder(tmp_path, make_manifest("m", entries), Policy())
    return {file.path: (file.kind, file.says) for file in found}


NAMED = {"auto_map": {"AutoModel": "modeling_x.Model", "AutoTokenizer": ["tok.A", None]}}
GGUF = (
    b"GGUF\3\0\0\0" + bytes(20) + b"tokenizer.chat_template\x08\0\0\0\x15" + bytes(7) + b"%b__ \0"
)
ELSEWHERE = {"auto_map": {"AutoModel": "org/other--modeling_x.Model"}}
SILENT = ["model.safetensors", "README.md", "config.json", "tokenizer.model", "merges.txt"]


@pytest.mark.parametrize(
    ("path", "content", "kind", "says"),
    [
        ("pytorch_model.bin", ONLY, "pickle", "weights only"),
        ("a/b.pt", EVIL, "pickle", "imports posix.system"),
        ("tokenizer.model", EVIL, "pickle", "imports posix.system"),
        ("x.pkl", b"\x80\x04cut", "pickle", "cannot be read"),
        ("ggml.bin", b"GGUF1234", "", ""),
        ("w.gguf", GGUF % b"{{ ''.__class__ }}", "template", "uses .__class__"),
        ("w.gguf", GGUF % b"{{ m.content|trim  }}", "", ""),
        ("w.gguf", EVIL, "pickle", "imports posix.system"),
        ("README.md", b"\x7fELF....", "program", "a program of Linux"),
        ("a.safetensors", EVIL, "pickle", "imports posix.system"),
        ("__pycache__/modeling.cpython-312.pyc", b"\xcb\r\r\n", "program", "by its name"),
        ("data", bytes(257) + b"ustar\0", "archive", "tar"),
        ("a.img", b"hsqs....", "archive", "squashfs"),
        ("openvino_model.bin", bytes(4000), "", ""),
        ("modeling.py", "print()", "python", "no configuration names it"),
        ("run.ipynb", "{}", "notebook", "cells of code"),
        ("lib.so", b"\x7fELF....", "program", "a program of Linux"),
        ("run", b"#!/bin/sh\n", "program", "a script"),
        ("setup.exe", b"MZ..", "program", "a program of Windows"),
        ("get.sh", "echo", "program", "by its name"),
        ("more.zip", b"PK\x03\x04" + bytes(30), "pickle", "cannot be read"),
        ("more.tar.gz", b"\x1f\x8b\x08..", "archive", "gzip"),
        ("data.tar", b"plain", "archive", "by its name"),
        ("config.json", json.dumps(ELSEWHERE), "remote code", "names code of another repository"),
        ("config.json", json.dumps(ELSEWHERE).replace("auto_map", r"auto_m\u0061p"), "remote code",
         "names code of another repository: org/other--modeling_x.Model"),
        ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "template", "uses .__class__, .__mro__"),
        ("chat_template.jinja", "{% include 'x' %}", "template", "uses"),
        ("chat_template.jinja", "{{ x|attr('a') }}", "template", "uses |attr"),
        ("chat_template.jinja", r"{{ x['\x5f\x5fclass'] }}", "template", "uses"),
        ("chat_template.jinja", "{{ ()['__cl' ~ 'ass__'] }}", "template", "uses __cl, __"),
        ("chat_template.jinja", "{{ ()['_'*2 ~ 'class'] }}", "template", "uses '_'"),
        ("chat_template.jinja", "{{ ()['%c'|format(95)] }}", "template", "uses %c"),
        ("chat_template.jinja", "{% for m in messages %}{{ m.content|trim }}{% endfor %}", "", ""),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ a.__init__ }}"}), "template", "uses"),
        ("tokenizer_config.json",
         json.dumps({"chat_template": [{"name": "t", "template": "{{ cycler }}"}]}), "template", "uses"),
        ("config.json", '{"auto_map": [1], "chat_template": 3}', "", ""),
        ("config.json", '{"auto_map": ', "", ""),
        ("config.json", "[" * 100_000 + '"auto_map"', "", ""),
    ],
)  # fmt: skip
def test_files_are_told_by_what_is_in_them(path, content, kind, says, tmp_path):
    found = seen(tmp_path, {path: content})
    if not kind:
        assert found == {}
    else:
        assert found[path][0] == kind
        assert found[path][1].startswith(says)


# What files begin with, as file(1) knows it.
MAGICS = {
    "a program of macOS": ["cf fa ed fe 07", "ce fa ed fe 07"],
    "a program of macOS or Java": ["ca fe ba be 00"],
    "a program of WebAssembly": ["00 61 73 6d 01"],
    "bzip2": ["42 5a 68 39"],
    "xz": ["fd 37 7a 58 5a 00"],
    "zstd": ["28 b5 2f fd"],
    "7z": ["37 7a bc af 27 1c"],
    "rar": ["52 61 72 21 1a 07"],
    "lz4": ["04 22 4d 18"],
    "ar": ["21 3c 61 72 63 68 3e 0a"],
    "cpio": ["30 37 30 37 30 31", "30 37 30 37 30 37"],
    "cab": ["4d 53 43 46 00"],
}


def test_programs_and_archives_are_told_by_their_first_bytes(tmp_path):
    rows = [(says, text) for says, texts in MAGICS.items() for text in texts]
    files = {f"{number}.txt": bytes.fromhex(text) * 9 for number, (_, text) in enumerate(rows)}
    found = seen(tmp_path, files)
    for (says, _), path in zip(rows, files):
        kind = "program" if says.startswith("a program") else "archive"
        assert found[path] == (kind, says)


def test_what_every_model_has_is_not_told(tmp_path):
    config = json.dumps({"architectures": ["A"], "note": "ä"})
    assert seen(tmp_path, dict.fromkeys(SILENT, config)) == {}


def test_python_that_a_configuration_names_is_told_from_other(tmp_path):
    found = seen(
        tmp_path, {"config.json": json.dumps(NAMED), "modeling_x.py": "", "tok.py": "", "o.py": ""}
    )
    named = ("python", "run with --trust-remote-code: config.json names it")
    assert found["modeling_x.py"] == found["tok.py"] == named
    assert found["o.py"] == ("python", "no configuration names it")


def file(kind="pickle", says="weights only"):
    return CodeFile("a.bin", "ab" * 32, kind, says)


EXCEPTED = (PolicyException("Org/M", "ab" * 32, "read by Kim"),)


@pytest.mark.parametrize(
    ("one", "policy", "outcome"),
    [
        (file(), Policy(), "reported"),
        (file(), Policy(pickle="allow"), "allowed"),
        (file(), Policy(pickle="weights-only"), "reported"),
        (file(says="imports os.system"), Policy(pickle="weights-only"), "refused"),
        (file(says="cannot be read: it is cut"), Policy(pickle="weights-only"), "refused"),
        (file(), Policy(pickle="refuse"), "refused"),
        (file(), Policy(pickle="refuse", exceptions=EXCEPTED), "allowed"),
        (file("python"), Policy(pickle="refuse"), "reported"),
        (file("python"), Policy(remote_code="refuse"), "refused"),
        (file("template"), Policy(remote_code="refuse"), "refused"),
        (file("archive"), Policy(remote_code="refuse", exceptions=EXCEPTED), "allowed"),
        (file("large"), Policy(max_file=10), "refused"),
        (file("large"), Policy(max_file=10, exceptions=EXCEPTED), "allowed"),
    ],
)
def test_decisions(one, policy, outcome):
    assert decide(one, policy, ["org/m"]).outcome == outcome
    if policy.exceptions:
        assert decide(one, policy, ["org/other"]).outcome == "refused"


def test_names_and_sizes_alone():
    paths = ["a.pt", "pytorch_model-00001-of-00002.bin", "openvino.bin", "m.py", "w.safetensors"]
    entries = [FileEntry(path, 20, "0" * 64) for path in paths]
    found = look_at_list(entries, Policy(max_file=10))
    kinds = [file.kind for file in found]
    assert kinds == ["pickle", "large", "pickle", "large", "large", "python", "large", "large"]


BY_NAME = {
    "pickle": "a.pt a.PTH b/c.pkl a.pickle a.ckpt a.joblib a.dill pytorch_model.bin"
    " d/adapter_model.bin diffusion_pytorch_model-x.bin training_args.bin d/optimizer.bin"
    " scheduler.bin pytorch_model-00001-of-00002.bin",
    "python": "a.py b/C.PY",
    "notebook": "a.ipynb",
    "program": "a.so a.dll a.exe a.sh a.bat a.jar a.pyc a.js a.DEB a.appimage a.desktop",
    "archive": "a.zip a.tar a.tar.gz a.tgz a.zst a.7z a.whl a.nemo a.mar",
    "": "openvino_model.bin a.bin myoptimizer.bin pytorch_model.bin.json a.safetensors py a.py/b .so/x"
    " xpt model.bin pt",
}


@pytest.mark.parametrize("kind", BY_NAME)
def test_what_a_name_tells_alone(kind):
    says = "cells of code" if kind == "notebook" else "by its name"
    for path in BY_NAME[kind].split():
        found = look_at_list([FileEntry(path, 20, "0" * 64)], Policy(max_file=20))
        assert found == ([CodeFile(path, "0" * 64, kind, says)] if kind else []), path


def test_a_file_is_large_beyond_what_the_site_takes(tmp_path):
    entry = FileEntry("a.txt", 2001, "0" * 64)
    large = CodeFile("a.txt", "0" * 64, "large", "2.0 kB")
    (tmp_path / "a.txt").write_bytes(b"x" * 2001)
    manifest = make_manifest("m", [entry])
    for most, found in [(2000, [large]), (2001, []), (0, [])]:
        policy = Policy(max_file=most)
        assert look_at_list([entry], policy) == look_at_folder(tmp_path, manifest, policy) == found


RULES = [
    (file(), Policy(), "reported", 'pickle = "report"'),
    (file(), Policy(pickle="allow"), "allowed", 'pickle = "allow"'),
    (file("python"), Policy(), "reported", 'remote_code = "report"'),
    (file("large"), Policy(max_file=10_000), "refused", "max_file = 10.0 kB"),
    (file("remote code"), Policy(remote_code="refuse"), "refused", 'remote_code = "refuse"'),
]


@pytest.mark.parametrize(("one", "policy", "outcome", "rule"), RULES)
def test_a_decision_names_its_rule(one, policy, outcome, rule):
    assert decide(one, policy, []) == Decision(one, outcome, rule)
    excepted = Policy(pickle="refuse", exceptions=EXCEPTED)
    assert decide(file(), excepted, ["ORG/m"]).reason == "read by Kim"


def test_a_refusal_says_what_lets_a_file_pass():
    source = Source("https://hub", "org/old", "main", "org/m", "0" * 40)
    manifest = make_manifest("m", [], source)
    assert names_of(manifest) == ["m", "org/old", "org/m"]
    assert names_of(make_manifest("m", [])) == ["m"]
    files = [CodeFile(f"{number}\n.pt", f"{number:064}", "pickle", "x") for number in range(12)]
    decisions = [Decision(files[0], "reported", "r")]
    decisions += [Decision(one, "refused", 'pickle = "refuse"') for one in files[1:]]
    error = refusal(decisions, names_of(manifest), "org/m")
    assert error.what == "org/m: the policy of this site refuses it"
    lines = error.why.split("\n")
    assert lines[0] == '1 | .pt (pickle: x): [policy] pickle = "refuse"' and len(lines) == 11
    assert f'repo = "org/m"\nsha256 = "{files[1].sha256}"\nreason = ' in error.next_step
    assert files[0].json() == {"path": "0\n.pt", "kind": "pickle", "says": "x"}


@pytest.mark.parametrize(("size", "looked_at"), [(200, True), (199, False)])
def test_a_text_that_is_too_large_is_not_looked_at_and_that_is_told(
    size, looked_at, tmp_path, monkeypatch
):
    config = json.dumps(ELSEWHERE).ljust(200)
    template = "{{ a.__init__ }}".ljust(200)
    monkeypatch.setattr(code_files, "_LARGEST_TEXT", size)
    found = seen(tmp_path, {"config.json": config, "a.jinja": template, "b.jinja2": template})
    if looked_at:
        assert found["config.json"][1].startswith("names code of another")
        assert found["a.jinja"] == found["b.jinja2"] == ("template", "uses .__init__")
    else:
        assert found == {
            "config.json": ("remote code", "a configuration that is too large to be looked at")
        }


def test_what_is_said_of_a_file_is_short_and_names_a_few(tmp_path):
    classes = {f"A{number}": f"org/{'x' * 200}--m.C{number}" for number in range(9)}
    many = " ".join(f"{{{{ a.__b{number} }}}}" for number in range(9))
    files = {"config.json": json.dumps({"auto_map": classes}), "a.jinja": many + many}
    found = seen(tmp_path, files)
    assert len(found["config.json"][1]) == 300
    assert found["a.jinja"][1].startswith("uses .__b0, .__b1, .__b2, .__b3, .__b4")
    assert ".__b5" not in found["a.jinja"][1]


def test_templates_are_found_wherever_they_lie(tmp_path):
    evil = "{{ a.__init__ }}"
    nested = [{"name": "a", "template": "{{ x }}"}, 7, {"name": "b", "template": evil}]
    files = {
        "a.json": json.dumps({"chat_template": nested}),
        "b.json": json.dumps({"template": evil}),  # only within a template of several
        "c.json": json.dumps({"chat_template": {"template": evil}}),
        "d.json": json.dumps({"chat_template": "x", "template": evil}),
        "e.json": json.dumps({"other": {"chat_template": evil}}),
    }
    assert sorted(seen(tmp_path, files)) == ["a.json", "d.json"]
    size = len(evil).to_bytes(8, "little")
    fact = b"tokenizer.chat_template.tool_use\x08\0\0\0" + size + evil.encode()
    other = b"tokenizer.chat_template\x08\0\0\0" + bytes([5]) + bytes(7) + b"hello"
    found = seen(
        tmp_path, {"w.gguf": b"GGUF" + bytes(300) + other + fact, "v.gguf": b"GGUF" + other}
    )
    assert found == {"w.gguf": ("template", "uses .__init__")}


def test_which_configuration_names_which_python(tmp_path):
    mapped = {"auto_map": {"A": "a.b.Model", "B": ["c.D", None, 7], "E": 5}}
    files = {
        "a/b.py": "",
        "c.py": "",
        "e.py": "",
        "config.json": json.dumps(mapped),
        "b.txt": json.dumps(mapped),
    }
    named = ("python", "run with --trust-remote-code: config.json names it")
    found = seen(tmp_path, files)
    assert found["a/b.py"] == found["c.py"] == named
    assert found["e.py"] == ("python", "no configuration names it")


# -- the whole way

FILES = {**a.SMALL, "pytorch_model.bin": ONLY, "old.pt": EVIL, "modeling.py": b"pass\n"}


@pytest.fixture
def packed(tmp_path, hfship):
    """An archive that a sender packed who reports and refuses nothing."""
    a.make_model(tmp_path / "m", FILES)
    shutil.rmtree(tmp_path / "m/.hfship")  # a folder that somebody made
    done = hfship("pack", tmp_path / "m", "-o", tmp_path / "out")
    assert "can run code: modeling.py (python: no configuration names it), old.pt" in done.stderr
    assert "by their opcodes weights only: pytorch_model.bin" in done.stderr
    return tmp_path / "out" / "m.tar.zst"


def refused(done):
    """The lines of a refusal that name files."""
    return [line for line in done.stderr.splitlines() if "[policy]" in line]


def test_what_the_sender_saw_travels(packed, tmp_path, hfship):
    done = hfship("unpack", packed, "-o", tmp_path / "un", "--json")
    (row,) = json.loads(done.stdout)
    told = {one["path"]: (one["kind"], one["says"], one["outcome"]) for one in row["code_files"]}
    assert told["old.pt"] == ("pickle", "imports posix.system", "reported")
    manifest = read_manifest(tmp_path / "un" / "m")
    assert [one.path for one in manifest.declared] == ["modeling.py", "old.pt", "pytorch_model.bin"]
    assert "as declared by the sender: modeling.py" in hfship("verify", packed).stderr


@pytest.mark.parametrize(
    ("env", "files"),
    [
        ({"HFSHIP_POLICY_PICKLE": "weights-only"}, ["old.pt"]),
        ({"HFSHIP_POLICY_PICKLE": "refuse"}, ["old.pt", "pytorch_model.bin"]),
        ({"HFSHIP_POLICY_REMOTE_CODE": "refuse"}, ["modeling.py"]),
        ({"HFSHIP_POLICY_MAX_FILE": "30"}, None),
        ({"HFSHIP_POLICY_LICENCES": "mit"}, []),
    ],
)
def test_each_side_decides_for_itself(env, files, packed, tmp_path, hfship):
    for words in (
        ["pack", tmp_path / "m", "-o", tmp_path / "o2"],
        ["unpack", packed, "-o", tmp_path / "un"],
    ):
        done = hfship(*words, env=env, code=6)
        lines = refused(done)
        for path in files or ():
            assert any(path in line for line in lines), (path, done.stderr)
    assert not (tmp_path / "un" / "m").exists()
    assert not (tmp_path / "o2").exists()
    # Nobody is told what is not so, and a milder word goes on where the stricter one stopped.
    assert not (files and len(lines) != len(files))
    hfship("unpack", packed, "-o", tmp_path / "un")
    assert hfship("verify", tmp_path / "un" / "m", env=env, code=6)


def test_a_file_of_the_site_lets_one_pass_with_a_reason(packed, tmp_path, hfship):
    from hfship.base.files import sha256_file

    models = tmp_path / "models.toml"
    step = hfship(
        "unpack",
        packed,
        "-o",
        tmp_path / "un",
        env={"HFSHIP_POLICY_PICKLE": "weights-only"},
        code=6,
    )
    snippet = step.stderr[step.stderr.index("[[policy.exception]]") :]
    lines = [line.strip() for line in snippet.splitlines()[:4]]
    models.write_text('[policy]\npickle = "weights-only"\n' + "\n".join(lines))
    assert sha256_file(tmp_path / "m" / "old.pt") in snippet
    env = {"HFSHIP_MODELS_FILE": str(models)}
    done = hfship("unpack", packed, "-o", tmp_path / "un", env=env)
    assert "old.pt (pickle: imports posix.system); allowed: WHO, WHEN, WHY" in done.stderr
    assert hfship("verify", packed, env=env)


def test_what_came_otherwise_than_declared_is_seen(packed, tmp_path, hfship):
    """A sender that lies about a file: its manifest says that a pickle holds weights only."""
    folder = tmp_path / "m"
    manifest = json.loads((folder / ".hfship/manifest.json").read_text())
    for row in manifest["declared"]:
        row["says"], row["outcome"] = "weights only", "allowed"
    (folder / ".hfship/manifest.json").write_text(json.dumps(manifest))
    hfship("pack", folder, "-o", tmp_path / "lie", "--force")
    env = {"HFSHIP_POLICY_PICKLE": "weights-only"}
    done = hfship("unpack", tmp_path / "lie/m.tar.zst", "-o", tmp_path / "un", env=env, code=6)
    assert "old.pt (pickle: imports posix.system)" in done.stderr
    assert not (tmp_path / "un/m").exists()


def test_a_refused_model_is_not_served(packed, tmp_path, hfship):
    hfship("unpack", packed, "-o", tmp_path / "un")
    env = {"HFSHIP_POLICY_PICKLE": "refuse"}
    done = hfship("serve", tmp_path / "un/m", "--plan", env=env, code=6)
    assert "old.pt (pickle: imports posix.system)" in done.stderr
    shutil.rmtree(tmp_path / "un/m/.hfship")
    assert "old.pt" in hfship("serve", tmp_path / "un/m", "--plan", env=env, code=6).stderr
    code = {"HFSHIP_POLICY_REMOTE_CODE": "refuse"}
    done = hfship("serve", tmp_path / "un/m", "--plan", "--trust-remote-code", env=code, code=6)
    assert "is not served with --trust-remote-code" in done.stderr


# -- from the Hub

README = b"""---
license: other
license_name: lab-1
base_model:
- org/base
---
# A model
"""


@pytest.fixture
def published(hub, tmp_path):
    """A model on the Hub, with pickles of both kinds and a card."""
    folder = tmp_path / "published"
    a.make_model(folder, {**FILES, "README.md": README, "w.pt": ONLY * 400})
    shutil.rmtree(folder / ".hfship")
    hub.add(folder, "org/old")
    return hub


@pytest.mark.parametrize(
    ("env", "said", "bytes_came"),
    [
        ({"HFSHIP_POLICY_MAX_FILE": "5k"}, "w.pt (large", False),
        ({"HFSHIP_POLICY_PICKLE": "refuse"}, "w.pt (pickle: by its name)", False),
        ({"HFSHIP_POLICY_REMOTE_CODE": "refuse"}, "modeling.py (python: by its name)", False),
        ({"HFSHIP_POLICY_LICENCES": "mit"}, "refuses its licence", False),
        ({"HFSHIP_POLICY_PICKLE": "weights-only"}, "old.pt (pickle: imports posix.system)", True),
    ],
)
def test_fetch_stops_before_the_first_byte_where_names_tell(
    env, said, bytes_came, published, tmp_path, hfship
):
    published.forget()
    words = ("fetch", "org/old", "--endpoint", published.url, "-o", tmp_path / "out")
    assert said in hfship(*words, env=env, code=6).stderr
    assert bool(published.traffic.paths("/resolve/")) == bytes_came
    assert not (tmp_path / "out/old/.hfship/manifest.json").exists()
    # What the error proposes is enough.
    if said.startswith("old.pt"):
        hfship(*words, "--exclude", "old.pt", env=env)


def test_the_card_and_what_was_seen_go_into_the_manifest(published, tmp_path, hfship):
    words = ("fetch", "org/old", "--endpoint", published.url, "-o", tmp_path / "out", "--json")
    (row,) = json.loads(hfship(*words, env={"HFSHIP_POLICY_CUSTODY": "true"}).stdout)
    assert {one["path"] for one in row["code_files"]} == {
        "modeling.py",
        "old.pt",
        "pytorch_model.bin",
        "w.pt",
    }
    folder = tmp_path / "out/old"
    manifest = read_manifest(folder)
    assert manifest.card.base_model == ("org/base",)
    assert manifest.licence == row["license"] == "lab-1"
    log = json.loads((folder / ".hfship/custody.jsonl").read_text())
    assert (log["event"], log["details"]["commit"]) == ("fetched", manifest.source.commit)
    before = (folder / ".hfship/manifest.json").read_bytes()
    hfship(*words, env={"HFSHIP_POLICY_CUSTODY": "true"})
    assert (folder / ".hfship/manifest.json").read_bytes() == before
    assert len((folder / ".hfship/custody.jsonl").read_text().splitlines()) == 1
