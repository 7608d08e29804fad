# SPDX-License-Identifier: Apache-2.0
"""`clean --images`: which images go, and that a kill leaves no half of one; test_images.py has docker."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import Exit, UsageError
from hfship.base.imagefacts import ImageFacts
from hfship.base.locks import FolderLock, InUseError
from hfship.base.manifest import FileEntry, make_manifest, write_manifest
from hfship.base.values import replace
from hfship.commands import clean_images

DIGESTS = ["sha256:" + letter * 64 for letter in "abcd"]
FACTS = ImageFacts("docker.io/vllm/app:1", *DIGESTS[:3], (DIGESTS[3],), "linux/amd64")


class Site:
    """Folders of images and of a model, and a docker that notes what it removes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.removed: List[str] = []
        self.said: List[str] = []
        self.json: Dict[str, Any] = {}
        for name, image in (("a_model", None), ("app_1", FACTS), ("app_2", FACTS)):
            (root / name).mkdir()
            (root / name / "oci-layout").touch()
            files = [FileEntry(one, 700, "0" * 64) for one in ("x", "y")]
            write_manifest(root / name, replace(make_manifest(name, files), image=image))
        (root / "b_unfinished").mkdir()
        (root / "b_unfinished/oci-layout").touch()

    def unused(self) -> List[Any]:
        sizes = {"id1": 100, "id2": 200, "id3": 300}
        return [SimpleNamespace(id=one, name=f"n{one}", size=sizes[one]) for one in sizes]

    def clean(self, **args: Any) -> Exit:
        given = {"images": "folders", "json": True, "dry_run": False, "yes": True, **args}
        reporter = SimpleNamespace(
            result=self.said.append, warn=self.said.append, result_json=self.json.update
        )
        settings = SimpleNamespace(models_dir=self.root)
        context: Any = SimpleNamespace(
            args=argparse.Namespace(**given), settings=settings, reporter=reporter
        )
        return clean_images.clean_images(context)

    @property
    def left(self) -> List[str]:
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    deployments = [SimpleNamespace(plan=SimpleNamespace(image_id="id2"))]
    monkeypatch.setattr("hfship.serve.engines.unused_images", made.unused)
    monkeypatch.setattr("hfship.serve.engines.remove_image", made.removed.append)
    monkeypatch.setattr("hfship.commands.names.readable_deployments", lambda *_: list(deployments))
    return made


def test_folders_of_images_go_and_nothing_else(site: Site) -> None:
    assert site.clean() == Exit.OK
    assert site.left == ["a_model", "b_unfinished"] and site.removed == []
    first, second = site.json["leftovers"]
    assert first == {
        "where": str(site.root / "app_1"),
        "what": "image vllm/app:1, fetched",
        "files": 2,
        "bytes": 1400,
        "kept": None,
        "paths": [str(site.root / "app_1")],
    }
    assert second["where"] == str(site.root / "app_2")
    assert (site.json["removed"], site.json["freed"]) == (2, 2800)


def test_images_of_docker_go_that_no_deployment_uses(site: Site) -> None:
    assert site.clean(images="docker") == Exit.OK
    assert site.removed == ["id1", "id3"] and "app_1" not in site.left
    rows = [
        (row["where"], row["what"], row["files"], row["bytes"]) for row in site.json["leftovers"]
    ]
    assert rows[2:] == [
        ("docker", "image nid1, unused", 1, 100),
        ("docker", "image nid3, unused", 1, 300),
    ]


@pytest.mark.parametrize("args", [{"dry_run": True}, {"yes": False}])
def test_nothing_goes_unless_it_is_wanted(args: Dict[str, Any], site: Site) -> None:
    before = site.left
    if args.get("yes") is False:
        with pytest.raises(UsageError, match="nothing was removed"):
            site.clean(images="docker", **args)
    else:
        site.clean(images="docker", **args)
        assert site.json["removed"] == 0
    assert site.left == before and site.removed == []


def test_an_image_that_somebody_works_on_stays(site: Site) -> None:
    with FolderLock(site.root / "app_1"), pytest.raises(InUseError):
        site.clean()
    assert "app_1" in site.left


def test_what_a_kill_leaves_counts_as_unfinished(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        assert not (folder / ".hfship/manifest.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("hfship.commands.clean_images.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        site.clean()
    monkeypatch.undo()
    clean_images._remove_folder(site.root / "app_1")  # which has no manifest
    assert "app_1" not in site.left
