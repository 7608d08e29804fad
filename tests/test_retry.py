"""When to try again: what a budget of attempts allows, and how long to wait."""

from __future__ import annotations

import pytest

from hfship.hub.retry import API_RETRY, WORKER_RETRY, Retry, backoff


@pytest.mark.parametrize(
    "failures, longest_s", [(1, 0.5), (2, 1.0), (5, 8.0), (7, 30.0), (99, 30.0)]
)
def test_a_wait_doubles_up_to_half_a_minute(failures: int, longest_s: float) -> None:
    waits = [backoff(failures) for _ in range(300)]
    assert min(waits) >= 0.05 and longest_s / 2 < max(waits) <= longest_s


def test_attempts_without_progress_are_counted() -> None:
    retry = Retry(attempts=3)
    spent = []
    while not retry.exhausted:
        retry = retry.after_failure()
        spent.append(retry.failures)
    assert spent == [1, 2, 3]


def test_a_shaky_network_that_gets_on_never_exhausts_the_budget() -> None:
    retry = WORKER_RETRY
    for _ in range(50):
        for _ in range(WORKER_RETRY.attempts - 2):
            retry = retry.after_failure()
        retry = retry.after_failure(progress=True)
        assert not retry.exhausted
    assert retry.failures == 1 and retry.after_success() == WORKER_RETRY


@pytest.mark.parametrize("asked_s, waited_s", [(0.0, 0.0), (7.0, 7.0), (9999.0, 120.0)])
def test_what_a_server_asks_for_is_waited_within_reason(asked_s: float, waited_s: float) -> None:
    assert API_RETRY.after_failure().wait_s(asked_s) == waited_s


def test_the_policy_itself_is_not_changed_by_who_uses_it() -> None:
    assert API_RETRY.after_failure() != API_RETRY
    assert API_RETRY.failures == 0
