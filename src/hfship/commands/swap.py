# SPDX-License-Identifier: Apache-2.0
"""`hfship serve NAME --instead-of OTHER`: one model on demand takes the place of another.

Promises: what is wrong with the model that comes is said before the other is touched; what the
other has in its hands is answered first.

One stops and the other starts. vLLM's sleep mode would be quicker, but from 0.8.3 to 0.33 its
routes are there with VLLM_SERVER_DEV_MODE alone, which opens /collective_rpc and more, and no route
outside of /v1 asks for a key: whoever reaches the port could run code there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfship.base.errors import UsageError, command_line
from hfship.base.locks import FolderLock
from hfship.commands.names import named_deployment
from hfship.site.rolling import drained
from hfship.site.store import gateway_folder

if TYPE_CHECKING:
    from hfship.commands.context import Context


def make_room(context: Context) -> None:
    """Stop the deployment of --instead-of, with all its replicas."""
    from hfship.commands.serve_model import find_served_model
    from hfship.serve.docker import inspect_container, require_docker
    from hfship.serve.stop import stop_deployment

    args = context.args
    if args.plan or args.write_only:
        why = "nothing is stopped for what is not started"
        option = "--plan" if args.plan else "--write-only"
        step = command_line("hfship", "serve", *args.names, option)
        raise UsageError("--instead-of is for a start", why, step)
    if args.instead_of in args.names:
        raise UsageError(f"{args.instead_of} cannot take its own place", "", "")
    for name in args.names:
        find_served_model(context, name)
    first = named_deployment(context, args.instead_of)
    require_docker()
    deploy_dir = context.settings.deploy_dir
    names = [first.plan.name]
    for number in range(2, 65):
        name = f"{first.plan.name}.{number}"
        if (deploy_dir / name).is_dir():
            names.append(name)
    for name in names:
        if inspect_container(name) is None:
            continue
        gateway = gateway_folder(deploy_dir)
        context.reporter.info(f"{name}: stops when its requests are answered")
        with FolderLock(deploy_dir), drained(gateway, name, context.reporter):
            stop_deployment(named_deployment(context, name), remove=False)
