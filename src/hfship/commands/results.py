# SPDX-License-Identifier: Apache-2.0
"""Results of commands as rows, and questions to the operator."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    Union,
)

from hfship.base.errors import Exit, HfshipError, Interrupted, UsageError, error_row
from hfship.base.files import disk_error
from hfship.base.report import FailedResult
from hfship.base.text import counted, human_bytes, table

if TYPE_CHECKING:
    from hfship.base.report import Reporter, Result
    from hfship.commands.context import Context

AnyResult = TypeVar("AnyResult", bound="Result")


# Failures that the same command can make good: it goes on, or the network is back.
PASSING = (Exit.INCOMPLETE, Exit.NETWORK)


def exit_of_list(codes: Iterable[Exit]) -> Exit:
    """The exit code of a list: 3 where the same command can help one that failed, else the gravest.

    >>> lists = ([0, 0], [8, 4], [2, 4], [9, 6])
    >>> [int(exit_of_list(map(Exit, codes))) for codes in lists]
    [0, 3, 4, 6]
    """
    failed = {code for code in codes if code != Exit.OK}
    if not failed:
        return Exit.OK
    if failed.intersection(PASSING):
        return Exit.INCOMPLETE
    if Exit.INTEGRITY in failed:  # wrong bytes are worse than none
        return Exit.INTEGRITY
    return max(failed)


def summarize_failures(failures: Sequence[HfshipError], count: int, reporter: Reporter) -> Exit:
    """Report what went wrong with some of `count` models.

    Returns the exit code: its own one where there is one model.
    """
    for failure in failures:
        reporter.error(failure)
    if failures and count > 1:
        problems = counted(len(failures), "problem")
        reporter.info(f"{problems} with {count} models; the rest is complete")

    codes = [failure.code for failure in failures]
    return _exit_of(codes, count)


def _exit_of(codes: Sequence[Exit], count: int) -> Exit:
    """The exit code of failures with some of `count` models."""
    if count == 1 and len(set(codes)) == 1:
        return codes[0]
    return exit_of_list(codes)


def each_of(context: Context, works: Sequence[Tuple[str, Callable[[], Result]]]) -> Exit:
    """Do the work for each of several models, with their names, and print its result; goes on after
    one that fails, then one summary. Raises the error of a single one."""
    if len(works) < 2:
        print_results(context, (work() for _, work in works))
        return Exit.OK

    reporter = context.reporter
    failures: List[Optional[HfshipError]] = []

    def results() -> Iterator[Result]:
        for number, (name, work) in enumerate(works, 1):
            failure: Optional[HfshipError] = None
            with reporter.about(name, number, len(works)):
                try:
                    yield work()
                except (HfshipError, OSError) as exc:
                    failure = error_of(exc)
                    reporter.error(failure)
                    yield FailedResult(failure, name)
            failures.append(failure)

    print_results(context, results())
    rows = []
    for (name, _), failure in zip(works, failures):
        why = ""
        if failure:
            why = failure.what
        rows.append((name, why))
    summarize_list(context.args.command, rows, reporter)
    return exit_of_list(failure.code for failure in failures if failure)


def summarize_list(
    command: str, rows: Sequence[Tuple[str, str]], reporter: Reporter, always: bool = False
) -> None:
    """Say how a list went, of which `rows` are the names and why each failed, "" for success.

    Of a list that went well only if `always` is set.
    """
    failed = sum(bool(why) for _, why in rows)
    summary = f"{command}: {counted(len(rows), 'model')}, {len(rows) - failed} ok, {failed} failed"
    if failed:
        lines = table([[f"  {name}", why or "ok"] for name, why in rows])
        reporter.info(f"{summary}\n{lines}")
    elif always:
        reporter.info(summary)


def error_of(exc: Union[HfshipError, OSError, KeyboardInterrupt]) -> HfshipError:
    """What ended a command, as the error that is reported."""
    if isinstance(exc, HfshipError):
        return exc
    if isinstance(exc, OSError):
        path = Path(os.fsdecode(exc.filename or "."))
        return disk_error(exc, "use", path)
    step = "run the same command again: what is complete is kept"
    return Interrupted("interrupted", "", step)


def print_results(context: Context, results: Iterable[AnyResult]) -> List[AnyResult]:
    """Print each result when it comes, or with --json all of them as one list at the end.

    Returns the results. An exception that ends them is the last entry of the list.
    """
    as_json, reporter = context.args.json, context.reporter
    came: List[AnyResult] = []
    rows: List[Dict[str, Any]] = []
    try:
        for result in results:
            came.append(result)
            if as_json:
                rows.append(result.json())
                continue
            text = result.text()
            if text:
                reporter.result(text, fit=True)
    except (HfshipError, OSError, KeyboardInterrupt) as exc:
        if not reporter.gathers:  # else it is reported for the whole list
            rows.append(error_row(error_of(exc)))
        raise
    finally:
        if as_json:
            reporter.result_json(rows)

    return came


def confirm(question: str, reporter: Reporter) -> None:
    """Go on if the operator says yes.

    Raises UsageError for any other answer, and where there is nobody to ask.
    """
    if not sys.stdin or not sys.stdin.isatty():
        why = f"no terminal to ask on: {question}"
        raise UsageError("nothing was removed", why, "the same command with --yes")
    if not says_yes(question, reporter):
        raise UsageError("nothing was removed", "the answer was not yes", "")


def says_yes(question: str, reporter: Reporter) -> bool:
    """What the operator at the terminal answers."""
    reporter.say(f"{question} [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def show_leftovers(rows: Sequence[Mapping[str, Any]], total: int, context: Context) -> None:
    """The table of what `clean` removes, of `total` bytes."""
    reporter = context.reporter
    lines = [
        [human_bytes(row["bytes"]), str(row["files"]), row["what"], row["where"]]
        for row in rows
        if not row["kept"]
    ]
    if not lines:
        reporter.result("nothing to clean")
        return

    reporter.result(table(lines, ["size", "files", "what", "where"]))
    if context.args.dry_run:
        reporter.result(f"would free {human_bytes(total)}")


def leftover_row(
    where: str, what: str, files: int, size: int, paths: Sequence[str], kept: str = ""
) -> Dict[str, Any]:
    """A row of what `clean` removes, of --json, too; `kept` is why it stays, "" where it goes."""
    return {
        "where": where,
        "what": what,
        "files": files,
        "bytes": size,
        "kept": kept or None,
        "paths": list(paths),
    }


def remove_rows(
    rows: Sequence[Mapping[str, Any]],
    noun: str,
    remove: Callable[[Mapping[str, Any]], None],
    context: Context,
) -> Exit:
    """Show what goes, ask, and remove one row after the other. Raises UsageError when the operator
    does not say yes, and what `remove` raises."""
    args, reporter = context.args, context.reporter
    size = sum(row["bytes"] for row in rows)
    if not args.json:
        show_leftovers(rows, size, context)
    removed = 0
    if rows and not args.dry_run:
        if not args.yes:
            confirm(f"remove them and free {human_bytes(size)}?", reporter)
        for row in rows:
            remove(row)
        removed = len(rows)

    freed = size if removed else 0
    if args.json:
        shown = {"leftovers": list(rows), "bytes": size, "removed": removed, "freed": freed}
        reporter.result_json(shown)
    elif removed:
        reporter.result(f"removed {counted(removed, noun)}, freed {human_bytes(size)}")
    return Exit.OK
