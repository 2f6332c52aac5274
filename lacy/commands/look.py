"""The commands that look into a dataset: stats, show, report, sql."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lacy.flags import command
from lacy.schemas.errors import UsageError

Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="Folder that lacy label wrote, or its URL.")]
Labels = Annotated[str | None, typer.Option(help="Label set to look at.", show_default="lacy, or the first")]
Where = Annotated[
    str | None, typer.Option(metavar="CONDITION", help="SQL condition on the view labels: only these tokens.")
]


def stats(
    dataset: Dataset,
    labels: Labels = None,
    where: Where = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the view labels to tabulate by its values.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print tables: shares by part of speech and entity type, losses, budgets, agreement of label sets, words."""
    from rich.console import Console

    from lacy.progress import messages
    from lacy.stats.compute import compute
    from lacy.stats.tables import show as show_tables

    with messages().status("reading") as status:
        result = compute(dataset, labels, where=where, by=by, on_stage=status.update)
    if json:
        print(result.model_dump_json(indent=1))
    else:
        show_tables(result, Console())


def show(
    dataset: Dataset,
    doc_id: Annotated[
        str | None,
        typer.Argument(metavar="DOC_ID", help="Document to show; if omitted, the beginning of the first two."),
    ] = None,
    labels: Labels = None,
    color: Annotated[Literal["label", "loss"], typer.Option(help="Color tokens by label or by loss.")] = "label",
    signals: Annotated[
        bool, typer.Option("--signals", help="Print a table of the document's tokens with all label sets.")
    ] = False,
) -> None:
    """Read a document as it was labelled, in the terminal."""
    if signals and doc_id is None:
        raise UsageError("--signals needs a document: lacy show DATASET DOC_ID --signals")
    from rich.console import Console

    from lacy.stats.show import paged, render
    from lacy.stats.show import show as show_document

    console = Console(highlight=False)
    with paged(console):
        if doc_id is None:
            render(dataset, labels=labels, color=color, console=console)
        else:
            show_document(dataset, doc_id, labels=labels, color=color, signals=signals, console=console)


def report(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("report.html"),
    labels: Labels = None,
    where: Where = None,
    documents: Annotated[int, typer.Option(min=0, help="Number of documents in the report.")] = 50,
    document: Annotated[
        list[str] | None,
        typer.Option(metavar="DOC_ID", help="Document to include, instead of a sample; repeatable."),
    ] = None,
) -> None:
    """Write one page about a dataset, to open in a browser and to share: figures, charts, documents to read."""
    from lacy.progress import messages, size
    from lacy.stats.report import write

    console = messages()
    with console.status("reading") as status:
        write(dataset, out, labels=labels, where=where, documents=document or documents, on_stage=status.update)
    console.print(f"{out}: {size(out.stat().st_size)}")


def sql(
    dataset: Dataset,
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="QUERY",
            help="SQL over documents, tokens, labels, parts; if omitted, a prompt or standard input.",
        ),
    ] = None,
    format: Annotated[Literal["table", "csv", "json", "parquet"], typer.Option(help="Format of the answer.")] = "table",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="standard output")] = None,
) -> None:
    """Query a dataset with DuckDB, read-only (docs/queries.md)."""
    from lacy.schemas.manifest import at
    from lacy.stats.answers import answer, destination
    from lacy.stats.connect import connect, statements

    asks = query is None and sys.stdin.isatty() and sys.stdout.isatty()
    if asks and out is not None:
        raise UsageError('--out needs a query: lacy sql DATASET "SELECT ..." --out FILE')
    with connect(dataset) as connection:
        if asks:
            from lacy.stats.prompt import prompt

            prompt(connection, format, sys.stdout)
            return
        queries = statements(sys.stdin.read()) if query is None else [query]
        if query is None and len(queries) != 1 and (out is not None or format == "parquet"):
            raise UsageError(f"{len(queries)} statements: pass only one with {'--out' if out else '--format parquet'}")
        try:
            with destination(out, at(dataset)) as file:
                for statement in queries:
                    answer(connection, statement, format, file, session=len(queries) > 1)
        except BrokenPipeError:  # the reader, head or less, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_to(app: typer.Typer) -> None:
    command(
        app,
        examples=[
            "lacy stats labelled --labels loss",
            "lacy stats labelled --by ent_type --where \"source LIKE 'wiki%' AND ref_nll > 3\"",
        ],
    )(stats)
    command(app, examples=["lacy show labelled", "lacy show labelled DOC_ID --color loss"])(show)
    command(
        app,
        examples=[
            "lacy report labelled --out report.html",
            "lacy report labelled --out short.html --where \"ent_type = 'DATE'\" --documents 10",
        ],
    )(report)
    command(app, examples=['lacy sql labelled "SELECT pos, avg(ref_nll) FROM tokens GROUP BY pos"'])(sql)
