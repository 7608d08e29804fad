# SPDX-License-Identifier: Apache-2.0
"""What an operator names: models, folders, archives, deployments, jobs.

Owns what a name means: NAME, ORG/NAME, a name in the API, with whatever capitals. What is called
exactly so comes first, and a path is a path. Promises: a name that nothing has raises
NotFoundError, which says where one looked, what there is, and a command that works.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Optional, Sequence, Union

from hfship.base.errors import (
    HfshipError,
    HostError,
    NotFoundError,
    UsageError,
    closest,
    command_line,
    meant_step,
    nearest,
)
from hfship.base.manifest import _NAME, _REPO_ID, MANIFEST_PATH, read_manifest
from hfship.base.settings import home_path
from hfship.base.text import shorten

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.base.manifest import Manifest
    from hfship.base.report import Reporter
    from hfship.base.settings import Settings
    from hfship.commands.context import Context
    from hfship.ops.jobs import Job
    from hfship.serve.deployments import Deployment


def find_folder(name: str, folders: Sequence[Path]) -> Optional[Path]:
    """The folder of a model: a path, or a NAME; here, if it is a model, or in the first of
    `folders` that has it, or any folder here.

    Raises UsageError for an empty name.
    """
    if not name:  # an unset variable of a script; it would mean the folder of all models
        raise UsageError("the name of a model is empty", "", "give a NAME or a path")

    places = [Path(name)]
    if not _is_path(name):
        places = [*(folder / name for folder in folders), Path(name)]
        if os.path.exists(Path(name, MANIFEST_PATH)):
            places = [Path(name)]
    for place in places:
        if os.path.isdir(place):  # and to be seen: some may be in another user's home
            return Path(os.path.abspath(place))

    return _folder_meant(name, folders)


def word_for(folder: Path, folders: Sequence[Path]) -> str:
    """The shortest word that means a model folder to a command which looks in `folders`."""
    if find_folder(folder.name, folders) == Path(os.path.abspath(folder)):
        return folder.name
    return str(folder)


def _folder_meant(name: str, folders: Sequence[Path]) -> Optional[Path]:
    """The folder that is meant by ORG/NAME, or by NAME with other capitals."""
    if not _may_be_a_name(name):
        return None
    for folder in _model_folders(folders):
        if _is_called(folder, name):
            return Path(os.path.abspath(folder))
    return None


def _may_be_a_name(name: str) -> bool:
    """Whether a word can be NAME or ORG/NAME, and is no path to something that is here."""
    org = name.partition("/")[0]
    is_path = org != name and os.path.isdir(org)
    return bool(_REPO_ID.match(name)) and not is_path


def _model_folders(folders: Sequence[Path]) -> Iterator[Path]:
    """The folders that may be models: NAME and ORG/NAME below each of `folders`."""
    for root in folders:
        for folder in _folders_in(root):
            yield folder
            if not os.path.exists(folder / MANIFEST_PATH):
                yield from _folders_in(folder)


def model_names(folders: Sequence[Path]) -> List[str]:
    """What the folders that may be models are called."""
    return [folder.name for folder in _model_folders(folders)]


def _folders_in(root: Path) -> List[Path]:
    try:
        return sorted(path for path in root.iterdir() if os.path.isdir(path))
    except OSError:
        return []


def _is_called(folder: Path, name: str) -> bool:
    """Whether a model folder is what ORG/NAME or NAME means; the manifest, or the folder above it,
    tells the ORG."""
    org, _, last = name.casefold().rpartition("/")
    if folder.name.casefold() != last:
        return False
    return not org or folder.parent.name.casefold() == org or _has_repo(folder, name)


def _has_repo(folder: Path, repo: str) -> bool:
    with contextlib.suppress(HfshipError):
        manifest = read_manifest(folder)
        return manifest is not None and _is_of(manifest, repo)
    return False


def _is_of(manifest: Manifest, repo: str) -> bool:
    """Whether a manifest came from a repository, whatever its capitals."""
    source = manifest.source
    if source is None:
        return False
    names = (source.repo.casefold(), source.resolved_repo.casefold())
    return repo.casefold() in names


def served_folder(name: str, settings: Settings) -> Optional[Path]:
    """The folder of the model that a deployment serves under a name."""
    from hfship.base.report import Reporter
    from hfship.serve.deployments import list_deployments

    with contextlib.suppress(HostError):
        found, _ = list_deployments(settings.deploy_dir, Reporter("none", -1))
        for deployment in found:
            folder = Path(deployment.plan.model_dir)
            if _answers_to(deployment, name) and os.path.isdir(folder):
                return folder
    return None


def _answers_to(deployment: Deployment, name: str) -> bool:
    """Whether a deployment is called so, here or in its API, whatever the capitals."""
    plan = deployment.plan
    return name.casefold() in (known.casefold() for known in (plan.name, *plan.served_names))


def repo_named(text: str, settings: Settings, reporter: Reporter) -> str:
    """REPO[@REV] for NAME[@REV] of a model that was fetched before; other words as they are."""
    name, at, revision = text.partition("@")
    if not _NAME.match(name):
        return text
    folder = _folder_meant(name, [settings.models_dir, settings.site_models_dir])
    manifest = None
    with contextlib.suppress(HfshipError):
        manifest = read_manifest(folder) if folder else None
    if manifest is None or manifest.source is None or manifest.source.repo == name:
        return text
    repo = manifest.source.repo
    reporter.info(f"{name} is {repo}, as it was fetched before")
    return f"{repo}{at}{revision}"


def _is_path(name: str) -> bool:
    return "/" in name or name in (".", "..")


def find_model(
    name: str, settings: Settings, also: Sequence[Path] = (), step: str = "hfship fetch ORG/NAME"
) -> Path:
    """The folder of a model to pack or to check.

    Raises NotFoundError, which says that `also` was looked in, too.
    """
    folders = [settings.models_dir, settings.site_models_dir]
    found = find_folder(name, folders) or served_folder(name, settings)
    if found is not None:
        return found

    looked = ""
    if "/" not in name:
        places = [*also, *folders, Path.cwd()]
        looked = "\n".join(["looked in:", *map(_looked_in, places)])

    known = model_names(folders)
    what = f"{name} was not found{nearest(name, known)}"
    raise NotFoundError(what, looked, meant_step(name, known, f"give a path, or: {step}"))


def _looked_in(place: Path) -> str:
    """A place for people, with what kept us from looking there."""
    try:
        os.stat(place / ".")
    except PermissionError:
        return f"{place} (permission denied)"
    except OSError:
        pass
    return str(place)


def named_archives(argument: str, places: Sequence[Path], step: str) -> List[ArchiveFiles]:
    """The archives that an argument means, a NAME those of all `places` and of the current folder.

    Raises NotFoundError, of which `step` is the next step, when there are none.
    """
    from hfship.archive.files import find_archives

    found = find_archives(archive_word(argument, places), places)
    if not found:
        looked = ""
        if "/" not in argument:
            looked = "looked in " + ", ".join(map(_looked_in, [Path.cwd(), *places]))
        known = archive_names(places)
        what = f"no archive {argument}{nearest(argument, known)}"
        raise NotFoundError(what, looked, meant_step(argument, known, step))

    return found


def archive_names(places: Sequence[Path]) -> List[str]:
    """The models of which archives are in the places and here."""
    from hfship.archive.files import model_of

    return list(dict.fromkeys(model_of(files.name) for files in _archives(places)))


def _archives(places: Sequence[Path]) -> Iterator[ArchiveFiles]:
    from hfship.archive.files import archives_in

    for folder in (Path(), *places):
        with contextlib.suppress(OSError):
            yield from archives_in(folder)


def archive_word(argument: str, places: Sequence[Path]) -> str:
    """The word by which archives are found: NAME for ORG/NAME, and with the capitals that it has
    on disk; other arguments as they are."""
    from hfship.archive.files import find_archives, model_of

    if not _may_be_a_name(argument) or find_archives(argument, places):
        return argument
    org, _, last = argument.casefold().rpartition("/")
    for files in _archives(places):
        name = model_of(files.name)
        is_called_so = last in (name.casefold(), files.name.casefold())
        if is_called_so and (not org or _carries(files, argument)):
            return name
    return argument


def _carries(files: ArchiveFiles, repo: str) -> bool:
    """Whether an archive carries a model of a repository."""
    from hfship.archive.opening import open_archive

    with contextlib.suppress(HfshipError, OSError):
        manifest = open_archive(files).manifest
        return manifest is not None and _is_of(manifest, repo)
    return False


def readable_deployments(
    context: Context, complain: Callable[[str], None] = lambda _: None
) -> List[Deployment]:
    """All deployments but damaged and planted ones, and those that this user may not read.

    What these hold of the machine is seen as all else that runs: their ports are taken, the memory
    of their GPUs is used.
    """
    from hfship.serve.deployments import list_deployments

    try:
        found, wrong = list_deployments(context.settings.deploy_dir, context.reporter)
    except HostError as exc:
        found, wrong = [], {"": exc}

    for problem in wrong.values():
        complain(problem.what)

    return found


# How a deployment is read: serve.deployments.read_deployment (the default, where this is None), or
# look_at_deployment, for commands that only show it.
ReadDeployment = Optional[Callable[[Path, "Reporter"], Optional["Deployment"]]]


def named_deployment(context: Context, name: str, read: ReadDeployment = None) -> Deployment:
    """The deployment that a name means. Raises NotFoundError, UsageError where it means several."""
    found = _deployment_called(context, name, read)
    if found is not None:
        return found

    _refuse_elsewhere(context, name)
    here = _deployment_names(context)
    why = f"in {context.settings.deploy_dir} there are: {', '.join(here) or 'none'}"
    steps = [f"hfship {context.args.command} {other}" for other in here[:10]]
    if not steps:
        steps = [f"hfship serve {name}"]
    what = f"no such deployment: {name}{nearest(name, here)}"
    raise NotFoundError(what, why, "\n".join(steps))


def _refuse_elsewhere(context: Context, name: str) -> None:
    """Name the hosts of a deployment that this machine, as their control host, had placed there.
    Raises NotFoundError."""
    from hfship.site.record import read_record

    hosts = read_record(context.settings.deploy_dir).places.get(name)
    if not hosts:
        return
    command = command_line("hfship", context.args.command, name)
    steps = [f"on {host}: {command}" for host in hosts]
    what = f"{name} is not on this machine: it was placed on {', '.join(hosts)}"
    raise NotFoundError(what, "", "\n".join(steps))


def _deployment_called(
    context: Context, name: str, read: ReadDeployment = None
) -> Optional[Deployment]:
    """The deployment NAME, else the one that has this name in its API. Raises UsageError for a name
    that several have."""
    from hfship.serve.deployments import list_deployments, read_deployment

    deploy_dir = context.settings.deploy_dir
    reads = read or read_deployment
    if _NAME.match(name):
        exact = reads(deploy_dir / name, context.reporter)
        if exact is not None:
            return exact

    found, _ = list_deployments(deploy_dir, context.reporter, reads)
    meant = [deployment for deployment in found if _answers_to(deployment, name)]
    if len(meant) > 1:
        names = [deployment.plan.name for deployment in meant]
        steps = [command_line("hfship", context.args.command, other) for other in names]
        raise UsageError(f"{name} means {' and '.join(names)}", "", "\n".join(steps))
    return meant[0] if meant else None


def _deployment_names(context: Context) -> List[str]:
    """The names of all deployments that can be read."""
    from hfship.serve.deployments import list_deployments

    found, _ = list_deployments(context.settings.deploy_dir, context.reporter)
    return [deployment.plan.name for deployment in found]


def log_folders(context: Context) -> List[Path]:
    """Our own log folder first, then those of --also, then those of others that we may read."""
    from glob import glob

    from hfship.ops.jobs import OTHER_LOGS

    folders = [context.settings.log_dir]
    folders += [home_path(place) for place in getattr(context.args, "also", ())]
    folders += [Path(path) for path in glob(OTHER_LOGS) if os.access(path, os.R_OK | os.X_OK)]
    return list(dict.fromkeys(folder.resolve() for folder in folders))


def job_or_deployment(
    context: Context, name: str, read: ReadDeployment = None
) -> Union[Job, Deployment]:
    """What is called `name`; a job before a deployment. Raises NotFoundError."""
    from hfship.ops.jobs import read_jobs

    jobs: Dict[str, Job] = {}
    for job in read_jobs(log_folders(context), context.reporter.warn):
        jobs.setdefault(job.label, job)

    if name in jobs:
        return jobs[name]
    deployment = _deployment_called(context, name, read)
    if deployment is not None:
        return deployment
    for label, job in jobs.items():
        if label.casefold() == name.casefold():
            return job

    _refuse_elsewhere(context, name)
    here = _deployment_names(context)
    known = [*jobs, *here]
    why = f"in {context.settings.deploy_dir} there are: {', '.join(here) or 'none'}"
    why += f"\njobs: {shorten(list(jobs)) or 'none'}"
    step = "hfship watch --once     # the jobs\nhfship status     # the deployments"
    meant = closest(name, known)
    if meant:
        step = command_line("hfship", context.args.command, meant)
    what = f"no such deployment or job: {name}{nearest(name, known)}"
    raise NotFoundError(what, why, step)
