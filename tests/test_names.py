"""What an operator names is found where it may be, or one is told where it was looked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Optional

import pytest

from conftest import Program
from hfship.base.errors import NotFoundError, UsageError
from hfship.base.manifest import Source, make_manifest, write_manifest
from hfship.base.report import Reporter
from hfship.base.settings import ListedModel, ModelsFile, load_settings
from hfship.commands.context import Context
from hfship.commands.names import (
    find_folder,
    find_model,
    job_or_deployment,
    log_folders,
    named_deployment,
    readable_deployments,
)
from hfship.commands.parser import parse_words
from hfship.ops.jobs import Job, new_record, write_job
from hfship.serve.deployments import Deployment, write_deployment
from hfship.serve.terms import Plan
from hfship.site.record import SiteRecord, write_record
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
