"""The policy of a site: [policy] of a models file, and the variables that win over it."""

from pathlib import Path

import pytest

from hfship.base.errors import UsageError
from hfship.base.policy import Policy, PolicyException, read_policy

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
