# SPDX-License-Identifier: Apache-2.0
"""`unpack` of an image: what is looked at before an engine gets it; test_images.py has engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import IntegrityError, UsageError
from hfship.base.values import dataclass
from hfship.commands import unpack_image


@dataclass(frozen=True)
class Options:
    """As UnpackOptions has them."""

    base: str = "base"
    force: bool = True
    jobs: int = 3
    consume: bool = False
    name: str = "asked-for"


@dataclass(frozen=True)
class Policy:
    """As a policy has them."""

    scan: Any = ()


NO_SCANNERS = Policy()


@dataclass(frozen=True)
class How:
    """As Restore has them."""

    out: Path
    policy: Policy
    options: Options


class Site:
    """An archive of an image, the scanners and the engine; what was done, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: List[Any] = []
        self.said: List[str] = []
        self.sent = 700
        self.error: Any = None
        files = SimpleNamespace(name="app.tar.zst")
        manifest = SimpleNamespace(image="image facts")
        self.opened: Any = SimpleNamespace(
            archive=SimpleNamespace(files=files, manifest=manifest),
            signed=None,
            found=SimpleNamespace(name="app"),
        )
        self.reporter: Any = SimpleNamespace(info=self.said.append)

    def load(self, archive: Any, image: Any, options: Any, _: Any) -> Any:
        assert (archive, image) == (self.opened.archive, "image facts")
        self.log.append(("load", options.engine, options.base, options.force, options.jobs))
        return SimpleNamespace(sent=self.sent, held=SimpleNamespace(id="sha256:held"))

    def restore(self, model: Any, opened: Any, how: How, _: Any) -> Any:
        assert opened == [self.opened] and model.named == (self.opened.archive.files,)
        self.log.append(("unpack", model.name, how.out, how.policy.scan, how.options))
        how.out.mkdir(parents=True)
        return SimpleNamespace(done=SimpleNamespace(folder=how.out / model.name))

    def scan(self, folder: Path) -> List[Any]:
        self.log.append(("scan", folder))
        if self.error:
            raise self.error
        return [SimpleNamespace(details=lambda: {"scanner": "x"})]

    def note(self, files: Any, event: str, manifest: Any, details: Any) -> None:
        assert manifest is self.opened.archive.manifest
        self.log.append((event, files.name, details))

    def run(self, policy: Policy = NO_SCANNERS, **options: Any) -> Any:
        how: Any = How(self.folder / "models", policy, Options(**options))
        return unpack_image.load_image(self.opened, how, "docker", self.reporter)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)

    def recorder(policy: Any, reporter: Any) -> Any:
        assert reporter is made.reporter
        return SimpleNamespace(scan=made.scan, note_beside=made.note)

    def load_options(engine: str, base: str, force: bool, jobs: int) -> Any:
        return SimpleNamespace(engine=engine, base=base, force=force, jobs=jobs)

    def remove(files: Any) -> None:
        made.log.append(("remove", files.name))

    patched: Dict[str, Any] = {
        "hfship.commands.unpack_image.Recorder": recorder,
        "hfship.serve.image_load.LoadOptions": load_options,
        "hfship.serve.image_load.load_archive": made.load,
        "hfship.archive.unpack.remove_archive": remove,
        "hfship.archive.unpack.require_manifest": lambda archive: archive.manifest,
        "hfship.commands.restore.restore_opened": made.restore,
    }
    for name, fake in patched.items():
        monkeypatch.setattr(name, fake)
    return made


LOAD = ("load", "docker", "base", True, 3)
LOADED = ("loaded", "app.tar.zst", {"engine": "docker", "image_id": "sha256:held"})


def test_an_image_is_loaded_and_noted(site: Site) -> None:
    site.opened.signed = SimpleNamespace(signer="kim")
    assert site.run().done.sent == 700
    assert site.log == [LOAD, LOADED] and site.said == ["app.tar.zst: signed by kim"]


def test_one_that_was_there_is_not_noted_again(site: Site) -> None:
    site.sent = 0
    site.run()
    assert site.log == [LOAD] and site.said == []


def test_an_archive_goes_when_its_image_is_there(site: Site) -> None:
    site.run(consume=True)
    assert site.log == [LOAD, LOADED, ("remove", "app.tar.zst")]


def test_scanners_see_an_image_before_the_engine_does(site: Site) -> None:
    site.run(Policy(scan=("clamscan",)), consume=True)
    place = site.folder / "models/.hfship-scan"
    options = Options(consume=False, name="")  # the archive stays, whatever they say
    assert site.log == [
        ("unpack", "app", place, (), options),
        ("scan", place / "app"),
        ("scanned", "app.tar.zst", {"scanner": "x"}),
        LOAD,
        LOADED,
        ("remove", "app.tar.zst"),
    ]
    assert not place.exists()
    assert site.said == [f"app.tar.zst: unpacked into {place} for the scanners"]


def test_what_a_scanner_refuses_reaches_no_engine(site: Site) -> None:
    site.error = IntegrityError("a virus", "", "")
    with pytest.raises(IntegrityError, match="a virus"):
        site.run(Policy(scan=("clamscan",)))
    assert [step[0] for step in site.log] == ["unpack", "scan"]
    assert not (site.folder / "models/.hfship-scan").exists()


def test_what_comes_through_a_pipe_cannot_be_scanned(site: Site) -> None:
    site.opened.archive.files.name = "-"
    with pytest.raises(UsageError, match="cannot be scanned"):
        site.run(Policy(scan=("clamscan",)))
    assert site.log == []


# -- which archive


def archive(name: str, fetched_at: str, is_delta: bool = False, image: Any = "facts") -> Any:
    version = SimpleNamespace(fetched_at=fetched_at)
    return SimpleNamespace(
        name=name,
        archive=SimpleNamespace(manifest=SimpleNamespace(image=image)),
        found=SimpleNamespace(version=version, is_delta=is_delta),
    )


def test_the_image_that_was_fetched_last_is_loaded_and_whole_before_a_delta() -> None:
    old, delta, whole = archive("old", "1"), archive("delta", "2", True), archive("whole", "2")
    for opened in ([old, delta, whole], [whole, delta, old]):
        assert unpack_image.image_in(opened) is whole
    assert unpack_image.image_in([old, delta]) is delta
    foreign: Any = SimpleNamespace()
    assert unpack_image.image_in(foreign) is None
    for none in (archive("m", "3", image=None), archive("n", "3")):
        if none.name == "n":
            none.archive.manifest = None
        assert unpack_image.image_in([old, none]) is None
