# SPDX-License-Identifier: Apache-2.0
"""`hfship unpack --all`: a site takes all that is new on a medium.

Promises: what is taken, and what is not, is decided before the first byte is written, and said; one
that cannot be taken does not keep the others from it. Each is proven and put in place by itself: so
a killed run is gone on with by the same command, and what was in place stays until told.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple, Union

from hfship.archive.kept import drop_beyond, kept_versions
from hfship.archive.update import BRING, HERE, Here, Offer, UpdateStep, plan_update
from hfship.base.errors import Exit, HfshipError
from hfship.base.text import shorten
from hfship.base.values import dataclass
from hfship.commands.restore import models_named, open_model, version_in
from hfship.commands.results import each_of, print_results
from hfship.commands.unpack_image import image_in
from hfship.commands.unpacking import restore_of, unpack_opened
from hfship.ops.stock import SERVABLE, stocked_model

if TYPE_CHECKING:
    from hfship.archive.unpack_foreign import ForeignModel
    from hfship.base.report import Reporter, Result
    from hfship.commands.context import Context
    from hfship.commands.restore import NamedModel, OpenedArchive, Restore

_STATES = {HERE: "already there", BRING: "new"}


@dataclass(frozen=True)
class LeftAlone:
    """What is not unpacked, since it is here or older; with --dry-run also what is new."""

    step: UpdateStep

    def text(self) -> str:
        """`m: commit 0000000 -> 1111111`"""
        return self.step.text()

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "unpack", --all."""
        step = self.step
        return {
            "name": step.offer.name,
            "kind": "image" if step.offer.is_image else "model",
            "state": _STATES.get(step.action, "older"),
            "commit": step.after.commit or None if step.after else None,
            "commit_before": step.before.commit or None if step.before else None,
        }


@dataclass(frozen=True)
class _Opened:
    """What a medium has under a name; `failure` is why it cannot be read."""

    model: NamedModel
    opened: Union[ForeignModel, List[OpenedArchive], None]
    failure: Optional[HfshipError] = None

    def offer(self) -> Offer:
        """What the planner has to know of it."""
        if not isinstance(self.opened, list):
            return Offer(self.model.name)
        found = tuple(one.found for one in self.opened)
        return Offer(found[0].name, found, image_in(self.opened) is not None)


def take_all(context: Context) -> Exit:
    """Unpack all that is new in the folders that are named, or in the transfer folder."""
    args, settings, reporter = context.args, context.settings, context.reporter
    words = args.archives or [str(settings.transfer_dir)]
    how = restore_of(context)
    opened: Dict[str, _Opened] = {}
    with reporter.clock("looking at what is new"):
        for model in models_named(words, [settings.transfer_dir, settings.package_dir]):
            one = _open(model, how, reporter)
            opened[one.offer().name] = one
        offers = [one.offer() for one in opened.values()]
        here = {offer.name: _here(how.out / offer.name) for offer in offers if not offer.is_image}
    steps = plan_update(offers, here, args.allow_older)
    if args.dry_run:
        print_results(context, [LeftAlone(step) for step in steps])
        return Exit.OK

    works: List[Tuple[str, Callable[[], Result]]] = []
    for step in steps:
        work = partial(_take, step, opened[step.offer.name], how, context)
        works.append((step.offer.name, work))
    code = each_of(context, works)
    _say_what_is_next(words, context)
    return code


def _open(model: NamedModel, how: Restore, reporter: Reporter) -> _Opened:
    try:
        return _Opened(model, open_model(model, how, reporter))
    except HfshipError as exc:
        return _Opened(model, None, exc)


def _here(folder: Path) -> Here:
    """What is here of a model: by a look, which reads no content."""
    present = version_in(folder)
    kept = tuple(one.version for one in kept_versions(folder))
    is_whole = present is not None and stocked_model(folder).state in SERVABLE
    return Here(present, is_whole, kept)


def _take(step: UpdateStep, one: _Opened, how: Restore, context: Context) -> Result:
    """Do a step. Raises as unpack does."""
    reporter = context.reporter
    if one.failure:
        raise one.failure
    if step.action != BRING:
        if context.args.keep is not None:
            gone = drop_beyond(how.out / step.offer.name, context.args.keep)
            if gone:
                reporter.info(f"removed, as --keep says: {shorten([path.name for path in gone])}")
        return LeftAlone(step)
    assert one.opened is not None
    reporter.info(step.text())
    return unpack_opened(one.model, one.opened, how, context)


def _say_what_is_next(words: List[str], context: Context) -> None:
    """The models file of the site serves all of it, where one came along."""
    from hfship.archive.bundle import MODELS_FILE

    for word in words:
        file = Path(word, MODELS_FILE)
        if file.is_file():
            context.reporter.then_elsewhere("hfship", "serve", "--models", str(file))
