# SPDX-License-Identifier: Apache-2.0
"""The card of a model: its licence, and the models that it was made from.

Owns what is kept of a card, from the Hub's answer ("cardData") or from the front matter of
README.md (hub-docs, modelcard.md: YAML between two lines of "---"), and the names that SPDX has for
the licences of the Hub.

Promises: of the front matter only plain keys and lists at the left margin are read, as cards have
them; anything else, and YAML that is broken, is no fact. Never: raises for what a card says.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Mapping, Optional, Tuple

from hfship.base.text import printable
from hfship.base.values import dataclass

LONGEST_FACT = 300  # characters of a fact
MOST_MODELS = 50  # that a model says it was made from
LARGEST_CARD = 4 << 20  # bytes of a README.md
FACTS = ("license", "license_name", "license_link", "base_model")
_KEY = re.compile(r"([A-Za-z_]+):(?:\s+(.*?))?\s*\Z")
_ITEM = re.compile(r"\s*-\s+(.*?)\s*\Z")

# The Hub's names (hub-docs, repositories-licenses.md) -> SPDX (licenses 3.25); others have none.
_SAME_NAMES = """
    Apache-2.0 MIT BSD-2-Clause BSD-3-Clause BSD-3-Clause-Clear ECL-2.0 AFL-3.0 Artistic-2.0
    BSL-1.0 C-UDA-1.0 CC0-1.0 CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0 CC-BY-SA-3.0 CC-BY-SA-4.0
    CC-BY-NC-2.0 CC-BY-NC-3.0 CC-BY-NC-4.0 CC-BY-ND-4.0 CC-BY-NC-ND-3.0 CC-BY-NC-ND-4.0
    CC-BY-NC-SA-2.0 CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0 CDLA-Permissive-1.0 CDLA-Permissive-2.0
    CDLA-Sharing-1.0 EPL-1.0 EPL-2.0 EUPL-1.1 EUPL-1.2 ISC LPPL-1.3c MPL-2.0 MS-PL NCSA OFL-1.1
    ODbL-1.0 ODC-By-1.0 OSL-3.0 PDDL-1.0 PostgreSQL Unlicense WTFPL Zlib 0BSD
"""
SPDX: Mapping[str, str] = {
    **{name.lower(): name for name in _SAME_NAMES.split()},
    "agpl-3.0": "AGPL-3.0-only",
    "gpl-2.0": "GPL-2.0-only",
    "gpl-3.0": "GPL-3.0-only",
    "lgpl-2.1": "LGPL-2.1-only",
    "lgpl-3.0": "LGPL-3.0-only",
    "gfdl": "GFDL-1.3-only",
    "c-uda": "C-UDA-1.0",
    "odc-by": "ODC-By-1.0",
    "pddl": "PDDL-1.0",
}


@dataclass(frozen=True)
class Card:
    """What the card of a model says; "" and () for what it does not. `terms` is "accepted" where
    access was granted to a gated repository."""

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    base_model: Tuple[str, ...] = ()
    terms: str = ""

    def json(self) -> Dict[str, Any]:
        """The facts that are there, as they lie in a manifest."""
        facts: Dict[str, Any] = {}
        for name, value in vars(self).items():
            if value:
                facts[name] = value
        return facts


def licence_of(license_: Optional[str], card: Card) -> str:
    """The name of a licence that a policy is asked about; "" where none is known. "other" of the
    Hub stands for the name that the card gives.

    >>> licence_of("other", Card(license_name="qwen-research")), licence_of(None, Card())
    ('qwen-research', '')
    """
    found = license_ or card.license
    if found == "other" and card.license_name:
        return card.license_name
    return found


def card_of(facts: Any) -> Card:
    """The card in the values of a card, of any form.

    >>> card_of({"license": "MIT", "base_model": ["a/b", 3]}).base_model
    ('a/b', '3')
    """
    if not isinstance(facts, dict):
        return Card()
    texts = {name: _text(facts.get(name)) for name in FACTS[:3]}
    models = facts.get("base_model") or ()
    if not isinstance(models, (list, tuple)):
        models = [models]
    named = [_text(model) for model in models[:MOST_MODELS]]
    return Card(**texts, base_model=tuple(name for name in named if name))


def _text(value: Any) -> str:
    """A fact; "" for one that is none. Of several licences all are named."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(one) for one in value[:MOST_MODELS])[:LONGEST_FACT]
    if value is None or isinstance(value, (dict, bool)):
        return ""
    return printable(str(value)).strip()[:LONGEST_FACT]


def card_in(readme: str) -> Card:
    """The card in the front matter of a README.md.

    >>> card_in("---\\nlicense: mit\\nbase_model:\\n- a/b\\n- 'c/d'  # two\\n---\\n# Hi").base_model
    ('a/b', 'c/d')
    >>> card_in("---\\nlicense: [broken\\n")
    Card(license='', license_name='', license_link='', base_model=(), terms='')
    """
    lines = readme.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return Card()

    facts: Dict[str, Any] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return card_of(facts)
        key = _read_line(line, key, facts)
    return Card()  # it has no end: no YAML


def _read_line(line: str, key: str, facts: Dict[str, Any]) -> str:
    """Take a line of front matter; the key to which items that follow belong."""
    found = _KEY.match(line)
    if found:
        key = found[1]
        if found[2]:
            facts[key] = _value(found[2])
        return key

    item = _ITEM.match(line)
    if not item or not isinstance(facts.setdefault(key, []), list):
        return key
    facts[key].append(_value(item[1]))
    return key


def _value(text: str) -> Any:
    """A plain value or a list in brackets; None for what is neither."""
    text = re.sub(r"(^|\s)#.*", "", text).strip()
    if text.startswith("["):
        if not text.endswith("]"):
            return None
        items: List[Any] = [_value(item) for item in text[1:-1].split(",") if item.strip()]
        return items
    quote = text[:1]
    if quote in ("'", '"'):
        if len(text) < 2 or text[-1] != quote:
            return None
        return text[1:-1]
    if quote in ("{", "&", "*", "|", ">", "!", "%", "@", "`"):
        return None
    return text
