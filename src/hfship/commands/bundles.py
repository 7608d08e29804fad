# SPDX-License-Identifier: Apache-2.0
"""Deliveries of a model with its image: `pack --with-image`, and `serve BUNDLE`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Sequence, Tuple

from hfship.archive.bundle import (
    BUNDLE_SUFFIX,
    MODELS_FILE,
    Bundle,
    BundleItem,
    bundle_item,
    bundles_at,
    models_text,
    read_bundle,
    read_me_text,
    write_bundle,
)
from hfship.archive.files import model_of
from hfship.archive.sidecars import READ_ME_FIRST
from hfship.base.errors import HostError, IntegrityError, NotFoundError, UsageError, command_line
from hfship.base.files import atomic_write, disk_errors
from hfship.base.manifest import read_manifest
from hfship.base.reading import parse_json, read_small
from hfship.base.settings import parse_size
from hfship.base.text import shorten
from hfship.base.values import replace

if TYPE_CHECKING:
    from hfship.archive.pack import Packed
    from hfship.base.imagefacts import ImageFacts
    from hfship.base.settings import Settings
    from hfship.commands.context import Context

SMALL_JSON = parse_size("16M")
Images = Dict[Path, Tuple[str, "ImageFacts"]]  # by folder, each with the name in its manifest


# -- pack


def image_folder(wanted: str, model: Path, settings: Settings) -> Path:
    """The folder of the image to pack with a model: the one that is `wanted`, by reference, name or
    path, or the newest that was fetched and has the model's class.

    Raises NotFoundError, with the command that fetches one.
    """
    found = _image_folders(settings.models_dir)
    if not wanted:
        return _newest(found, model)

    name = wanted.partition("docker://")[2] or wanted
    for folder, (own_name, image) in found.items():
        if name in (image.name, image.reference, own_name, str(folder)):
            return folder
    path = Path(wanted)
    manifest_there = read_manifest(path) if path.is_dir() else None
    if manifest_there and manifest_there.image:
        return path
    fetch = command_line("hfship", "fetch", f"docker://{name}")
    raise NotFoundError(f"the image {name} is not here", _here(found), fetch)


def _image_folders(root: Path) -> Images:
    """The folders of images that were fetched."""
    found = {}
    for path in sorted(root.glob("*/oci-layout")):
        folder = path.parent
        manifest = read_manifest(folder)
        if manifest and manifest.image:
            found[folder] = (manifest.name, manifest.image)
    return found


def _here(found: Images) -> str:
    names = [image.name for _, image in found.values()]
    if not names:
        return "no image was fetched"
    return f"here are: {shorten(names)}"


def _newest(found: Images, model: Path) -> Path:
    """The image that `serve` would choose. Raises NotFoundError."""
    from hfship.serve.images import choose_image, image_called

    folders = {}
    for folder, (_, image) in found.items():
        if "vllm" in image.name:
            folders[image.name] = folder
    images = [image_called(name, "") for name in folders]
    device = "gpu"
    if images and all(one.cpu for one in images):
        device = "cpu"
    try:
        chosen = choose_image(images, None, device, _architecture(model))
    except HostError as exc:
        step = "hfship fetch docker://vllm/vllm-openai:vX.Y.Z, then the same command again"
        raise NotFoundError("no image of vLLM is here to pack", _here(found), step) from exc
    return folders[chosen.reference]


def _architecture(model: Path) -> str:
    """The class of a model, as its config.json says; "" where it does not."""
    try:
        config = parse_json(read_small(model / "config.json", SMALL_JSON))
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ""


def has_image(targets: Sequence[Path], settings: Settings) -> bool:
    """Whether an image is packed already, in a folder of archives: by the name of its archive, as
    opening them would take long."""
    from hfship.archive.files import archives_in

    names = {name for name, _ in _image_folders(settings.models_dir).values()}
    for target in targets:
        if bundles_at(target):
            return True
        for files in archives_in(target):
            if model_of(files.name) in names:
                return True
    return False


def finish_bundles(
    pairs: Sequence[Tuple[Packed, Packed]], targets: Sequence[Path], context: Context
) -> List[Path]:
    """Write what makes deliveries of (model, image) that were packed; the files that describe them.

    Raises DiskError.
    """
    if not pairs:
        return []
    bundles = []
    for model, image in pairs:
        items = (_item(image), _item(model))
        bundles.append(Bundle(model.manifest.name, items))

    text = models_text(bundles)
    if context.file and context.file.path.suffix == ".toml":
        with disk_errors("read", context.file.path):
            text = read_small(context.file.path, SMALL_JSON).decode()
    paths = []
    for target in targets:
        for bundle in bundles:
            paths.append(write_bundle(target, bundle))
        atomic_write(target / MODELS_FILE, text)
        atomic_write(target / "READ-ME-FIRST.txt", read_me_text(bundles) + READ_ME_FIRST)
    return paths[: len(bundles)]


def _item(packed: Packed) -> BundleItem:
    first = packed.parts[0]
    archive = first.path.name
    if not archive.endswith(".zst"):
        archive, _, _ = archive.rpartition(".")
    return bundle_item(packed.manifest, archive, packed.size)


# -- serve


def is_bundle(word: str) -> bool:
    """Whether a word means a delivery: its file, or a folder that holds one and no model."""
    if word.endswith(BUNDLE_SUFFIX):
        return True
    place = Path(word)
    if "/" not in word and word != ".":
        return False
    return not (place / "config.json").exists() and bool(bundles_at(place))


def unpacked_bundle(
    context: Context, word: str, load: Callable[[Path], None], unpack: Callable[[Path], Path]
) -> List[Tuple[Context, str]]:
    """Bring a delivery into place: images by `load`, models by `unpack`, which gives their folder.

    Returns the models to serve, each with the options that name its image. Raises NotFoundError,
    IntegrityError for archives of another version than the delivery's.
    """
    found = []
    for path in bundles_at(Path(word)):
        bundle = read_bundle(path)
        _require_archives(path, bundle)
        image = ""
        for item in bundle.images:
            load(path.parent / item.archive)
            image = item.reference
        for item in bundle.models:
            folder = unpack(path.parent / item.archive)
            found.append((_with_image(context, image), str(folder)))
    if not found:
        raise NotFoundError(f"{word} holds no model to serve", "", f"hfship verify {word}")
    return found


def _require_archives(path: Path, bundle: Bundle) -> None:
    """Refuse a delivery of which archives are missing, or were replaced by other versions."""
    from hfship.archive.files import archives_in
    from hfship.archive.opening import open_archive
    from hfship.archive.versions import version_of

    there = {files.name: files for files in archives_in(path.parent)}
    missing = [item.archive for item in bundle.items if item.archive not in there]
    if missing:
        step = "bring them beside it, then the same command again"
        raise NotFoundError(f"{path} is not complete", f"missing: {shorten(missing)}", step)
    for item in bundle.items:
        manifest = open_archive(there[item.archive]).manifest
        if manifest and version_of(manifest).id != item.version:
            what = f"{item.archive} is another version than {path.name} says"
            why = f"it holds {version_of(manifest).short}, the delivery has {item.version[:7]}"
            step = f"hfship unpack {item.archive}, then hfship serve {model_of(item.archive)}"
            raise IntegrityError(what, why, step)


def _with_image(context: Context, image: str) -> Context:
    """The options of serve with an image, unless one was asked for."""
    if not image or context.asked.get("image"):
        return context
    values = dict(vars(context.args))
    values["image"] = image
    asked = dict(context.asked)
    asked["image"] = image
    args = argparse.Namespace(**values)
    return replace(context, args=args, asked=asked)


def require_no_plan(args: argparse.Namespace, word: str) -> Optional[UsageError]:
    """--plan and --name mean one model that is there; the error that says so, or None."""
    if args.plan:
        step = f"hfship serve {word} --write-only, or unpack it first"
        return UsageError(f"{word} is not unpacked yet, so it cannot be planned", "", step)
    return None
