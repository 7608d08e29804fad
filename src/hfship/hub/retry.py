# SPDX-License-Identifier: Apache-2.0
"""When to try again. Pure.

Owns the policy for faults that may pass: how many failures in a row are too many, and how long to
wait after each. Promises: progress renews the budget, so a slow or shaky network never ends a
download that still gets on. It never sleeps, sends or reports: whoever tries does that.
"""

from __future__ import annotations

import random
from typing import Optional

from hfship.base.values import dataclass, replace

SHORTEST_WAIT_S = 0.05
FIRST_WAIT_S = 0.5  # the longest wait after one failure; it doubles with each further failure ...
LONGEST_WAIT_S = 30.0  # ... up to this


class RetryableError(Exception):
    """A fault that may pass: the same bytes can be asked for again.

    `wait_s` is how many seconds the server wants us to wait before; None when it does not say.
    """

    def __init__(self, reason: str, wait_s: Optional[float] = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class ObjectChanged(RetryableError):
    """The server has another object at this address than a moment ago.

    What came of the old one is worthless.
    """


class SourceFaltered(RetryableError):
    """This source hardly sends anything, or wants to be left alone for a while.

    Another one, where there is one, is asked before it is asked again.
    """


def backoff(failures: int) -> float:
    """Seconds to wait after `failures` (1, 2, ...) failures in a row.

    Full jitter (a uniform choice) below 0.5, 1, 2, ... 30 s: clients that failed together do not
    come back together.
    """
    longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (failures - 1))
    return random.uniform(SHORTEST_WAIT_S, longest_s)


@dataclass(frozen=True)
class Retry:
    """A budget of attempts, and what is spent of it.

    >>> retry = Retry(attempts=3).after_failure().after_failure()
    >>> retry.failures, retry.exhausted, retry.after_failure().exhausted
    (2, False, True)
    >>> retry.after_failure(progress=True).failures, retry.after_success().failures
    (1, 0)
    """

    attempts: int  # so many failures in a row without progress are too many
    longest_asked_s: float = float("inf")  # a longer wait that the server asks for is cut to this
    failures: int = 0  # in a row, without progress in between

    def after_failure(self, progress: bool = False) -> Retry:
        """The budget after one more failure; `progress` if the attempt brought something before."""
        if progress:
            return replace(self, failures=1)
        return replace(self, failures=self.failures + 1)

    def after_success(self) -> Retry:
        """The whole budget again."""
        return replace(self, failures=0)

    @property
    def exhausted(self) -> bool:
        """Is it time to give up?"""
        return self.failures >= self.attempts

    def wait_s(self, asked_s: Optional[float] = None) -> float:
        """Seconds to wait before the next attempt: what the server asks for, else `backoff`.

        >>> Retry(attempts=6, longest_asked_s=120.0).after_failure().wait_s(9999.0)
        120.0
        """
        if asked_s is None:
            return backoff(self.failures)
        return min(asked_s, self.longest_asked_s)


API_RETRY = Retry(attempts=6, longest_asked_s=120.0)  # one request to the Hub's API
WORKER_RETRY = Retry(
    attempts=8, longest_asked_s=120.0
)  # the ranges that one worker of a download asks for
BLOCK_RETRY = Retry(attempts=6)  # one block of a file under repair
