"""XIDs of GPUs from the kernel's log: which log, which lines, which GPU."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest

from hfship.base.errors import HostError
from hfship.base.processes import Completed
from hfship.serve import xid
from hfship.serve.xid import gpu_xids, parse_xids, read_xids

GPUS = "0, 00000000:3B:00.0\n1, 00000000:5E:00.0\n"


def line(at: float, bus: str, number: int) -> str:
    return f"[{at:12.6f}] NVRM: Xid (PCI:{bus}): {number}, pid='<unknown>', name=<unknown>\n"


def test_the_last_xid_of_each_gpu_in_the_last_hour_is_told() -> None:
    log = (
        line(100, "0000:5e:00", 31)  # too old
        + "[ 7000.0] usb 1-1: new device\n"
        + line(7000, "0000:3b:00", 13)
        + line(7100, "0000:3B:00.0", 79)
        + line(3600, "0000:af:00", 48)
        + line(3599.9, "0000:d8:00", 48)
    )
    assert parse_xids(log, uptime_s=7200.0) == {"3b:00": 79, "af:00": 48}


def test_each_gpu_has_its_own_or_none() -> None:
    said = f"{GPUS}No devices were found\n"
    assert gpu_xids(said, {"5e:00": 79}) == (("0", 0), ("1", 79))


DMESG, JOURNAL = "dmesg", "journalctl"
LOG = "[ 0.000001] NVRM: Xid (PCI:0000:3b:00): 79, pid=1\n"


@pytest.mark.parametrize(
    "logs, asked, found",
    [
        ({DMESG: LOG}, [DMESG], (("0", 79), ("1", 0))),
        ({DMESG: ""}, [DMESG], (("0", 0), ("1", 0))),
        ({JOURNAL: LOG}, [DMESG, JOURNAL], (("0", 79), ("1", 0))),  # dmesg is for root alone
        ({}, [DMESG, JOURNAL], ()),
    ],
)
def test_the_first_log_that_may_be_read_counts(
    logs: Dict[str, str],
    asked: List[str],
    found: Tuple[Tuple[str, int], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: List[str] = []

    def run(argv: Sequence[str], timeout_s: Optional[float] = None) -> Completed:
        assert timeout_s, "a log that hangs must not hold us up"
        tried.append(argv[0])
        if argv[0] not in logs and argv[0] == JOURNAL:
            raise HostError("journalctl is missing", "", "")
        return Completed(0 if argv[0] in logs else 1, logs.get(argv[0], LOG), "")

    monkeypatch.setattr(xid, "run_program", run)
    monkeypatch.setattr(xid, "ask_nvidia_smi", lambda *_: GPUS)
    monkeypatch.setattr(xid, "parse_xids", of_all_times)
    assert read_xids() == found
    assert tried == asked


def of_all_times(log: str, uptime_s: float) -> Dict[str, int]:
    assert uptime_s > 0, "of /proc/uptime"
    return parse_xids(log, uptime_s, recent_s=1e12)


def test_without_gpus_no_log_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Completed:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(xid, "run_program", refuse)
    monkeypatch.setattr(xid, "ask_nvidia_smi", lambda *_: "")
    assert read_xids() == ()
