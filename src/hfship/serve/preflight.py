# SPDX-License-Identifier: Apache-2.0
"""The preflight: the image's own vLLM checks a plan before weights are loaded.

One short container without network and rights runs in_image.py on the model's folder: vLLM parses
the very arguments of the plan, makes its configuration, loads tokenizer and chat template. What it
derives replaces our estimate. It takes as long as vLLM's imports do, some 10 s, so that a check
that passed is remembered, and a new one goes on beside what takes long anyway (as
commands/serve_model says).

serve/image_notes remembers the checks of an image: "checks": {KEY: {"version", "max_model_len",
"kv_bytes", "at"}}. KEY is made of all that the check depends on: arguments, variables, GPUs, and
which files the model has.

Promises: what cannot be checked is no refusal. No secret is on a command line or on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Tuple

from hfship.base.errors import HfshipError, HostError
from hfship.base.processes import run_program
from hfship.base.pyz import own_entry
from hfship.base.reading import parse_json
from hfship.base.values import dataclass, replace
from hfship.serve.docker import IN_IMAGE
from hfship.serve.files import CDI_KIND
from hfship.serve.fit import LENGTH_STEP
from hfship.serve.image_notes import CHECKS, note, noted
from hfship.serve.messages import explain
from hfship.serve.mounts import Mount, mounts_of
from hfship.serve.parallel import rounded_requests
from hfship.serve.plan import vllm_arguments
from hfship.serve.terms import IMAGE_SAYS
from hfship.serve.vllm import flags_in
from hfship.serve.vllm_table import parse_version, version_text

if TYPE_CHECKING:
    from hfship.serve.terms import Plan

CHECK_TIMEOUT_S = 180.0  # the program itself gives up after 170
MOST_CHECKS = 50  # that are remembered of an image
PIDS = 4096
BESIDE_SHARES = 64  # of the CPU, where 1024 is usual: what is served comes first


@dataclass(frozen=True)
class Check:
    """What vLLM said of a plan.

    `refused` is its sentence, "" where it takes the plan; `skipped` are the stages that this
    version does not let be checked. A number that was not told is 0.
    """

    refused: str = ""
    version: str = ""
    max_model_len: int = 0  # tokens of context, as vLLM derives it
    kv_bytes: int = 0  # per token on each GPU
    skipped: Tuple[str, ...] = ()
    finished: bool = False  # the program came to its end, or to a refusal


def read_check(output: str) -> Check:
    """The check in the output of the program.

    >>> read_check('x\\nhfship-preflight {"stage": "done", "max_model_len": 8}\\n').max_model_len
    8
    """
    check = Check()
    skipped: List[str] = []
    for line in output.splitlines():
        if not line.startswith(IMAGE_SAYS):
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = parse_json(line[len(IMAGE_SAYS) :])
            stage = str(row["stage"])
            if "skipped" in row:
                skipped.append(stage)
            check = _with_row(check, stage, row)

    return replace(check, skipped=tuple(skipped))


def _with_row(check: Check, stage: str, row: Mapping[str, Any]) -> Check:
    if row.get("refused"):
        return replace(check, refused=str(row["refused"]), finished=True)
    if stage == "version":
        return replace(check, version=str(row["version"]))
    if stage == "done":
        return replace(
            check,
            max_model_len=_number(row.get("max_model_len")),
            kv_bytes=_number(row.get("kv_bytes")),
            finished=True,
        )
    return check


def _number(value: Any) -> int:
    if isinstance(value, int) and value > 0:
        return value
    return 0


# -- what is run


def docker_arguments(plan: Plan, beside: bool, program: str) -> List[str]:
    """The arguments of docker for a check. `beside`: something else is served meanwhile."""
    limits = ["--network", "none", "--pull", "never", "--pids-limit", str(PIDS)]
    rights = ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    label = ["--label", f"hfship.preflight={plan.name}"]
    words = ["run", "--rm", *limits, *rights, *label]
    if beside:
        words += ["--cpu-shares", str(BESIDE_SHARES)]

    for right in plan.cap_add:
        words += ["--cap-add", right]
    if plan.cdi:
        for uuid in plan.gpus:
            words += ["--device", f"{CDI_KIND}={uuid}"]
    elif plan.gpus:
        # Quotes within: docker reads the value as a line of CSV.
        devices = ",".join(plan.gpus)
        words += ["--gpus", f'"device={devices}"']

    model = Mount(plan.model_dir, f"/models/{plan.name}")
    for mount in (model, *mounts_of(plan)):
        words += ["--mount", mount_text(mount)]
    # Variables may be secret; they come through a pipe.
    words += ["--env-file", "/dev/stdin", "--entrypoint", "python3", plan.image]
    length = "free"
    if plan.wishes.get("max_model_len") or "--max-model-len" in flags_in(plan.extra_args):
        length = "fixed"
    return [*words, "-c", program, length, *vllm_arguments(plan)]


def mount_text(mount: Mount) -> str:
    """A mount as `docker run --mount` reads it: a line of CSV.

    >>> mount_text(Mount('/a,b', '/models/m'))
    'type=bind,"source=/a,b",target=/models/m,readonly'
    """
    fields = ["type=bind", f"source={mount.host}", f"target={mount.container}", "readonly"]
    cells = []
    for field in fields:
        if "," in field or '"' in field:
            doubled = field.replace('"', '""')
            field = f'"{doubled}"'
        cells.append(field)
    return ",".join(cells)


def run_check(plan: Plan, beside: bool = False) -> Check:
    """Let the image check a plan. Raises HostError where docker cannot be run at all.

    What goes wrong besides, such as an image without Python, is a check that found nothing.
    """
    content = own_entry(IN_IMAGE)
    program = content.decode("utf-8")
    variables = ""
    for name, value in plan.env.items():
        variables += f"{name}={value}\n"

    argv = ["docker", *docker_arguments(plan, beside, program)]
    done = run_program(argv, stdin=variables, timeout_s=CHECK_TIMEOUT_S)
    return read_check(done.out)


class Running:
    """A check that goes on beside other work."""

    def __init__(
        self, plan: Plan, beside: bool, if_refused: Optional[Callable[[], None]] = None
    ) -> None:
        self.plan = plan
        self._if_refused = if_refused
        self._check: Optional[Check] = None
        # A daemon: who ends meanwhile need not wait for it.
        self._thread = threading.Thread(target=self._run, args=(beside,), daemon=True)
        self._thread.start()

    def _run(self, beside: bool) -> None:
        check = Check()
        with contextlib.suppress(HfshipError, OSError):  # else nothing is known
            check = run_check(self.plan, beside)
        self._check = check
        stop = self._if_refused
        if check.refused and stop:
            with contextlib.suppress(HfshipError, OSError):  # what it says is the news
                stop()

    def result(self) -> Check:
        """What was found, once it is."""
        self._thread.join()
        return self._check or Check()

    def forget(self) -> None:
        """What comes of it stops nothing any more: the plan was proven in another way."""
        self._if_refused = None

    def so_far(self) -> Optional[Check]:
        """What was found; None while it goes on."""
        return self._check


# -- what is remembered


def check_key(plan: Plan) -> str:
    """What a check of a plan depends on, as SHA-256. Raises DiskError."""
    files: Dict[str, Any] = {}
    files[plan.model_dir] = _files_below(plan.model_dir)
    own = replace(plan, mounts=())
    for mount in mounts_of(own):
        files[mount.host] = _files_below(mount.host)

    arguments = vllm_arguments(plan)
    value = [arguments, dict(plan.env), list(plan.gpu_names), files]
    text = json.dumps(value, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()


def _files_below(root: str) -> List[Tuple[str, int, int, int]]:
    """(path, size, time of change, inode) of all files below a folder, or of the file itself."""
    paths = [root]
    for folder, folders, names in os.walk(root):
        folders.sort()
        paths += [os.path.join(folder, name) for name in sorted(names)]

    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            if not os.path.isdir(path):
                row = (path, status.st_size, status.st_mtime_ns, status.st_ino)
                found.append(row)
    return found


def remembered(plan: Plan) -> Optional[Check]:
    """The check of a plan that passed before, None where there was none. Raises HostError."""
    row = _rows(plan).get(check_key(plan))
    if not isinstance(row, dict):
        return None
    return Check(
        version=str(row.get("version", "")),
        max_model_len=_number(row.get("max_model_len")),
        kv_bytes=_number(row.get("kv_bytes")),
        finished=True,
    )


def _rows(plan: Plan) -> Dict[str, Any]:
    rows = noted(plan.image_id).get(CHECKS)
    if isinstance(rows, dict):
        return rows
    return {}


def remember(plan: Plan, check: Check) -> None:
    """Remember a check that passed. Raises DiskError, HostError."""
    rows = _rows(plan)
    rows[check_key(plan)] = {
        "version": check.version,
        "max_model_len": check.max_model_len,
        "kv_bytes": check.kv_bytes,
        "at": int(time.time()),
    }
    newest = sorted(rows.items(), key=_noted_at, reverse=True)
    note(plan.image_id, CHECKS, dict(newest[:MOST_CHECKS]))


def _noted_at(item: Tuple[str, Any]) -> int:
    _, row = item
    return _number(row.get("at")) if isinstance(row, dict) else 0


# -- what follows of it


def refusal(plan: Plan, check: Check) -> HostError:
    """The error for a plan that the image's vLLM refuses."""
    name = plan.name
    version = check.version
    if not version:
        version = version_text(plan.version)
    cause, step = explain(f"{check.refused}. ", name)

    what = f"vLLM {version} would not serve {name}"
    if cause:
        what += f": {cause}"
    why = f"it says, in {plan.image}: {check.refused}"
    if not step:
        step = f"hfship serve {name} --plan    # what it is given"
    step += f"\nif it is mistaken: hfship serve {name} --no-preflight"
    return HostError(what, why, step)


def as_derived(plan: Plan, check: Check) -> Plan:
    """The plan with what vLLM derives in the place of our estimates.

    >>> from hfship.serve.terms import Plan
    >>> plan = Plan(max_model_len=4096, kv_bytes=1 << 20, concurrency=9.0, version=(0, 8, 3))
    >>> as_derived(plan, Check(max_model_len=2048)).max_model_len
    2048
    """
    warnings = list(plan.warnings)
    length = plan.max_model_len
    if 0 < check.max_model_len < length:
        length = check.max_model_len
        warnings.append(f"vLLM derives a context of {length} tokens, which the plan now has")

    concurrency = plan.concurrency
    if check.kv_bytes and length and plan.kv_bytes:
        fits = plan.kv_bytes // check.kv_bytes
        if fits < length and "max_model_len" not in plan.wishes:
            length = fits // LENGTH_STEP * LENGTH_STEP or fits
            warnings.append(f"context of {length} tokens: vLLM says what a token takes")
        requests = plan.kv_bytes / (check.kv_bytes * length)
        concurrency = rounded_requests(requests * max(1, plan.data_parallel_size))
    return replace(
        plan,
        max_model_len=length,
        concurrency=concurrency,
        version=parse_version(check.version) or plan.version,
        warnings=tuple(warnings),
    )
