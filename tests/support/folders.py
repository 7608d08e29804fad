"""What two model folders hold, compared, and what must not be left in one."""

from __future__ import annotations

from pathlib import Path
from typing import List

from hfship.base.content import content_files


def same_files(left: Path, right: Path) -> bool:
    """Do both folders hold the same content (apart from hfship's and the Hub client's own files)?"""
    listings = [content_files(folder) for folder in (left, right)]
    return listings[0] == listings[1] and all(
        (left / path).read_bytes() == (right / path).read_bytes() for path, _ in listings[0]
    )


def leftovers(folder: Path) -> List[str]:
    """Files that must not be there after a success."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*.incomplete")]
    return found + [str(path.relative_to(folder)) for path in folder.glob(".hfship/partial/*")]
