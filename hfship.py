#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""hfship: carry Hugging Face models across an air gap and put them into service, as one file.

    connected side                      medium, or push          offline side
    Hub - fetch -> model dir - pack -> NAME.tar.zst (parts) -> verify - unpack -> model dir
                   + manifest          + .sha256 + hfship.pyz                     + manifest
                                                             model dir - serve  -> vLLM
                                                                       - mirror -> hf, vLLM, ...

The promise: what the GPU reads is bit for bit what the Hub published, proven at every hop by the
SHA-256 that the Hub itself gives, and every step can be killed at any instant and run again.

The source is a house in src/hfship/, on floors in the order in which data flows. A room, which is
a module, imports lower floors and earlier rooms of its own floor, never upwards:

    base/       errors, reporting, settings, files, locks, other programs, workers, the manifest
    hub/        from the Hub or a registry to a folder: protocol, sessions, ranges, readers,
                download, repair
    archive/    a folder to NAME.tar.zst and back: zstd, frames, planes, pack, verify, unpack,
                signatures
    serve/      facts, host and image to a plan, its files, and a container that answered
    site/       many models behind one address: gateway, keys, monitoring
    ops/        what a runbook needs around the verbs: jobs, watch, push, clean, doctor, mirror
    commands/   the words that an operator types

This script runs it from a checkout; `make build` makes hfship.pyz of it. The script is in the
grammar of Python 2.7, so that every Python can say which one is needed.
"""

import os
import sys

SOURCE = os.path.join(os.path.dirname(os.path.realpath(__file__)), "src")


def check():
    # type: () -> None
    """End with one clear line where the package would be a SyntaxError, or is not there."""
    problem = ""
    if sys.version_info < (3, 8):
        version = "%d.%d.%d" % sys.version_info[:3]
        problem = "needs Python 3.8 or newer; this is %s (%s); " % (version, sys.executable)
        problem += "next: python3.11 %s, or any other from 3.8 on" % " ".join(sys.argv)
    elif not os.path.isdir(os.path.join(SOURCE, "hfship")):
        problem = "runs from a checkout, and %s/hfship is not there; next: copy hfship.pyz" % SOURCE
    if problem:
        sys.stderr.write("hfship %s\n" % problem)
        sys.exit(9)


def restart_in_utf8():
    # type: () -> None
    """Start once more where the locale is not UTF-8; see launcher.py."""
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8":
        return
    try:
        with open("/proc/self/cmdline", "rb") as stream:
            words = stream.read().split(b"\0")[:-1]
        os.execv(sys.executable, words[:1] + [b"-X", b"utf8"] + words[1:])
    except (OSError, ValueError):
        pass


if __name__ == "__main__":
    check()
    restart_in_utf8()
    sys.path.insert(0, SOURCE)
    from hfship.commands.run import main

    sys.exit(main())
