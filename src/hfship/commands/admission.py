# SPDX-License-Identifier: Apache-2.0
"""What the policy of a site says of a model, where models pass: fetch, pack, verify, unpack, serve.

Owns the order: what names, sizes and the licence tell, before a byte is moved; then what is in the
files. Images of containers are what docker runs: for them there is `require`, and scanners.

Promises: a refused model is told by file and rule, and gets no manifest here; what another
side declared is told, and saves no look.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from hfship.base.errors import HfshipError, IntegrityError
from hfship.base.manifest import Declared
from hfship.base.policy import read_policy
from hfship.base.text import shorten
from hfship.base.values import replace

if TYPE_CHECKING:
    from hfship.base.card import Card
    from hfship.base.code_files import CodeFile, Decision
    from hfship.base.manifest import FileEntry, Manifest
    from hfship.base.policy import Policy
    from hfship.base.report import Reporter
    from hfship.commands.context import Context
    from hfship.hub.fetch import FetchPlan
    from hfship.serve.terms import ServeOptions


def site_policy(context: Context) -> Policy:
    """The policy of this run. Raises UsageError."""
    file = context.file
    return read_policy(os.environ, file)


def require_listed(manifest: Manifest, policy: Policy, what: str) -> None:
    """Refuse a model for its licence, or for files that names and sizes tell; `what` is done with
    it. Raises IntegrityError.

    A pickle of which only the name is known is refused where no pickle may cross.
    """
    from hfship.base.code_files import look_at_list

    if manifest.image:
        return
    require_licence(manifest.licence, policy, what)
    found = look_at_list(_decidable(manifest.files, policy), policy)
    if policy.pickle != "refuse":
        # What they import is not known yet.
        found = [file for file in found if file.kind != "pickle"]
    _require_accepted(found, manifest, policy, what)


def accepted_plans(
    plans: Sequence[FetchPlan], policy: Policy
) -> Tuple[List[FetchPlan], List[HfshipError]]:
    """The plans that the policy takes, by licence, names and sizes, and why it refuses others.
    Raises the error of a single one."""
    from hfship.base.manifest import FileEntry, make_manifest

    accepted: List[FetchPlan] = []
    refused: List[HfshipError] = []
    for plan in plans:
        source = plan.snapshot.source
        entries = [FileEntry(file.path, file.size, file.sha256 or "") for file in plan.wanted]
        listed = replace(make_manifest(plan.name, entries, source), card=plan.snapshot.card)
        try:
            require_listed(listed, policy, source.resolved_repo)
        except IntegrityError as exc:
            if len(plans) == 1:
                raise
            refused.append(exc)
        else:
            accepted.append(plan)
    return accepted, refused


def _decidable(entries: Sequence[FileEntry], policy: Policy) -> List[FileEntry]:
    """The files of which an exception can be told: small ones have no SHA-256 before they came."""
    if not policy.exceptions:
        return list(entries)
    return [entry for entry in entries if entry.sha256]


def require_licence(licence: str, policy: Policy, what: str) -> None:
    """Refuse a model for its licence. Raises IntegrityError."""
    refused = policy.licence_refusal(licence)
    if not refused:
        return
    step = "choose another model, or have the licence added to licences of [policy]"
    raise IntegrityError(f"{what}: the policy of this site refuses its licence", refused, step)


def _require_accepted(
    found: Sequence[CodeFile], manifest: Manifest, policy: Policy, what: str
) -> List[Decision]:
    """The decisions on files, of which none is refused. Raises IntegrityError."""
    from hfship.base.code_files import decide, names_of, refusal

    names = names_of(manifest)
    decisions = [decide(file, policy, names) for file in found]
    if any(one.outcome == "refused" for one in decisions):
        raise refusal(decisions, names, what)
    return decisions


def look_again(
    folder: Path,
    manifest: Manifest,
    policy: Policy,
    reporter: Reporter,
    called: Optional[Path] = None,
) -> List[Decision]:
    """What the policy says of the files of a folder, after a look into them; what is reported is
    said, of the folder as it is `called`. Raises IntegrityError for what it refuses, DiskError."""
    from hfship.base.code_files import look_at_folder

    if manifest.image:
        return []
    called = called or folder
    require_licence(manifest.licence, policy, str(called))
    found = look_at_folder(folder, manifest, policy)
    decisions = _require_accepted(found, manifest, policy, str(called))
    tell(called, decisions, reporter)
    return decisions


def require_servable(
    folder: Path,
    manifest: Optional[Manifest],
    options: ServeOptions,
    policy: Policy,
    reporter: Reporter,
) -> None:
    """Refuse to serve what the policy refuses, or to run code of a model where it may not. Raises
    IntegrityError, DiskError."""
    if options.trust_remote_code and policy.remote_code == "refuse":
        what = f"{folder} is not served with --trust-remote-code"
        why = '[policy] remote_code = "refuse"'
        step = "leave that option out, or have remote_code of [policy] changed"
        raise IntegrityError(what, why, step)
    if manifest is None:
        manifest = unlisted_manifest(folder)
    look_again(folder, manifest, policy, reporter)


def unlisted_manifest(folder: Path) -> Manifest:
    """What stands for the manifest of a folder that has none: its files, without SHA-256, which
    only an exception of the policy would need. Raises UsageError for a name that is none."""
    from hfship.base.content import content_files
    from hfship.base.manifest import FileEntry, make_manifest

    entries = [FileEntry(path, size, "") for path, size in content_files(folder)]
    return make_manifest("unlisted", entries)


def tell(folder: Path, decisions: Sequence[Decision], reporter: Reporter) -> None:
    """Say which files can run code; pickles that import what weights need are no warning."""
    weights: List[str] = []
    others: List[str] = []
    for one in decisions:
        text = one.file.text()
        if one.reason:
            others.append(f"{text}; allowed: {one.reason}")
        elif one.outcome == "reported" and one.file.says == "weights only":
            weights.append(one.file.path)
        elif one.outcome == "reported":
            others.append(text)
    if others:
        reporter.warn(f"{folder}: can run code: {shorten(others, 5)}")
    if weights:
        reporter.info(f"{folder}: pickles, by their opcodes weights only: {shorten(weights, 3)}")


def admit(folder: Path, manifest: Manifest, policy: Policy, reporter: Reporter) -> Manifest:
    """The manifest of a model that is new here, with what its card says and what is declared of its
    files. Raises as `look_again`."""
    manifest = replace(manifest, card=completed_card(folder, manifest))
    decisions = look_again(folder, manifest, policy, reporter)
    return replace(manifest, declared=tuple(_declared(one) for one in decisions))


def _declared(decision: Decision) -> Declared:
    file = decision.file
    return Declared(
        path=file.path,
        kind=file.kind,
        says=file.says,
        outcome=decision.outcome,
        rule=decision.rule,
        reason=decision.reason,
    )


def completed_card(folder: Path, manifest: Manifest) -> Card:
    """The card of a model, with what only its README.md says. Raises DiskError."""
    from hfship.base.card import LARGEST_CARD, card_in
    from hfship.base.files import disk_errors
    from hfship.base.reading import read_small

    entries = {entry.path: entry for entry in manifest.files}
    readme = entries.get("README.md")
    if readme is None or readme.size > LARGEST_CARD:
        return manifest.card
    with disk_errors("read", folder / readme.path):
        text = read_small(folder / readme.path, LARGEST_CARD).decode("utf-8", "replace")
    told = card_in(text)
    if manifest.source and manifest.source.license:
        told = replace(told, license="")
    return replace(told, **manifest.card.json())


def tell_declared(manifest: Manifest, reporter: Reporter) -> None:
    """Say what the sender of an archive declared of its files: nothing here looked into them."""
    rows = [f"{one.path} ({one.kind}: {one.says}; {one.outcome})" for one in manifest.declared]
    if rows:
        text = f"{manifest.name}: can run code, as declared by the sender: {shorten(rows, 5)}"
        reporter.info(text)


def code_rows(manifest: Optional[Manifest]) -> List[Dict[str, Any]]:
    """What is declared of files, for --json."""
    if manifest is None:
        return []
    return [one.json() for one in manifest.declared]
