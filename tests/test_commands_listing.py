# SPDX-License-Identifier: Apache-2.0
"""`list` for people, and what commands without a name could take, from a stock made by hand.

tests/golden/texts holds the tables; HFSHIP_GOLDEN=write makes them anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from conftest import ROOT
from hfship.base.settings import load_settings
from hfship.base.values import replace
from hfship.commands import listing
from hfship.commands.listing import Choice, StockText, choices_for, choices_text
from hfship.ops.stock import KINDS, Stock, StockedDeployment, StockedImage, WantedModel
from support.samples import Samples

SETTINGS = replace(
    load_settings({}),
    **{
        name: Path("/", name)
        for name in ("models_dir", "site_models_dir", "package_dir", "transfer_dir", "deploy_dir")
    },
)


def made(kind: Any, **fields: Any) -> Any:
    """A value with these fields, and all others empty."""
    return replace(Samples(False).value(kind), **fields)


def stock_of_all() -> Stock:
    from hfship.ops.stock import StockedModel, StockedPackage

    models = [
        made(
            StockedModel,
            name=name,
            path=f"/{place}/{name}",
            state=state,
            commit="0123456789abcdef" * 2 if name != "b" else "",
            bytes=16_000_000_000,
            files=9,
            fetched_at="2026-01-31T04:05:06Z" if place == "models_dir" else "",
            note="left alone" if state != "whole" else "",
            licence="mit" if name != "b" else "",
        )
        for name, place, state in (
            ("a", "models_dir", "whole"),
            ("b", "models_dir", "changed"),
            ("c", "site_models_dir", "whole"),
        )
    ]
    packages = [
        made(
            StockedPackage,
            name="a",
            path="/package_dir/a.tar.zst",
            state="whole",
            commit="0123456789abcdef" * 2,
            bytes=11_000_000_000,
            parts=3,
            licence="mit",
        ),
        made(StockedPackage, name="b", path="/package_dir/b.tar.zst", state="incomplete", bytes=7),
        made(StockedPackage, name="d", path="/usb/d.tar.zst.0001", state="missing", parts=2),
    ]
    return Stock(
        models=tuple(models),
        packages=tuple(packages),
        images=(
            made(StockedImage, reference="vllm:1", version="0.27.1", device="gpu", place="docker"),
        ),
        deployments=(StockedDeployment("a", "healthy", "http://x", "up"),),
        wanted=(
            WantedModel("e", "o/e", "not here", ("fetch", "o/e")),
            WantedModel("f", "o/f", "another commit", ()),
        ),
    )


ALL = stock_of_all()
CASES: Dict[str, StockText] = {
    "list": StockText(ALL, KINDS, SETTINGS, True),
    "list-licences": StockText(ALL, KINDS, SETTINGS, True, True),
    "list-models": StockText(ALL, ["models"], SETTINGS, False),
    "list-empty": StockText(Stock(), KINDS, SETTINGS, True),
    "list-problems": StockText(
        replace(ALL, problems={"images": "docker is down", "deployments": "no right"}),
        KINDS,
        SETTINGS,
        False,
    ),
    "list-no-docker": StockText(
        Stock(problems={"images": "docker is down"}), ["images"], SETTINGS, False
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_tables_of_list(name: str) -> None:
    said = "\n\n----\n".join(CASES[name].text(width) for width in (200, 60)) + "\n"
    path = ROOT / "tests" / "golden" / "texts" / f"{name}.txt"
    if os.environ.get("HFSHIP_GOLDEN") == "write":
        path.write_text(said, encoding="utf-8")
    assert said == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pack", ["a", "c"]),
        ("serve", ["a", "c"]),
        ("verify", ["a", "d", "b", "/models_dir/a", "/models_dir/b", "/site_models_dir/c"]),
        ("unpack", ["a", "d", "b"]),
        ("push", ["d", "b", "a"]),
        ("stop", ["m", "runs"]),
        ("restart", ["m"]),
        ("logs", ["m", "runs", "ended"]),
        ("fetch", None),
    ],
)
def test_what_a_command_without_a_name_could_take(
    command: str, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: List[Any] = []

    def stocked_packages(places: Any) -> List[Any]:
        looked.append([place.name for place in places])
        return list(reversed(ALL.packages))

    deployment = SimpleNamespace(plan=SimpleNamespace(name="m", url="http://m"))
    jobs = [
        SimpleNamespace(label="runs", state="running"),
        SimpleNamespace(label="ended", state="done"),
    ]
    monkeypatch.setattr("hfship.commands.listing.stocked_models", lambda _: list(ALL.models))
    monkeypatch.setattr("hfship.commands.listing.stocked_packages", stocked_packages)
    monkeypatch.setattr("hfship.commands.names.readable_deployments", lambda _: [deployment])
    monkeypatch.setattr("hfship.commands.names.log_folders", lambda _: [])
    monkeypatch.setattr("hfship.ops.jobs.read_jobs", lambda _: jobs)
    context: Any = SimpleNamespace(settings=SETTINGS)
    found = choices_for(command, context)
    assert (found and [choice.word for choice in found]) == words
    if looked:
        first = "package_dir" if command == "push" else "transfer_dir"
        assert looked[0][0] == first and set(looked[0]) == {"package_dir", "transfer_dir"}


def test_a_model_that_is_packed_alone_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.commands.listing.stocked_models", lambda _: [])
    monkeypatch.setattr("hfship.commands.listing.stocked_packages", lambda _: list(ALL.packages))
    context: Any = SimpleNamespace(settings=SETTINGS)
    assert choices_for("serve", context) == [
        Choice("a", ("11.0 GB", "packed", "/package_dir/a.tar.zst"))
    ]


def test_choices_are_shown_a_line_each() -> None:
    few = [Choice("a", ("1 B", "whole")), Choice("long", ("2 B",))]
    assert choices_text(few).split() == ["a", "1", "B", "whole", "long", "2", "B"]
    many = [Choice(f"m{number}", ()) for number in range(listing.MOST_SHOWN + 2)]
    lines = choices_text(many).splitlines()
    assert lines[-1] == "and 2 more: hfship list" and len(lines) == listing.MOST_SHOWN + 1
    assert "more" not in choices_text(many[: listing.MOST_SHOWN])
    assert choices_text([]) == ""
