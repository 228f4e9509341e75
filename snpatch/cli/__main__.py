"""`python -m snpatch.cli`."""

from snpatch.cli import program

program()
