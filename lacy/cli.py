"""The command `lacy`. Each command imports what it needs when it runs, so that --help answers at once."""

import sys
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from lacy import running
from lacy.commands import cascade, label, look, models, train

ORDER = (
    "label", "decide", "status", "check", "stats", "show", "report", "sql",
    "train", "generate", "eval", "compare", "plan", "tokenizer", "models",
)  # fmt: skip


class _InOrder(TyperGroup):
    """Lists the commands in the order of the work."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(self.commands, key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Decide, token by token, what a small language model should learn and what it should delegate.",
    epilog="Example: lacy label corpus/*.jsonl.gz --out labelled, then lacy stats labelled",
)
for group in (label, look, train, cascade, models):
    group.add_to(app)

GROUPS = {"eval", "models"}


def _print_version(asked: bool) -> None:
    if asked:
        from lacy import __version__

        typer.echo(f"lacy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show tracebacks and the libraries' logs.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    running.debug = debug


def main() -> None:
    arguments = sys.argv[1:]
    if "--" in arguments:
        split = arguments.index("--")
        label.BEAM_OPTIONS.extend(arguments[split + 1 :])
        arguments = arguments[:split]
    if not arguments or (len(arguments) == 1 and arguments[0] in GROUPS):
        arguments.append("--help")
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except TyperException as error:
        print(f"lacy: {_usage(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(running.INTERRUPTED)


def _usage(error: TyperException) -> str:
    """What is wrong with the command line, on one line."""
    flags = getattr(getattr(error, "param", None), "opts", None)
    if flags and flags[-1].startswith("--") and isinstance(error, typer.BadParameter) and error.message:
        return f"{flags[-1]}: {error.message.removeprefix('Value error, ')}"
    command = getattr(getattr(error, "ctx", None), "command_path", "lacy")
    return f"{' '.join(error.format_message().split()).removesuffix('.')}; see {command} --help"


if __name__ == "__main__":
    main()
