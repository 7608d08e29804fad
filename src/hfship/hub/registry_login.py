# SPDX-License-Identifier: Apache-2.0
"""How one logs in at registries of images.

Owns what docker and podman keep of logins and certificates: config.json with its credential
helpers, auth.json, and the CAs in certs.d. Promises: a password is neither an argument of a
program nor shown. Never: writes any of these files.

Sources: docker/cli `cli/config`, docker-credential-helpers (`get`, the host on stdin), and
containers-auth.json(5).
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional

from hfship.base.errors import HfshipError, UsageError
from hfship.base.processes import run_program
from hfship.base.reading import parse_json, read_small
from hfship.base.text import printable
from hfship.hub.registry_protocol import DOCKER_HUB

DOCKER_HUB_KEY = "https://index.docker.io/v1/"  # what docker's files call Docker Hub
TOKEN_USER = "<token>"  # a helper's word for: the secret is an identity token
HELPER_TIMEOUT_S = 20.0
LONGEST_FILE = 1 << 20
_HELPER = re.compile(r"[\w.-]+\Z", re.ASCII)

Warn = Callable[[str], None]


class RegistryLogin(NamedTuple):
    """A user with a password, or an identity token; and where it came from."""

    user: str
    password: str
    identity_token: str
    source: str

    def __repr__(self) -> str:
        return f"RegistryLogin({self.source!r})"

    @property
    def basic(self) -> str:
        """The Authorization that logs in; "" for an identity token."""
        if self.identity_token:
            return ""
        pair = f"{self.user}:{self.password}"
        encoded = base64.b64encode(pair.encode())
        return f"Basic {encoded.decode()}"

    @property
    def secrets(self) -> List[str]:
        """What is shown nowhere."""
        encoded = self.basic[6:]
        secrets = [self.password, self.identity_token, encoded]
        return [secret for secret in secrets if secret]


def login_files(env: Mapping[str, str]) -> List[Path]:
    """Where docker and podman keep their logins, in the order in which they are looked at."""
    home = Path(os.path.expanduser(env.get("HOME") or "~"))
    found = []
    if env.get("REGISTRY_AUTH_FILE"):
        found.append(Path(env["REGISTRY_AUTH_FILE"]))
    found.append(Path(env.get("DOCKER_CONFIG") or home / ".docker") / "config.json")
    runtime = env.get("XDG_RUNTIME_DIR")
    if runtime:
        found.append(Path(runtime) / "containers/auth.json")
    found.append(home / ".config/containers/auth.json")
    return found


def find_login(
    registry: str, repository: str, env: Mapping[str, str], warn: Warn
) -> Optional[RegistryLogin]:
    """The login for a registry in the files of docker and podman; None where there is none, or
    none that can be used, of which `warn` is told."""
    for path in login_files(env):
        try:
            config = parse_json(read_small(path, LONGEST_FILE))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as exc:
            warn(f"{path} cannot be read: {printable(str(exc))[:200]}")
            continue
        if isinstance(config, dict):
            found = _login_in(config, path, registry, repository, warn)
            if found:
                return found
    return None


def _keys(registry: str, repository: str) -> List[str]:
    """What files call a registry, podman's for a part of it first."""
    keys = []
    parts = repository.split("/")
    for count in range(len(parts), 0, -1):
        keys.append("/".join(parts[:count]))
    if registry == DOCKER_HUB:
        keys += [DOCKER_HUB_KEY, "index.docker.io", "registry-1.docker.io"]
    keys += [f"https://{registry}", f"http://{registry}", f"https://{registry}/v1/"]
    return keys


def _login_in(
    config: Dict[str, Any], path: Path, registry: str, repository: str, warn: Warn
) -> Optional[RegistryLogin]:
    """The login in one file: of a helper for this registry, as it stands there, or of the helper
    for all."""
    helpers, auths = config.get("credHelpers"), config.get("auths")
    keys = _keys(registry, repository)
    if isinstance(helpers, dict):
        for key in keys:
            if key in helpers:
                return _ask_helper(helpers[key], _helper_key(registry), warn)
    if config.get("credsStore"):
        found = _ask_helper(config["credsStore"], _helper_key(registry), warn)
        if found:
            return found
    if isinstance(auths, dict):
        for key in keys:
            if auths.get(key):
                return _read_entry(auths[key], f"{path}", warn)
    return None


def _helper_key(registry: str) -> str:
    if registry == DOCKER_HUB:
        return DOCKER_HUB_KEY
    return registry


def _read_entry(entry: Any, source: str, warn: Warn) -> Optional[RegistryLogin]:
    """An entry of `auths`: {"auth": base64 of USER:PASSWORD} or {"identitytoken": ...}."""
    try:
        user, _, password = base64.b64decode(entry.get("auth", "")).decode().partition(":")
        token = str(entry.get("identitytoken") or "")
    except (ValueError, TypeError, AttributeError):  # no base64, no text, no table
        warn(f"{source}: a login there has another form than docker writes; it is not used")
        return None
    if not token and not password:
        return None
    return RegistryLogin(user, password.rstrip("\0"), token, source)


def _ask_helper(name: Any, key: str, warn: Warn) -> Optional[RegistryLogin]:
    """The login that docker-credential-NAME has for a registry; None when it has none."""
    if not isinstance(name, str) or not _HELPER.match(name):
        warn(f"{name!r:.50} is no name of a credential helper")
        return None
    program = f"docker-credential-{name}"
    try:
        done = run_program([program, "get"], stdin=key, timeout_s=HELPER_TIMEOUT_S)
    except HfshipError as exc:
        warn(f"{exc.what}: going on without the login that it keeps")
        return None
    if done.code:
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        value = parse_json(done.out)
        user, secret = str(value["Username"]), str(value["Secret"])
        if user == TOKEN_USER:
            return RegistryLogin("", "", secret, program)
        return RegistryLogin(user, secret, "", program)
    warn(f"{program} does not answer like a credential helper; its login is not used")
    return None


def given_login(user: str, password_file: Optional[Path]) -> RegistryLogin:
    """The login of --registry-user and the file with its password. Raises UsageError."""
    if password_file is None:
        step = "give --registry-password-file FILE (chmod 600), or log in with docker login"
        raise UsageError(f"--registry-user {user} has no password", "", step)
    try:
        text = read_small(password_file, LONGEST_FILE).decode()
    except (OSError, ValueError) as exc:
        what = f"the password in {password_file} cannot be read"
        raise UsageError(what, str(exc), "write it into that file") from exc
    password = text.rstrip("\r\n")
    if not password or "\n" in password:
        step = "write the password into it, in one line"
        raise UsageError(f"{password_file} holds no password", "", step)
    return RegistryLogin(user, password, "", f"--registry-user {user}")


def known_cas(registry: str, env: Mapping[str, str]) -> Iterator[str]:
    """The files of CAs that docker and podman believe for a registry: certs.d/HOST/*.crt."""
    home = os.path.expanduser(env.get("HOME") or "~")
    folders = ["/etc/docker/certs.d", "/etc/containers/certs.d"]
    folders += [f"{home}/.config/containers/certs.d", f"{home}/.docker/certs.d"]
    for folder in folders:
        place = Path(folder, registry)
        with contextlib.suppress(OSError):
            for path in sorted(place.glob("*.crt")):
                yield str(path)
