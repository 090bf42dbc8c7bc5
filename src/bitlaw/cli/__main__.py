"""`python -m bitlaw.cli`."""

from bitlaw.cli import main

main()
