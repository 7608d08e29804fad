"""Settings: endpoint, token and folders, from the environment."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest

from hfship.base.errors import AuthError, UsageError
from hfship.base.settings import (
    DEFAULT_ENDPOINT,
    FOLDERS,
    ListedModel,
    ModelsFile,
    Token,
    cache_folder,
    checked_endpoint,
    checked_token,
    expanded_path,
    find_token,
    home_path,
    hub_path,
    known_fields,
    load_settings,
    parse_rate,
    parse_size,
    read_token_file,
    typed_fields,
)
from hfship.base.values import dataclass


@pytest.mark.parametrize(
    "url",
    [
        "http://h:abc",
        "http://[::1",
        "http://a..b",
        "ftp://h",
        "http://",
        "http://h\nx",
        "http://h x",
        "http://h?a=b",
        "http://h/#x",
        "'http://h'",
        "http://h:70000",
        "h",
    ],
)
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not an http"):
        load_settings({}, url)


@pytest.mark.parametrize("url", [" https://hub", "https://hub/ ", "\thttps://hub\r\n"])
@pytest.mark.parametrize("source", ["flag", "environment"])
def test_blanks_around_an_endpoint_mean_nothing(url: str, source: str) -> None:
    """A file with HF_ENDPOINT in it may have them, and line ends of Windows."""
    if source == "flag":
        assert load_settings({}, url).endpoint == "https://hub"
    else:
        assert load_settings({"HF_ENDPOINT": url}).endpoint == "https://hub"


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_endpoint_is_none(blank: str) -> None:
    assert load_settings({"HF_ENDPOINT": blank}, blank).endpoint == DEFAULT_ENDPOINT


@pytest.mark.parametrize(
    "url",
    [
        "http://bob:hunter2@hub",
        "http://hunter2@hub",
        "http://bob:hunter2/x@hub",
        "bob:hunter2@hub",
        "http://bob:hunter2#@hub",
    ],
)
def test_an_endpoint_with_a_password_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UsageError, match="user name") as caught:
        load_settings({"HF_ENDPOINT": url})
    assert "hunter2" not in caught.value.text() and "~/.netrc" in caught.value.text()


def test_a_token_does_not_show_in_its_repr() -> None:
    assert "secret" not in repr(Token("secret", "here"))


@pytest.mark.parametrize(
    "env, expected",
    [
        ({"HF_TOKEN": " hf_a \n"}, ("hf_a", "environment variable HF_TOKEN")),
        (
            {"HUGGING_FACE_HUB_TOKEN": "hf_b"},
            ("hf_b", "environment variable HUGGING_FACE_HUB_TOKEN"),
        ),
        (
            {"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "hf_b"},
            ("hf_b", "environment variable HUGGING_FACE_HUB_TOKEN"),
        ),
        ({"HF_TOKEN": "hf_a", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, None),
        ({"HF_TOKEN_PATH": "{tmp}/token"}, ("hf_file", "file {tmp}/token")),
        ({"HF_HOME": "{tmp}"}, ("hf_file", "file {tmp}/token")),
        ({"XDG_CACHE_HOME": "{tmp}/cache"}, ("hf_xdg", "file {tmp}/cache/huggingface/token")),
        ({"HF_HOME": "{tmp}/nowhere"}, None),
    ],
)
def test_token_sources(env: Dict[str, str], expected: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_file\n")
    (tmp_path / "cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "cache" / "huggingface" / "token").write_text("hf_xdg")
    found = find_token({key: value.format(tmp=tmp_path) for key, value in env.items()})
    assert (found and (found.value, found.source)) == (
        expected and (expected[0], expected[1].format(tmp=tmp_path))
    )


def test_folders_come_from_the_environment() -> None:
    settings = load_settings({"HFSHIP_MODELS_DIR": "~/m", "HF_ENDPOINT": "http://mirror/"})
    assert settings.models_dir == Path.home() / "m" and settings.endpoint == "http://mirror"
    assert settings.site_models_dir == Path("/data/models/huggingface")


@pytest.mark.parametrize(
    "text", ["", "-1", "1.", "4X", "1e3", "G", "1 2", "9" * 400, "9" * 400 + "G"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """Also a number that is infinite as a float."""
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@dataclass(frozen=True)
class Kept:
    """What may be read back from JSON, a field of each type."""

    name: str = ""
    names: Tuple[str, ...] = ()
    share: float = 0.0
    count: int = 0
    code: Optional[int] = None


@pytest.mark.parametrize(
    "values, fields",
    [
        ({}, {}),
        ({"name": "m", "of a later version": 1}, {"name": "m"}),
        ({"names": ["a", "b"]}, {"names": ("a", "b")}),
        ({"share": 1, "count": 2}, {"share": 1, "count": 2}),
        ({"share": 0.5}, {"share": 0.5}),
        ({"code": None}, {"code": None}),
        ({"code": 130}, {"code": 130}),
    ],
)
def test_fields_are_read_back(values: Dict[str, Any], fields: Dict[str, Any]) -> None:
    """A list as a tuple; what a later version has added is left out."""
    assert known_fields(Kept, values) == typed_fields(Kept(), values) == fields


@pytest.mark.parametrize(
    "name, value",
    [
        ("name", 1),
        ("name", None),
        ("names", "ab"),
        ("share", "1"),
        ("share", float("nan")),
        ("share", float("inf")),
        ("share", -1e18),
        ("count", 1.5),
        ("count", None),
        ("count", 10**18),
        ("code", "0"),
    ],
)
def test_a_field_of_another_type_is_not_read_back(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is not what it should be"):
        typed_fields(Kept(), {name: value})


# -- homes


def nobody(_: object) -> None:
    raise KeyError


@pytest.mark.parametrize("home", [None, "", ".", "relative/home"])
@pytest.mark.parametrize("text", ["~", "~/models", "~/"])
def test_without_a_home_there_is_no_path_in_it(
    home: Optional[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert home_path(text) == Path(pwd.getpwuid(os.getuid()).pw_dir, text[2:])
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UsageError, match="nobody knows your home") as error:
        home_path(text)
    assert "export HOME=" in error.value.next_step
    with pytest.raises(UsageError):
        load_settings({})
    assert find_token({}) is None


@pytest.mark.parametrize("text", ["~nobody-here", "~nobody-here/x", "~a~b"])
def test_the_home_of_nobody_is_no_folder(text: str) -> None:
    with pytest.raises(UsageError, match="there is no user"):
        home_path(text)


@pytest.mark.parametrize("text", ["./~x", "a/~/b", "/~", "x~"])
def test_a_tilde_elsewhere_is_one(text: str) -> None:
    assert home_path(text) == Path(text)


def test_folders_that_are_all_set_need_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    env = {folder.variable: "/data" for folder in FOLDERS.values()}
    assert load_settings(env).log_dir == Path("/data")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b" hf_secret\n", "hf_secret"),
        (b"", "it is empty"),
        (b"two words", "it is empty, or has spaces"),
        (b"\xff", "can't decode byte"),
        (None, "No such file or directory"),
    ],
)
def test_a_token_file_holds_a_token_or_says_why_not(
    content: Any, found: str, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    try:
        token = read_token_file(path)
    except AuthError as exc:
        assert str(path) in exc.what and found in exc.why
        assert found != "No such file or directory" or exc.why == found
        assert "words" not in str(exc)
    else:
        assert (token.value, token.source) == (found, f"file {path}")


def test_a_token_file_of_nobody_is_told_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    said: List[str] = []
    monkeypatch.setattr("hfship.base.settings.read_small", refuse)
    assert find_token({"HF_TOKEN_PATH": str(tmp_path / "t")}, said.append) is None
    assert said == [
        f"the token file {tmp_path / 't'} cannot be read (Permission denied): going on without a token"
    ]


@pytest.mark.parametrize(
    ("env", "path"),
    [
        ({"A": "/a", "B": "/b", "HF_HOME": "/h"}, "/a"),
        ({"A": "", "B": "/b", "HF_HOME": "/h"}, "/b"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/c"}, "/h/hub"),
        ({"HF_HOME": "", "XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"XDG_CACHE_HOME": ""}, "HOME/.cache/huggingface/hub"),
    ],
)
def test_a_path_of_huggingface_hub(
    env: Dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert str(hub_path(env, "hub", "A", "B")) == path.replace("HOME", "/home/me")


@pytest.mark.parametrize(
    ("text", "bytes_or_step"),
    [
        ("1k", 1000),
        ("1KiB", 1024),
        ("1 T", 10**12),
        ("1e3", "write it like 4300M, 4.7G or 4GiB"),
        ("9" * 19, "write it like 4300M, 4.7G or 4GiB"),
        ("1" + "0" * 18, 10**18),
        ("80Mbit/s", "80MB/s, or 10MB/s if you mean bits"),
        ("8 kbps", "8KB/s, or 1KB/s if you mean bits"),
        ("1M/second", 10**6),
        ("1Mps", 10**6),
    ],
)
def test_rates_are_bytes(text: str, bytes_or_step: Any) -> None:
    if isinstance(bytes_or_step, int):
        assert parse_rate(text) == bytes_or_step
    else:
        with pytest.raises(UsageError) as caught:
            parse_rate(text)
        assert caught.value.next_step == bytes_or_step


@pytest.mark.parametrize(
    "env, folder",
    [
        ({"HFSHIP_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"HFSHIP_CACHE": "", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/hfship"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/hfship"),
        ({"HFSHIP_CACHE": "relative", "HOME": "/h"}, None),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, None),
    ],
)
def test_what_can_be_made_anew_is_kept_in_a_cache(
    env: Dict[str, str], folder: Optional[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HFSHIP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == (Path(folder) if folder else None)


@pytest.mark.parametrize("name", FOLDERS)
def test_each_folder_is_set_by_its_variable_its_key_or_not_at_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DEEP", "deep")
    variable, default = FOLDERS[name]
    plain = Path(default.replace("~", "/home/me"))
    assert getattr(load_settings({}), name) == plain
    assert getattr(load_settings({variable: ""}), name) == plain
    assert getattr(load_settings({variable: "rel/$DEEP"}), name) == Path("rel/deep")
    file = ModelsFile(tmp_path / "m.toml", {name: "$DEEP/x"}, (), ListedModel(""))
    assert getattr(load_settings({}, None, file), name) == tmp_path / "deep" / "x"
    assert getattr(load_settings({variable: "/e"}, None, file), name) == Path("/e")
    empty = ModelsFile(tmp_path / "m.toml", {}, (), ListedModel(""))
    assert getattr(load_settings({}, None, empty), name) == plain
    assert expanded_path("~/$DEEP") == Path("/home/me/deep")


@pytest.mark.parametrize(
    "url, endpoint",
    [
        ("https://hub.box/", "https://hub.box"),
        ("https://hub.box//", "https://hub.box"),
        ("http://hub:8080/below/x", "http://hub:8080/below/x"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("https://hub.site.", "https://hub.site."),
    ],
)
def test_an_endpoint_ends_without_a_slash(url: str, endpoint: str) -> None:
    file = ModelsFile(Path("/m.toml"), {"endpoint": url}, (), ListedModel(""))
    assert load_settings({}, url).endpoint == endpoint
    assert load_settings({"HF_ENDPOINT": url}, " ").endpoint == endpoint
    assert load_settings({"HF_ENDPOINT": " "}, None, file).endpoint == endpoint
    assert load_settings({"HF_ENDPOINT": "http://e"}, "http://f", file).endpoint == "http://f"


def test_what_is_wrong_with_an_endpoint_is_told() -> None:
    for url in ("http://hub:0", "http://", "x"):
        with pytest.raises(UsageError) as caught:
            checked_endpoint(url)
        assert caught.value.what == f"endpoint {url!r} is not an http(s) URL"
        assert caught.value.next_step == "give --endpoint https://HOST or set HF_ENDPOINT"
    with pytest.raises(UsageError, match="user name in it"):
        checked_endpoint("http://a@b:x")
    with pytest.raises(UsageError, match="is not an http"):
        checked_endpoint("http://hub/x?a@b")


def test_a_model_is_called_by_any_of_its_names() -> None:
    first = ListedModel("a", "org/A@v1", serve={"name": "Chat"})
    second = ListedModel("b")
    file = ModelsFile(Path("/m.toml"), {}, (first, second), ListedModel(""))
    assert (first.deployment, second.deployment) == ("Chat", "b")
    assert ListedModel("a", serve={"name": ""}).deployment == "a"
    assert file.known == {"org/A": first, "Chat": first, "a": first, "b": second}
    for word, found in {"org/a": first, "CHAT": first, "B": second, "c": None, "": None}.items():
        assert file.called(word) is found


@pytest.mark.parametrize("value", ["", "a b", "a\n", "\u00e9", "a\x7f"])
def test_a_token_can_be_sent_in_a_header(value: str) -> None:
    assert checked_token("!~", "here") == Token("!~", "here")
    with pytest.raises(AuthError) as caught:
        checked_token(value, "env X")
    error = caught.value
    assert error.what == "the token from env X is not a token"
    assert error.next_step == "copy it again from your Hub's settings page"


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_token_that_is_none_is_told_with_its_variable(variable: str) -> None:
    with pytest.raises(AuthError, match=f"environment variable {variable} is not a token"):
        find_token({variable: "a b"})


def test_no_token_is_looked_for_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: List[str] = []
    assert find_token({"HF_TOKEN_PATH": str(tmp_path / "file" / "x")}, said.append) is None
    assert find_token({"HF_TOKEN_PATH": str(tmp_path)}, said.append) is None
    assert (
        len(said) == 1 and f"the token file {tmp_path} cannot be read (it is a folder)" in said[0]
    )
