"""Who holds the memory of GPUs: nvidia-smi, docker and /proc are played."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Sequence

import pytest

from hfship.base.errors import HostError
from hfship.base.processes import Completed
from hfship.serve import holders
from hfship.serve.holders import (
    Holder,
    container_names,
    held_text,
    parse_compute_apps,
    read_holders,
    strangers,
)

OURS, OTHERS = "a" * 64, "b" * 64


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/proc, with processes in a container of ours, one of others, and none."""
    for pid, group in (
        (7, f"0::/system.slice/docker-{OURS}.scope"),
        (8, f"12:devices:/docker/{OTHERS}"),
        (9, "0::/user.slice"),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(f"{group}\n")
    monkeypatch.setattr(holders, "PROC", tmp_path)
    monkeypatch.setattr(holders, "program_of", lambda pid: {8: "train.py"}.get(pid, ""))
    return tmp_path


def says(monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    def run(argv: Sequence[str], timeout_s: Optional[float] = None) -> Completed:
        assert timeout_s, "a driver that hangs must not hold us up"
        return Completed(0, out, "")

    monkeypatch.setattr(holders, "run_program", run)


def test_each_process_has_its_program_and_its_container(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(
        monkeypatch,
        "GPU-1, 7, /usr/bin/python3, 1024\n"
        "No running processes found\n"
        "GPU-1, x, a, 1\n"
        "GPU-1, 8, [Not Found], [N/A]\n"
        "GPU-2, 9, /opt/a, b/run,it, 1\n"
        "GPU-2, 10, [Not Found], 2\n",
    )
    assert read_holders({OURS: "vllm_m"}) == (
        Holder("GPU-1", 7, "python3", 1 << 30, "vllm_m"),
        Holder("GPU-1", 8, "train.py", 0, OTHERS[:12]),
        Holder("GPU-2", 9, "run,it", 1 << 20),
        Holder("GPU-2", 10, "a program", 2 << 20),  # it has ended, or is another user's
    )


def test_containers_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, f"{OURS} vllm_m\n{OTHERS} train\n")
    assert container_names() == {OURS: "vllm_m", OTHERS: "train"}


def test_without_docker_no_container_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Completed:
        raise HostError("no docker", "", "")

    monkeypatch.setattr(holders, "run_program", fail)
    assert container_names() == {}


def test_who_holds_it_is_said() -> None:
    assert held_text([], 2 << 30) == "2.1 GB by no process that can be seen from here"
    (plain,) = parse_compute_apps("GPU-1, 77, /usr/bin/python3, 1024")
    contained = Holder("GPU-1", 78, "python3", 0, "vllm_m")
    said = held_text([plain, contained], 2 << 30)
    assert said == "python3 (process 77), 1.1 GB; the container vllm_m"
    assert strangers([plain, contained], ["vllm_m"]) == [plain]
