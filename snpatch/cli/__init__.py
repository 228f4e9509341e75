"""The command line: `snpatch contrast | generate | sweep | minimal | exp | train | reproduce | serve | report | guard |
demo | env`.

Why the imports stand inside the commands: `--help` answers at once, torch takes seconds. Results go to stdout,
progress and errors to stderr; exit codes: 0 done, 2 bad input (one line says what), 130 interrupted.
"""

import sys

import typer

from snpatch.cli import demo, guard, sweep, train
from snpatch.cli.contrast import contrast
from snpatch.cli.env import env
from snpatch.cli.exp import exp
from snpatch.cli.generate import generate
from snpatch.cli.minimal import minimal
from snpatch.cli.report import report
from snpatch.cli.reproduce import reproduce
from snpatch.cli.serve import FORWARDED, serve
from snpatch.errors import SnpatchError

app = typer.Typer(
    help="Find safety neurons, patch them while text is generated, measure what that changes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (contrast, generate, minimal, exp, reproduce, report, env):
    app.command()(command)
app.command(context_settings=FORWARDED)(serve)
app.add_typer(sweep.app, name="sweep")
app.add_typer(guard.app, name="guard")
app.add_typer(train.app, name="train")
app.add_typer(demo.app, name="demo")


def main() -> None:
    """Entry point: a SnpatchError is one line and exit code 2."""
    try:
        app()
    except SnpatchError as error:
        sys.exit(_failed(f"snpatch: error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_failed("snpatch: interrupted", 130))


def _failed(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
