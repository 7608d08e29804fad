"""A real Linux kernel for tests: user-mode Linux, a kernel that is a program, with a filesystem of its own on an image file.

The host's root is the guest's, read-only; one folder, the test's, can be written from both sides. On `disk` below it lies,
for the guest alone, the filesystem of the image. `cut` ends the guest as a power cut does: what the guest's page cache held
is lost, what it had written to the image stays.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from queue import Queue
from typing import Any, Dict, Mapping, Optional, Sequence

from conftest import missing
from support import components

START_TIMEOUT_S = 60
MKFS = {
    "vfat": ["mkfs.vfat", "-F", "32"],
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}
MODULES = [
    "fs/nls/nls_ascii",
    "fs/nls/nls_cp437",
    "fs/nls/nls_iso8859-1",
    "fs/nls/nls_utf8",
    "fs/fat/fat",
    "fs/fat/vfat",
]
MODULES += ["drivers/md/dm-mod"]

# Commands come as files NUMBER.sh, told by a line on the console; a line there tells when one is done, and its exit status.
INIT = """#!/bin/sh
export PATH={path} LD_LIBRARY_PATH={libraries}
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t tmpfs tmpfs /dev
for node in null:3 zero:5 random:8 urandom:9; do mknod -m 666 /dev/${{node%:*}} c 1 ${{node#*:}}; done
mknod /dev/ubda b 98 0; ln -s /proc/self/fd /dev/fd
mkdir /dev/shm /dev/mapper; mount -t tmpfs tmpfs /dev/shm
mount -t hostfs none {folder} -o {folder}
ip link set lo up
for module in {modules}; do insmod {kernel}/usr/lib/uml/modules/$(uname -r)/kernel/$module.ko; done
unset LD_LIBRARY_PATH
echo "0 $(cat /sys/block/ubda/size) linear /dev/ubda 0" | {dmsetup} create disk
{dmsetup} mknodes
mount -t {kind} -o {options} /dev/mapper/disk {folder}/disk
echo "@ up $?"
while read -r number; do
  [ "$number" = off ] && break
  (sh {work}/$number.sh; echo "@ $number $?") &
done
umount {folder}/disk; echo "@ off $?"
echo o > /proc/sysrq-trigger
sleep 100
"""


class Running:
    """A command in the guest. Its exit status, stdout and stderr are known when it has ended."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.status: Queue[int] = Queue()

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """How it ended; raises queue.Empty if it does not."""
        status = self.status.get(timeout=timeout)
        out, err = (
            self.place.with_suffix(end).read_text(errors="replace") for end in (".out", ".err")
        )
        return subprocess.CompletedProcess(str(self.place), status, out, err)


class Kernel:
    """A context manager: the guest, up, with the filesystem of an image on `disk`, a folder below `folder`."""

    def __init__(
        self, folder: Path, megabytes: int, kind: str = "ext4", options: str = "rw"
    ) -> None:
        self.root = components.require("uml")
        self.kernel = self.root.parent / "kernel/root"
        self.folder, self.kind, self.options = folder, kind, options
        self.image, self.disk, self._work = folder / "disk.img", folder / "disk", folder / "kernel"
        self._running: Dict[str, Running] = {}
        self._started = 0
        for path in (self.disk, self._work):
            path.mkdir(exist_ok=True)
        if not self.image.exists():
            with self.image.open("wb") as stream:
                stream.truncate(megabytes << 20)
            program, *flags = MKFS[kind]
            self._tool(self.root / "sbin" / program, *flags, self.image)

    def _tool(self, *argv: Any, codes: Sequence[int] = (0,)) -> None:
        done = subprocess.run(
            [*map(str, argv)], capture_output=True, text=True, env={**os.environ, **self._libraries}
        )
        assert done.returncode in codes, done.stdout + done.stderr

    @property
    def _libraries(self) -> Dict[str, str]:
        folders = [self.root / "lib/x86_64-linux-gnu", self.root / "usr/lib/x86_64-linux-gnu"]
        return {"LD_LIBRARY_PATH": ":".join(map(str, folders))}

    def __enter__(self) -> Kernel:
        self.boot()
        return self

    def __exit__(self, *_: object) -> None:
        self.halt()

    def boot(self) -> None:
        """Power on, and mount; FAT, which has no journal, is mended first."""
        if self.kind == "vfat":
            self._tool(self.root / "sbin/fsck.vfat", "-a", self.image, codes=(0, 1))
        path = f"{self.root}/bin:{self.root}/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        libraries = self._libraries["LD_LIBRARY_PATH"]
        init = self._work / "init"
        script = INIT.format(
            path=path, libraries=libraries, folder=self.folder, work=self._work, modules=" ".join(MODULES),
            kernel=self.kernel,
            kind=self.kind, options=self.options, dmsetup=f"LD_LIBRARY_PATH={libraries} dmsetup --noudevsync",
        )  # fmt: skip
        init.write_text(script)
        init.chmod(0o755)
        argv = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "env",
            f"LD_LIBRARY_PATH={self.kernel}/usr/lib/x86_64-linux-gnu",
            self.kernel / "usr/bin/linux.uml",
            f"ubd0={self.image}",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
        ]
        argv += [
            f"init={init}",
            "mem=1G",
            f"uml_dir={self._work}",
            "con=null",
            "con0=fd:0,fd:1",
            "quiet",
        ]
        self._process = subprocess.Popen(
            [*map(str, argv)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            errors="replace",
            cwd=self.kernel,  # where its loader is
            start_new_session=True,
        )
        self.said = ""
        up = self._running["up"] = Running(self._work)
        self._off = self._running["off"] = Running(self._work)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        status = up.status.get(timeout=START_TIMEOUT_S)
        if status == -1:
            missing(f"a machine on which user-mode Linux runs; it said: {self.said}")
        assert status == 0, self.said

    def _read(self) -> None:
        """Take what the console says."""
        assert self._process.stdout
        for line in self._process.stdout:
            self.said += line
            words = line.split()
            if words[:1] == ["@"] and len(words) == 3 and words[1] in self._running:
                self._running.pop(words[1]).status.put(int(words[2]))
        for running in self._running.values():  # of a guest that is no more
            running.status.put(-1)
        self._running.clear()

    def start(
        self,
        argv: Sequence[Any],
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[Path] = None,
    ) -> Running:
        """Start a command in the guest."""
        self._started += 1
        place = self._work / str(self._started)
        environ = [
            f"{name}={value}" for name, value in (env or {"PATH": os.environ["PATH"]}).items()
        ]
        command = shlex.join(["env", "-i", *environ, *map(str, argv)])
        script = f"cd {shlex.quote(str(cwd or '/'))}; exec {command} > {place}.out 2> {place}.err < /dev/null\n"
        place.with_suffix(".sh").write_text(script)
        running = self._running[place.name] = Running(place)
        self._tell(place.name)
        return running

    def run(
        self,
        argv: Sequence[Any],
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[Path] = None,
        timeout: float = 120,
        **_: Any,
    ) -> subprocess.CompletedProcess[str]:
        """subprocess.run, but in the guest; output is text."""
        return self.start(argv, env, cwd).wait(timeout)

    def wait_until_written(self, megabytes: int) -> None:
        """Wait until so much lies on the image, which is sparse at first."""
        until = time.monotonic() + START_TIMEOUT_S
        while self.image.stat().st_blocks * 512 < megabytes << 20:
            assert time.monotonic() < until, "nothing more is written"
            time.sleep(0.01)

    def seen(self, folder: Path) -> Path:
        """What the guest has in a folder, copied to where the host sees it."""
        target = self.folder / "seen"
        shutil.rmtree(target, ignore_errors=True)
        done = self.run(["cp", "-r", folder, target])
        assert done.returncode == 0, done.stderr
        return target

    def _tell(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")

    def cut(self) -> None:
        """Power off, now."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def halt(self) -> None:
        """Unmount and power off, if it still runs."""
        if self._process.poll() is None:
            try:
                self._tell("off")
                assert self._off.status.get(timeout=START_TIMEOUT_S) == 0, self.said
                self._process.wait(START_TIMEOUT_S)
            finally:
                if self._process.poll() is None:
                    self.cut()

    def reboot(self) -> None:
        """Down in order, and up again: with empty page caches, and another boot id."""
        self.halt()
        self.boot()

    def pull(self) -> None:
        """Pull the medium out: from now on every read and write of it fails."""
        sectors = self.image.stat().st_size // 512
        table = f"dmsetup --noudevsync load disk --table '0 {sectors} error'"
        script = f"dmsetup --noudevsync suspend --nolockfs --noflush disk && {table}"
        path = {"PATH": f"{self.root}/sbin:{os.environ['PATH']}", **self._libraries}
        done = self.run(["sh", "-c", f"{script} && dmsetup --noudevsync resume disk"], env=path)
        assert done.returncode == 0, done.stderr
