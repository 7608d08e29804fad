# SPDX-License-Identifier: Apache-2.0
"""`--install` of `watch` and `mirror`: ask, and install a unit of systemd, or print it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hfship.base.errors import Exit, HostError
from hfship.base.settings import home_path
from hfship.commands.results import says_yes

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.ops.service import Service


def install_or_print(context: Context, service: Service, by_hand: str = "") -> Exit:
    """Install a service for this user when somebody says yes, or --yes does; else print how it is
    done by hand: `by_hand`, or the same unit. Raises DiskError, HostError."""
    from hfship.ops.service import (
        install_for_user,
        install_text,
        systemd_answers,
        user_unit_path,
    )

    args, reporter, home = context.args, context.reporter, home_path("~")
    text = by_hand or install_text(service, home)
    path = user_unit_path(service, home)
    answers = (args.yes or _somebody_is_there(context)) and systemd_answers()
    if args.yes and not answers:
        what = "systemd runs no units for this user here"
        step = f"hfship {args.command} --install     # prints a unit and a line for cron"
        raise HostError(what, "systemctl --user does not answer", step)

    wanted = args.yes
    if answers and not wanted:
        reporter.show(service.unit())
        wanted = says_yes(f"install this as {path}, and enable it?", reporter)
    if not wanted:
        reporter.show(text)
        return Exit.OK

    install_for_user(service, home, reporter)
    reporter.result(f"installed and enabled {path}")
    reporter.info(f"to remove it: systemctl --user disable --now {service.name} && rm {path}")
    return Exit.OK


def _somebody_is_there(context: Context) -> bool:
    """Is there a terminal to ask on, and does the text not go into a file?"""
    if not sys.stdin or not sys.stdin.isatty():
        return False
    out = context.reporter.out
    return out.isatty()
