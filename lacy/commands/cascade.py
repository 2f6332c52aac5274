"""The commands of a trained model: lacy generate, lacy eval, lacy compare."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lacy.cascade.evaluation.options import (
    DelegationOptions,
    FactscoreModels,
    FactscoreOptions,
    LeakageOptions,
    LeakagePartner,
    NluOptions,
)
from lacy.cascade.options import DeviceOptions, GenerateOptions, PartnerOptions
from lacy.cascade.prompts import read_prompts
from lacy.flags import Flags, command
from lacy.running import quiet

EXTRA = "eval"
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder that lacy train wrote, checkpoint, model folder or hub name.")
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder that lacy train wrote, checkpoint, or model folder.")
]
Again = Annotated[bool, typer.Option("--again", help="Measure again, even if there is a result for these options.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
GREEDY = frozenset({"temperature", "top_p", "seed"})  # what evaluations leave at its default

eval_app = typer.Typer(
    name="eval",
    help="Measure a trained model: where it calls, what it leaks, what it writes, what it understands.",
    epilog="Results stay in RUN/eval; lacy compare shows those of several runs.",
    rich_markup_mode="rich",
)


def add_to(app: typer.Typer) -> None:
    command(
        app,
        extra=EXTRA,
        examples=[
            "lacy generate run --prompt 'Odra Venn was born in'",
            "lacy generate run --prompts names.txt --partner http://127.0.0.1:8000 --format html --out texts.html",
        ],
    )(generate)
    app.add_typer(eval_app)
    command(app, extra=EXTRA, examples=["lacy compare run-lacy run-standard --page runs.html"])(compare)


def generate(
    run: Run,
    partner: PartnerOptions,
    options: GenerateOptions,
    device: DeviceOptions,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='File with one prompt per line, or .jsonl with "prompt".')
    ] = None,
    format: Annotated[Literal["text", "jsonl", "html"], typer.Option(help="Format of the output.")] = "text",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="standard output")] = None,
) -> None:
    """Write with the small model and, where it calls, a partner. Without a prompt, standard input is continued."""
    quiet(None)
    asked = read_prompts(prompt or [], prompts)

    from rich.console import Console

    from lacy.cascade import generate as writing
    from lacy.cascade import show
    from lacy.cascade.opening import open_cascade
    from lacy.progress import CountView, messages
    from lacy.schemas.files import write_atomic

    errors = messages()
    with open_cascade(run, partner, options, device) as (model, opened, settled):
        if format == "text" and out is None and len(asked) == 1:
            stream = show.Stream(Console(soft_wrap=True, highlight=False), errors, asked[0])
            for generation in writing.generate(model, asked, opened, settled, on_piece=stream):
                stream.end(generation)
            return

        def counted() -> Iterator[Any]:
            with CountView(errors, "generate") as count:
                for done, text in enumerate(writing.generate(model, asked, opened, settled), start=1):
                    count(done, len(asked))
                    yield text

        if format == "jsonl":
            buffer = io.StringIO()
            show.write_jsonl(counted(), sys.stdout if out is None else buffer)
            written = buffer.getvalue()
        else:
            texts = sorted(counted(), key=lambda text: text.index)
            if format == "html":
                written = show.html(texts, f"{Path(run).name} and {partner.partner}")
            elif out is None:
                show.text(texts, Console(highlight=False), errors)
                written = ""
            else:
                written = "".join(f"{text.prompt}{text.text}\n\n" for text in texts)
        if out is not None:
            write_atomic(out, written.encode())
        elif format == "html":
            print(written)


@command(eval_app, extra=EXTRA, examples=["lacy eval delegation run --fit"])
def delegation(
    run: RunFolder,
    options: DelegationOptions,
    fit: Annotated[bool, typer.Option("--fit", help="Fit the weight of the combined score, and save it.")] = False,
    again: Again = False,
    json: Json = False,
) -> None:
    """Measure on held-out documents, for each call score, whether the model calls where it would get a fact wrong."""
    quiet(None)
    from lacy.cascade.evaluation import delegation as evaluation
    from lacy.tables import show_result

    with _steps() as tell:
        result = evaluation.evaluate(
            run.absolute(),
            options,
            fit=fit,
            again=again,
            tell=lambda _, figures: tell("delegation", round(1000 * figures["done"]), 1000),
        )
    show_result(result, json, evaluation.table(result))


@command(
    eval_app,
    extra=EXTRA,
    examples=["lacy eval leakage run", "lacy eval leakage run --partner smollm2-135m --budget 0.22"],
)
def leakage(
    run: RunFolder,
    options: LeakageOptions,
    calls: Annotated[dict[str, Any], Flags(GenerateOptions, GREEDY | {"max_new_tokens"})],
    device: DeviceOptions,
    partner: LeakagePartner,
    again: Again = False,
    json: Json = False,
) -> None:
    """Measure which facts come out: with calls forbidden, those that it memorised; with a partner, the cascade's."""
    quiet(None)
    how = GenerateOptions(**calls)
    from lacy.cascade.evaluation import run as evaluations
    from lacy.tables import figures, percent, show_result

    with _steps() as tell:
        result = evaluations.leakage(run, options, partner, how, device, again=again, tell=tell)
    table = figures(f"{result.kind}, {result.options['documents']} documents")
    table.add_row("facts asked for", f"{result.figures['pairs']:,.0f}")
    table.add_row("came out", percent(result.figures["contained"]))
    if result.kind == "containment":
        table.add_row("positions called", percent(result.figures["called"]))
        table.add_row("failed calls", f"{result.figures['missed']:,.0f}")
    for kind, row in sorted(result.details["by_type"].items(), key=lambda item: -item[1]["pairs"]):
        table.add_row(f"  {kind}, {row['pairs']:,}", percent(row["contained"]))
    show_result(result, json, table)


@command(
    eval_app,
    extra=EXTRA,
    examples=[
        "lacy eval factscore run --entities names.txt --knowledge corpus.jsonl.gz --judge Qwen/Qwen3-8B "
        "--judge-server http://127.0.0.1:8000"
    ],
)
def factscore(
    run: RunFolder,
    models: FactscoreModels,
    options: FactscoreOptions,
    partner: PartnerOptions,
    generating: Annotated[dict[str, Any], Flags(GenerateOptions, GREEDY)],
    device: DeviceOptions,
    entities: Annotated[Path, typer.Option(help="File with one name per line.")],
    knowledge: Annotated[
        Path, typer.Option(help="Source that facts are checked against: a dataset, .jsonl or .parquet files.")
    ],
    template: Annotated[str, typer.Option(help="Prompt, with {} for the name.")] = "{} is",
    index: Annotated[
        Path | None, typer.Option(help="Folder of the source's index.", show_default="RUN/eval/knowledge")
    ] = None,
    again: Again = False,
    json: Json = False,
) -> None:
    """FActScore: write about entities, split the texts into facts, verify them. Answers are kept and reused."""
    quiet(None)
    how = GenerateOptions(**generating)
    from lacy.cascade.evaluation import run as evaluations
    from lacy.tables import figures, percent, show_result

    with _steps() as tell:
        result = evaluations.factscore(
            run, entities, knowledge, options, models, partner, how, device,
            template=template, index=index, again=again, tell=tell,
        )  # fmt: skip
    table = figures("factscore")
    for name, value in result.figures.items():
        is_share = name in ("score", "init_score", "responded", "called")
        shown = percent(value) if is_share else "none" if value is None else f"{value:,.4g}"
        table.add_row(name.replace("_", " "), shown)
    show_result(result, json, table)


@command(
    eval_app,
    extra=EXTRA,
    examples=["lacy eval nlu run --task arc_easy --task piqa", "lacy eval nlu run --task cloze.yaml"],
)
def nlu(
    run: RunFolder,
    task: Annotated[list[str], typer.Option(help="Task of lm-evaluation-harness, or YAML file in its format.")],
    options: NluOptions,
    device: DeviceOptions,
    json: Json = False,
) -> None:
    """Measure language understanding on tasks of lm-evaluation-harness, with <CALL> forbidden."""
    quiet(None)
    from lacy.cascade.evaluation import run as evaluations
    from lacy.tables import figures, show_result

    result = evaluations.nlu(run, task, options, device)
    table = figures("nlu, <CALL> forbidden")
    for name, value in result.figures.items():
        if not name.endswith(".stderr"):
            error = result.figures.get(f"{name}.stderr")
            table.add_row(name, "none" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error else ""))
    show_result(result, json, table)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Runs that were evaluated.")],
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Page with curves to write.")] = None,
    json: Json = False,
) -> None:
    """Compare runs in one table with 95 % intervals, from the results of lacy eval."""
    quiet(None)
    from lacy.cascade.evaluation import compare as comparison
    from lacy.progress import messages
    from lacy.schemas.files import write_atomic
    from lacy.tables import results_console

    result = comparison.compare([run.absolute() for run in runs])
    if page is not None:
        write_atomic(page, comparison.page(result).encode())
    if json:
        print(result.model_dump_json(indent=1))
    else:
        comparison.show(result, results_console())
    if page is not None:
        messages().print(f"{page} written")


@contextmanager
def _steps() -> Iterator[Any]:
    """A function of (step, done, total) that shows the progress of an evaluation, one step after the other."""
    from lacy.progress import CountView, messages

    console = messages()
    views: list[Any] = []

    def tell(step: str, done: int, total: int) -> None:
        if not views or views[-1][0] != step:
            if views:
                views[-1][1].__exit__()
            views.append((step, CountView(console, step)))
        views[-1][1](done, total)

    try:
        yield tell
    finally:
        if views:
            views[-1][1].__exit__()
