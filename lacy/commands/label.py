"""The commands that make a dataset and watch it: label, decide, tokenizer, plan, status, check."""

import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lacy import running
from lacy.flags import Flags, command
from lacy.pipeline.options import DecideOptions, LabelOptions, PolicyName
from lacy.pipeline.runners.presets import Cluster
from lacy.running import FAILED, quiet
from lacy.schemas.errors import UsageError

EXTRA = "label"
BEAM_OPTIONS: list[str] = []  # what stands behind -- on the command line

Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="Folder that lacy label wrote, or its URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ELSEWHERE = "Other machines (docs/dataflow.md)"


def label(
    options: LabelOptions,
    deciding: Annotated[dict[str, Any], Flags(DecideOptions, frozenset({"name"}))],
    cluster: Annotated[dict[str, Any], Flags(Cluster)],
    save_rates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --estimate: save the measured rates for lacy plan --rates."),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait",
            help="Wait for the job to end; with --no-wait, rerun the command later to finish.",
            rich_help_panel=ELSEWHERE,
        ),
    ] = True,
    patience: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Minutes without a finished part after which the job is cancelled.",
            show_default="30, on Dataflow no limit",
            rich_help_panel=ELSEWHERE,
        ),
    ] = None,
) -> None:
    """Label a corpus: measure every token, then decide which to learn and which to delegate.

    Rerun the same command to resume after an interruption.
    """
    quiet(options.threads)
    machines, how = cluster_of(cluster), DecideOptions(**deciding)
    if save_rates and not options.estimate:
        raise UsageError("--save-rates is for what --estimate measures: add --estimate")
    if save_rates and not save_rates.absolute().parent.is_dir():
        raise UsageError(f"--save-rates: there is no folder {save_rates.absolute().parent}")
    if not (machines or BEAM_OPTIONS) and (not wait or patience is not None):
        raise UsageError("--no-wait and --patience are for a job on other machines: add --on")
    from lacy import api
    from lacy.progress import LabelView, messages

    console = messages()
    if machines:
        from lacy.pipeline.options import require_reach

        require_reach(machines, options)
    if not options.estimate:
        api.run_label(
            options,
            how,
            console,
            cluster=machines,
            beam_options=lambda job: beam_options_of(machines, job, str(options.out)),
            wait=wait,
            patience=patience,
            debug=running.debug,
        )
        return
    from lacy.pipeline.estimate import estimate
    from lacy.pipeline.label import Run
    from lacy.tables import show_estimate

    with LabelView(console) as view:
        run = Run(on_stage=view.stage, on_start=view.start, on_progress=view.update, debug=running.debug)
        measured = estimate(api.with_workers(options), how.policy, how.budget, run=run)
    show_estimate(measured)
    if save_rates:
        import json

        from lacy.pipeline.cost import measured as rates_of

        save_rates.write_text(json.dumps(rates_of(measured), indent=1) + "\n")


def decide(
    dataset: Dataset,
    policy: Annotated[PolicyName, typer.Option(help="Rule that chooses tokens (docs/policies.md).")],
    deciding: Annotated[dict[str, Any], Flags(DecideOptions)],
    cluster: Annotated[dict[str, Any], Flags(Cluster, frozenset({"gpu", "gpus"}))],
    workers: Annotated[int, typer.Option(min=1, help="Worker processes; one is enough for some billion tokens.")] = 1,
) -> None:
    """Decide again, from what was measured: another policy or budget, without any model."""
    quiet(1)
    machines, how = cluster_of(cluster), DecideOptions(policy=policy, **deciding)
    if machines:
        from lacy.pipeline.runners.presets import require_store

        require_store(machines, dataset)
    from lacy.api import print_decided
    from lacy.pipeline.decide import decide as write_labels
    from lacy.progress import messages
    from lacy.schemas.manifest import at

    far = beam_options_of(machines, "decide", dataset)
    labels = write_labels(at(dataset), **how.model_dump(), workers=workers, beam_options=far)
    print_decided(messages(), labels)


def tokenizer(
    corpus: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS", help="Files, folders or globs, as for lacy label."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(min=300, help="Entries of the vocabulary, with <CALL>.")] = 32000,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N documents.")] = None,
) -> None:
    """Train a byte-level BPE tokenizer on a corpus, with <CALL> as a special token."""
    quiet(os.cpu_count() or 1)
    from lacy.pipeline.train_tokenizer import train

    documents, size = train(corpus, out, vocab_size, limit)
    fewer = f"; --vocab-size {vocab_size:,} needs a larger corpus" if size < vocab_size else ""
    print(f"{out}: {size:,} entries, <CALL> among them, from {documents:,} documents{fewer}")


def plan(
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="Finished dataset that gives the bytes per token.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="N", help="Tokens of the corpus, as 3e9 or 3B.", show_default="the dataset's"),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", metavar="N", help="Bytes of the corpus, uncompressed, in place of tokens.")
    ] = None,
    models: Annotated[int, typer.Option(min=0, help="Models that score: a reference and a student are 2.")] = 1,
    gpu: Annotated[Literal["l4", "a100", "h100"], typer.Option(help="GPU of the machines that score.")] = "l4",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one machine.")] = 1,
    hours: Annotated[
        float, typer.Option(help="Hours from start to end, if --taggers and --scorers are not given.")
    ] = 24.0,
    taggers: Annotated[int | None, typer.Option(min=1, help="Machines that tag.")] = None,
    scorers: Annotated[int | None, typer.Option(min=1, help="Machines that score.")] = None,
    part_bytes: Annotated[int | None, typer.Option(min=1024, help="Corpus bytes in one part.")] = None,
    rates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON or YAML file with your own rates (docs/scale.md).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with the rates.")] = False,
) -> None:
    """Estimate the parts, machines, hours and money that a corpus takes on Dataflow; every rate can be replaced."""
    from lacy.pipeline.cost import DEFAULTS, amount, estimate_cost, with_dataset, with_file
    from lacy.tables import show_plan

    if tokens and size:
        raise UsageError("--tokens and --bytes: leave out one of them")
    if not (tokens or size or dataset):
        raise UsageError("pass a DATASET, --tokens or --bytes")
    known, total = with_dataset(DEFAULTS, dataset) if dataset else (DEFAULTS, 0)
    known = with_file(known, rates) if rates else known
    wanted = amount(size) / known["bytes_per_token"].value if size else amount(tokens) if tokens else float(total)
    planned = estimate_cost(
        wanted, known, models=models, gpu=gpu, gpus=gpus, hours=hours, taggers=taggers, scorers=scorers,
        part_bytes=part_bytes,
    )  # fmt: skip
    if json:
        import json as json_

        print(json_.dumps(planned.model_dump() | {"rates": {n: r.model_dump() for n, r in known.items()}}, indent=1))
    else:
        show_plan(planned, known)


def status(
    dataset: Dataset,
    json: Json = False,
    watch: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="Repeat every SECONDS until the run is complete.")
    ] = None,
) -> None:
    """Show how far a run is, on any runner: parts, tokens, bad records, pace, time left, label sets."""
    quiet(1)
    from rich.console import Console

    from lacy.pipeline.status import status as status_of
    from lacy.schemas.manifest import at
    from lacy.tables import show_status, status_line

    console, location = Console(highlight=False, soft_wrap=True), at(dataset)
    known: dict[str, Any] = {}
    while True:
        now = status_of(location, known)
        if json:
            print(now.model_dump_json(indent=None if watch else 1), flush=True)
        elif watch and not console.is_terminal:
            print(status_line(now), flush=True)
        else:
            if watch:
                console.clear()
            show_status(console, now)
        if not watch or now.state == "complete":
            return
        time.sleep(watch)


def check(
    dataset: Dataset,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare only names, sizes and totals; do not read the parts.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker threads.", show_default="one for each core")
    ] = None,
) -> None:
    """Compare every part with the manifest: checksums, columns, counts, invariants."""
    quiet(1)
    import gc

    from lacy.pipeline.check import check as faults_of
    from lacy.progress import CountView, messages
    from lacy.schemas.manifest import at, label_sets, read_complete

    location = at(dataset)
    manifest, sets = read_complete(location), label_sets(location)
    gc.freeze()  # hundreds of thousands of records that stay: the collector need not look at them again
    faults, total = 0, len(manifest.parts)
    with CountView(messages(), "check", "parts") as count:
        processes = workers or os.cpu_count() or 1
        for fault in faults_of(
            location, manifest, sets, quick=quick, workers=processes, on_progress=lambda done: count(done, total)
        ):
            faults += 1
            print(fault, flush=True)
    parts = f"{total:,} parts, {manifest.documents:,} documents, {manifest.tokens:,} tokens"
    sound = "sound by names, sizes and totals" if quick else "sound"
    print(f"{dataset}: {parts}, labels: {', '.join(sets) or 'none'}: {f'{faults} faults' if faults else sound}")
    if faults:
        raise typer.Exit(FAILED)


def add_to(app: typer.Typer) -> None:
    command(
        app,
        extra=EXTRA,
        examples=[
            "lacy label corpus/*.jsonl.gz --out labelled",
            "lacy label gs://bucket/corpus --out gs://bucket/labelled --on dataflow --project my-project "
            "--region us-central1 --image IMAGE",
        ],
    )(label)
    command(app, extra=EXTRA, examples=["lacy decide labelled --policy loss --budget 0.2"])(decide)
    command(app, examples=["lacy status labelled", "lacy status gs://bucket/labelled --watch 60"])(status)
    command(app, examples=["lacy check labelled", "lacy check s3://bucket/labelled --quick"])(check)
    command(
        app,
        extra=EXTRA,
        examples=[
            "lacy plan --tokens 3B --gpu l4",
            "lacy plan labelled --tokens 1T --gpu h100 --gpus 8 --hours 240 --rates rates.json",
        ],
    )(plan)
    command(app, extra=EXTRA, examples=["lacy tokenizer corpus/*.jsonl.gz --out tokenizer --vocab-size 32000"])(
        tokenizer
    )


def cluster_of(options: dict[str, Any]) -> Cluster | None:
    """The machines that options describe; None for this one. Raises UsageError for options without --on."""
    if "on" in options:
        return Cluster(**options)
    for name in options:
        raise UsageError(f"--{name.replace('_', '-')} needs --on dataflow, flink or portable")
    return None


def beam_options_of(cluster: Cluster | None, job: str, dataset: str) -> list[str]:
    """Beam's options of a job: those of the cluster, which are printed, then the user's own."""
    if cluster is None:
        return BEAM_OPTIONS
    from lacy.pipeline.runners.presets import beam_options
    from lacy.progress import messages

    options = beam_options(cluster, job, dataset)
    messages().print(f"{job} on {cluster.on}: {' '.join(options)}")
    return options + BEAM_OPTIONS
