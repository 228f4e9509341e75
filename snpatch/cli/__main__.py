"""`python -m snpatch.cli`."""

from snpatch.cli import main

main()
