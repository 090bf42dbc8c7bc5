"""The command line. Each command checks its input, calls the library, and prints what came of it."""

from bitlaw.cli import checkpoints, images, ladder, studies
from bitlaw.cli.app import app, main

__all__ = ["app", "checkpoints", "images", "ladder", "main", "studies"]
