# SPDX-License-Identifier: Apache-2.0
"""`hfship list`, and what a command without a name says there is for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from hfship.base.errors import Exit, HostError, UsageError, as_typed, command_line, nearest
from hfship.base.text import human_bytes, narrow_table, table
from hfship.base.values import dataclass
from hfship.commands.image_details import image_shown
from hfship.commands.options import hosts_arguments, means_hosts
from hfship.ops.stock import (
    KINDS,
    SERVABLE,
    Stock,
    image_folders,
    images_to_build_upon,
    package_caption,
    stocked_deployments,
    stocked_images,
    stocked_models,
    stocked_packages,
    wanted_models,
)

if TYPE_CHECKING:
    from hfship.base.settings import Settings
    from hfship.commands.context import Context
    from hfship.ops.stock import StockedImage, StockedModel, StockedPackage

MOST_SHOWN = 12  # of what a command could take
_SHORT_COMMIT = 7
_INDENT = "  "


def list_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship list`."""
    add = parser.add_argument
    kinds = f"only these: {', '.join(KINDS)} (default: all); or one image that was fetched"
    add("kinds", nargs="*", metavar="KIND|IMAGE", help=kinds)
    wants = "also what this file wants and is not here (default: HFSHIP_MODELS_FILE)"
    add("--models", dest="models_file", metavar="FILE", help=wants)
    hosts_arguments(parser, "say what is there")


def cmd_list(context: Context) -> Exit:
    """Say what is here, on whichever side this is."""
    if means_hosts(context.args):
        from hfship.commands.hosts import list_hosts

        return list_hosts(context)
    kinds = context.args.kinds or KINDS
    for kind in kinds:
        if kind in KINDS:
            continue
        details = image_shown(kind, context)
        if details:
            context.reporter.result_of(details.text(), details.json())
            return Exit.OK
        what = f"list knows no {kind}{nearest(kind, KINDS)}"
        raise UsageError(what, f"it knows {', '.join(KINDS)}", "hfship list")
    with context.reporter.clock("looking"):
        stock = look(context, kinds)
    reporter = context.reporter
    shown = StockText(
        stock, kinds, context.settings, context.file is not None, reporter.verbosity > 0
    )
    reporter.result_of(shown.text(reporter.width), stock.json())
    return Exit.OK


def look(context: Context, kinds: Sequence[str]) -> Stock:
    """What is here of some kinds; a kind that cannot be looked at has a problem instead."""
    settings = context.settings
    found: Dict[str, Any] = {}
    problems: Dict[str, str] = {}
    folders = stocked_models([settings.models_dir, settings.site_models_dir])
    models = [folder for folder in folders if not folder.image]
    packages = stocked_packages([settings.package_dir, settings.transfer_dir])
    images = image_folders(folders)
    ways: Mapping[str, Callable[[], Any]] = {
        "models": lambda: models,
        "packages": lambda: packages,
        "images": lambda: [*images, *stocked_images()],
        "deployments": lambda: stocked_deployments(settings.deploy_dir, context.reporter),
        "wanted": lambda: wanted_models(context.file, models, packages),
    }
    for kind in kinds:
        try:
            found[kind] = tuple(ways[kind]())
        except HostError as exc:
            problems[kind] = exc.what
            if kind == "images":
                found[kind] = tuple(images)
    if "images" in kinds and "images" not in problems and context.args.json:
        found["docker_images"] = tuple(images_to_build_upon())
    return Stock(**found, problems=problems)


# -- in words


@dataclass(frozen=True)
class StockText:
    """What is here for people: a table for each kind and folder, and what to type next."""

    stock: Stock
    kinds: Sequence[str]
    settings: Settings
    has_file: bool
    with_licences: bool = False  # of models and packages

    def text(self, width: int) -> str:
        """All of it, at most `width` wide where that can be."""
        sections = {
            "models": self._models,
            "packages": self._packages,
            "images": self._images,
            "deployments": self._deployments,
            "wanted": self._wanted,
        }
        said: List[str] = []
        for kind in self.kinds:
            said += sections[kind](width)
        step = self._next()
        if step:
            said.append(f"next  {as_typed(step)}")
        return "\n\n".join(said)

    def _models(self, width: int) -> List[str]:
        columns = self._with_licence(
            "name",
            "commit",
            "size",
            "files",
            "state",
            "fetched",
            "note",
        )
        places = (self.settings.models_dir, self.settings.site_models_dir)
        rows = [(_place_of(model.path, places), _model_cells(model)) for model in self.stock.models]
        return _sections("models", rows, columns, ("files", "fetched"), places, width)

    def _with_licence(self, *columns: str) -> Sequence[str]:
        """The columns, before the note the licence where it is asked for."""
        if not self.with_licences:
            return columns
        at = columns.index("note")
        return (*columns[:at], "licence", *columns[at:])

    def _packages(self, width: int) -> List[str]:
        columns = self._with_licence("name", "commit", "size", "state", "note", "file")
        places = (self.settings.package_dir, self.settings.transfer_dir)
        rows = [
            (_place_of(package.path, places), _package_cells(package))
            for package in self.stock.packages
        ]
        return _sections("packages", rows, columns, ("file",), places, width)

    def _images(self, width: int) -> List[str]:
        said: List[str] = []
        problem = self.stock.problems.get("images")
        if problem:
            said.append(f"images: {problem}")
        elif not self.stock.images:
            said.append("images: docker has none with vLLM")
        if self.stock.images:
            rows = [_image_cells(image) for image in self.stock.images]
            text = _indented(rows, ("image", "vLLM", "for", "in"), (), width)
            said.append(f"images\n{text}")
        return said

    def _deployments(self, width: int) -> List[str]:
        folder = self.settings.deploy_dir
        problem = self.stock.problems.get("deployments")
        if problem:
            return [f"deployments: {problem}"]
        if not self.stock.deployments:
            return [f"deployments: none in {folder}"]
        columns = ("name", "state", "address", "note")
        rows = [
            {
                "name": one.name,
                "state": one.state,
                "address": one.url,
                "note": one.note,
            }
            for one in self.stock.deployments
        ]
        return [f"deployments in {folder}\n" + _indented(rows, columns, (), width)]

    def _wanted(self, _width: int) -> List[str]:
        if not self.has_file:
            return []
        if not self.stock.wanted:
            return ["wanted by the models file: all is here"]
        lines = []
        for one in self.stock.wanted:
            step = as_typed(command_line("hfship", *one.next_command))
            if not one.next_command:
                step = ""
            lines.append([f"  {one.name}", one.lacks, step])
        return ["wanted by the models file\n" + table(lines)]

    def _next(self) -> str:
        """What comes first where nothing is here yet."""
        stock = self.stock
        if stock.models or stock.packages or not {"models", "packages"} <= set(self.kinds):
            return ""
        transfer = self.settings.transfer_dir
        return f"hfship fetch ORG/NAME, where the Hub is; or put NAME.tar.zst into {transfer}"


def _place_of(path: str, places: Sequence[Path]) -> Path:
    """The folder among `places` in which something lies, at whatever depth."""
    for place in places:
        if place == Path(path) or place in Path(path).parents:
            return place
    return Path(path).parent


def _sections(
    kind: str,
    rows: Sequence[Tuple[Path, Mapping[str, str]]],
    columns: Sequence[str],
    optional: Sequence[str],
    places: Sequence[Path],
    width: int,
) -> List[str]:
    """A table for each place that has something of a kind; one line where none has."""
    if not rows:
        looked = ", ".join(dict.fromkeys(map(str, places)))
        return [f"{kind}: none in {looked}"]
    by_place: Dict[Path, List[Mapping[str, str]]] = {}
    for place, row in rows:
        by_place.setdefault(place, []).append(row)

    found: List[str] = []
    for place, cells in by_place.items():
        text = _indented(cells, columns, optional, width)
        found.append(f"{kind} in {place}\n{text}")
    return found


def _indented(
    rows: Sequence[Mapping[str, str]], columns: Sequence[str], optional: Sequence[str], width: int
) -> str:
    """A table, indented; without columns in which nothing stands."""
    used = []
    for column in columns:
        cells = {row[column] for row in rows}
        if cells - {"", "-"}:
            used.append(column)

    gone = [column for column in optional if column in used]
    room = width - len(_INDENT)
    text = narrow_table(rows, used, gone, room)
    return indent(text, _INDENT)


def _model_cells(model: StockedModel) -> Dict[str, str]:
    fetched = model.fetched_at[:16].replace("T", " ")
    return {
        "name": model.name,
        "commit": model.commit[:_SHORT_COMMIT] or "-",
        "size": human_bytes(model.bytes),
        "files": str(model.files),
        "state": model.state,
        "fetched": f"{fetched}Z" if fetched else "-",
        "licence": model.licence or "-",
        "note": model.note,
    }


def _image_cells(image: StockedImage) -> Dict[str, str]:
    return {
        "image": image.reference,
        "vLLM": image.version or "?",
        "for": image.device,
        "in": image.place,
    }


def _package_cells(package: StockedPackage) -> Dict[str, str]:
    return {
        "name": package.name,
        "commit": package.commit[:_SHORT_COMMIT] or "-",
        "size": human_bytes(package.bytes),
        "state": package.state,
        "licence": package.licence or "-",
        "note": package_caption(package),
        "file": Path(package.path).name,
    }


# -- what a command without a name could take


@dataclass(frozen=True)
class Choice:
    """What a command can be given: the word for it, and what is to be known of it."""

    word: str
    about: Tuple[str, ...]


def choices_for(command: str, context: Context) -> Optional[List[Choice]]:
    """What is here that a command can be given; None for one that takes what is elsewhere."""
    ways: Mapping[str, Callable[[Context], List[Choice]]] = {
        "pack": _models_to_pack,
        "serve": _models_to_serve,
        "verify": _all_to_verify,
        "unpack": _archives_to_unpack,
        "push": _archives_to_push,
        "stop": _running,
        "restart": _deployments,
        "logs": _logged,
    }
    way = ways.get(command)
    if way is None:
        return None
    return way(context)


def _model_choices(models: Sequence[StockedModel]) -> List[Choice]:
    found = []
    for model in models:
        about = (human_bytes(model.bytes), model.state, model.path)
        choice = Choice(model.name, about)
        found.append(choice)
    return found


def _archive_choices(packages: Sequence[StockedPackage]) -> List[Choice]:
    found = []
    for package in packages:
        about = (
            human_bytes(package.bytes),
            package.state,
            package.path,
            package_caption(package),
        )
        found.append(Choice(package.name, about))
    return found


def _models_to_pack(context: Context) -> List[Choice]:
    settings = context.settings
    places = [settings.models_dir, settings.site_models_dir]
    models = stocked_models(places)
    usable = [model for model in models if model.state in SERVABLE]
    return _model_choices(usable)


def _models_to_serve(context: Context) -> List[Choice]:
    settings = context.settings
    models = stocked_models([settings.site_models_dir, settings.models_dir])
    found = [model for model in models if model.state in SERVABLE and not model.image]
    names = [model.name for model in found]
    packed = stocked_packages([settings.transfer_dir, settings.package_dir])
    more = [one for one in packed if one.state == "whole" and one.name not in names]
    choices = [
        Choice(package.name, (human_bytes(package.bytes), "packed", package.path))
        for package in more
    ]
    return _model_choices(found) + choices


def _all_to_verify(context: Context) -> List[Choice]:
    settings = context.settings
    models = stocked_models([settings.site_models_dir, settings.models_dir])
    return _archives_to_unpack(context) + [
        Choice(model.path, (human_bytes(model.bytes), model.state, "")) for model in models
    ]


def _archives_to_unpack(context: Context) -> List[Choice]:
    settings = context.settings
    found = stocked_packages([settings.transfer_dir, settings.package_dir])
    found.sort(key=lambda package: package.state != "whole")
    return _archive_choices(found)


def _archives_to_push(context: Context) -> List[Choice]:
    settings = context.settings
    found = stocked_packages([settings.package_dir, settings.transfer_dir])
    return [
        Choice(package.name, (human_bytes(package.bytes), package.state, package.path))
        for package in found
    ]


def _deployments(context: Context) -> List[Choice]:
    from hfship.commands.names import readable_deployments

    found = readable_deployments(context)
    return [Choice(one.plan.name, ("deployment", one.plan.url)) for one in found]


def _jobs(context: Context) -> List[Choice]:
    from hfship.commands.names import log_folders
    from hfship.ops.jobs import read_jobs

    folders = log_folders(context)
    jobs = read_jobs(folders)
    return [Choice(job.label, ("job", job.state)) for job in jobs]


def _running(context: Context) -> List[Choice]:
    found = _deployments(context)
    for job in _jobs(context):
        if "running" in job.about:
            found.append(job)
    return found


def _logged(context: Context) -> List[Choice]:
    return _deployments(context) + _jobs(context)


def choices_text(choices: Sequence[Choice]) -> str:
    """What there is, a line each."""
    shown = choices[:MOST_SHOWN]
    lines = [[choice.word, *choice.about] for choice in shown]
    columns = max(map(len, lines), default=0)
    for line in lines:
        empty = columns - len(line)
        line.extend([""] * empty)

    text = table(lines)
    more = len(choices) - len(shown)
    if more:
        text += f"\nand {more} more: hfship list"
    return text
