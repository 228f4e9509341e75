"""The command line: `snpatch contrast | generate | sweep | find-minimal | exp | train | reproduce | serve | report |
guard | demo | env`.

Why the imports stand inside the commands: `--help` answers at once, torch takes seconds. Results go to stdout,
progress and errors to stderr; exit codes: 0 done, 2 bad input (one line says what), 130 interrupted.
"""

import atexit
import os
import sys

import typer

from snpatch.cli import demo, guard, sweep, train
from snpatch.cli.contrast import contrast
from snpatch.cli.env import env
from snpatch.cli.exp import exp
from snpatch.cli.find_minimal import find_minimal
from snpatch.cli.generate import generate
from snpatch.cli.report import report
from snpatch.cli.reproduce import reproduce
from snpatch.cli.serve import FORWARD_UNKNOWN_OPTIONS, serve
from snpatch.errors import SnpatchError

app = typer.Typer(
    help="Find safety neurons, patch them while text is generated, measure what that changes.",
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


def program() -> None:
    """Run `main` as all that this process does, and end it before the destructors of C++ libraries run.

    Triton's (nanobind) would print a line for each object that something of vLLM still holds then.
    """
    code, process = 1, os.getpid()  # 1: of a traceback

    def end() -> None:
        if os.getpid() == process:  # and not one that was forked
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was closed from the start
                stream.flush()
            os._exit(code)

    atexit.register(end)  # the first that is registered is the last that runs
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise


def main() -> None:
    """Run the command line: a SnpatchError is one line and exit code 2."""
    if sys.stderr is None:  # closed: what is for it would be written to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.exit(_failed("snpatch: error: stdout: closed. Redirect it to a file, or to /dev/null.", 2))
    try:
        app()
    except SnpatchError as error:
        sys.exit(_failed(f"snpatch: error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_failed("snpatch: interrupted", 130))


def _failed(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
