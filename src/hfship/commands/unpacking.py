# SPDX-License-Identifier: Apache-2.0
"""What unpacking the archives that are named and taking all of a medium have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional, Union

from hfship.archive.versions import version_of
from hfship.base.errors import command_line
from hfship.base.text import counted, human_bytes, human_seconds
from hfship.base.values import dataclass
from hfship.commands.admission import code_rows, site_policy
from hfship.commands.names import word_for

if TYPE_CHECKING:
    import argparse

    from hfship.archive.unpack import Unpacked
    from hfship.archive.unpack_foreign import ForeignModel
    from hfship.archive.versions import Version
    from hfship.base.report import Result
    from hfship.commands.context import Context
    from hfship.commands.restore import NamedModel, OpenedArchive, Restore


@dataclass(frozen=True)
class UnpackResult:
    """A model that was unpacked, or was there already, and the version that was there before."""

    done: Unpacked
    before: Optional[Version] = None

    def text(self) -> str:
        """Where it is, how much it is, and what is not proven of it."""
        done = self.done
        manifest = done.manifest
        count = counted(len(manifest.files), "file")
        size = human_bytes(manifest.size)
        how = "were there already and are intact"
        if done.written:
            how = f"in {human_seconds(done.seconds)}"
        version = version_text(version_of(manifest), self.before)
        return f"unpacked {done.folder}: {count}, {size} {how}{version}{manifest.caveats}"

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "unpack"."""
        done = self.done
        manifest = done.manifest
        return {
            "name": manifest.name,
            "path": str(done.folder),
            "state": "unpacked" if done.written else "already there",
            "files": len(manifest.files),
            "written": done.written,
            "bytes": manifest.size,
            "commit": version_of(manifest).commit or None,
            "commit_before": self.before.commit or None if self.before else None,
            "seconds": round(done.seconds, 2),
            "unproven": manifest.unproven,
            "left_out": manifest.left_out,
            "license": manifest.licence,
            "code_files": code_rows(manifest),
        }


def version_text(version: Version, before: Optional[Version]) -> str:
    """`; commit A -> B`, or which one it is; "" for a version without commit that was not another
    one before."""
    if before and before.id != version.id:
        return f"; {before.label} -> {version.short}"
    if version.commit:
        return f"; {version.label}"
    return ""


def restore_of(context: Context) -> Restore:
    """How the options of `unpack` ask for it."""
    from hfship.archive.unpack import UnpackOptions
    from hfship.commands.restore import Restore

    args = context.args
    options = UnpackOptions(
        name=args.name or "",
        only=tuple(args.only),
        base=args.base,
        consume=args.consume,
        force=args.force,
        keep=versions_to_keep(args),
        jobs=args.jobs,
    )
    return Restore(
        out=args.output or context.settings.site_models_dir,
        options=options,
        key=args.key,
        wait=args.wait,
        allow_older=args.allow_older,
        policy=site_policy(context),
    )


def versions_to_keep(args: argparse.Namespace) -> int:
    """How many earlier versions stay: of an update one, else none, if nobody says otherwise."""
    if args.keep is not None:
        kept: int = args.keep
        return kept
    return int(args.all)


def unpack_opened(
    model: NamedModel,
    opened: Union[ForeignModel, List[OpenedArchive]],
    how: Restore,
    context: Context,
) -> Result:
    """Restore a model of which the archives are open, or load the image that they carry."""
    from hfship.archive.folder_check import require_whole_folder
    from hfship.commands.restore import restore_opened
    from hfship.commands.unpack_image import image_in, load_image

    args, settings, reporter = context.args, context.settings, context.reporter
    into_engine = args.engine or not args.output
    image = image_in(opened)
    if image and into_engine:
        return load_image(image, how, args.engine or "docker", reporter)
    restored = restore_opened(model, opened, how, reporter)
    if not args.only and not args.force:
        insist = command_line("hfship", "unpack", "--force", *args.archives)
        step = f"it is unpacked as it was packed: bring a whole one, or keep it: {insist}"
        require_whole_folder(restored.done.folder, restored.done.manifest, step)
    if not args.only and not image:
        folders = [settings.site_models_dir, settings.models_dir]
        reporter.then("serve", word_for(restored.done.folder, folders))
    return UnpackResult(restored.done, restored.before)
