# SPDX-License-Identifier: Apache-2.0
"""[[schedule]] as timers of systemd: when one model on demand takes the place of another.

Pure. hfship has no daemon for that: systemd calls `hfship serve MODEL --instead-of OTHER`.
"""

from __future__ import annotations

import re
from typing import Dict, Sequence

from hfship.site.settings import Schedule

_UNIT = "hfship-swap"


def unit_word(argument: str) -> str:
    """A word of a command line as ExecStart has it (systemd.service(5)): quoted, with % and $ as
    themselves.

    >>> unit_word("/opt/my models/50%.pyz")
    '"/opt/my models/50%%.pyz"'
    """
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"')
    escaped = escaped.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[A-Za-z0-9_./:=@%-]+", escaped):
        return escaped
    return f'"{escaped}"'


def timer_texts(
    schedules: Sequence[Schedule], argv: Sequence[str], models_file: str
) -> Dict[str, str]:
    """The units of all schedules, by file name. `argv` is how hfship is called.

    >>> units = timer_texts([Schedule("22:00", "night", "day")], ["/usr/bin/hfship"], "/m.toml")
    >>> sorted(units)
    ['hfship-swap-1.service', 'hfship-swap-1.timer']
    """
    texts = {}
    for number, schedule in enumerate(schedules, 1):
        swap = [*argv, "serve", "--models", models_file, schedule.model]
        swap += ["--instead-of", schedule.instead_of]
        line = " ".join(unit_word(word) for word in swap)
        about = f"hfship: {schedule.model} instead of {schedule.instead_of}"
        texts[f"{_UNIT}-{number}.service"] = (
            f"[Unit]\nDescription={about}\nAfter=docker.service\n\n"
            f"[Service]\nType=oneshot\nExecStart={line}\n"
        )
        texts[f"{_UNIT}-{number}.timer"] = (
            f"[Unit]\nDescription={about}\n\n"
            f"[Timer]\nOnCalendar={schedule.at}\nPersistent=true\n\n"
            "[Install]\nWantedBy=timers.target\n"
        )

    return texts
