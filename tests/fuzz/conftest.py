"""How hostile input is generated.

In the suite each test draws the same few examples every time, and all of `tests/fuzz` takes at most three minutes.
With HFSHIP_FUZZ_SECONDS=N they draw other examples each time, and so many that the whole takes about N seconds;
`make fuzz` does so again and again (see run.py). A found input is kept as an `@example` of its test, or as a row of
its table; a seed that found one, in seeds.txt.

    @given(archives())
    @fuzzed(examples=50)
    def test_reader_is_never_surprised(...): ...
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import List

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
SUITE_SECONDS = 180
SECONDS = float(os.environ.get("HFSHIP_FUZZ_SECONDS") or 0)  # 0: as one of the suite
FACTOR = max(1.0, SECONDS / SUITE_SECONDS)


def fuzzed(examples: int) -> settings:
    """Settings of a fuzz test that draws `examples` examples in the suite. Fixtures that these share are meant to be shared."""
    return settings(
        max_examples=round(examples * FACTOR),
        derandomize=not SECONDS,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """What draws more may take longer."""
    for item in items:
        if HERE in item.path.parents and FACTOR > 1:
            item.add_marker(pytest.mark.timeout(300 * FACTOR))
