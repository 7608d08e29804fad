# SPDX-License-Identifier: Apache-2.0
"""`hfship status --site` and `watch --site`: a site on one screen, once or until nobody looks."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from hfship.base.errors import Exit, UsageError
from hfship.base.progress import PLAIN_INTERVAL_S
from hfship.base.pyz import own_file
from hfship.base.text import harmless_json, utc
from hfship.serve.deployments import list_deployments
from hfship.site.overview import SiteView, read_site
from hfship.site.store import gateway_folder
from hfship.site.terms import PAGE_ROUTE

if TYPE_CHECKING:
    from hfship.commands.context import Context

SCREEN_INTERVAL_S = 2.0


def look_at_site(context: Context) -> SiteView:
    """The site as it is now. Raises NotFoundError, HostError, IntegrityError."""
    deploy_dir = context.settings.deploy_dir
    deployments, _ = list_deployments(deploy_dir, context.reporter)
    return read_site(deploy_dir, {one.plan.name: one.plan for one in deployments})


def show_site(context: Context) -> Exit:
    """Show the site; the exit code is 0 when each model is served by a replica that is no standby,
    3 where something is to be looked at, 9 where a model is served by none."""
    view = look_at_site(context)
    context.reporter.result_of(view.text(context.reporter.width), view.json())
    return exit_of_site(view)


def exit_of_site(view: SiteView) -> Exit:
    """How a site is, as an exit code."""
    if view.gateway != "up" or any("503" in trouble for trouble in view.troubles):
        return Exit.HOST
    if view.troubles or view.alerts:
        return Exit.INCOMPLETE
    return Exit.OK


def watch_site(context: Context) -> Exit:
    """Show the site until q or Ctrl-C: on a terminal one screen, else a view each interval, which
    is a line with --json."""
    args, reporter = context.args, context.reporter
    if args.once or (args.json and not args.interval):
        return show_site(context)
    with contextlib.suppress(KeyboardInterrupt):
        if reporter.out.isatty() and not args.json:
            _on_screen(context, args.interval or SCREEN_INTERVAL_S)
        else:
            _in_lines(context, args.interval or PLAIN_INTERVAL_S)
    return Exit.OK


def _in_lines(context: Context, interval_s: float) -> None:
    reporter = context.reporter
    while True:
        view = look_at_site(context)
        if context.args.json:
            reporter.show(harmless_json(json.dumps(view.json(), ensure_ascii=False)) + "\n")
        else:
            reporter.show(f"{utc()} {view.text(reporter.width)}\n")
        time.sleep(interval_s)


def _on_screen(context: Context, interval_s: float) -> None:
    from hfship.ops.watch import frame_text, full_screen

    reporter = context.reporter
    with full_screen(reporter) as key:
        while True:
            view = look_at_site(context)
            size = os.get_terminal_size(reporter.out.fileno())
            width, height = size.columns or 80, size.lines or 80
            keys = f"{utc()}   q quits"
            lines = view.text(width).splitlines()
            reporter.show(frame_text(lines, keys, width, height))
            if "q" in key(interval_s):
                return


def serve_page(context: Context) -> Exit:
    """Serve the site as a page behind the gateway until interrupted, or have that done at boot.
    Raises UsageError, NotFoundError, HostError."""
    from hfship.commands.mirror import serve_until_interrupted
    from hfship.ops.site_page import PageServer

    args, reporter = context.args, context.reporter
    if not args.site:
        raise UsageError("--page needs --site", "", "hfship watch --site --page")
    if args.install:
        return _install_page(context)
    look_at_site(context)  # what is wrong is said here, not on the page
    folder = gateway_folder(context.settings.deploy_dir)
    with PageServer(folder, partial(look_at_site, context), reporter) as server:
        said = f"the page is at {PAGE_ROUTE} of the gateway, for keys of: hfship key add NAME --ops"
        reporter.info(said)
        serve_until_interrupted(server, is_background=False)
    return Exit.OK


def _install_page(context: Context) -> Exit:
    from hfship.commands.installing import install_or_print
    from hfship.ops.service import Service

    argv = ["/usr/bin/env", f"HFSHIP_DEPLOY_DIR={context.settings.deploy_dir}"]
    argv += [sys.executable, str(own_file()), "watch", "--site", "--page"]
    about = "The page of this site, behind the gateway"
    service = Service("hfship-page", about, tuple(argv), stays=True)
    return install_or_print(context, service)
