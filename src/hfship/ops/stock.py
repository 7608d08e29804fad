# SPDX-License-Identifier: Apache-2.0
"""What is here: models, packages, images, deployments, and what the models file wants besides.

Owns how much of a model folder or of an archive is there, as far as that can be seen without
reading their content. The state of a model:

  whole       all files of its manifest are there in full size, and the Hub vouches for them
  partial     the same, but somebody chose to do without some files, or an index names others
  unproven    nobody vouches for it: it has no manifest, or none that came from the Hub
  changed     a file of its manifest is missing, or has another size
  unfinished  a fetch or an unpack into it did not end
  kept        the same as whole, but an earlier version, to which `serve --rollback` goes back
  unreadable  this user may not look, or its manifest is damaged

Promises: a look costs a `stat` for each file, and the tables and the first frame of an archive.
Never: hashes, changes or locks anything. `verify` proves.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from hfship.base.content import content_files, is_kept
from hfship.base.errors import HfshipError, HostError
from hfship.base.manifest import read_manifest, require_finished
from hfship.base.values import asdict, dataclass, field, replace
from hfship.ops.catalogue import model_folders

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.reader import Archive
    from hfship.base.manifest import Manifest
    from hfship.base.report import Reporter
    from hfship.base.settings import ListedModel, ModelsFile
    from hfship.serve.deployments import Deployment
    from hfship.serve.engines import HeldImage

KINDS = ("models", "packages", "images", "deployments", "wanted")
SERVABLE = ("whole", "partial", "unproven")  # states of a model with which one can work on


@dataclass(frozen=True)
class StockedModel:
    """A model folder. `repo`, `commit` and `fetched_at` (UTC) are "" where no manifest of the Hub
    tells; `note` says what is wrong; `licence` is for people, with the terms of a gated model."""

    name: str
    path: str
    state: str
    repo: str = ""
    commit: str = ""
    bytes: int = 0
    files: int = 0
    fetched_at: str = ""
    note: str = ""
    licence: str = ""
    image: str = ""  # the reference of the container image that the folder is, in place of a model


@dataclass(frozen=True)
class StockedPackage:
    """An archive. `name` is that of the model; `parts` is 0 for one whole file; `missing` are the
    names of parts that are not here; `delta_of` is the version, or "?", that a delta needs.

    `state` is whole, incomplete, foreign (of another program) or unreadable.
    """

    name: str
    path: str
    state: str
    commit: str = ""
    bytes: int = 0
    parts: int = 0
    missing: Tuple[str, ...] = ()
    delta_of: str = ""
    note: str = ""
    licence: str = ""


@dataclass(frozen=True)
class StockedImage:
    """An image with vLLM that docker has loaded, or a file that holds one."""

    reference: str
    place: str  # "docker", or the path of the file
    version: str = ""  # of vLLM, where the tag tells it
    device: str = ""  # "gpu" or "cpu"
    id: str = ""  # the digest by which docker knows it; "" of a folder


@dataclass(frozen=True)
class StockedDeployment:
    """A deployment, its state as `status` has it, and its address."""

    name: str
    state: str
    url: str
    note: str = ""


@dataclass(frozen=True)
class WantedModel:
    """A model of the models file that is not here as it should be: `lacks` says what to do first,
    `next_command` has the words for it."""

    name: str
    repo: str
    lacks: str
    next_command: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Stock:
    """All that is here, and by kind why it could not be looked at."""

    models: Tuple[StockedModel, ...] = ()
    packages: Tuple[StockedPackage, ...] = ()
    images: Tuple[StockedImage, ...] = ()
    deployments: Tuple[StockedDeployment, ...] = ()
    wanted: Tuple[WantedModel, ...] = ()
    docker_images: Tuple[HeldImage, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Dict[str, Any]:
        """docs/json.md: list."""
        rows: Dict[str, Any] = {}
        for kind in KINDS:
            rows[kind] = [asdict(item) for item in getattr(self, kind)]
        for row in rows["models"]:
            del row["image"]  # those that are images are among these
        for row in rows["packages"]:
            row["missing"] = list(row["missing"])
        for row in rows["wanted"]:
            row["next_command"] = list(row["next_command"])
        rows["docker_images"] = []
        for image in self.docker_images:
            known_as = [image.id, *image.digests]
            rows["docker_images"].append({"digests": known_as, "layers": list(image.diff_ids)})
        return {**rows, "problems": dict(self.problems)}


# -- models


def stocked_models(folders: Sequence[Path]) -> List[StockedModel]:
    """The models in folders, each by name; what cannot be listed has no models."""
    found: List[StockedModel] = []
    for root in dict.fromkeys(folders):
        try:
            named = [(folder, repo_id) for folder, kind, repo_id in model_folders(root)]
        except OSError:
            continue
        found += [stocked_model(folder, repo_id) for folder, repo_id in named]
    return found


def stocked_model(folder: Path, name: str = "") -> StockedModel:
    """What a look at a model folder tells."""
    name = name or folder.name
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return _without_manifest(folder, name)
        problem = _missing_or_changed(folder, manifest)
    except (HfshipError, OSError) as exc:
        return StockedModel(name, str(folder), "unreadable", note=_words_of(exc))

    state, note = _state_of(manifest)
    if is_kept(folder.name):
        state, note = "kept", f"hfship serve {folder.name.rpartition('~')[0]} --rollback"
    if problem:
        state, note = "changed", problem
    found = StockedModel(
        name,
        str(folder),
        state,
        bytes=manifest.size,
        files=len(manifest.files),
        note=note,
        licence=manifest.licence_text,
    )
    if manifest.image:
        found = replace(found, image=manifest.image.name)
    source = manifest.source
    if source is None:
        return found
    return replace(found, repo=source.repo, commit=source.commit, fetched_at=source.fetched_at)


def _words_of(exc: BaseException) -> str:
    if isinstance(exc, HfshipError):
        return exc.what
    return getattr(exc, "strerror", "") or str(exc)


def _without_manifest(folder: Path, name: str) -> StockedModel:
    try:
        require_finished(folder)
    except HfshipError:
        step = "run the same fetch or unpack again"
        return StockedModel(name, str(folder), "unfinished", note=step)

    files = content_files(folder)
    size = sum(count for _, count in files)
    note = "no manifest"
    return StockedModel(name, str(folder), "unproven", bytes=size, files=len(files), note=note)


def _missing_or_changed(folder: Path, manifest: Manifest) -> str:
    """What differs from the manifest, as far as sizes tell; "" for nothing."""
    for entry in manifest.files:
        try:
            size = os.stat(folder / entry.path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"{entry.path} is missing"
        if size != entry.size:
            return f"{entry.path} has {size} bytes instead of {entry.size}"
    return ""


def _state_of(manifest: Manifest) -> Tuple[str, str]:
    """The state that a manifest tells, and in words what is to be known of it."""
    note = manifest.caveats[len("; ") :]
    if manifest.image:
        return "whole", f"image {manifest.image.name} for {manifest.image.platform}"
    if manifest.partial or manifest.left_out:
        return "partial", note
    if manifest.unproven or manifest.source is None:
        return "unproven", note or "packed from a folder that the Hub does not vouch for"
    return "whole", note


# -- packages


def stocked_packages(folders: Sequence[Path]) -> List[StockedPackage]:
    """The archives in folders; what cannot be listed has none."""
    from hfship.archive.files import archives_in

    found: List[StockedPackage] = []
    for folder in dict.fromkeys(folders):
        try:
            archives = archives_in(folder)
        except OSError:
            continue
        found += [stocked_package(files) for files in archives]
    return found


def stocked_package(files: ArchiveFiles) -> StockedPackage:
    """What a look at an archive tells."""
    from hfship.archive.files import is_delta_name, model_of
    from hfship.archive.opening import open_archive
    from hfship.archive.reader import ForeignArchive

    name = model_of(files.name)
    size = sum(path.stat().st_size for path in files.paths)
    plain = StockedPackage(name, str(files.place), "foreign", bytes=size, parts=len(files.numbers))
    try:
        archive = open_archive(files)
    except ForeignArchive:
        return plain
    except (HfshipError, OSError) as exc:
        return _incomplete(plain, files, exc)

    return _opened(plain, archive, is_delta_name(files.name))


def _opened(plain: StockedPackage, archive: Archive, called_delta: bool) -> StockedPackage:
    """An archive of ours, whose tables or frames could be read."""
    from hfship.archive.damage import MISSING
    from hfship.archive.layout import Delta

    missing: List[str] = []
    for damage in archive.damages:
        if damage.what == MISSING:
            missing += damage.parts

    state, note = "whole", ""
    if missing:
        state = "incomplete"
    elif archive.damages:
        state, note = "unreadable", archive.damages[0].what

    delta_of = ""
    if called_delta or archive.delta != Delta():
        delta_of = archive.delta.base or "?"
    parts = plain.parts
    if parts:
        parts = len(archive.parts)
    found = replace(
        plain, state=state, parts=parts, missing=tuple(missing), delta_of=delta_of, note=note
    )
    manifest = archive.manifest
    if manifest is None:
        return found
    return replace(
        found,
        name=manifest.name,
        commit=_commit_of(manifest),
        licence=manifest.licence_text,
    )


def _commit_of(manifest: Manifest) -> str:
    if manifest.source is None:
        return ""
    return manifest.source.commit


def _incomplete(plain: StockedPackage, files: ArchiveFiles, exc: BaseException) -> StockedPackage:
    """An archive that cannot be opened, with the parts that its sums say are missing."""
    present = {path.name for path in files.paths}
    missing = sorted(set(files.listed()) - present)
    if not missing:
        return replace(plain, state="unreadable", note=_words_of(exc))
    parts = plain.parts + len(missing)
    return replace(plain, state="incomplete", parts=parts, missing=tuple(missing))


# -- images and deployments


def image_folders(found: Sequence[StockedModel]) -> List[StockedImage]:
    """The folders that hold images, as `fetch docker://` makes them."""
    from hfship.serve.images import image_called
    from hfship.serve.vllm_table import version_text

    images = []
    for folder in found:
        if not folder.image:
            continue
        named = image_called(folder.image, "")
        version = version_text(named.version) if named.version else ""
        images.append(StockedImage(folder.image, folder.path, version))
    return images


def stocked_images() -> List[StockedImage]:
    """The vLLM images that docker has loaded. Raises HostError where docker cannot be asked."""
    from hfship.serve.docker import list_images
    from hfship.serve.vllm_table import version_text

    found = []
    for image in list_images(""):
        version = version_text(image.version) if image.version else ""
        device = "cpu" if image.cpu else "gpu"
        found.append(StockedImage(image.reference, "docker", version, device, image.id))
    return found


def images_to_build_upon() -> List[HeldImage]:
    """All images that docker has, whatever is in them; their layers, by diff ID, where it takes an
    image without those that it has. Raises HostError where docker cannot be asked."""
    from hfship.serve.engines import engine_state, images_of_docker

    images = images_of_docker()
    if engine_state("docker").keeps_whole:
        return [replace(image, diff_ids=()) for image in images]
    return list(images)


def stocked_deployments(deploy_dir: Path, reporter: Reporter) -> List[StockedDeployment]:
    """The deployments and their states, each asked at the same time. Raises HostError for a folder
    that cannot be listed."""
    from concurrent.futures import ThreadPoolExecutor

    from hfship.serve.deployments import list_deployments

    found, wrong = list_deployments(deploy_dir, reporter)
    rows: List[StockedDeployment] = []
    if found:
        problem = _docker_problem()
        with ThreadPoolExecutor(len(found)) as pool:
            rows += pool.map(lambda deployment: _stocked(deployment, problem), found)
    for name, error in wrong.items():
        rows.append(StockedDeployment(name, "unknown", "", error.what))
    return sorted(rows, key=lambda row: row.name)


def _docker_problem() -> str:
    from hfship.serve.docker import require_docker

    try:
        require_docker()
    except HostError as exc:
        return exc.what
    return ""


def _stocked(deployment: Deployment, docker_problem: str) -> StockedDeployment:
    from hfship.serve.status import deployment_status

    plan = deployment.plan
    if docker_problem:
        return StockedDeployment(plan.name, "unknown", plan.url, docker_problem)
    try:
        status = deployment_status(deployment)
    except HostError as exc:
        return StockedDeployment(plan.name, "unknown", plan.url, exc.what)
    return StockedDeployment(plan.name, status.state, plan.url, status.note)


# -- what the models file wants


def wanted_models(
    file: Optional[ModelsFile], models: Sequence[StockedModel], packages: Sequence[StockedPackage]
) -> List[WantedModel]:
    """The models of the file that are not here, or not as it says."""
    if file is None:
        return []
    found = []
    for model in file.models:
        wanted = _wanted(model, models, packages)
        if wanted:
            found.append(wanted)
    return found


def _wanted(
    model: ListedModel, models: Sequence[StockedModel], packages: Sequence[StockedPackage]
) -> Optional[WantedModel]:
    here = [one for one in models if model.name in (one.name, Path(one.path).name)]
    if here:
        return _as_it_should_be(model, here)

    archives = [one for one in packages if one.name == model.name]
    if archives:
        return _packed(model, archives)
    if not model.repo:
        return WantedModel(model.name, "", "is not here")
    return WantedModel(model.name, model.repo, "is not here", ("fetch", model.repo))


def _packed(model: ListedModel, archives: Sequence[StockedPackage]) -> WantedModel:
    """A model of which only archives are here."""
    for one in archives:
        if one.state == "whole" and not one.delta_of:
            step = ("unpack", one.path)
            return WantedModel(model.name, model.repo, "is packed, and not unpacked here", step)
    lacks = "has an archive that is not complete"
    return WantedModel(model.name, model.repo, lacks, ("verify", archives[0].path))


def _as_it_should_be(model: ListedModel, here: Sequence[StockedModel]) -> Optional[WantedModel]:
    """None for a model that is here in the revision that the file wants, as far as can be told."""
    good = [one for one in here if one.state in SERVABLE]
    if not good:
        lacks = f"is {here[0].state}"
        step = ("verify", here[0].path)
        if here[0].state == "unfinished" and model.repo:
            step = ("fetch", model.repo)
        return WantedModel(model.name, model.repo, lacks, step)

    revision = str(model.wishes.get("revision", ""))
    is_commit = len(revision) == 40
    if is_commit and not any(one.commit == revision for one in good):
        lacks = f"is here at commit {good[0].commit[:12] or 'unknown'}, wanted is {revision[:12]}"
        return WantedModel(model.name, model.repo, lacks, ("fetch", f"{model.repo}@{revision}"))
    return None


def package_caption(package: StockedPackage) -> str:
    """What is to be said of an archive beside its size: parts, what is missing, whose delta.

    >>> package_caption(StockedPackage("m", "m.tar.zst", "whole", parts=3))
    '3 parts'
    >>> package_caption(StockedPackage("m", "p", "incomplete", parts=3, missing=("m.0002",)))
    '3 parts, missing: m.0002'
    """
    said = list(_captions(package))
    return ", ".join(said)


def _captions(package: StockedPackage) -> Iterator[str]:
    from hfship.base.text import counted, shorten

    if package.parts:
        yield counted(package.parts, "part")
    if package.missing:
        yield f"missing: {shorten(package.missing, 3)}"
    if package.delta_of == "?":
        yield "a delta"
    elif package.delta_of:
        yield f"a delta of {package.delta_of[:7]}"
    if package.note:
        yield package.note
