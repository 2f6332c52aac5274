"""The commands of a trained model: lacy generate, lacy eval, lacy compare. Light, as lacy/cli.py is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lacy.running import known_errors, quiet

eval_app = typer.Typer(
    no_args_is_help=True,
    help="What a trained model is worth: where it calls, what it leaks, what it says, what it understands.",
    epilog="Results stay in RUN/eval; lacy compare shows those of several runs.",
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that lacy train wrote, a checkpoint, or a model.")]
Partner = Annotated[
    str,
    typer.Option(
        metavar="MODEL|URL|none",
        help="Who answers calls: a model folder or hub name, an OpenAI-compatible server, or nobody.",
    ),
]
Engine = Annotated[str, typer.Option(help="What a partner in this process runs in: transformers or vllm.")]
ServedModel = Annotated[str | None, typer.Option(metavar="NAME", help="The model of a server that has several.")]
ServedTokenizer = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="The tokenizer of a server's model: if it is the SLM's, token ids are sent."),
]
PartnerTokens = Annotated[int, typer.Option(min=1, help="Tokens that the partner writes for one call.")]
PartnerWords = Annotated[int | None, typer.Option(min=1, help="Whole words, in place of tokens.")]
PartnerTimeout = Annotated[float, typer.Option(help="Seconds for one answer of a server.")]
CallScore = Annotated[str, typer.Option(help="What calls are decided by: margin, uncertainty or combined.")]
Weight = Annotated[
    float | None, typer.Option(help="Of uncertainty in combined; default: what lacy eval delegation --fit found.")
]
Budget = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of positions that may call, by a running quantile. Default: 0.22."),
]
Threshold = Annotated[float | None, typer.Option(help="Call where the score is above this, in place of a budget.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of so much probability.")]
Seed = Annotated[int, typer.Option(help="Of sampling.")]
Batch = Annotated[int, typer.Option(min=1, help="Texts, or sequences, side by side.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; auto: cuda where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: float32 for a model with <CALL>.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the models.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="A labelled dataset; default: the run's.")]
Holdout = Annotated[float | None, typer.Option(help="Share of its documents held out; default: the run's.")]
Again = Annotated[bool, typer.Option("--again", help="Measure again, though there is a result of the same options.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Examples:  lacy generate run --prompt 'Odra Venn was born in'   lacy generate run --prompts names.txt "
        "--partner http://127.0.0.1:8000 --format html --out texts.html"
    )(generate)
    app.add_typer(eval_app, name="eval")
    app.command(epilog="Example:  lacy compare run-lacy run-standard --page runs.html")(compare)


def generate(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A folder that lacy train wrote, a checkpoint, or a model.")
    ],
    partner: Partner = "smollm2-135m",
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='A prompt a line, or .jsonl with "prompt".')
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 256,
    budget: Budget = None,
    threshold: Threshold = None,
    call_score: CallScore = "margin",
    weight: Weight = None,
    partner_tokens: PartnerTokens = 1,
    partner_words: PartnerWords = None,
    partner_engine: Engine = "transformers",
    partner_model: ServedModel = None,
    partner_tokenizer: ServedTokenizer = None,
    partner_timeout: PartnerTimeout = 30.0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    format: Annotated[str, typer.Option("--format", help="text, jsonl or html.")] = "text",
    out: Annotated[Path | None, typer.Option(help="A file; default: standard output.")] = None,
) -> None:
    """Write: the small model, and where it calls, a larger partner. Without a prompt, standard input is continued."""
    given = locals()
    with known_errors():
        quiet(None)
        from lacy.cascade_commands import run_generate

        run_generate(run, _who(given), _how(given), _place(given), prompt or [], prompts, format, out)


@eval_app.command(epilog="Example:  lacy eval delegation run --fit")
def delegation(
    run: Run,
    fit: Annotated[bool, typer.Option("--fit", help="Find the weight of the combined score, and keep it.")] = False,
    dataset: Dataset = None,
    labels: Annotated[str | None, typer.Option(help="The label set; default: the run's.")] = None,
    holdout: Holdout = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens, at most.")] = 500_000,
    batch: Batch = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    again: Again = False,
    json: Json = False,
) -> None:
    """Does it call where it would be wrong about a fact? On held-out documents, for each call score."""
    names = ("dataset", "labels", "holdout", "max_tokens", "batch", "device", "dtype")
    options = {name: value for name, value in locals().items() if name in names}
    with known_errors():
        quiet(None)
        from lacy.cascade_commands import run_delegation

        run_delegation(run, options, fit, again, json)


@eval_app.command(
    epilog="Examples:  lacy eval leakage run   lacy eval leakage run --partner smollm2-135m --budget 0.22"
)
def leakage(
    run: Run,
    partner: Partner = "none",
    documents: Annotated[
        str | None, typer.Option(help="trained or held-out; default: trained, and held-out with a partner.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Facts to ask for.")] = 500,
    prefix: Annotated[int, typer.Option(min=16, help="Tokens of text before a fact, at most.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 24,
    dataset: Dataset = None,
    holdout: Holdout = None,
    budget: Budget = None,
    threshold: Threshold = None,
    call_score: CallScore = "margin",
    weight: Weight = None,
    partner_tokens: PartnerTokens = 1,
    partner_words: PartnerWords = None,
    partner_engine: Engine = "transformers",
    partner_model: ServedModel = None,
    partner_tokenizer: ServedTokenizer = None,
    partner_timeout: PartnerTimeout = 30.0,
    batch: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    again: Again = False,
    json: Json = False,
) -> None:
    """Which facts come out? With calls forbidden, those that it learnt by heart; with a partner, the cascade's."""
    given = locals()
    asked = {name: given[name] for name in ("documents", "pairs", "prefix", "new_tokens", "dataset", "holdout")}
    with known_errors():
        quiet(None)
        from lacy.cascade_commands import run_leakage

        run_leakage(run, _who(given), _how(given), _place(given), asked, again, json)


@eval_app.command(
    epilog="Example:  lacy eval factscore run --entities names.txt --knowledge corpus.jsonl.gz --judge Qwen/Qwen3-8B "
    "--judge-server http://127.0.0.1:8000"
)
def factscore(
    run: Run,
    entities: Annotated[Path, typer.Option(help="A file with a name a line.")],
    knowledge: Annotated[
        Path, typer.Option(help="What facts are checked against: a dataset, or .jsonl, .parquet files.")
    ],
    judge: Annotated[str, typer.Option(help="The chat model that verifies facts.")],
    judge_server: Annotated[
        list[str] | None, typer.Option(metavar="URL[,URL...]", help="Its servers; default: vLLM here.")
    ] = None,
    splitter: Annotated[str | None, typer.Option(help="The chat model that splits texts; default: the judge.")] = None,
    splitter_server: Annotated[
        list[str] | None, typer.Option(metavar="URL[,URL...]", help="Its servers; default: the judge's.")
    ] = None,
    template: Annotated[str, typer.Option(help="The prompt, {} for the name.")] = "{} is",
    gamma: Annotated[int, typer.Option(min=0, help="Facts below which a text is penalised for its length.")] = 10,
    passages: Annotated[int, typer.Option(min=1, help="Passages that a fact is checked against.")] = 5,
    index: Annotated[Path | None, typer.Option(help="Where the index is kept; default: RUN/eval/knowledge.")] = None,
    partner: Partner = "smollm2-135m",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 256,
    budget: Budget = None,
    threshold: Threshold = None,
    call_score: CallScore = "margin",
    weight: Weight = None,
    partner_tokens: PartnerTokens = 1,
    partner_words: PartnerWords = None,
    partner_engine: Engine = "transformers",
    partner_model: ServedModel = None,
    partner_tokenizer: ServedTokenizer = None,
    partner_timeout: PartnerTimeout = 30.0,
    batch: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    again: Again = False,
    json: Json = False,
) -> None:
    """FActScore: write about entities, split the texts into facts, and verify them. Answers are kept and used again."""
    given = locals()
    chats = {
        "judge": judge,
        "judge_server": judge_server or [],
        "splitter": splitter or judge,
        "splitter_server": splitter_server or ([] if splitter else judge_server) or [],
    }
    options = {"gamma": gamma, "passages": passages}
    with known_errors():
        quiet(None)
        from lacy.cascade_commands import run_factscore

        how = _how(given) | {"max_new_tokens": new_tokens}
        run_factscore(
            run, _who(given), how, _place(given), entities, knowledge, template, chats, index, options, again, json
        )


@eval_app.command(
    epilog="Examples:  lacy eval nlu run --task arc_easy --task piqa   lacy eval nlu run --task cloze.yaml"
)
def nlu(
    run: Run,
    task: Annotated[list[str], typer.Option(help="A task of lm-evaluation-harness, or a YAML file of its format.")],
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; default: the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions of a task.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of examples.")] = 0,
    offline: Annotated[bool, typer.Option("--offline", help="Load no data that is not here.")] = False,
    batch: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Language understanding, by tasks of lm-evaluation-harness, with <CALL> forbidden."""
    options = {"num_fewshot": num_fewshot, "limit": limit, "seed": seed, "offline": offline, "batch": batch}
    with known_errors():
        quiet(None)
        from lacy.cascade_commands import run_nlu

        run_nlu(run, task, {"device": device, "dtype": dtype}, options, json)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs that were evaluated.")],
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with curves.")] = None,
    json: Json = False,
) -> None:
    """One table over runs, with 95 % intervals, from what lacy eval found."""
    with known_errors():
        quiet(None)
        from lacy.cascade_commands import run_compare

        run_compare(runs, page, json)


def _who(given: dict[str, Any]) -> Any:
    from lacy.cascade_commands import PartnerOptions

    return PartnerOptions(**{name: given[name] for name in PartnerOptions.model_fields})


def _how(given: dict[str, Any]) -> dict[str, Any]:
    """Of `lacy.cascade.generate.Options`, and the weight, which may be None."""
    names = ("budget", "threshold", "call_score", "weight", "temperature", "top_p", "seed", "batch")
    found = {name: given[name] for name in names if name in given}
    return found | {"max_new_tokens": given["new_tokens"]}


def _place(given: dict[str, Any]) -> dict[str, Any]:
    return {"device": given["device"], "dtype": given["dtype"]}
