"""The command line, `snpatch COMMAND`.

Commands import torch and what needs it inside their functions, so that `--help` is instant. Results go to stdout,
progress and errors to stderr. Exit codes: 0 success, 2 invalid input (one line on stderr), 130 interrupted.
"""

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from snpatch import __version__
from snpatch.cli import demo, guard, sweep, train
from snpatch.cli.contrast import contrast
from snpatch.cli.env import env
from snpatch.cli.exp import exp
from snpatch.cli.find_minimal import find_minimal
from snpatch.cli.generate import generate
from snpatch.cli.help_panels import arrange
from snpatch.cli.interrupts import EXIT_CODE, report_interrupts
from snpatch.cli.report import report
from snpatch.cli.reproduce import reproduce
from snpatch.cli.serve import FORWARD_UNKNOWN_OPTIONS, serve
from snpatch.errors import SnpatchError, printable
from snpatch.utils import progress

app = typer.Typer(
    help="Find safety neurons, patch them during generation, and measure the effect.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (contrast, generate, find_minimal, exp, reproduce, report, env):
    app.command()(command)
app.command(context_settings=FORWARD_UNKNOWN_OPTIONS)(serve)
app.add_typer(sweep.app, name="sweep")
app.add_typer(guard.app, name="guard")
app.add_typer(train.app, name="train")
app.add_typer(demo.app, name="demo")


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print(f"snpatch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find safety neurons, patch them during generation, and measure the effect."""


def program() -> None:
    """Run `main` and end the process before the destructors of C++ libraries run.

    Triton's library nanobind would otherwise print a line for each object that vLLM still holds.
    """
    code, process = 1, os.getpid()  # 1: exit code of a traceback

    def end() -> None:
        if os.getpid() == process:  # not in a forked process
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it was closed from the start
                stream.flush()
            os._exit(code)

    atexit.register(end)  # registered first, so it runs last
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise


def main() -> None:
    """Run the command line. A SnpatchError becomes one line on stderr and exit code 2."""
    if sys.stderr is None:  # closed: its text would be written to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.exit(_report("snpatch: error: stdout: closed. Redirect it to a file, or to /dev/null.", 2))
    progress.set_default(False)
    try:
        group = typer.main.get_command(app)
        arrange(group)
        report_interrupts(group)
        with _log_to_stderr():
            group()
    except SnpatchError as error:
        sys.exit(_report(f"snpatch: error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_report("snpatch: interrupted", EXIT_CODE))


def _report(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


class _StderrHandler(logging.Handler):
    """Handler that prints messages to the current stderr, with control characters escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(record.getMessage()), file=sys.stderr, flush=True)


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Print the log of snpatch's modules, and only this, to stderr."""
    logger, handler = logging.getLogger("snpatch"), _StderrHandler()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries give the root logger handlers of their own
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
