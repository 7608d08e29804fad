# SPDX-License-Identifier: Apache-2.0
"""The card of a model: what of it is a fact, and the names that SPDX has for its licence."""

from __future__ import annotations

from typing import Any, Dict, Optional

import pytest

from hfship.base.card import (
    LONGEST_FACT,
    MOST_MODELS,
    SPDX,
    Card,
    card_in,
    card_of,
    licence_of,
)

licenses = pytest.importorskip("packaging.licenses")


@pytest.mark.parametrize("name", SPDX)
def test_spdx_has_the_licences_that_it_is_said_to_have(name: str) -> None:
    """Under names that differ from the Hub's in capitals, or in what they say of the version."""
    assert licenses.canonicalize_license_expression(SPDX[name]) == SPDX[name]
    assert SPDX[name].lower().startswith(name)


@pytest.mark.parametrize(
    "told, card, found",
    [
        ("mit", Card("apache-2.0", "x"), "mit"),
        (None, Card("apache-2.0", "x"), "apache-2.0"),
        ("other", Card(license_name="qwen"), "qwen"),
        ("", Card("other", "qwen"), "qwen"),
        ("other", Card("mit"), "other"),
        (None, Card(), ""),
    ],
    ids=str,
)
def test_which_licence_a_policy_is_asked_about(told: Optional[str], card: Card, found: str) -> None:
    assert licence_of(told, card) == found


LONG = "x" * (LONGEST_FACT + 9)
MANY = [str(number) for number in range(MOST_MODELS + 9)]


@pytest.mark.parametrize(
    "facts, card",
    [
        (None, Card()),
        ([], Card()),
        ({"license": "mit", "license_name": "n", "license_link": "l"}, Card("mit", "n", "l")),
        ({"license": ["a", "b", None]}, Card("a, b, ")),
        ({"license": [LONG]}, Card(LONG[:LONGEST_FACT])),
        ({"license": MANY}, Card(", ".join(MANY[:MOST_MODELS]))),
        ({"license": 7, "license_name": True, "license_link": {"a": 1}}, Card("7")),
        ({"license": " a\nb\x1b "}, Card("a | b?")),
        ({"license_name": LONG}, Card("", LONG[:LONGEST_FACT])),
        ({"terms": "accepted", "else": 1}, Card()),
        ({"base_model": "a/b"}, Card(base_model=("a/b",))),
        ({"base_model": ["a/b", 3, None, {}]}, Card(base_model=("a/b", "3"))),
        ({"base_model": ("a/b",)}, Card(base_model=("a/b",))),
        ({"base_model": MANY}, Card(base_model=tuple(MANY[:MOST_MODELS]))),
        ({"base_model": ""}, Card()),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_of_a_card_is_a_fact(facts: Any, card: Card) -> None:
    assert card_of(facts) == card


def test_a_manifest_has_the_facts_that_there_are() -> None:
    assert Card().json() == {}
    card = Card("mit", base_model=("a/b",), terms="accepted")
    assert card.json() == {"license": "mit", "base_model": ("a/b",), "terms": "accepted"}


# front matter -> what is read of it
MATTERS: Dict[str, Any] = {
    "license: mit": Card("mit"),
    "license:   mit  ": Card("mit"),
    "license: mit # or so": Card("mit"),
    "license: a#b": Card("a#b"),
    "license: 'it'": Card("it"),
    'license: "i#t"': Card("i#t"),
    "license: 'it": Card(),
    "license: '": Card(),
    "license: ''": Card(),
    "license: 'it\"": Card(),
    "license:mit": Card(),
    "license: [a, 'b' , ]": Card("a, b"),
    "license: [a": Card(),
    "base_model: []": Card(),
    "base_model: [a/b]\n- c/d": Card(base_model=("a/b", "c/d")),
    "base_model:\n- a/b\n  -   'c/d'  # two\n\n-\n- e": Card(base_model=("a/b", "c/d", "e")),
    "base_model: a/b\n- c/d": Card(base_model=("a/b",)),
    "base_model:\n- a/b\nlicense: mit": Card("mit", base_model=("a/b",)),
    "- x\nlicense: mit": Card("mit"),
    "  license: mit": Card(),
    "li-cense: mit": Card(),
    **{f"license: {mark}x": Card() for mark in "{&*|>!%@`"},
}


@pytest.mark.parametrize("matter", MATTERS)
def test_what_is_read_of_front_matter(matter: str) -> None:
    assert card_in(f"---\n{matter}\n---\n# Model\nlicense_name: no\n") == MATTERS[matter]
    assert card_in(f"\ufeff---  \n{matter}\n ---\n") == MATTERS[matter]


@pytest.mark.parametrize(
    "readme",
    ["", "# Model", "\n---\nlicense: mit\n---", "---\nlicense: mit\n", "--\nlicense: mit\n--"],
)
def test_a_readme_without_front_matter_has_no_card(readme: str) -> None:
    assert card_in(readme) == Card()
