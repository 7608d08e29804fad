# SPDX-License-Identifier: Apache-2.0
"""Words of a command line in a unit of systemd, and the files that a schedule becomes."""

from __future__ import annotations

import pytest

from hfship.site.settings import Schedule
from hfship.site.timers import timer_texts, unit_word

# A word, and how ExecStart= has it (systemd.service(5), "Command lines").
WORDS = [
    ("/usr/bin/hfship", "/usr/bin/hfship"),
    ("--models=/etc/a_b-1.toml:@", "--models=/etc/a_b-1.toml:@"),
    ("50%", "50%%"),
    ("$HOME", '"$$HOME"'),
    ("a b", '"a b"'),
    ('say "a"', r'"say \"a\""'),
    ("back\\slash", r'"back\\slash"'),
    ('\\"', r'"\\\""'),
    ("it's", '"it\'s"'),
    (";", '";"'),
    ("", '""'),
]


@pytest.mark.parametrize("word, line", WORDS)
def test_a_word_is_itself_to_systemd(word: str, line: str) -> None:
    assert unit_word(word) == line


def test_a_schedule_is_a_service_and_a_timer_with_one_number() -> None:
    schedules = [Schedule("22:00", "night", "day"), Schedule("06:00", "day", "night")]
    texts = timer_texts(schedules, ["python3", "/opt/my files/hfship.pyz"], "/etc/100%.toml")
    assert list(texts) == [
        "hfship-swap-1.service",
        "hfship-swap-1.timer",
        "hfship-swap-2.service",
        "hfship-swap-2.timer",
    ]
    (line,) = [one for one in texts["hfship-swap-1.service"].splitlines() if "Exec" in one]
    assert line == (
        'ExecStart=python3 "/opt/my files/hfship.pyz" serve --models /etc/100%%.toml night'
        " --instead-of day"
    )
    assert "OnCalendar=06:00\n" in texts["hfship-swap-2.timer"]
    assert timer_texts([], ["hfship"], "/m.toml") == {}
