# SPDX-License-Identifier: Apache-2.0
"""Images from a registry to their folders.

Owns the order of the steps: what the tag means, which manifest is for the platform, which blobs are
here; the rest is that of models (hub/fetch): the same plan, readers, journals, repair and records,
with blobs for files. Promises: one GET for each manifest, none for one that is here and is still
what the tag means; a folder with a manifest holds one image, whole and proven.

The texts beside the blobs, and the blobs that were read for the plan, are written from memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from typing import TYPE_CHECKING, Dict, Mapping, Optional, Tuple, Union

from hfship.base.content import PARTIAL_DIR, content_files
from hfship.base.errors import IntegrityError, UsageError, command_line
from hfship.base.files import disk_errors, write_all
from hfship.base.imagefacts import BLOBS, KIND, ImageFacts
from hfship.base.manifest import MANIFEST_PATH, Source, parse_manifest
from hfship.base.reading import LIST_SIZE, parse_json, read_small
from hfship.base.text import counted, printable
from hfship.base.values import dataclass, replace
from hfship.hub.fetch import (
    FetchPlan,
    finish_fetch,
    lock_folder,
    present_files,
    readable_manifest,
)
from hfship.hub.modelpack import (
    IMAGE_CONFIGS,
    disagreement,
    is_archive,
    is_model,
    model_files,
    model_layers,
)
from hfship.hub.protocol import RemoteFile, Snapshot
from hfship.hub.registry_protocol import (
    INDEXES,
    LARGEST_CONFIG,
    Descriptor,
    ImageConfig,
    ImageManifest,
    blob_path,
    choose_platform,
    digest_of,
    layout_texts,
    media_type_of,
    parse_config,
    parse_image_manifest,
    parse_index,
    require_platform,
)
from hfship.hub.verified import FileHasher, VerifiedLog

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.base.manifest import Manifest
    from hfship.hub.registry import FetchedManifest, RegistryClient
    from hfship.hub.registry_protocol import ImageReference

NO_MANIFEST = (ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class RemoteImage:
    """An image as its registry has it now: what the tag means, the manifest for the platform, the
    configuration. `texts` are the contents, by path, that are known before a layer is fetched."""

    reference: ImageReference
    top: Descriptor
    manifest: ImageManifest
    manifest_digest: str
    config: ImageConfig
    texts: Mapping[str, bytes]

    @property
    def layers(self) -> Tuple[Descriptor, ...]:
        """Each blob once: an empty layer stands in an image several times."""
        found: Dict[str, Descriptor] = {}
        for layer in self.manifest.layers:
            found.setdefault(layer.digest, layer)
        each_once = found.values()
        return tuple(each_once)

    @property
    def files(self) -> Tuple[RemoteFile, ...]:
        """The files of the image folder."""
        found = []
        for path, content in self.texts.items():
            digest = digest_of(content)
            size = len(content)
            found.append(RemoteFile(path, size, "", digest[7:]))
        for layer in self.layers:
            found.append(layer.remote)
        return tuple(found)

    @property
    def facts(self) -> ImageFacts:
        """What its manifest says of it."""
        return ImageFacts(
            reference=self.reference.local_reference,
            digest=self.top.digest,
            manifest_digest=self.manifest_digest,
            config_digest=self.manifest.config.digest,
            diff_ids=self.config.diff_ids,
            platform=self.config.platform,
        )


@dataclass(frozen=True)
class RemoteModel:
    """A model in a registry: `source` is the Hub's, where our manifest is among its layers, else
    the registry."""

    reference: ImageReference
    top: Descriptor
    source: Source
    files: Tuple[RemoteFile, ...]


@dataclass(frozen=True)
class LayeredModel:
    """A model in a registry of which layers are archives: `source` is the registry; `files` has for
    each layer, in their order, the path of the file that it is, "" for an archive."""

    reference: ImageReference
    source: Source
    layers: Tuple[Descriptor, ...]
    files: Tuple[str, ...]


@dataclass(frozen=True)
class ImagePlan:
    """What an image needs: the plan of its files, and the image."""

    files: FetchPlan
    image: RemoteImage

    @property
    def moved(self) -> str:
        """The digest that the tag meant when this folder was fetched; "" if it is the same, or
        there was none."""
        held = readable_manifest(self.files.folder)
        if held is None or held.image is None:
            return ""
        digest = held.image.digest
        if digest == self.image.top.digest:
            return ""
        return digest


# -- the plan


class _Here:
    """Manifests that lie in an image folder already; `known` if one was fetched into it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        blobs = folder / BLOBS
        self.known = blobs.is_dir()

    def read(self, digest: str) -> Optional[bytes]:
        """The content of a digest, if it is here and right."""
        with contextlib.suppress(OSError, ValueError):
            content = read_small(self._folder / blob_path(digest), LARGEST_CONFIG)
            if digest_of(content) == digest:
                return content
        return None


def look_up(
    client: RegistryClient, platform: str, folder: Path
) -> Union[RemoteImage, RemoteModel, LayeredModel]:
    """What the registry has. Raises NotFoundError, AuthError, NetworkError, HostError for another
    platform, IntegrityError for what is no image."""
    reference = client.reference
    here = _Here(folder)
    top = _top_manifest(client, here)
    texts: Dict[str, bytes] = {}
    try:
        chosen = top
        kind = _kind_of(top)
        if kind in INDEXES:
            texts[blob_path(top.digest)] = top.body
            entry = choose_platform(parse_index(top.body), platform, reference.name)
            chosen = _manifest_of(client, here, entry.digest)
        manifest = parse_image_manifest(chosen.body)
        texts[blob_path(chosen.digest)] = chosen.body
        if is_model(manifest):
            return _look_up_model(client, manifest, described_of(top))
        _require_image(manifest, reference)
        config_blob = manifest.config
        content = here.read(config_blob.digest)
        if content is None:
            content = client.blob(config_blob.digest, config_blob.size, LARGEST_CONFIG)
        texts[blob_path(config_blob.digest)] = content
        config = parse_config(content)
        if len(config.diff_ids) != len(manifest.layers):
            raise ValueError(
                f"it has {len(manifest.layers)} layers, its configuration {len(config.diff_ids)}"
            )
    except NO_MANIFEST as exc:
        what = f"what {reference.registry} has as {reference.name} cannot be used as an image"
        step = "name another tag, or tell who made it"
        raise IntegrityError(what, printable(str(exc))[:300], step) from exc

    require_platform(config, platform, reference.name)
    described = described_of(top)
    texts.update(layout_texts(reference, described, manifest))
    return RemoteImage(reference, described, manifest, chosen.digest, config, texts)


def described_of(fetched: FetchedManifest) -> Descriptor:
    """A manifest as another one would name it."""
    kind = _kind_of(fetched)
    size = len(fetched.body)
    return Descriptor(kind, fetched.digest, size, {})


def _look_up_model(
    client: RegistryClient, manifest: ImageManifest, top: Descriptor
) -> Union[RemoteModel, LayeredModel]:
    """A model that lies in a registry. Raises ValueError for paths that cannot be, IntegrityError
    where the layers are not what our manifest among them lists."""
    reference = client.reference
    layers = model_layers(manifest)
    source = Source(
        endpoint=client.endpoint,
        repo=reference.repository,
        revision=reference.wanted,
        resolved_repo=reference.repository,
        commit=top.digest[7:],
        repo_type=KIND,
    )
    if any(map(is_archive, manifest.layers)):
        return _layered(reference, source, manifest, layers)
    ours = layers.get(MANIFEST_PATH)
    if ours:
        content = client.blob(ours.digest, ours.size, LIST_SIZE)
        listed = parse_manifest(content, f"the manifest in {reference.name}")
        different = disagreement(layers, listed.files)
        if different:
            what = f"{reference.name} does not hold what its manifest lists"
            raise IntegrityError(what, different, "push it again")
        source = listed.source or source
    client.digests.update({path: layer.digest for path, layer in layers.items()})
    return RemoteModel(reference, top, source, model_files(layers))


def _layered(
    reference: ImageReference,
    source: Source,
    manifest: ImageManifest,
    files: Mapping[str, Descriptor],
) -> LayeredModel:
    """A model of which layers are archives; what else is among its layers, as KitOps' own Kitfile,
    is no file of it."""
    paths = {layer.digest: path for path, layer in files.items()}
    layers: Dict[str, Descriptor] = {}
    for layer in manifest.layers:
        if is_archive(layer) or layer.digest in paths:
            layers.setdefault(layer.digest, layer)
    names = tuple(paths.get(digest, "") for digest in layers)
    return LayeredModel(reference, source, tuple(layers.values()), names)


def _top_manifest(client: RegistryClient, here: _Here) -> FetchedManifest:
    """What the tag means. One that is here is not asked for again if it still is that."""
    from hfship.hub.registry import FetchedManifest

    reference = client.reference
    digest = reference.digest
    if not digest and here.known:
        digest = client.head_digest(reference.tag)
    content = here.read(digest) if digest else None
    if content is None:
        return client.manifest(reference.wanted)
    return FetchedManifest(content, digest, "")


def _manifest_of(client: RegistryClient, here: _Here, digest: str) -> FetchedManifest:
    from hfship.hub.registry import FetchedManifest

    content = here.read(digest)
    if content is None:
        return client.manifest(digest)
    return FetchedManifest(content, digest, "")


def _kind_of(fetched: FetchedManifest) -> str:
    """The media type of an index or manifest. Raises ValueError for anything else."""
    value = parse_json(fetched.body)
    kind = media_type_of(value, fetched.media_type)
    if kind:
        return kind
    said = "nothing that is known"
    if isinstance(value, dict):
        said = value.get("mediaType") or fetched.media_type or said
        if value.get("schemaVersion") == 1:
            said = "a manifest of schema 1, which no engine loads any more"
    raise ValueError(f"it is {said!s:.200}")


def _require_image(manifest: ImageManifest, reference: ImageReference) -> None:
    """Refuse an artifact that no engine can run. Raises UsageError."""
    kind = manifest.config.media_type
    if kind in IMAGE_CONFIGS and not manifest.artifact_type:
        return
    shown = printable(manifest.artifact_type or kind)
    raise UsageError(
        f"{reference.name} is no container image",
        f"it is an artifact of the type {shown}",
        "name an image, like docker://vllm/vllm-openai:v0.11.0",
    )


@dataclass(frozen=True)
class ImageRequest:
    """What the operator asked for: an image for a platform, and the name of its folder."""

    reference: ImageReference
    platform: str
    name: str
    rehash: bool = False  # believe no record: hash what is there


def plan_image(
    client: RegistryClient,
    request: ImageRequest,
    folder: Path,
    locks: contextlib.ExitStack,
    stop: threading.Event,
    dry_run: bool,
) -> Union[ImagePlan, FetchPlan, LayeredModel]:
    """Ask the registry what the image has and look at what is here. Returns its plan, or that of a
    model that lies there; of one in archives, which need a folder of their own, what it is.

    Unless it is a dry run the folder is made, and locked until `locks` is closed. Raises as
    `look_up`, UsageError for a folder of something else, DiskError.
    """
    if not dry_run:
        lock_folder(folder, locks, stop)
    held = readable_manifest(folder)
    reference = request.reference
    if held and held.image and (not held.source or held.source.repo != reference.repository):
        raise UsageError(
            f"{folder} holds something else, {held.source.repo if held.source else held.name}",
            "",
            command_line("hfship", "fetch", reference.url, "--name", "ANOTHER_NAME"),
        )

    image = look_up(client, request.platform, folder)
    if isinstance(image, RemoteModel):
        return _plan_model(client, request, folder, image)
    if isinstance(image, LayeredModel):
        return image
    _tell_of_foreign(image, client)
    source = Source(
        endpoint=client.endpoint,
        repo=reference.repository,
        revision=reference.wanted,
        resolved_repo=reference.repository,
        commit=image.top.digest[7:],
        repo_type=KIND,
    )
    wanted = image.files
    log = VerifiedLog(folder)
    present = present_files(folder, wanted, log, client.reporter, request.rehash)
    plan = FetchPlan(
        name=request.name,
        folder=folder,
        snapshot=Snapshot(source, wanted),
        wanted=wanted,
        present=present,
        log=log,
        outdates=held is not None and held.image != image.facts,
    )
    return ImagePlan(plan, image)


def _plan_model(
    client: RegistryClient, request: ImageRequest, folder: Path, model: RemoteModel
) -> FetchPlan:
    """The plan of a model that lies in a registry; as that of one on the Hub."""
    held = readable_manifest(folder)
    if held and held.source and held.source.resolved_repo != model.source.resolved_repo:
        raise UsageError(
            f"{folder} holds another model, {held.source.resolved_repo}",
            "",
            command_line("hfship", "fetch", model.reference.url, "--name", "ANOTHER_NAME"),
        )
    log = VerifiedLog(folder)
    return FetchPlan(
        name=request.name,
        folder=folder,
        snapshot=Snapshot(model.source, model.files),
        wanted=model.files,
        present=present_files(folder, model.files, log, client.reporter, request.rehash),
        log=log,
        outdates=held is None or held.source != model.source,
        hub_notes=False,
    )


def plan_layers(
    client: RegistryClient, model: LayeredModel, folder: Path, locks: contextlib.ExitStack
) -> FetchPlan:
    """The plan of the layers of a model, as blobs in a folder of their own, which is locked until
    `locks` is closed. Raises DiskError."""
    lock_folder(folder, locks, threading.Event())
    wanted = tuple(layer.remote for layer in model.layers)
    log = VerifiedLog(folder)
    return FetchPlan(
        name=folder.name,
        folder=folder,
        snapshot=Snapshot(model.source, wanted),
        wanted=wanted,
        present=present_files(folder, wanted, log, client.reporter),
        log=log,
        hub_notes=False,
    )


def _tell_of_foreign(image: RemoteImage, client: RegistryClient) -> None:
    """Layers that the maker of an image keeps elsewhere: few registries have them."""
    foreign = [layer for layer in image.layers if layer.urls]
    if not foreign:
        return
    count = counted(len(foreign), "layer")
    client.reporter.warn(
        f"{image.reference.name}: {count} may not be passed on, says who made it"
        f" ({printable(foreign[0].urls[0])[:100]}); asking {image.reference.registry} nevertheless"
    )


# -- the work


def write_known(plan: ImagePlan) -> ImagePlan:
    """Put what the plan knows already into the folder, proven like anything else. Returns the plan
    without it. Raises DiskError."""
    present = dict(plan.files.present)
    for transfer in plan.files.transfers:
        content = plan.image.texts.get(transfer.remote.path)
        if content is None:
            continue
        hasher = FileHasher(transfer.remote)
        hasher.update(content)
        with disk_errors("write", transfer.target):
            fd = transfer.open_work_file(os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                write_all(fd, content)
                os.fsync(fd)
                status = os.fstat(fd)
            finally:
                os.close(fd)
            transfer.publish()
        transfer.record(status, hasher)
        present[transfer.remote.path] = hasher.sha256
    return replace(plan, files=replace(plan.files, present=present))


def finish_image(plan: ImagePlan) -> Manifest:
    """All blobs are proven: write the manifest, and remove what an earlier image left in the
    folder. Raises as `finish_fetch`."""
    manifest = finish_fetch(plan.files, plan.image.facts)
    folder = plan.files.folder
    listed = {entry.path for entry in manifest.files}
    for path, _ in content_files(folder):
        if path in listed or not path.startswith(BLOBS):
            continue
        stale = folder / path
        with disk_errors("remove", stale):
            stale.unlink()
    partial = folder / PARTIAL_DIR  # of layers that the tag no longer has
    shutil.rmtree(partial, ignore_errors=True)
    return manifest
