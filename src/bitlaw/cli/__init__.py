"""The command line. Each command checks its input, calls the library, and prints what came of it."""

from bitlaw.cli import allocation, analysis, checkpoints, distillation, images, ladder, studies
from bitlaw.cli.app import app, main

__all__ = ["allocation", "analysis", "app", "checkpoints", "distillation", "images", "ladder", "main", "studies"]
