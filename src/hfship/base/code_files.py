# SPDX-License-Identifier: Apache-2.0
"""Which files of a model can run code, or hide what would, and what the policy of a site says.

Owns the kinds of such files, how each is looked at, and the rule that decides on it:

  pickle       what pickles import (base/checkpoints.py)                    rule pickle
  python       *.py; those that a configuration names run with --trust-remote-code
  remote code  a configuration that names code of another repository
  template     a chat template (also within GGUF) that reaches for what templates have no use for
  notebook, program, archive                                                rule remote_code
  large        a file of more bytes than the site takes                     rule max_file

Promises: nothing is loaded, run or unpacked; only the beginning of a file is read, and pickles to
their end; nothing is called clean or safe. What a sender says of a file is told, and never saves a
look. Never: decides that a file is harmless because of its name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

from hfship.base.below import open_regular
from hfship.base.errors import IntegrityError
from hfship.base.files import disk_errors
from hfship.base.reading import parse_json, read_small
from hfship.base.text import human_bytes, printable, shorten
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.base.manifest import FileEntry, Manifest
    from hfship.base.policy import Policy

_HEAD = 265  # bytes that tell a program or an archive
_LARGEST_TEXT = 64 << 20  # bytes of a configuration: a tokenizer.json has 20 million
_LONGEST = 300  # characters of what is said of a file
_GGUF_HEAD = 64 << 20  # bytes in which the facts of a GGUF file lie: a vocabulary has 10 MB
_GGUF_TEMPLATE = re.compile(rb"tokenizer\.chat_template[\w.]*\x08\0\0\0(.{8})", re.DOTALL)
_PROGRAM_NAMES = """
    .so .dll .dylib .exe .sh .bash .bat .cmd .ps1 .jar .wasm .pyc .pyd .pyz .js .mjs .rb .pl .lua
    .vbs .scr .msi .deb .rpm .appimage .desktop
"""
_NAMED_PROGRAMS = frozenset(_PROGRAM_NAMES.split())
_NAMED_ARCHIVES = frozenset(
    [".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl", ".nemo", ".mar"]
)
_PROGRAMS: Mapping[bytes, str] = {
    b"\x7fELF": "a program of Linux",
    b"MZ": "a program of Windows",
    b"#!": "a script",
    b"\xcf\xfa\xed\xfe": "a program of macOS",
    b"\xce\xfa\xed\xfe": "a program of macOS",
    b"\xca\xfe\xba\xbe": "a program of macOS or Java",
    b"\0asm": "a program of WebAssembly",
}
_ARCHIVES: Mapping[bytes, str] = {
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
    b"\x04\x22\x4d\x18": "lz4",
    b"!<arch>\n": "ar",
    b"07070": "cpio",
    b"hsqs": "squashfs",
    b"MSCF": "cab",
}
_TAR_AT = 257  # where a tar file has its magic
# What templates of chats have no use for: the way from a value to Python's own objects.
_UNUSUAL = re.compile(
    r"""
    \.?__\w* | ['"]_['"] | %c | \|\s*attr\b | \.mro\b
    | \b(lipsum|cycler|joiner|get_flashed_messages)\b
    | \{%-?\s*(include|import|extends|from)\b | \bself\._ | \b(getattr|popen|subprocess|eval|exec)\b
    | \.format_map\b | \\x5f | \\u005f | \\137
    """,
    re.VERBOSE,
)
_TEMPLATE_KEYS = ("chat_template", "template")
# What is in JSON that may have a key of interest: the key as it is, or letters written as \u0061.
_TELLING = (b'"auto_map"', b'"chat_template"')
_ESCAPED = re.compile(rb"\\u00(5[fF]|[67])")
# Formats that hold no pickle, but where a file begins like one.
_PLAIN = frozenset(["", ".safetensors", ".gguf", ".txt", ".md", ".png", ".jpg", ".gitattributes"])
_BEGINNINGS = (b"\x80", b"P")  # of pickles and zips
RULES: Mapping[str, str] = {"pickle": "pickle", "large": "max_file"}  # of a kind; else remote_code


@dataclass(frozen=True)
class CodeFile:
    """A file that can run code, or is larger than the site takes: its path, SHA-256 and kind, and
    what was found of it."""

    path: str
    sha256: str
    kind: str
    says: str

    @property
    def rule(self) -> str:
        """The key of the policy that decides on it."""
        kind = self.kind
        return RULES.get(kind, "remote_code")

    def text(self) -> str:
        """`pytorch_model.bin (pickle: weights only)`"""
        path = printable(self.path)
        found = f"{self.kind}: {self.says}"
        return f"{path} ({found})"

    def json(self) -> Dict[str, str]:
        """As it lies in a manifest and in results."""
        return {
            "path": self.path,
            "kind": self.kind,
            "says": self.says,
        }


@dataclass(frozen=True)
class Decision:
    """What the policy says of a file: "allowed", "reported" or "refused", by which rule, and the
    reason of an exception."""

    file: CodeFile
    outcome: str
    rule: str = ""
    reason: str = ""


# -- decisions


def decide(file: CodeFile, policy: Policy, repos: Sequence[str]) -> Decision:
    """What the policy says of a file of a model that is known by the names `repos`.

    >>> from hfship.base.policy import Policy
    >>> file = CodeFile("a.bin", "0" * 64, "pickle", "weights only")
    >>> [decide(file, Policy(pickle=rule), []).outcome for rule in ("report", "weights-only")]
    ['reported', 'reported']
    >>> decide(file, Policy(pickle="refuse"), []).rule
    'pickle = "refuse"'
    """
    rule = file.rule
    if rule == "max_file":
        refused = True
        said = f"max_file = {human_bytes(policy.max_file)}"
    else:
        value = getattr(policy, rule)
        said = f'{rule} = "{value}"'
        refused = value == "refuse" or (value == "weights-only" and file.says != "weights only")
        if value == "allow":
            return Decision(file, "allowed", said)

    if not refused:
        return Decision(file, "reported", said)
    reason = policy.reason_for(repos, file.sha256)
    if reason:
        return Decision(file, "allowed", said, reason)
    return Decision(file, "refused", said)


def names_of(manifest: Manifest) -> List[str]:
    """The names by which an exception of the policy may mean a model."""
    names = [manifest.name]
    if manifest.source:
        names += [manifest.source.repo, manifest.source.resolved_repo]
    return names


def refusal(decisions: Iterable[Decision], names: Sequence[str], what: str) -> IntegrityError:
    """The error of a model of which the policy refuses files; `what` says of which."""
    refused = [one for one in decisions if one.outcome == "refused"]
    lines = [f"{one.file.text()}: [policy] {one.rule}" for one in refused]
    first = refused[0].file
    repo = names[-1]
    step = (
        "leave these files out (fetch --exclude FILE), ask for safetensors, or write into the\n"
        "models file, after somebody has read the file:\n"
        "[[policy.exception]]\n"
        f'repo = "{repo}"\nsha256 = "{first.sha256}"\nreason = "WHO, WHEN, WHY"'
    )
    return IntegrityError(
        f"{what}: the policy of this site refuses it", shorten(lines, 10, "\n"), step
    )


# -- the look


def look_at_folder(folder: Path, manifest: Manifest, policy: Policy) -> List[CodeFile]:
    """The files of a model that can run code, by what is in the folder; in the order of the
    manifest. Raises DiskError."""
    found: List[CodeFile] = []
    named = _named_code(folder, manifest)
    for entry in manifest.files:
        path = folder / entry.path
        with disk_errors("read", path):
            found += _look_at_file(folder, entry, policy, named)
    return found


def look_at_list(entries: Iterable[FileEntry], policy: Policy) -> List[CodeFile]:
    """The files that are known for what they are by name and size alone, before one is there."""
    found: List[CodeFile] = []
    for entry in entries:
        kind, says = _by_name(entry.path)
        if kind:
            file = CodeFile(entry.path, entry.sha256, kind, says)
            found.append(file)
        if policy.max_file and entry.size > policy.max_file:
            found.append(_large(entry))
    return found


def _large(entry: FileEntry) -> CodeFile:
    size = human_bytes(entry.size)
    return CodeFile(
        entry.path,
        entry.sha256,
        "large",
        size,
    )


# Pickles by their whole names; others that end in .bin may be something else.
_PICKLE_NAME = re.compile(
    r"(?:.*/)?(?:.*\.(?:pt|pth|pkl|pickle|ckpt|joblib|dill)"
    r"|(?:pytorch|adapter|diffusion_pytorch)_model[\w.-]*\.bin"
    r"|(?:training_args|optimizer|scheduler)\.bin)\Z"
)


def _by_name(path: str) -> Tuple[str, str]:
    """(kind, what is said) of a file by its name; ("", "") where that tells nothing.

    >>> _by_name("a/pytorch_model-00001-of-00002.bin"), _by_name("openvino_model.bin")
    (('pickle', 'by its name'), ('', ''))
    """
    lower = path.lower()
    suffix = _suffix(lower)
    if _PICKLE_NAME.match(lower):
        return "pickle", "by its name"
    if suffix == ".py":
        return "python", "by its name"
    if suffix == ".ipynb":
        return "notebook", "cells of code"
    if suffix in _NAMED_PROGRAMS:
        return "program", "by its name"
    if suffix in _NAMED_ARCHIVES:
        return "archive", "by its name"
    return "", ""


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    if dot < 0:
        return ""
    return name[dot:].lower()


def _look_at_file(
    folder: Path, entry: FileEntry, policy: Policy, named: Mapping[str, str]
) -> Iterator[CodeFile]:
    """What is found of one file. Raises OSError."""
    if policy.max_file and entry.size > policy.max_file:
        yield _large(entry)
    suffix = _suffix(entry.path)
    found: List[Tuple[str, str]] = []
    if suffix == ".py":
        found.append(("python", named.get(entry.path, "no configuration names it")))
    elif suffix == ".json":
        found += _in_configuration(folder, entry)
    elif suffix in (".jinja", ".jinja2"):
        template = _bytes_at(folder, entry).decode("utf-8", "replace")
        found += _in_template(template)
    else:
        found += _in_content(folder, entry, suffix)
    for kind, says in found:
        yield CodeFile(entry.path, entry.sha256, kind, says[:_LONGEST])


def _in_content(folder: Path, entry: FileEntry, suffix: str) -> Iterator[Tuple[str, str]]:
    """What the first bytes of a file say, and its pickles. Raises OSError."""
    with open(open_regular(folder / entry.path), "rb") as stream:
        head = stream.read(_HEAD)
        if head.startswith(b"GGUF"):
            yield from _in_gguf(head + stream.read(_GGUF_HEAD))
            return
        if _may_have_pickles(head, suffix):
            from hfship.base.checkpoints import look_for_pickles  # few models need it

            pickles = look_for_pickles(stream, entry.size, suffix)
            if pickles:
                yield "pickle", printable(pickles.says())
                return

    for magic, program in _PROGRAMS.items():
        if head.startswith(magic):
            yield "program", program
            return
    for magic, archive in _ARCHIVES.items():
        if head.startswith(magic):
            yield "archive", archive
            return
    if head.startswith(b"ustar", _TAR_AT):
        yield "archive", "tar"
        return
    kind, says = _by_name(entry.path)
    if kind:
        yield kind, says


def _may_have_pickles(head: bytes, suffix: str) -> bool:
    if suffix in _PLAIN and not head.startswith(_BEGINNINGS):
        return False
    from hfship.base.checkpoints import PICKLE_SUFFIXES, ZIP, is_pickle_head

    return suffix in PICKLE_SUFFIXES or head.startswith(ZIP) or is_pickle_head(head)


# -- configurations and templates


def _bytes_at(folder: Path, entry: FileEntry) -> bytes:
    """The content of a small file; b"" for a large one. Raises OSError."""
    if entry.size > _LARGEST_TEXT:
        return b""
    return read_small(folder / entry.path, _LARGEST_TEXT)


def _is_telling(content: bytes) -> bool:
    """Whether JSON may have a key of interest: a tokenizer has megabytes without one."""
    if any(key in content for key in _TELLING):
        return True
    return rb"\u00" in content and _ESCAPED.search(content) is not None


def _configuration(folder: Path, entry: FileEntry) -> Optional[Dict[str, Any]]:
    """A configuration in JSON that may name code or hold a template; None for anything else."""
    content = _bytes_at(folder, entry)
    if not _is_telling(content):
        return None
    try:
        value = parse_json(content.decode("utf-8", "replace"))
    except ValueError:
        return None
    if isinstance(value, dict):
        return value
    return None


def _in_configuration(folder: Path, entry: FileEntry) -> Iterator[Tuple[str, str]]:
    """Code of other repositories, and templates, in a configuration. Raises OSError."""
    if entry.size > _LARGEST_TEXT:
        yield "remote code", "a configuration that is too large to be looked at"
    value = _configuration(folder, entry)
    if value is None:
        return
    elsewhere = [name for name in _mapped(value) if "--" in name]
    if elsewhere:
        yield "remote code", f"names code of another repository: {printable(shorten(elsewhere, 3))}"
    for template in _templates(value):
        yield from _in_template(template)


def _mapped(value: Mapping[str, Any]) -> Iterator[str]:
    """The classes that an auto_map names: "modeling_x.Class" or "org/repo--modeling_x.Class"."""
    mapped = value.get("auto_map")
    if not isinstance(mapped, dict):
        return
    for names in mapped.values():
        if not isinstance(names, list):
            names = [names]
        for name in names:
            if isinstance(name, str):
                yield name


def _templates(value: Mapping[str, Any]) -> Iterator[str]:
    for key in _TEMPLATE_KEYS:
        template = value.get(key)
        if isinstance(template, str):
            yield template
        if isinstance(template, list):  # of {"name", "template"}
            for one in template:
                if isinstance(one, dict):
                    yield from _templates(one)


def _in_template(text: str) -> Iterator[Tuple[str, str]]:
    unusual = list(dict.fromkeys(match[0].strip() for match in _UNUSUAL.finditer(text)))
    if unusual:
        yield "template", f"uses {printable(shorten(unusual, 5))}"


def _in_gguf(head: bytes) -> Iterator[Tuple[str, str]]:
    """Templates in the facts of a GGUF file: a key, the number 8 of its kind, bytes, and text (GGUF
    specification, gguf_metadata_kv_t)."""
    for found in _GGUF_TEMPLATE.finditer(head):
        start = found.end()
        stop = start + int.from_bytes(found[1], "little")
        yield from _in_template(head[start:stop].decode("utf-8", "replace"))


def _named_code(folder: Path, manifest: Manifest) -> Dict[str, str]:
    """Python files that a configuration names, and which one does. Raises DiskError."""
    named: Dict[str, str] = {}
    if not any(entry.path.endswith(".py") for entry in manifest.files):
        return named
    for entry in manifest.files:
        if not entry.path.endswith(".json"):
            continue
        with disk_errors("read", folder / entry.path):
            value = _configuration(folder, entry)
        for name in _mapped(value or {}):
            module = name.rpartition(".")[0]
            path = f"{module.replace('.', '/')}.py"
            named[path] = f"run with --trust-remote-code: {printable(entry.path)} names it"
    return named
