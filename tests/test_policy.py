"""The policy of a site: [policy] of a models file, and the variables that win over it."""

from pathlib import Path

import pytest

from hfship.base.errors import UsageError
from hfship.base.policy import (
    CODE_RULES,
    PICKLE_RULES,
    READERS,
    Policy,
    PolicyException,
    is_role,
    read_exception,
    read_policy,
)

SHA = "ab" * 32
FILE = f"""
[policy]
pickle = "refuse"
remote_code = "allow"
max_file = "50G"
licences = ["apache-2.0", "mit", "!mit-0"]
require = ["release", "security", "security"]
keys = "keys"
scan = ["clamscan --no-summary {{}}"]
custody = false

[[policy.exception]]
repo = "org/old"
sha256 = "{SHA}"
reason = "read by us, ticket 12"
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A models file, read: a function of its text."""
    import argparse

    from hfship.commands.modelskeys import models_file

    def read(text):
        path = tmp_path / "models.toml"
        path.write_text(text)
        return models_file(argparse.Namespace(models_file=str(path)))

    return read


def test_a_file_says_the_policy(file, tmp_path):
    policy = read_policy({}, file(FILE))
    assert policy == Policy(
        pickle="refuse",
        remote_code="allow",
        max_file=50_000_000_000,
        licences=("apache-2.0", "mit", "!mit-0"),
        exceptions=(PolicyException("org/old", SHA, "read by us, ticket 12"),),
        require=("release", "security", "security"),
        keys=tmp_path / "keys",
        scan=("clamscan --no-summary {}",),
        custody=False,
    )


def test_without_a_word_all_is_reported_and_nothing_refused():
    assert read_policy({}) == Policy()
    assert (Policy().pickle, Policy().remote_code, Policy().custody) == ("report", "report", True)


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("HFSHIP_POLICY_PICKLE", "weights-only", "pickle", "weights-only"),
        ("HFSHIP_POLICY_REMOTE_CODE", "refuse", "remote_code", "refuse"),
        ("HFSHIP_POLICY_MAX_FILE", "8G", "max_file", 8_000_000_000),
        ("HFSHIP_POLICY_MAX_FILE", "0", "max_file", 0),
        ("HFSHIP_POLICY_LICENCES", "mit, !gpl*", "licences", ("mit", "!gpl*")),
        ("HFSHIP_POLICY_LICENCES", "", "licences", ()),
        ("HFSHIP_POLICY_REQUIRE", "release,legal", "require", ("release", "legal")),
        ("HFSHIP_POLICY_SCAN", "scan -r, {}", "scan", ("scan -r, {}",)),
        ("HFSHIP_POLICY_CUSTODY", "true", "custody", True),
        ("HFSHIP_KEYS", "/etc/keys", "keys", Path("/etc/keys")),
    ],
)
def test_a_variable_wins_over_the_file(variable, text, field, value, file):
    assert getattr(read_policy({variable: text}, file(FILE)), field) == value


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("HFSHIP_POLICY_PICKEL", "refuse", "is no part of the policy"),
        ("HFSHIP_POLICY_PICKLE", "Refuse", "is not one of"),
        ("HFSHIP_POLICY_PICKLE", "", "is not one of"),
        ("HFSHIP_POLICY_MAX_FILE", "large", "is not a size"),
        ("HFSHIP_POLICY_REQUIRE", "a/b", "is not a role"),
        ("HFSHIP_POLICY_REQUIRE", "revoked", "is not a role"),
        ("HFSHIP_POLICY_SCAN", "scan 'x", "is not a command line"),
        ("HFSHIP_POLICY_CUSTODY", "perhaps", "neither true nor false"),
        ("HFSHIP_POLICY_EXCEPTIONS", "x", "is no part of the policy"),
        ("HFSHIP_POLICY_KEYS", "x", "is empty|no part"),
        ("HFSHIP_KEYS", " ", "is empty"),
    ],
)
def test_a_wrong_variable_is_refused(variable, text, said):
    with pytest.raises(UsageError, match=said):
        read_policy({variable: text})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[policy]\npickle = "never"', "is not one of"),
        ("[policy]\npickel = 1", "is not a key"),
        ('[policy]\nmax_file = "big"', "is not a size"),
        ('[policy]\nrequire = ["a b"]', "is not a role"),
        ('[policy]\nscan = [" "]', "is not a command line"),
        ('[[policy.exception]]\nrepo = "a/b"\nreason = "x"', "has no sha256"),
        ('[[policy.exception]]\nrepo = "a/b"\nsha256 = "12"\nreason = "x"', "is no SHA-256"),
        (f'[[policy.exception]]\nrepo = "a/b"\nsha256 = "{SHA}"\nreason = " "', "has no reason"),
        (f'[[policy.exception]]\nrepo = "a/b"\nsha256 = "{SHA}"\nwhy = " "', "is not a key"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(text, said, file):
    with pytest.raises(UsageError, match=said) as error:
        file(text)
    assert "models.toml:" in error.value.what


LICENCES = ("apache-2.0", "llama3*", "!llama3.2")


@pytest.mark.parametrize(
    ("licences", "licence", "refused"),
    [
        ((), "agpl-3.0", False),
        ((), "", False),
        (LICENCES, "Apache-2.0", False),
        (LICENCES, "llama3.1", False),
        (LICENCES, "llama3.2", True),
        (LICENCES, "other", True),
        (LICENCES, "", True),
        (("!agpl*",), "mit", False),
        (("!agpl*",), "", False),
        (("!agpl*",), "AGPL-3.0", True),
    ],
)
def test_licences(licences, licence, refused):
    assert bool(Policy(licences=licences).licence_refusal(licence)) == refused


GOOD = {
    "pickle": [(rule, rule) for rule in ("allow", "report", "weights-only", "refuse")],
    "remote_code": [(rule, rule) for rule in ("allow", "report", "refuse")],
    "max_file": [(0, 0), ("0", 0), ("", 0), (8_000_000, 8_000_000), ("8G", 8_000_000_000)],
    "licences": [
        ("", ()),
        ("x", ("x",)),
        (" x , ,!y,", ("x", "!y")),
        ([" x ", "!!y"], ("x", "!!y")),
        ([], ()),
    ],
    "require": [("release,  a_1", ("release", "a_1")), (["a"], ("a",)), (["a" * 32], ("a" * 32,))],
    "keys": [("/k", Path("/k")), ("k", Path("k")), ("~/k", Path.home() / "k")],
    "scan": [(" a, b {} ", ("a, b {}",)), (["a", " b "], ("a", "b"))],
    "custody": [
        *[(word, True) for word in (True, "true", "YES", "1")],
        *[(word, False) for word in (False, "False", "no", "0")],
    ],
    "bom": [("yes", True), ("no", False)],
}
BAD = {
    "pickle": ["", "all", "ALLOW", None],
    "remote_code": ["", "weights-only"],
    "licences": ["!", ["!!"], [""], "mit,!"],
    "require": ["a b", ["a" * 33], ["1a"], ["_a"], [""], ["revoked"], ["A"]],
    "scan": ["", [""], ["a 'b"]],
    "custody": ["", "2", "ja", None],
    "bom": ["tru"],
}


@pytest.mark.parametrize("key", READERS)
def test_each_value_of_a_key_is_read_or_refused(key):
    for value, read in GOOD[key]:
        found = READERS[key](value)
        assert found == read and type(found) is type(read), value
    for value in BAD.get(key, []):
        with pytest.raises(ValueError, match="is not|is neither"):
            READERS[key](value)


def test_what_a_choice_can_be_is_said():
    for key, rules in (("pickle", PICKLE_RULES), ("remote_code", CODE_RULES)):
        with pytest.raises(ValueError, match=f"'x' is not one of: {', '.join(rules)}"):
            READERS[key]("x")
    assert not is_role("") and not is_role("a\n")


EXCEPTION = {"repo": " org/m ", "sha256": f" {SHA.upper()} ", "reason": " read "}


def test_an_exception_is_for_one_file_of_one_repository():
    exception = read_exception(EXCEPTION)
    assert exception == PolicyException("org/m", SHA, "read")
    policy = Policy(exceptions=(PolicyException("x/y", SHA, "other"), exception))
    for repos, sha256, reason in [
        (["Org/M"], SHA, "read"),
        (["a/b", "org/m"], SHA, "read"),
        (["a/b"], SHA, ""),
        ([], SHA, ""),
        (["org/m"], "0" * 64, ""),
        (["x/y", "org/m"], SHA, "other"),
    ]:
        assert policy.reason_for(repos, sha256) == reason


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        *[(name, " ", f"an exception has no {name}") for name in EXCEPTION],
        ("sha256", SHA + "a", f"'{SHA[:20]}' is no SHA-256: 64 hex digits"),
        ("sha256", SHA[1:], "is no SHA-256"),
        ("sha256", SHA[1:] + "g", "is no SHA-256"),
    ],
)
def test_an_exception_has_all_its_parts(name, text, said):
    with pytest.raises(ValueError, match=said):
        read_exception({**EXCEPTION, name: text})
    with pytest.raises(ValueError, match=f"an exception has no {name}"):
        read_exception({key: value for key, value in EXCEPTION.items() if key != name})


@pytest.mark.parametrize(
    ("licences", "licence", "said"),
    [
        (LICENCES, "Llama3.2", "licences: !llama3.2"),
        (LICENCES, "other", "licences: other is not one of apache-2.0, llama3*"),
        (LICENCES, "", "licences: no licence is known"),
        (("!AGPL*",), "agpl-3.0", "licences: !AGPL*"),
        (("MIT",), "mit", ""),
        (("agpl*", "!agpl-3.0"), "agpl-3.0", "licences: !agpl-3.0"),
    ],
)
def test_the_rule_that_refuses_a_licence_is_named(licences, licence, said):
    assert Policy(licences=licences).licence_refusal(licence) == said


def test_keys_lie_where_the_file_or_the_operator_says(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_policy({"HFSHIP_KEYS": "a/../k"}).keys == tmp_path / "k"
    read = file('[policy]\nkeys = "/abs"')
    assert read_policy({}, read).keys == Path("/abs")
    assert read_policy({"HFSHIP_KEYS": "/of/me"}, read).keys == Path("/of/me")
    assert read_policy({}, file("[policy]\nbom = false")).keys is None
    assert read_policy({"HFSHIP_KEY": "x", "XHFSHIP_POLICY_PICKLE": "x"}) == Policy()


@pytest.mark.parametrize(
    ("variable", "text", "what", "why", "step"),
    [
        (
            "HFSHIP_POLICY_KEYS",
            "x",
            "HFSHIP_POLICY_KEYS is no part of the policy",
            "",
            "set one of: HFSHIP_POLICY_PICKLE, HFSHIP_POLICY_REMOTE_CODE, HFSHIP_POLICY_MAX_FILE, "
            "HFSHIP_POLICY_LICENCES, HFSHIP_POLICY_REQUIRE, HFSHIP_POLICY_SCAN, "
            "HFSHIP_POLICY_CUSTODY, HFSHIP_POLICY_BOM, HFSHIP_KEYS",
        ),
        (
            "HFSHIP_KEYS",
            " ",
            "HFSHIP_KEYS is empty",
            "it names the folder of trusted keys",
            "correct it, or: unset HFSHIP_KEYS",
        ),
        (
            "HFSHIP_POLICY_BOM",
            "x",
            "HFSHIP_POLICY_BOM: 'x' is neither true nor false",
            "",
            "correct it, or: unset HFSHIP_POLICY_BOM",
        ),
    ],
)
def test_a_wrong_variable_is_told_with_what_to_do(variable, text, what, why, step):
    with pytest.raises(UsageError) as caught:
        read_policy({variable: text})
    assert (caught.value.what, caught.value.why, caught.value.next_step) == (what, why, step)
