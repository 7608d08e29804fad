"""The main job of an operator on a machine that has a Python and nothing else: run inside of it.

    python3 main_job.py WORD... hfship.pyz       WORDs start a Python there

As an unprivileged user with a home that cannot be written: serves /data/hub as a Hub, fetches org/tiny from it, packs
/data/tiny, verifies, unpacks and plans. Works in /work. Prints JSON: the SHA-256 of all files that came out.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time

PORT = 8300
HFSHIP = sys.argv[1:]
ENVIRON = {"PATH": "/usr/bin:/bin", "HOME": "/home/op", "LANG": "C.UTF-8"}


def run(*words, code=0):
    """A command that has to end with `code`; its output."""
    done = subprocess.run(
        [*HFSHIP, *words],
        env=ENVIRON,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != code:
        sys.exit(f"{words}: {done.returncode}\n{done.stdout}")
    return done.stdout


def wait_for_hub():
    """Until it answers."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", PORT), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    sys.exit("the mirror does not answer")


def sums(folder):
    """path -> SHA-256 of the files of a model or an archive."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as stream:
                found[os.path.relpath(path, folder)] = hashlib.sha256(stream.read()).hexdigest()
    return found


def main():
    """The job."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    hub = subprocess.Popen(
        [*HFSHIP, "mirror", "/data/hub", "--port", str(PORT)],
        env=ENVIRON,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_hub()
        old = sys.version_info < (3, 10)  # there it says so, and all else works
        url = f"http://127.0.0.1:{PORT}"
        run("fetch", "org/tiny", "--endpoint", url, "-o", "/disk/models", code=9 if old else 0)
    finally:
        hub.kill()
    run("pack", "/data/tiny", "-o", "/disk/transfer", "--split", "3M")
    run("verify", "/disk/transfer/tiny.tar.zst")
    run("unpack", "/disk/transfer/tiny.tar.zst", "-o", "/disk/site")
    plan = run("serve", "/disk/site/tiny", "--plan", "--assume-gpus", "1x24GB")
    packed = sums("/disk/transfer")
    said = {
        "version": run("version"),
        "plan": plan,
        "fetched": None if old else sums("/disk/models/tiny"),
        "packed": {name: packed[name] for name in packed if "tar.zst.0" in name},
        "unpacked": sums("/disk/site/tiny"),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
