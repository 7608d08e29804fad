# SPDX-License-Identifier: Apache-2.0
"""Deployments on disk: read, listed, written.

Owns DEPLOY_DIR/NAME with plan.json, .env and docker-compose.yml, whose text is of serve/files.
Promises: the key is made once and kept from then on, and the reporter never shows it. Files that
are as they should be are not written again. A folder or a key of another user is not taken over:
nothing in it is believed, followed or written to.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Tuple

from hfship.base.below import Refused, folder_below, is_foreign, open_in, owner_of
from hfship.base.errors import (
    HfshipError,
    HostError,
    IntegrityError,
    UsageError,
    command_line,
)
from hfship.base.files import disk_errors, make_dir, write_below
from hfship.base.reading import STATE_SIZE, read_whole
from hfship.base.values import dataclass, field
from hfship.serve.files import (
    COMPOSE_FILE,
    ENV_FILE,
    PLAN_FILE,
    compose_text,
    env_text,
    key_in_env,
    parse_plan,
    plan_text,
    variables_in_env,
    with_variables,
)

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.serve.terms import Plan


# The group may look at plan and logs; what is secret is in .env, which is the owner's alone.
FOLDER_MODE = 0o750


@dataclass(frozen=True)
class Deployment:
    """A folder with a plan, and the API key of its .env (never shown).

    `owner` is the user whose deployment it is, where that is not us or root: it can be looked at,
    without its key.
    """

    folder: Path
    plan: Plan
    key: str = field(repr=False)
    owner: str = ""


class NotOursError(HostError):
    """What lies in the place of a deployment, and hfship did not make for this user or for root."""


def read_deployment(folder: Path, reporter: Reporter) -> Optional[Deployment]:
    """The deployment in a folder, None when there is none. Its key is hidden from now on.

    Raises HostError for files that cannot be read or are another user's, IntegrityError,
    UsageError.
    """
    path = folder / PLAN_FILE
    content = read_own(folder, PLAN_FILE)
    if content is None:
        return None

    plan = parse_plan(_decoded(content, path), str(path))
    env = _env_text(folder)
    key = _hidden_key(env, folder / ENV_FILE, reporter)
    variables = variables_in_env(env)
    whole = with_variables(plan, variables)
    return Deployment(folder, whole, key)


def look_at_deployment(folder: Path, reporter: Reporter) -> Optional[Deployment]:
    """The deployment in a folder, also one of another user of our group: to be looked at.

    Of that one the plan alone is read, never the key; nothing of it is run or written to. Raises as
    read_deployment.
    """
    owner = _owner_we_trust(folder)
    if not owner:
        return read_deployment(folder, reporter)

    path = folder / PLAN_FILE
    content = read_own(folder, PLAN_FILE, of_others=True)
    if content is None:
        return None
    plan = parse_plan(_decoded(content, path), str(path))
    if plan.name != folder.name:  # it would name the container of another
        raise NotOursError(
            f"{path} is not of this deployment",
            f"it names {plan.name}",
            f"ask {owner}",
        )
    return Deployment(folder, plan, "", owner)


def _owner_we_trust(folder: Path) -> str:
    """The user whose folder it is, if that is another of one of our groups (root: any), and not
    everybody may write there; else ""."""
    try:
        status = os.stat(folder)
    except OSError:
        return ""
    if status.st_uid in (os.geteuid(), 0) or not _may_be_looked_at(status):
        return ""
    return owner_of(status)


def _may_be_looked_at(status: os.stat_result) -> bool:
    """Whether a file or folder is ours, or of our group and closed to the rest of the world."""
    if not is_foreign(status):
        return True
    if status.st_mode & stat.S_IWOTH:
        return False
    if os.geteuid() == 0:
        return True
    groups = os.getgroups()
    return status.st_gid == os.getegid() or status.st_gid in groups


def read_key(folder: Path, reporter: Reporter) -> str:
    """The API key in a deployment's .env, "" when there is none yet. Hidden from now on.

    Raises HostError, IntegrityError, UsageError.
    """
    return _hidden_key(_env_text(folder), folder / ENV_FILE, reporter)


def _env_text(folder: Path) -> str:
    content = read_own(folder, ENV_FILE) or b""
    return _decoded(content, folder / ENV_FILE)


def _hidden_key(env: str, path: Path, reporter: Reporter) -> str:
    try:
        key = key_in_env(env)
    except ValueError as exc:  # not repeated as the cause: it may hold the key
        what = f"the key in {path} cannot be used"
        raise UsageError(what, str(exc), f"edit {path}, then hfship serve") from None

    reporter.hide(key)
    return key


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as exc:
        what = f"cannot read {path}: it is not text in UTF-8"
        raise IntegrityError(what, "", f"edit {path}, or remove it; then hfship serve") from exc


def read_own(
    folder: Path, name: str, most: int = STATE_SIZE, of_others: bool = False
) -> Optional[bytes]:
    """The content of a file of at most `most` bytes in a deployment's folder, None without one.

    Raises HostError where it cannot be read, and where folder or file are not this user's or
    root's: whoever made them may have chosen the key, or what docker is told. With `of_others`
    those of our group will do: for what is only shown.
    """
    path = folder / name
    try:
        with folder_below(folder.parent, folder.name) as fd:
            _refuse_foreign(folder, os.fstat(fd), of_others)
            file = open_in(fd, name)
        try:
            _refuse_foreign(path, os.fstat(file), of_others)
            return read_whole(file, most, path)
        finally:
            os.close(file)
    except FileNotFoundError:
        return None
    except Refused as exc:
        why = "hfship does not make it so"
        step = f"look at {folder}, and remove what nobody needs"
        raise NotOursError(f"cannot read {path}: {exc.strerror}", why, step) from exc
    except OSError as exc:
        why = ""
        if isinstance(exc, PermissionError):
            why = "the folder belongs to the user who ran serve"
        step = "run as that user or one of the folder's group, or as root"
        raise HostError(f"cannot read {path}: {exc.strerror}", why, step) from exc


def _refuse_foreign(path: Path, status: os.stat_result, of_others: bool = False) -> None:
    """Raise NotOursError for what another user owns or can write; with `of_others` not of one of
    our group."""
    if not is_foreign(status) or (of_others and _may_be_looked_at(status)):
        return
    what = f"others may write to {path}"
    step = command_line("chmod", "go-w", path) + "     # if all that is in it is yours"
    if status.st_uid not in (os.geteuid(), 0):
        owner = owner_of(status)
        what = f"{path} belongs to {owner}"
        step = f"run as {owner}, or choose another --name; or remove it, if nobody needs it"
    why = "whoever can change it chooses the API key, and what docker is told"
    raise NotOursError(what, why, step)


def list_deployments(
    deploy_dir: Path,
    reporter: Reporter,
    read: Callable[[Path, Reporter], Optional[Deployment]] = read_deployment,
) -> Tuple[List[Deployment], Dict[str, HfshipError]]:
    """(all deployments in the order of their names, what is wrong with those that cannot be read).

    `read` is read_deployment, or look_at_deployment. Raises HostError.
    """
    found: List[Deployment] = []
    wrong: Dict[str, HfshipError] = {}
    for folder in _deployment_folders(deploy_dir):
        try:
            deployment = read(folder, reporter)
        except HfshipError as exc:
            wrong[folder.name] = exc
            continue
        if deployment:
            found.append(deployment)

    return found, wrong


def _deployment_folders(deploy_dir: Path) -> List[Path]:
    """The folders that may be deployments. Those that start with _ are ours for other purposes."""
    try:
        if not deploy_dir.is_dir():
            return []
        entries = sorted(deploy_dir.iterdir())
    except OSError as exc:
        what = f"cannot read {deploy_dir}: {exc.strerror}"
        raise HostError(what, "", "run as its user, or as root") from exc

    return [path for path in entries if path.is_dir() and path.name[0] not in "_."]


def make_own_folder(folder: Path) -> None:
    """Make a deployment's folder, or close the one that is there to others.

    Raises DiskError; HostError for one of another user.
    """
    make_dir(folder.parent)
    with disk_errors("write", folder), folder_below(folder.parent, folder.name, make=True) as fd:
        status = os.fstat(fd)
        if status.st_uid not in (os.geteuid(), 0):
            _refuse_foreign(folder, status)
        os.chmod(".", FOLDER_MODE, dir_fd=fd)


def write_deployment(
    folder: Path, plan: Plan, reporter: Reporter, shared_key: str = ""
) -> Deployment:
    """Write the deployment's files where they differ. `shared_key` is that of other replicas.

    Raises DiskError, UsageError; HostError for a folder or a file of another user.
    """
    make_own_folder(folder)
    key = shared_key or read_key(folder, reporter)
    if not key:
        import secrets  # loads much, and only a new deployment needs it

        key = "sk-" + secrets.token_urlsafe(32)
    reporter.hide(key)
    texts = {
        PLAN_FILE: plan_text(plan),
        ENV_FILE: env_text(plan, key),
        COMPOSE_FILE: compose_text(plan),
    }
    for name, text in texts.items():
        if read_own(folder, name) == text.encode("utf-8"):
            continue
        mode = 0o600 if name == ENV_FILE else 0o644
        write_below(folder.parent, f"{folder.name}/{name}", text, mode)
        reporter.detail(f"wrote {folder / name}")

    return Deployment(folder, plan, key)
