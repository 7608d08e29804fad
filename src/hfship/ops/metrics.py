# SPDX-License-Identifier: Apache-2.0
"""Deployments, jobs and disks as text for Prometheus: what `status --format prometheus` prints.

Owns the names of the metrics, which are an interface (docs/formats.md), and the form of the text:
https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4), as the textfile
collector of node exporter reads it. Pure, but for the room of disks. Promises: each family has its
HELP and TYPE, no two samples have the same labels, and no time is given, which that collector
refuses.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from hfship import __version__
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.base.settings import Settings
    from hfship.ops.jobs import Job
    from hfship.serve.status import DeploymentStatus

_ESCAPES = (("\\", "\\\\"), ("\n", "\\n"), ('"', '\\"'))
DEPLOYMENT_STATES = (
    "healthy",
    "loading",
    "stalled",
    "degraded",
    "hung",
    "stopped",
    "down",
    "unknown",
)
JOB_STATES = ("running", "done", "failed", "stopped", "interrupted")

# name -> (kind, help)
FAMILIES: Mapping[str, Tuple[str, str]] = {
    "hfship_info": ("gauge", "The hfship that wrote this."),
    "hfship_deployment_state": ("gauge", "1 for the state that a deployment is in, 0 for others."),
    "hfship_deployment_answer_seconds": ("gauge", "Time until a real request was answered."),
    "hfship_deployment_uptime_seconds": ("gauge", "Time since the container was started."),
    "hfship_deployment_restarts_total": ("counter", "Restarts of the container by docker."),
    "hfship_jobs": ("gauge", "Jobs by state, of those whose records are kept."),
    "hfship_job_exit_code": ("gauge", "How the last run of a job ended; see hfship --help."),
    "hfship_job_ended_timestamp_seconds": ("gauge", "When the last run of a job ended."),
    "hfship_job_done_bytes": ("gauge", "How far a running job is in its stage."),
    "hfship_job_expected_bytes": ("gauge", "How many bytes its stage has."),
    "hfship_job_bytes_per_second": ("gauge", "How fast it is."),
    "hfship_disk_free_bytes": ("gauge", "Room for this user where a folder of hfship is."),
    "hfship_disk_size_bytes": ("gauge", "Size of the filesystem of that folder."),
    "hfship_certificate_days": ("gauge", "Days until the certificate of the gateway ends."),
    "hfship_gpu_xid": ("gauge", "The last XID error of a GPU in the last hour; 0 for none."),
}


@dataclass(frozen=True)
class Sample:
    """One value of a family, with its labels."""

    family: str
    value: float
    labels: Tuple[Tuple[str, str], ...] = ()

    def line(self) -> str:
        """As it is written.

        >>> Sample("hfship_jobs", 2.0, (("state", 'a "b"'),)).line()
        'hfship_jobs{state="a \\\\"b\\\\""} 2'
        """
        value = f"{self.value:.17g}"
        if not self.labels:
            return f"{self.family} {value}"

        pairs = []
        for name, text in self.labels:
            shown = escaped(text)
            pairs.append(f'{name}="{shown}"')

        inside = ",".join(pairs)
        return f"{self.family}{{{inside}}} {value}"


@dataclass(frozen=True)
class Disk:
    """The room where a folder is, in bytes."""

    purpose: str  # models, packages, ...: the setting without _dir
    folder: Path
    free: int
    size: int


def escaped(text: str) -> str:
    """The value of a label as it is written between quotes.

    What is no UTF-8 (a name in another encoding on disk) becomes a question mark: Prometheus
    refuses a file that holds it.
    """
    data = text.encode("utf-8", "replace")
    plain = data.decode("utf-8")
    for char, escape in _ESCAPES:
        plain = plain.replace(char, escape)
    return plain


@dataclass(frozen=True)
class Hardware:
    """What the rules of a site go by beside engines: days until the certificate of the gateway
    ends, None without one, and (GPU, its last XID)."""

    certificate_days: Optional[float] = None
    xids: Sequence[Tuple[str, int]] = ()


def metrics_text(
    statuses: Sequence[DeploymentStatus],
    jobs: Sequence[Job],
    disks: Sequence[Disk],
    hardware: Hardware = Hardware(),  # noqa: B008
) -> str:
    """The whole text: each family that has samples, with its help and its kind."""
    samples = [Sample("hfship_info", 1.0, (("version", __version__),))]
    for status in statuses:
        samples += _of_deployment(status)
    samples += _of_all_jobs(jobs)
    for job in jobs:
        samples += _of_job(job)
    for disk in disks:
        samples += _of_disk(disk)
    if hardware.certificate_days is not None:
        days = round(hardware.certificate_days, 2)
        samples.append(Sample("hfship_certificate_days", days))
    for gpu, xid in hardware.xids:
        samples.append(Sample("hfship_gpu_xid", xid, (("gpu", gpu),)))

    lines = _family_lines(samples)
    return "".join(lines)


def _of_disk(disk: Disk) -> Iterator[Sample]:
    labels = (
        ("purpose", disk.purpose),
        ("folder", str(disk.folder)),
    )
    yield Sample("hfship_disk_free_bytes", disk.free, labels)
    yield Sample("hfship_disk_size_bytes", disk.size, labels)


def _family_lines(samples: Sequence[Sample]) -> Iterator[str]:
    by_family: Dict[str, Dict[str, str]] = {}
    for sample in samples:
        line = sample.line()
        key = line.rpartition(" ")[0]
        lines = by_family.setdefault(sample.family, {})
        lines.setdefault(key, line)  # twice the same labels, and all is refused

    for family, (kind, help_text) in FAMILIES.items():
        if family not in by_family:
            continue
        yield f"# HELP {family} {help_text}\n"
        yield f"# TYPE {family} {kind}\n"
        for line in by_family[family].values():
            yield f"{line}\n"


def _of_deployment(status: DeploymentStatus) -> Iterator[Sample]:
    name = ("name", status.name)
    for state in dict.fromkeys([*DEPLOYMENT_STATES, status.state]):
        value = float(state == status.state)
        yield Sample("hfship_deployment_state", value, (name, ("state", state)))

    measured = {
        "hfship_deployment_answer_seconds": status.answer,
        "hfship_deployment_uptime_seconds": status.uptime,
        "hfship_deployment_restarts_total": status.restarts,
    }
    for family, value_or_none in measured.items():
        if value_or_none is not None:
            yield Sample(family, float(value_or_none), (name,))


def _of_all_jobs(jobs: Sequence[Job]) -> Iterator[Sample]:
    states = [job.state for job in jobs]
    for state in JOB_STATES:
        label = ("state", state)
        count = states.count(state)
        yield Sample("hfship_jobs", float(count), (label,))


def _of_job(job: Job) -> Iterator[Sample]:
    record = job.record
    labels = (("job", job.label), ("command", record.command))
    if job.state != "running":
        if record.exit_code is not None:
            yield Sample("hfship_job_exit_code", record.exit_code, labels)
        yield Sample("hfship_job_ended_timestamp_seconds", round(record.updated_at), labels)
        return

    if record.unit == "B":
        yield Sample("hfship_job_done_bytes", record.done, labels)
        yield Sample("hfship_job_expected_bytes", record.total, labels)
        yield Sample("hfship_job_bytes_per_second", record.rate, labels)


def read_disks(settings: Settings) -> List[Disk]:
    """The room of each folder of hfship that is there."""
    folders = {
        "models": settings.models_dir,
        "packages": settings.package_dir,
        "transfer": settings.transfer_dir,
        "site_models": settings.site_models_dir,
        "deployments": settings.deploy_dir,
        "logs": settings.log_dir,
    }
    disks = []
    for purpose, folder in folders.items():
        with contextlib.suppress(OSError):  # one of the other side, or of another user
            stat = os.statvfs(folder)
            free = stat.f_bavail * stat.f_frsize
            size = stat.f_blocks * stat.f_frsize
            disks.append(Disk(purpose, folder, free, size))

    return disks
