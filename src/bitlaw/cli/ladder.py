"""The built-in models."""

from pathlib import Path
from typing import Annotated

import typer

from bitlaw.cli.app import app
from bitlaw.cli.options import Out

ladder_app = typer.Typer(no_args_is_help=True, help="The built-in models.")
app.add_typer(ladder_app, name="ladder")


@ladder_app.command("train", epilog="Example: `bitlaw ladder train --out ladder`")
def ladder_train(
    out: Out = Path("ladder"),
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
    only: Annotated[str, typer.Option(help="Jobs to run, with commas; default: all.")] = "",
) -> None:
    """Rebuild the built-in models from nothing; resumable, under two hours on two cores."""
    from bitlaw.ladder.train import train_ladder

    train_ladder(out, workers=workers, only=[name for name in only.split(",") if name])
