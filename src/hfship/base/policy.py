# SPDX-License-Identifier: Apache-2.0
"""The policy of a site: what may cross, who must have signed it, what is recorded of it.

Owns what `[policy]` of a models file and the HFSHIP_POLICY_* variables mean; a variable wins over
the file. Values only: what is looked at, and what is then said, lies in base/code_files.py,
base/licences.py and archive/approval.py.

Promises: a policy that cannot be read stops the command, and so does a misspelt variable: a rule
is never passed over in silence.
"""

from __future__ import annotations

import os
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from hfship.base.errors import UsageError
from hfship.base.settings import home_path, parse_size
from hfship.base.values import dataclass, replace

if TYPE_CHECKING:
    from hfship.base.settings import ModelsFile

PICKLE_RULES = ("allow", "report", "weights-only", "refuse")
CODE_RULES = ("allow", "report", "refuse")
VARIABLES = "HFSHIP_POLICY_"  # in front of the name of a key, in capitals
KEYS_VARIABLE = "HFSHIP_KEYS"

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_ROLE = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
RELEASE = "release"  # the role of a signature that names none


@dataclass(frozen=True)
class PolicyException:
    """A file that may cross although a rule refuses it: by repository and SHA-256, and why."""

    repo: str
    sha256: str
    reason: str


@dataclass(frozen=True)
class Policy:
    """What a site lets pass. `max_file` is in bytes, 0 is any size.

    `licences` are patterns of which one must match, those with a "!" in front refuse. `require` are
    the roles that must have signed, each as often as it is named. `keys` is the folder of trusted
    keys. `scan` are command lines, with {} for the folder of the model.
    """

    pickle: str = "report"
    remote_code: str = "report"
    max_file: int = 0
    licences: Tuple[str, ...] = ()
    exceptions: Tuple[PolicyException, ...] = ()
    require: Tuple[str, ...] = ()
    keys: Optional[Path] = None
    scan: Tuple[str, ...] = ()
    custody: bool = True
    bom: bool = True

    def reason_for(self, repos: Sequence[str], sha256: str) -> str:
        """Why a file of a model, known by these names, may cross all the same; "": it may not.

        >>> told = PolicyException("Org/M", "0" * 64, "read by us on 2026-11-02")
        >>> Policy(exceptions=(told,)).reason_for(["org/m"], "0" * 64)
        'read by us on 2026-11-02'
        """
        names = {name.lower() for name in repos}
        for exception in self.exceptions:
            if exception.sha256 == sha256 and exception.repo.lower() in names:
                return exception.reason
        return ""

    def licence_refusal(self, licence: str) -> str:
        """Which rule refuses a licence ("": none is known), in words; "" where none does.

        >>> Policy().licence_refusal("agpl-3.0")
        ''
        >>> policy = Policy(licences=("apache-2.0", "llama3*", "!llama3.2"))
        >>> [policy.licence_refusal(name) for name in ("Apache-2.0", "llama3.1")]
        ['', '']
        >>> policy.licence_refusal("llama3.2"), policy.licence_refusal("")
        ('licences: !llama3.2', 'licences: no licence is known')
        """
        name = licence.lower()
        allowed = [pattern for pattern in self.licences if not pattern.startswith("!")]
        for pattern in self.licences:
            if pattern.startswith("!") and fnmatchcase(name, pattern[1:].lower()):
                return f"licences: {pattern}"
        if not allowed or any(fnmatchcase(name, pattern.lower()) for pattern in allowed):
            return ""
        if not licence:
            return "licences: no licence is known"
        return f"licences: {licence} is not one of {', '.join(allowed)}"


# -- values, as a models file or a variable gives them


def read_size(value: Any) -> int:
    """Bytes of 8000000, "8G" or "0" (no limit). Raises UsageError."""
    if value in (0, "0", ""):
        return 0
    return parse_size(str(value))


def read_licences(value: Any) -> Tuple[str, ...]:
    """Patterns of licences, from a list or from a text with commas. Raises ValueError."""
    expected = "a licence, like apache-2.0 or !gpl*"
    return _words(value, _is_pattern, expected)


def _is_pattern(word: str) -> bool:
    name = word.strip("!")
    return bool(name)


def read_roles(value: Any) -> Tuple[str, ...]:
    """Roles that must sign, from a list or from a text with commas. Raises ValueError."""
    expected = "a role: small letters, digits and _"
    return _words(value, is_role, expected)


def is_role(word: str) -> bool:
    """Can it be the name of a role? "revoked" is the folder of keys that nobody trusts any more.

    >>> [is_role(word) for word in ("security", "revoked", "a/b", "")]
    [True, False, False, False]
    """
    if word == "revoked":
        return False
    return bool(_ROLE.match(word))


def read_scans(value: Any) -> Tuple[str, ...]:
    """Command lines of scanners, from a list, or one from a text. Raises ValueError."""
    if isinstance(value, str):
        value = [value.strip()]
    return _words(value, _is_command, "a command line, like: clamscan --no-summary {}")


def _is_command(text: str) -> bool:
    try:
        return bool(shlex.split(text))
    except ValueError:
        return False


def read_truth(value: Any) -> bool:
    """true or false. Raises ValueError."""
    if isinstance(value, bool):
        return value
    truth = _TRUTH.get(str(value).lower())
    if truth is None:
        raise ValueError(f"{value!r} is neither true nor false")
    return truth


def read_exceptions(value: Any) -> Tuple[PolicyException, ...]:
    """Exceptions of a list of tables, each of which has a repo, a sha256 and a reason. Raises
    ValueError."""
    exceptions = [read_exception(table) for table in value]
    return tuple(exceptions)


def read_exception(table: Mapping[str, Any]) -> PolicyException:
    """One exception. Raises ValueError."""
    fields = {name: str(table.get(name, "")).strip() for name in ("repo", "sha256", "reason")}
    for name, text in fields.items():
        if not text:
            raise ValueError(f"an exception has no {name}")
    fields["sha256"] = fields["sha256"].lower()
    if not _SHA256.match(fields["sha256"]):
        raise ValueError(f"{fields['sha256'][:20]!r} is no SHA-256: 64 hex digits")
    return PolicyException(**fields)


def _words(value: Any, good: Callable[[str], bool], expected: str) -> Tuple[str, ...]:
    if isinstance(value, str):
        value = [word for word in value.split(",") if word.strip()]

    texts = [str(word).strip() for word in value]
    words = tuple(texts)
    for word in words:
        if not good(word):
            raise ValueError(f"{word!r} is not {expected}")
    return words


def _choice(choices: Sequence[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            known = ", ".join(choices)
            raise ValueError(f"{value!r} is not one of: {known}")
        return str(value)

    return read


# What reads the value of a key, by the field of Policy.
READERS: Mapping[str, Callable[[Any], Any]] = {
    "pickle": _choice(PICKLE_RULES),
    "remote_code": _choice(CODE_RULES),
    "max_file": read_size,
    "licences": read_licences,
    "require": read_roles,
    "keys": home_path,
    "scan": read_scans,
    "custody": read_truth,
    "bom": read_truth,
}
# The list of exceptions is for a file, where each has its reason beside it.


def read_policy(env: Mapping[str, str], file: Optional[ModelsFile] = None) -> Policy:
    """The policy of a run. Raises UsageError for a variable that is wrong, or none."""
    told: Dict[str, Any] = {}
    if file:
        for name, value in file.policy.items():
            if name == "exception":
                told["exceptions"] = read_exceptions(value)
            else:
                told[name] = READERS[name](value)
        if told.get("keys"):
            told["keys"] = file.path.parent.absolute() / told["keys"]

    told.update(_of_variables(env))
    return replace(Policy(), **told)


def _of_variables(env: Mapping[str, str]) -> Dict[str, Any]:
    """What variables say, by field. Raises UsageError."""
    found: Dict[str, Any] = {}
    for variable, text in env.items():
        if variable == KEYS_VARIABLE:
            found["keys"] = _value_of(variable, "keys", text)
        elif variable.startswith(VARIABLES):
            name = variable[len(VARIABLES) :].lower()
            found[name] = _value_of(variable, name, text)
    return found


def _value_of(variable: str, name: str, text: str) -> Any:
    """The value of one variable. Raises UsageError."""
    if name not in READERS or variable == f"{VARIABLES}KEYS":
        known: List[str] = [f"{VARIABLES}{key.upper()}" for key in READERS if key != "keys"]
        step = f"set one of: {', '.join([*known, KEYS_VARIABLE])}"
        raise UsageError(f"{variable} is no part of the policy", "", step)
    step = f"correct it, or: unset {variable}"
    if name == "keys" and not text.strip():
        raise UsageError(f"{variable} is empty", "it names the folder of trusted keys", step)
    try:
        value = READERS[name](text)
    except (ValueError, UsageError) as exc:
        raise UsageError(f"{variable}: {exc}", "", step) from exc
    if name == "keys":
        return Path(os.path.abspath(value))
    return value
