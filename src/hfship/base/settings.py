# SPDX-License-Identifier: Apache-2.0
"""Settings.

Owns where things are and who we are. What wins: flags, then the HFSHIP_* and HF_* environment, then
the models file, then defaults. Nothing is read but the file of the token.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Tuple, Type
from urllib.parse import urlsplit

from hfship.base.errors import AuthError, UsageError
from hfship.base.reading import read_small
from hfship.base.values import dataclass, field, field_names

DEFAULT_ENDPOINT = "https://huggingface.co"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_TOKEN_STEP = "name a file that holds the token and nothing else, or set HF_TOKEN"
_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub/constants.py has them


class Folder(NamedTuple):
    """Where a folder is set: the environment variable that names it, and what it is without."""

    variable: str
    default: str


# By the name of the field in Settings, which is the key in a models file.
FOLDERS: Mapping[str, Folder] = {
    "models_dir": Folder("HFSHIP_MODELS_DIR", "~/models"),
    "package_dir": Folder("HFSHIP_PACKAGE_DIR", "~/transfer_package"),
    "log_dir": Folder("HFSHIP_LOG_DIR", "~/logs/hfship"),
    "transfer_dir": Folder("HFSHIP_TRANSFER_DIR", "/data/transfer"),
    "site_models_dir": Folder("HFSHIP_SITE_MODELS_DIR", "/data/models/huggingface"),
    "deploy_dir": Folder("HFSHIP_DEPLOY_DIR", "/data/deploy"),
}


@dataclass(frozen=True)
class Token:
    """A Hub token and where it came from. `value` is never shown, not even by repr."""

    value: str = field(repr=False)
    source: str


@dataclass(frozen=True)
class Settings:
    """Resolved paths and endpoint of one run."""

    endpoint: str
    models_dir: Path
    package_dir: Path
    log_dir: Path
    transfer_dir: Path
    site_models_dir: Path
    deploy_dir: Path


@dataclass(frozen=True)
class ListedModel:
    """A [[model]] of a models file, over its [defaults].

    `wishes` are the values of all its keys but `serve`, which has those for `hfship serve`. Their
    names are in the JSON of `hfship models`.
    """

    name: str
    repo: str = ""
    wishes: Mapping[str, Any] = field(default_factory=dict)
    serve: Mapping[str, Any] = field(default_factory=dict)
    copies: Mapping[str, Any] = field(default_factory=dict)  # how many run, and how they share work

    @property
    def deployment(self) -> str:
        """The name of its deployment: `serve.name`, else its own."""
        name: str = self.serve.get("name", "")
        return name or self.name


@dataclass(frozen=True)
class ModelsFile:
    """A models file. `others` stands for models that it does not list: the [defaults] alone.

    `policy` are the values of [policy]; `tables` those of a site, as they stand in the file.
    """

    path: Path
    defaults: Mapping[str, Any]
    models: Tuple[ListedModel, ...]
    others: ListedModel
    policy: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> Dict[str, ListedModel]:
        """The models by the words that mean them: repositories, deployments, names."""
        known = {}
        for model in self.models:
            repo = model.repo.partition("@")[0]
            for word in (repo, model.deployment, model.name):
                if word:
                    known[word] = model
        return known

    def called(self, word: str) -> Optional[ListedModel]:
        """The model that a word means, whatever its capitals; None for no model."""
        known = self.known
        if word in known:
            return known[word]
        folded = {name.casefold(): model for name, model in known.items()}
        return folded.get(word.casefold())


def cache_folder() -> Optional[Path]:
    """Where what can be made anew is kept; None for a user without a home."""
    folder = os.environ.get("HFSHIP_CACHE", "")
    if not folder:
        of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(of_user, "hfship")
    if not os.path.isabs(folder):
        return None
    return Path(folder)


def load_settings(
    env: Mapping[str, str], endpoint: Optional[str] = None, file: Optional[ModelsFile] = None
) -> Settings:
    """The settings of a run; `endpoint` is that of the flag.

    `~` and `$VAR` in paths are expanded; a relative path in the models file starts at its folder.
    Raises UsageError for a wrong endpoint.
    """
    defaults: Mapping[str, Any] = file.defaults if file else {}
    folders = {}
    for name, folder in FOLDERS.items():
        from_env = env.get(folder.variable)
        chosen = from_env or defaults.get(name) or folder.default
        path = expanded_path(chosen)
        if file and not from_env:
            path = file.path.parent.absolute() / path
        folders[name] = path

    named = [endpoint, env.get("HF_ENDPOINT"), defaults.get("endpoint"), DEFAULT_ENDPOINT]
    urls = [url.strip() for url in named if url and url.strip()]
    return Settings(endpoint=checked_endpoint(urls[0].rstrip("/")), **folders)


def expanded_path(text: str) -> Path:
    """The path with `~` and `$VAR` expanded. Raises UsageError where that cannot be done."""
    with_variables = os.path.expandvars(text)
    return home_path(with_variables)


def home_path(text: str) -> Path:
    """The path with `~` and `~USER` expanded. Raises UsageError where nobody knows whither: a
    folder that is called ~ is nobody's wish."""
    if not text.startswith("~"):
        return Path(text)

    user, _, rest = text.partition("/")
    home = ""
    if user == "~":
        home = os.environ.get("HOME", "")
    # HOME=. or an empty one would mean another folder each time.
    if not os.path.isabs(home):
        home = _home_of(user[1:])
    if not home:
        raise _no_home(text, user[1:])
    return Path(home) / rest


def _home_of(user: str) -> str:
    """The home of a user, "" for this one; "" where the system knows none."""
    import pwd

    try:
        entry = pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())
    except KeyError:
        return ""
    return entry.pw_dir


def _no_home(text: str, user: str) -> UsageError:
    if user:
        what = f"{text} cannot be found: there is no user {user}"
        return UsageError(what, "", f"give it from /, or as ./{text} if ~ begins its name")
    what = f"{text} cannot be found: nobody knows your home folder"
    why = f"HOME is not set, and the system has no user with the number {os.getuid()}"
    variables = ", ".join(folder.variable for folder in FOLDERS.values())
    step = f"export HOME=DIR, a folder that you may write to\nsingle folders: {variables}"
    return UsageError(what, why, step)


def checked_endpoint(url: str) -> str:
    """The address of a Hub. Raises UsageError for what is none, and for one with a user name: the
    manifest, which travels with the model, has the address in it."""
    step = "give --endpoint https://HOST or set HF_ENDPOINT"
    try:
        parts = urlsplit(url)
        labels = (parts.hostname or "").rstrip(".").split(".")
        usable = parts.scheme in ("http", "https") and parts.port != 0 and all(labels)
    except ValueError:
        usable = False

    before_query = url.partition("?")[0]
    if "@" in before_query:
        why = "it would travel with the model; a Hub that wants a login finds it in ~/.netrc"
        raise UsageError("the endpoint has a user name in it", why, step)
    is_plain = url.isprintable() and not re.search(r"[\s?#]", url)
    if not usable or not is_plain:
        raise UsageError(f"endpoint {url!r} is not an http(s) URL", "", step)

    return url


def truthy(value: Optional[str]) -> bool:
    """The Hub's reading of a boolean environment variable.

    >>> [truthy(v) for v in (None, "", "0", "1", "on", "Yes", "TRUE")]
    [False, False, False, True, True, True, True]
    """
    if not value:
        return False
    return value.upper() in _TRUE


def find_token(
    env: Mapping[str, str], complain: Callable[[str], None] = lambda _: None
) -> Optional[Token]:
    """The Hub token, from the places and in the order of huggingface_hub: HF_TOKEN,
    HUGGING_FACE_HUB_TOKEN, the file HF_TOKEN_PATH ($HF_HOME/token).

    None when HF_HUB_DISABLE_IMPLICIT_TOKEN is set or nothing is found. `complain` is called with a
    sentence about a file that is there and cannot be read: of another user's home, say. Raises
    AuthError for a token that cannot be one.
    """
    if truthy(env.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return None

    for variable in TOKEN_VARIABLES:
        value = env.get(variable, "").strip()
        if value:
            return checked_token(value, f"environment variable {variable}")

    try:
        path = hub_path(env, "token", "HF_TOKEN_PATH")
    except UsageError:  # no home, and so no token in it
        return None
    try:
        content = read_small(path, or_pipe=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        complain(f"the token file {path} cannot be read ({exc.strerror}): going on without a token")
        return None

    return _token_in(content, path)


def hub_path(env: Mapping[str, str], name: str, *variables: str) -> Path:
    """A path of huggingface_hub: the first of `variables` that is set, else `name` in its home.

    Its home is $HF_HOME, else $XDG_CACHE_HOME/huggingface. Raises UsageError for a user without
    a home.
    """
    for variable in variables:
        if env.get(variable):
            return expanded_path(env[variable])

    home = env.get("HF_HOME")
    if not home:
        cache = env.get("XDG_CACHE_HOME") or "~/.cache"
        home = f"{cache}/huggingface"

    return expanded_path(f"{home}/{name}")


def read_token_file(path: Path) -> Token:
    """The token in a file. Raises AuthError for a file that cannot be read or holds no token."""
    try:
        content = read_small(path, or_pipe=True)
    except OSError as exc:
        why = exc.strerror or str(exc)
        raise AuthError(f"cannot read the token file {path}", why, _TOKEN_STEP) from exc

    return _token_in(content, path)


def _token_in(content: bytes, path: Path) -> Token:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise AuthError(f"cannot read the token file {path}", str(exc), _TOKEN_STEP) from exc

    return checked_token(text.strip(), f"file {path}")


def checked_token(value: str, source: str) -> Token:
    """A token that can be sent in a header. Raises AuthError, which does not show it."""
    if not re.fullmatch(r"[!-~]+", value):
        why = "it is empty, or has spaces, line breaks or letters that no token has"
        step = "copy it again from your Hub's settings page"
        raise AuthError(f"the token from {source} is not a token", why, step)
    return Token(value, source)


_MOST_NUMBER = 1e18  # bytes, seconds, ports: nothing that we read or write comes near it
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?$", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes of "4300M", "4.7G" (decimal) or "4GiB" (binary). Raises UsageError.

    >>> [parse_size(t) for t in ("512", "4.7G", "1GiB", "100MB")]
    [512, 4700000000, 1073741824, 100000000]
    """
    match = _SIZE.match(text.strip())
    if not match or float(match[1]) > _MOST_NUMBER:
        raise UsageError(f"{text!r} is not a size", "", "write it like 4300M, 4.7G or 4GiB")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    unit = base ** _POWERS[prefix.upper()]
    return int(float(number) * unit)


_RATE_END = re.compile(r"\s*(/s|/sec|ps|/second)$", re.IGNORECASE)
_BITS = re.compile(r"([\d.]+)\s*([KMGTkmgt]?)i?(bits?(/s|ps)?|b(/s|ps))$")


def parse_rate(text: str) -> int:
    """Bytes per second of "50M", "50MB/s" or "50 MiB/s". Raises UsageError, also for bits.

    >>> [parse_rate(t) for t in ("20M", "50MB/s", "1MiB/s", "50M/s")]
    [20000000, 50000000, 1048576, 50000000]
    """
    bits = _BITS.match(text.strip())
    if bits:
        amount, prefix = bits[1], bits[2].upper()
        with contextlib.suppress(ValueError):
            eighth = f"{float(amount) / 8:g}"
            step = f"{amount}{prefix}B/s, or {eighth}{prefix}B/s if you mean bits"
            raise UsageError(f"{text!r} is in bits; rates are in bytes", "", step)
    return parse_size(_RATE_END.sub("", text.strip()))


def known_fields(kind: Type[Any], values: Mapping[str, Any]) -> Dict[str, Any]:
    """The values that the dataclass has fields for, with tuples for lists."""
    names = set(field_names(kind))
    known = {}
    for name, value in values.items():
        if name not in names:
            continue
        if isinstance(value, list):
            value = tuple(value)
        known[name] = value

    return known


# Type of a field's default -> what may stand in the field. A number that is not known is None.
_FIELD_TYPES: Mapping[type, Tuple[type, ...]] = {
    float: (int, float),
    type(None): (int, type(None)),
}


def typed_fields(default: Any, values: Mapping[str, Any]) -> Dict[str, Any]:
    """The values for the fields of a dataclass, each of the type that it has in `default`.

    For what is read back from JSON. Raises ValueError, also for numbers that are not finite.
    """
    known = known_fields(type(default), values)
    for name, value in known.items():
        usual = type(getattr(default, name))
        accepted = _FIELD_TYPES.get(usual, (usual,))
        usable = isinstance(value, accepted)
        if isinstance(value, (int, float)):
            usable = usable and abs(value) < _MOST_NUMBER  # NaN is not
        if not usable:
            raise ValueError(f"{name} is not what it should be")

    return known
