"""What an operator names is found where it may be, or one is told where it was looked for."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any, List, Optional, Tuple

import pytest

from conftest import Program
from hfship.base.errors import HostError, NotFoundError, UsageError
from hfship.base.manifest import Source, make_manifest, write_manifest
from hfship.base.report import Reporter
from hfship.base.settings import ListedModel, ModelsFile, load_settings
from hfship.commands.context import Context
from hfship.commands.names import (
    archive_names,
    archive_word,
    find_folder,
    find_model,
    job_or_deployment,
    log_folders,
    model_names,
    named_archives,
    named_deployment,
    readable_deployments,
    repo_named,
    served_folder,
    word_for,
)
from hfship.commands.parser import parse_words
from hfship.ops.jobs import Job, new_record, write_job
from hfship.serve.deployments import Deployment, write_deployment
from hfship.serve.terms import Plan
from hfship.site.record import SiteRecord, write_record
from support import archives as a
from support.hub import FaultHub


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """`stop` on a machine with the job fetch-x, the deployment chat, and both, a job and a
    deployment, of the name both."""
    folders = {
        f"HFSHIP_{name}_DIR": str(tmp_path / name.lower())
        for name in ("MODELS", "SITE_MODELS", "DEPLOY", "LOG")
    }
    args, given = parse_words(["stop", "x"])
    made = Context(args, load_settings(folders), Reporter("none"), given)
    made.settings.log_dir.mkdir()
    for name in ("chat", "both"):
        write_deployment(made.settings.deploy_dir / name, Plan(name=name), made.reporter)
    for name in ("fetch-x", "both"):
        write_job(made.settings.log_dir, new_record(name, ["fetch", "x"], False, {}))
    return made


@pytest.mark.parametrize("name, kind", [("fetch-x", Job), ("both", Job), ("chat", Deployment)])
def test_a_name_means_a_job_before_a_deployment(name: str, kind: type, context: Context) -> None:
    found = job_or_deployment(context, name)
    assert isinstance(found, kind)
    assert name == (found.plan.name if isinstance(found, Deployment) else found.record.name)


@pytest.mark.parametrize(
    "name, step",
    [
        ("chatt", "hfship stop chat"),
        ("fetch-y", "hfship stop fetch-x"),
        ("../deploy/chat", "hfship "),
        ("zzzzzz", "hfship watch --once"),
    ],
)
def test_of_an_unknown_name_it_is_said_what_there_is(
    name: str, step: str, context: Context
) -> None:
    with pytest.raises(NotFoundError, match="no such deployment or job") as caught:
        job_or_deployment(context, name)
    assert f"{context.settings.deploy_dir} there are: both, chat\n" in caught.value.why
    assert "fetch-x" in caught.value.why and caught.value.next_step.startswith(step)


def test_a_deployment_is_found_by_its_name(context: Context) -> None:
    assert named_deployment(context, "chat").plan.name == "chat"
    assert [found.plan.name for found in readable_deployments(context)] == ["both", "chat"]
    with pytest.raises(NotFoundError, match="no such deployment: fetch-x") as caught:
        named_deployment(context, "fetch-x")
    assert caught.value.next_step == "hfship stop both\nhfship stop chat"


@pytest.mark.parametrize("find", [named_deployment, job_or_deployment])
def test_what_a_control_host_placed_elsewhere_is_named_with_its_hosts(
    find: Any, context: Context
) -> None:
    record = SiteRecord(places={"large": ("gpu1", "gpu2"), "gone": ()})
    write_record(context.settings.deploy_dir, record)
    with pytest.raises(NotFoundError, match="it was placed on gpu1, gpu2") as caught:
        find(context, "large")
    assert caught.value.next_step == "on gpu1: hfship stop large\non gpu2: hfship stop large"
    with pytest.raises(NotFoundError, match="no such deployment"):
        find(context, "gone")


def test_logs_are_looked_for_in_our_folder_first(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home/bob/logs").mkdir(parents=True)
    monkeypatch.setattr("hfship.ops.jobs.OTHER_LOGS", str(tmp_path / "home/*/logs"))
    context.args.also = [str(tmp_path / "also"), str(tmp_path / "log")]
    expected = [tmp_path / "log", tmp_path / "also", tmp_path / "home/bob/logs"]
    assert log_folders(context) == expected


@pytest.mark.parametrize(
    "name, found",
    [
        ("m", "models/m"),
        ("n", "site_models/n"),
        ("here", "here"),
        ("./m", None),
        ("site_models/m", "site_models/m"),
        (".", "."),
        ("none", None),
    ],
)
def test_a_model_is_looked_for_in_the_models_folders_and_here(
    name: str,
    found: Optional[str],
    context: Context,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder in ("models/m", "site_models/m", "site_models/n", "here"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = context.settings
    folders = [settings.models_dir, settings.site_models_dir]
    if found is not None:
        assert find_folder(name, folders) == find_model(name, settings) == tmp_path / found
        return
    assert find_folder(name, folders) is None
    with pytest.raises(NotFoundError) as caught:
        find_model(name, settings, [tmp_path / "also"])
    looked = ["looked in:", *map(str, [tmp_path / "also", *folders, tmp_path])]
    assert caught.value.why == ("" if "/" in name else "\n".join(looked))


# -- what a name may look like


def put_model(folder: Path, repo: str = "") -> None:
    """A model folder, which the Hub's repository `repo` vouches for."""
    source = None
    if repo:
        source = Source("https://hub", repo, "main", repo, "a" * 40)
    write_manifest(folder, make_manifest(folder.name, [], source))


@pytest.mark.parametrize(
    "name, found",
    [
        ("Qwen3-8B", "models/Qwen3-8B"),
        ("qwen3-8b", "models/Qwen3-8B"),
        ("Qwen/Qwen3-8B", "models/Qwen3-8B"),
        ("qwen/QWEN3-8b", "models/Qwen3-8B"),
        ("Other/Qwen3-8B", None),
        ("m", "models/m"),  # exactly so, before M
        ("org/two", "models/org/two"),
        ("two", "models/org/two"),
        ("Org/Two", "models/org/two"),
        ("x/m", None),  # nobody says that it is of x
        ("./qwen3-8b", None),
        ("models/qwen3-8b", None),  # a path
    ],
)
def test_a_model_is_called_by_org_and_name_and_with_any_capitals(
    name: str,
    found: Optional[str],
    context: Context,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_model(tmp_path / "models/Qwen3-8B", "Qwen/Qwen3-8B")
    put_model(tmp_path / "models/M")
    put_model(tmp_path / "models/m")
    put_model(tmp_path / "models/org/two")
    monkeypatch.chdir(tmp_path)
    folders = [context.settings.models_dir, context.settings.site_models_dir]
    expected = None if found is None else tmp_path / found
    assert find_folder(name, folders) == expected


def test_a_model_is_called_by_its_name_in_the_api(context: Context, tmp_path: Path) -> None:
    model = tmp_path / "elsewhere"
    put_model(model)
    plan = Plan(name="served", model_dir=str(model), served_names=("GPT", "org/gpt"))
    write_deployment(context.settings.deploy_dir / "served", plan, context.reporter)
    assert find_model("gpt", context.settings) == model
    for name in ("served", "Served", "GPT", "gpt", "org/gpt"):
        assert named_deployment(context, name).plan.name == "served"
        found = job_or_deployment(context, name)
        assert isinstance(found, Deployment) and found.plan.name == "served"
    other = Plan(name="other", served_names=("GPT",))
    write_deployment(context.settings.deploy_dir / "other", other, context.reporter)
    with pytest.raises(UsageError, match="gpt means other and served") as caught:
        named_deployment(context, "gpt")
    assert caught.value.next_step == "hfship stop other\nhfship stop served"
    found = job_or_deployment(context, "FETCH-X")
    assert isinstance(found, Job)


def test_of_a_slip_the_nearest_model_is_named(context: Context, tmp_path: Path) -> None:
    put_model(tmp_path / "models/Qwen3-8B")
    with pytest.raises(NotFoundError, match="did you mean Qwen3-8B?"):
        find_model("Qwen3-8", context.settings)


def test_archives_are_called_by_org_and_name(
    pyz: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": hub.url}
    pyz("fetch", "org/tiny", env=env)
    again = pyz("fetch", "Tiny", env=env)
    assert "Tiny is org/tiny, as it was fetched before" in again.stderr
    pyz("pack", "ORG/tiny")
    assert "ok: " in pyz("verify", "org/tiny", "Tiny.tar.zst").stdout
    shutil.rmtree(pyz.home / "models/tiny")
    assert "ok: " in pyz("verify", "org/Tiny").stdout
    refused = pyz("verify", "other/tiny", code=5).stderr
    assert "other/tiny was not found" in refused
    assert "did you mean tiny?" in pyz("unpack", "tyny", code=5).stderr
    assert "/site/tiny" in pyz("unpack", "org/tiny").stdout
    assert "did you mean tiny?" in pyz("serve", "tinyy", code=None).stderr
    missed = pyz("fetch", "gpt9", env=env, code=5).stderr
    assert "most models are called ORG/gpt9" in missed


def test_a_models_file_takes_other_capitals(tmp_path: Path) -> None:
    one = ListedModel("m", "Org/M")
    file = ModelsFile(tmp_path, {}, (one,), ListedModel(""))
    assert file.called("org/m") is one and file.called("M") is one and file.called("x") is None


def test_a_name_that_is_empty_means_nothing(tmp_path: Path) -> None:
    """An unset variable of a script; it would mean the folder of all models."""
    with pytest.raises(UsageError, match="the name of a model is empty"):
        find_folder("", [tmp_path])


# -- archives, and repositories


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> List[Path]:
    """Folders with the archives Tiny, of Org/Tiny, and loose, of nobody; and one that is not there."""
    put_model(tmp_path / "models/Tiny", "Org/Tiny")
    put_model(tmp_path / "models/loose")
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "none"]
    for name, folder in zip(("Tiny", "loose"), folders):
        a.pack(tmp_path / "models" / name, folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folders


@pytest.mark.parametrize(
    "word, means",
    [
        ("Tiny", "Tiny"),
        ("tiny", "Tiny"),
        ("org/TINY", "Tiny"),
        ("other/tiny", "other/tiny"),
        ("tiny.tar.ZST", "Tiny"),
        ("org/loose", "org/loose"),
        ("LOOSE", "loose"),
        ("./tiny", "./tiny"),
        ("tin", "tin"),
    ],
)
def test_the_word_by_which_an_archive_is_found(word: str, means: str, places: List[Path]) -> None:
    assert archive_word(word, places) == means


def test_an_archive_that_cannot_be_opened_is_of_nobody(places: List[Path]) -> None:
    [path] = places[0].glob("*.zst")
    path.write_bytes(b"x" * 100)
    assert archive_word("org/tiny", places) == "org/tiny"


def test_archives_are_named_once_whatever_their_place(places: List[Path], tmp_path: Path) -> None:
    assert archive_names(places) == ["Tiny", "loose"]
    shutil.copy(places[1] / "loose.tar.zst", tmp_path / "here")
    assert archive_names(places) == ["loose", "Tiny"]
    found = named_archives("LOOSE", places, "")
    assert {files.folder.resolve() for files in found} == {tmp_path / "here", places[1]}


@pytest.mark.parametrize(
    "word, what, step",
    [
        ("tinyy", "no archive tinyy; did you mean Tiny?", "hfship STEP Tiny"),
        ("zzz", "no archive zzz", "STEP"),
        ("./zzz", "no archive ./zzz", "STEP"),
    ],
)
def test_of_an_archive_that_is_nowhere_it_is_said_where_one_looked(
    word: str, what: str, step: str, places: List[Path], tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError) as caught:
        named_archives(word, places, "STEP")
    assert caught.value.what.startswith(what)
    looked = ", ".join(map(str, [tmp_path / "here", *places]))
    assert caught.value.why == ("" if "/" in word else f"looked in {looked}")
    assert ("Tiny" in caught.value.next_step) == (word == "tinyy")
    if word != "tinyy":
        assert caught.value.next_step == step


# What was typed: what it means, where Tiny was fetched from Org/Tiny.
NAMED: List[Tuple[str, str]] = [
    ("Tiny", "Org/Tiny"),
    ("tiny", "Org/Tiny"),
    ("tiny@v1", "Org/Tiny@v1"),
    ("loose", "loose"),
    ("torn", "torn"),
    ("bare", "bare"),
    ("gpt2", "gpt2"),
    ("Org/Tiny", "Org/Tiny"),
    ("unknown@v1", "unknown@v1"),
]


@pytest.mark.parametrize("typed, repo", NAMED)
def test_a_name_means_the_repository_that_it_was_fetched_from(
    typed: str, repo: str, context: Context, tmp_path: Path
) -> None:
    put_model(tmp_path / "models/Tiny", "Org/Tiny")
    put_model(tmp_path / "models/gpt2", "gpt2")
    put_model(tmp_path / "models/loose")
    (tmp_path / "site_models/torn/.hfship").mkdir(parents=True)
    (tmp_path / "site_models/torn/.hfship/manifest.json").write_text("{")
    (tmp_path / "site_models/bare").mkdir()
    err = io.StringIO()
    assert repo_named(typed, context.settings, Reporter("plain", 0, io.StringIO(), err)) == repo
    is_said = "as it was fetched before" in err.getvalue()
    assert is_said == (typed != repo)


def test_models_are_listed_and_have_a_shortest_word(context: Context, tmp_path: Path) -> None:
    put_model(tmp_path / "models/m")
    put_model(tmp_path / "models/org/two")
    put_model(tmp_path / "site_models/m")
    folders = [context.settings.models_dir, context.settings.site_models_dir, tmp_path / "none"]
    (tmp_path / "models/file").touch()
    assert model_names(folders) == ["m", "org", "two", "m"]
    assert word_for(tmp_path / "models/m", folders) == "m"
    assert word_for(tmp_path / "site_models/m", folders) == str(tmp_path / "site_models/m")
    assert word_for(tmp_path / "models/org/two", folders) == "two"


def test_a_folder_that_is_served_is_there_still(context: Context, tmp_path: Path) -> None:
    plan = Plan(name="gone", model_dir=str(tmp_path / "gone"), served_names=("m",))
    write_deployment(context.settings.deploy_dir / "gone", plan, context.reporter)
    assert served_folder("m", context.settings) is None
    put_model(tmp_path / "gone")
    assert served_folder("M", context.settings) == tmp_path / "gone"
    assert served_folder("other", context.settings) is None


def test_a_place_that_may_not_be_looked_into_is_said(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def stat(path: Any, *given: Any, **named: Any) -> Any:
        if str(path) == str(tmp_path / "models"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *given, **named)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        find_model("m", context.settings)
    looked = [f"{tmp_path}/models (permission denied)", f"{tmp_path}/site_models", str(tmp_path)]
    assert caught.value.why.splitlines() == ["looked in:", *looked]


@pytest.mark.parametrize("error", [None, HostError("no folder")])
def test_deployments_that_cannot_be_read_are_told_to_who_asks(
    error: Optional[HostError], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*_: Any) -> Any:
        if error:
            raise error
        return ["d"], {"x": HostError("x is torn"), "y": HostError("y is torn")}

    monkeypatch.setattr("hfship.serve.deployments.list_deployments", listed)
    told: List[str] = []
    found: Any = readable_deployments(context, told.append)
    if error:
        assert (found, told) == ([], ["no folder"])
    else:
        assert (found, told) == (["d"], ["x is torn", "y is torn"])
    assert readable_deployments(context) == found, "and nobody needs to be told"


def test_a_name_means_a_deployment_by_the_reader_that_is_asked_for(context: Context) -> None:
    read: List[Path] = []

    def reads(folder: Path, reporter: Reporter) -> Any:
        read.append(folder)
        return None

    with pytest.raises(NotFoundError):
        named_deployment(context, "chat", reads)
    assert context.settings.deploy_dir / "chat" in read
