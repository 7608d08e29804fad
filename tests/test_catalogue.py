# SPDX-License-Identifier: Apache-2.0
"""What a scan of the mirror makes of the folders that it finds, with folders that say what they are;
test_mirror.py has real ones."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping, Tuple, Union

import pytest

from hfship.base.errors import IncompleteError
from hfship.base.manifest import Source
from hfship.base.values import replace
from hfship.hub.protocol import RemoteFile
from hfship.ops import catalogue
from hfship.ops.catalogue import RepoCatalogue, model_folders
from hfship.ops.mirror_repo import MirrorRepo


def repo_of(folder: str, name: str, commit: str = "a", files: int = 1, **fields: Any) -> MirrorRepo:
    source = Source("https://hub", name, "main", name, commit * 40)
    remote = {str(number): RemoteFile(str(number), 1, "1" * 40) for number in range(files)}
    return MirrorRepo(replace(source, **fields), Path("/site") / folder, remote, {})


Found = Union[MirrorRepo, Exception]


class Site:
    """A models folder as it is now, the catalogue of it, and what that said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: Dict[str, Found] = {}
        self.refuses: List[OSError] = []
        self.made: List[Tuple[Any, ...]] = []
        self.said: List[str] = []
        monkeypatch.setattr("hfship.ops.catalogue.model_folders", self._listed)
        monkeypatch.setattr("hfship.ops.catalogue.MirroredFolder", self._opened)
        monkeypatch.setattr("hfship.ops.catalogue.RESCAN_S", 3600.0)
        self.judge: Any = object()
        self.progress: Any = object()
        self.catalogue = RepoCatalogue(
            Path("/site"), self.said.append, None, self.judge, self.progress
        )

    def _listed(self, root: Path) -> Any:
        for error in self.refuses:
            raise error
        return [(root / name, "model", name) for name in sorted(self.folders)]

    def _opened(self, folder: Path, *more: Any) -> Any:
        self.made.append((folder.name, *more))
        return SimpleNamespace(repo=lambda: self._looked_at(folder.relative_to("/site").as_posix()))

    def _looked_at(self, name: str) -> MirrorRepo:
        found = self.folders[name]
        if isinstance(found, Exception):
            raise found
        return found

    def scan(self, **folders: Found) -> List[str]:
        """What is said of a scan that finds these folders, if any are given."""
        if folders:
            self.folders = dict(folders)
        del self.said[:]
        self.catalogue._rescan()
        return list(self.said)

    def offered(self) -> Dict[str, str]:
        """What is served: the folder of each name."""
        with_ids = self.catalogue.index().items()
        return {key[1]: " ".join(one.folder.name for one in held) for key, held in with_ids}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(monkeypatch)


A, B = repo_of("a", "org/a"), repo_of("b", "org/b")


def test_what_comes_and_goes_is_said_but_not_what_was_there_from_the_start(site: Site) -> None:
    assert not site.catalogue.is_complete
    assert site.scan(a=A) == [] and site.catalogue.is_complete
    assert site.offered() == {"org/a": "a"}
    assert site.scan(a=A, b=B) == ["new: org/b"]
    assert site.offered() == {"org/a": "a", "org/b": "b"}
    assert site.scan() == []
    assert site.scan(b=B) == ["gone: org/a"]
    assert site.offered() == {"org/b": "b"}


def test_a_folder_is_known_from_one_scan_to_the_next_until_it_is_gone(site: Site) -> None:
    """Proofs of its files are kept with it: nothing is read twice, and nothing kept for ever."""
    site.scan(a=A, b=B)
    record = site.catalogue._record
    more = (site.catalogue._say, record, site.judge, site.progress)
    assert site.made == [("a", "model", "a", *more), ("b", "model", "b", *more)]
    site.scan(b=B)
    assert list(site.catalogue._folders) == ["b"]
    site.scan(a=A, b=B)
    assert [name for name, *_ in site.made] == ["a", "b", "a"]


def test_what_is_not_served_is_said_once_with_its_reason(site: Site) -> None:
    site.scan(a=A, b=B)
    assert set(site.offered()) == {"org/a", "org/b"}
    broken = IncompleteError("a is not complete yet", "x missing")
    assert site.scan(a=broken, b=B) == ["not served: a is not complete yet (x missing)"]
    assert set(site.offered()) == {"org/b"}
    assert site.catalogue.left_out == {"a": "a is not complete yet (x missing)"}
    assert site.scan() == []
    assert site.scan(a=IncompleteError("another", ""), b=B) == ["not served: another"]
    assert site.scan(a=PermissionError(13, "not allowed"), b=B) == [
        "not served: /site/a: not allowed"
    ]
    assert site.scan(a=A, b=B) == ["new: org/a"] and site.catalogue.left_out == {}
    assert set(site.offered()) == {"org/a", "org/b"}
    site.scan(a=broken)
    assert site.catalogue.left_out and site.scan(b=B) == ["new: org/b"]
    assert site.catalogue.left_out == {}


def test_another_state_of_a_folder_takes_the_place_of_the_last_one(site: Site) -> None:
    site.scan(a=A)
    index = site.catalogue.index()
    assert site.catalogue.index() is index, "made once"
    site.scan(a=A)
    assert site.catalogue.index() is index, "nothing changed"
    later = repo_of("a", "org/a", "b")
    assert site.scan(a=later) == []
    assert site.catalogue.find("model", "org/a") is later


def test_what_lies_beside_the_files_of_a_model_is_said_and_the_model_served(site: Site) -> None:
    beside = replace(A, others="notes.txt (hidden)")
    assert site.scan(a=beside) == ["not served: /site/a: notes.txt (hidden)"]
    assert site.catalogue.left_out == {"a: other files": "/site/a: notes.txt (hidden)"}
    assert site.offered() == {"org/a": "a"}
    assert site.scan() == []
    assert site.scan(a=A) == [] and site.catalogue.left_out == {}
    site.scan(a=beside)
    assert site.scan(b=B) == ["new: org/b", "gone: org/a"] and site.catalogue.left_out == {}


def test_a_folder_that_cannot_be_listed_serves_nothing_and_is_no_end(site: Site) -> None:
    site.scan(a=A)
    site.refuses = [OSError(5, "input/output error")]
    words = "/site cannot be listed: input/output error"
    assert site.scan() == [f"not served: {words}", "gone: org/a"]
    assert site.catalogue.left_out == {"/site": words} and site.offered() == {}
    site.refuses = []
    assert site.scan() == ["new: org/a"] and site.catalogue.left_out == {}


def test_what_was_withdrawn_is_looked_at_again(site: Site) -> None:
    site.scan(a=A, b=B)
    site.catalogue.withdraw(repo_of("a", "org/a"), "x has changed")  # of an earlier scan
    assert site.said == [] and site.catalogue.left_out == {}
    assert site.offered() == {"org/a": "a", "org/b": "b"} and not site.catalogue._is_old()
    site.said.clear()
    site.catalogue.withdraw(A, "x has changed")
    assert site.said == ["not served: /site/a is looked at again: x has changed"]
    assert site.catalogue.left_out == {"a": "/site/a is looked at again: x has changed"}
    assert site.catalogue._is_old()
    assert "org/a" in site.offered(), "the question after that looks"
    assert site.catalogue.left_out == {}


# -- when it is looked at again


def test_a_question_looks_when_what_is_known_is_old(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.folders = {"a": A}
    scans: List[str] = []
    real = site.catalogue._rescan
    monkeypatch.setattr(site.catalogue, "_rescan", lambda: (scans.append("scan"), real()))
    assert site.offered() == {"org/a": "a"} and scans == ["scan"]
    site.folders = {"a": A, "b": B}
    assert site.offered() == {"org/a": "a"} and scans == ["scan"]
    site.catalogue.forget()
    assert set(site.offered()) == {"org/a", "org/b"} and scans == ["scan"] * 2


@pytest.mark.parametrize(("age_s", "is_old"), [(0.0, False), (2.0, False), (2.1, True)])
def test_how_old_what_is_known_may_be(
    age_s: float, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hfship.ops.catalogue.time", SimpleNamespace(monotonic=lambda: 100.0 + age_s)
    )
    held = RepoCatalogue(Path("/site"))
    assert held._is_old(), "it was never looked at"
    held._ended = 100.0
    assert held._is_old() is is_old


def test_only_the_first_questions_wait_for_all_to_be_seen(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no longer, all together, than FIRST_SCAN_S; nor are there two scans at a time."""
    go_on, begun = threading.Event(), threading.Event()
    scans: List[int] = []

    def slow() -> None:
        scans.append(1)
        begun.set()
        go_on.wait(30)

    monkeypatch.setattr(site.catalogue, "_rescan", slow)
    monkeypatch.setattr("hfship.ops.catalogue.FIRST_SCAN_S", 0.0)
    assert site.catalogue.index() == {} and begun.wait(30)
    assert site.catalogue.index() == {} and scans == [1]
    waited: List[float] = []
    now = site.catalogue._began
    assert now > 0
    clock = SimpleNamespace(monotonic=lambda: now + 4.0)
    monkeypatch.setattr("hfship.ops.catalogue.time", clock)
    monkeypatch.setattr("hfship.ops.catalogue.FIRST_SCAN_S", 10.0)
    seen = SimpleNamespace(wait=waited.append, is_set=lambda: False)
    monkeypatch.setattr(site.catalogue, "_all_seen", seen)
    site.catalogue.index()
    now += 100.0
    site.catalogue.index()
    assert waited == [6.0, 0.0] and scans == [1]
    go_on.set()


# -- names and revisions


HELD: Mapping[str, MirrorRepo] = {
    "old": repo_of("old", "Org/Tiny", "1", fetched_at="2026-01-01"),
    "new": repo_of("new", "Org/Tiny", "2", fetched_at="2026-02-01"),
    "tag": repo_of("tag", "org/tiny", "2a", revision="v1", fetched_at="2026-03-01", repo="org/was"),
    "own": repo_of("own", "org/tiny", "4", endpoint="", fetched_at="2026-09-01"),
    "sums": repo_of("sums", "org/sums", "5", repo_type="dataset"),
    "some": repo_of("some", "a/b", "6", files=1),
    "more": repo_of("more", "a/b", "6", files=2),
}


@pytest.mark.parametrize(
    ("kind", "repo", "revision", "folder"),
    [
        ("model", "ORG/tiny", "main", "new"),
        ("model", "org/tiny", "v1", "tag"),
        ("model", "org/tiny", "2" * 40, "new"),
        ("model", "org/tiny", "1" * 7, "old"),
        ("model", "org/tiny", "1" * 6, ""),
        ("model", "org/tiny", "2a2a2a2", "tag"),
        ("model", "org/tiny", "4444444", "own"),
        ("model", "org/tiny", "v2", ""),
        ("model", "org/was", "main", "tag"),
        ("model", "org/sums", "main", ""),
        ("dataset", "org/sums", "main", "sums"),
        ("model", "a/b", "main", "more"),
        ("model", "none", "main", ""),
    ],
)
def test_which_folder_answers(kind: str, repo: str, revision: str, folder: str, site: Site) -> None:
    site.scan(**HELD)
    found = site.catalogue.find(kind, repo, revision)
    assert (found.folder.name if found else "") == folder


def test_each_repository_is_listed_once_and_with_its_revisions(site: Site) -> None:
    site.scan(**HELD)
    assert [one.folder.name for one in site.catalogue.repos()] == ["new", "more", "sums"]
    main = HELD["new"]
    assert site.catalogue.branches(main) == {"main": "2" * 40, "v1": "2a" * 40}
    unknown = repo_of("x", "org/x", "7", revision="v3")
    assert site.catalogue.branches(unknown) == {"main": "7" * 40, "v3": "7" * 40}
    by_commit = repo_of("x", "org/x", "7", revision="7" * 40)
    assert site.catalogue.branches(by_commit) == {"main": "7" * 40}


def test_of_two_revisions_of_one_name_the_first_counts(site: Site) -> None:
    early = repo_of("e", "o/m", "1", revision="v1", fetched_at="2026-01-01")
    late = repo_of("l", "o/m", "2", revision="v1", fetched_at="2026-02-01")
    site.scan(e=early, l=late)
    assert site.catalogue.branches(late) == {"v1": "2" * 40, "main": "2" * 40}


# -- folders


def test_which_folders_are_models(tmp_path: Path) -> None:
    files = """
        plain/config.json org/inner/config.json org/other/sub/deep.txt .hidden/config.json
        org/.hidden/config.json datasets/sums/a.csv datasets/o/sums/a.csv spaces/o/app/app.py
        datasets/.cache/x begun/.hfship/x README
    """
    for name in files.split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "empty/nothing").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    found = [
        (path.relative_to(tmp_path).as_posix(), kind, name)
        for path, kind, name in model_folders(tmp_path)
    ]
    assert found == [
        ("begun", "model", "begun"),
        ("empty/nothing", "model", "empty/nothing"),
        ("link", "model", "link"),
        ("org/inner", "model", "org/inner"),
        ("org/other", "model", "org/other"),
        ("plain", "model", "plain"),
        ("datasets/o/sums", "dataset", "o/sums"),
        ("datasets/sums", "dataset", "sums"),
        ("spaces/o/app", "space", "o/app"),
    ]
    with pytest.raises(OSError, match="none"):
        list(model_folders(tmp_path / "none"))


def test_a_folder_that_cannot_be_read_is_a_model_so_that_the_list_says_so() -> None:
    def refuse() -> Any:
        raise PermissionError(13, "no")

    closed = SimpleNamespace(is_dir=lambda: False, iterdir=refuse)
    folder: Any = type(
        "Closed", (), {"__truediv__": lambda *_: closed, "iterdir": lambda _: refuse()}
    )
    assert catalogue._is_model(folder())
