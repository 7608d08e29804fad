# SPDX-License-Identifier: Apache-2.0
"""`hfship unpack` of an image: it goes into an engine.

Where the site has scanners, the image is unpacked into a folder of its own first, which they see,
and only what they let pass is loaded.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union

from hfship.base.errors import UsageError
from hfship.base.files import disk_errors
from hfship.base.text import counted, human_bytes, human_seconds
from hfship.base.values import dataclass, replace
from hfship.commands.record import Recorder

if TYPE_CHECKING:
    from hfship.archive.unpack_foreign import ForeignModel
    from hfship.base.report import Reporter
    from hfship.commands.restore import OpenedArchive, Restore
    from hfship.serve.image_load import Loaded

SCAN_FOLDER = ".hfship-scan"  # among the models; goes when the scanners are done


@dataclass(frozen=True)
class LoadResult:
    """An image that an engine has, and is proven to have."""

    done: Loaded

    def text(self) -> str:
        """`docker has vllm/vllm-openai:v1, sha256:0123...: 30 layers proven by diff ID; ...`"""
        done = self.done
        facts = done.facts
        layers = counted(len(facts.diff_ids), "layer")
        how = "was there already"
        if done.sent:
            how = f"{human_bytes(done.sent)} sent in {human_seconds(done.seconds)}"
            if done.layers_sent < len(facts.diff_ids):
                how += f", {counted(done.layers_sent, 'layer')} of them new"
        proof = f"{layers} proven by diff ID"
        if not done.held.diff_ids:
            proof = "proven by its digest"
        moved = ""
        if done.before and done.before.id != done.held.id:
            moved = f"; {done.before.id[:19]} -> {done.held.id[:19]}"
        digest = facts.digest[:19]
        return f"{done.engine.name} has {facts.name}, {digest}: {proof}; {how}{moved}"

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "unpack", of an image."""
        done = self.done
        facts = done.facts
        return {
            "name": done.manifest.name,
            "kind": "image",
            "engine": done.engine.name,
            "reference": facts.name,
            "image_id": done.held.id,
            "image_id_before": done.before.id if done.before else None,
            "digest": facts.digest,
            "state": "loaded" if done.sent else "already there",
            "layers": len(facts.diff_ids),
            "layers_sent": done.layers_sent,
            "bytes": done.manifest.size,
            "bytes_sent": done.sent,
            "seconds": round(done.seconds, 2),
        }


def image_in(opened: Union[ForeignModel, List[OpenedArchive]]) -> Optional[OpenedArchive]:
    """The newest of archives that carry an image; None for those of a model."""
    if not isinstance(opened, list):
        return None
    for one in opened:
        manifest = one.archive.manifest
        if manifest is None or manifest.image is None:
            return None
    return max(opened, key=_preference)


def _preference(one: OpenedArchive) -> Tuple[str, bool]:
    """Of the image that was fetched last, a whole archive before a delta."""
    found = one.found
    is_whole = not found.is_delta
    return found.version.fetched_at, is_whole


def load_image(opened: OpenedArchive, how: Restore, engine: str, reporter: Reporter) -> LoadResult:
    """Load the image of an archive, once the scanners of the site let it pass. Raises as
    load_archive and scan_image."""
    from hfship.archive.unpack import remove_archive
    from hfship.serve.image_load import LoadOptions, load_archive

    manifest = opened.archive.manifest
    assert manifest is not None and manifest.image is not None
    files = opened.archive.files
    if opened.signed:
        reporter.info(f"{files.name}: signed by {opened.signed.signer}")
    if how.policy.scan:
        scan_image(opened, how, reporter)
    options = LoadOptions(
        engine,
        how.options.base,
        how.options.force,
        how.options.jobs,
    )
    loaded = load_archive(opened.archive, manifest.image, options, reporter)
    if loaded.sent:
        held = {"engine": engine, "image_id": loaded.held.id}
        Recorder(how.policy, reporter).note_beside(files, "loaded", manifest, held)
    if how.options.consume:
        remove_archive(files)
    return LoadResult(loaded)


def scan_image(opened: OpenedArchive, how: Restore, reporter: Reporter) -> None:
    """Have the scanners of the site look at the files of an image, which are unpacked for that, and
    note what they said. Raises IntegrityError where one refuses it, UsageError for what comes
    through a pipe, and as restore_opened."""
    from hfship.archive.files import STDIN
    from hfship.archive.unpack import require_manifest
    from hfship.commands.restore import NamedModel, restore_opened

    recorder = Recorder(how.policy, reporter)
    files = opened.archive.files
    if files.name == STDIN:
        what = "an image that comes through a pipe cannot be scanned"
        raise UsageError(what, "[policy] scan", "put it into a file, and unpack that")
    place = how.out / SCAN_FOLDER
    options = replace(how.options, consume=False, name="")
    aside = replace(how, out=place, options=options, policy=replace(how.policy, scan=()))
    reporter.info(f"{files.name}: unpacked into {place} for the scanners")
    try:
        model = NamedModel(opened.found.name, (files,))
        folder = restore_opened(model, [opened], aside, reporter).done.folder
        scans = recorder.scan(folder)
    finally:
        with disk_errors("remove", place):
            shutil.rmtree(place, ignore_errors=True)

    manifest = require_manifest(opened.archive)
    for one in scans:
        recorder.note_beside(files, "scanned", manifest, one.details())
