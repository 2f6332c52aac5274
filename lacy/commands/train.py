"""The command lacy train."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lacy.flags import Flags, command
from lacy.running import quiet
from lacy.trainer.config import TrainConfig, load


def train(
    options: Annotated[dict[str, Any], Flags(TrainConfig, merged=True)],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with any of these options; flags override it.", rich_help_panel="Run"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume from the newest checkpoint, if there is one.", rich_help_panel="Run"),
    ] = False,
) -> None:
    """Pretrain a small model on labels: it learns to write what it can, and to call for the rest."""
    quiet(None)
    settled = load(options, config, resume)
    from lacy.api import run_train
    from lacy.progress import messages

    if stopped := run_train(settled, messages()):
        raise typer.Exit(128 + stopped)


def add_to(app: typer.Typer) -> None:
    command(
        app,
        extra="train",
        examples=[
            "lacy train labelled --out run --model tiny",
            "torchrun --nproc-per-node 8 -m lacy train labelled --out run --resume",
            "lacy train --config run.yaml --out run",
        ],
    )(train)
