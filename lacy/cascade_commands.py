"""What `lacy generate`, `lacy eval` and `lacy compare` do and print."""

import io
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lacy.commands import PLAIN_INTERVAL, console_for_messages
from lacy.schemas.errors import CascadeError
from lacy.schemas.files import write_atomic

PATIENCE = 60.0  # seconds without any server of a judge


class PartnerOptions(BaseModel):
    """Who answers calls, and how much."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partner: str
    partner_engine: Literal["transformers", "vllm"] = "transformers"
    partner_model: str | None = None
    partner_tokenizer: str | None = None
    partner_tokens: int = Field(1, ge=1)
    partner_words: int | None = Field(None, ge=1)
    partner_timeout: float = Field(30.0, gt=0)
    trust_remote_code: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on."""
        return self.model_dump(exclude={"partner_timeout", "trust_remote_code"})


def run_generate(
    run: str,
    who: PartnerOptions,
    how: dict[str, Any],
    place: dict[str, Any],
    prompts: list[str],
    file: Path | None,
    form: str,
    out: Path | None,
) -> None:
    from lacy.cascade import show
    from lacy.cascade.generate import generate

    if form not in ("text", "jsonl", "html"):
        raise CascadeError(f"--format {form} is none of text, jsonl, html")
    asked = _prompts(prompts, file)
    if not asked:
        raise CascadeError("nothing to continue: there is no prompt in what was given")
    errors = console_for_messages()
    model, options = _model(run, place, how, who.partner != "none")
    with _partner(model, who, options) as partner:
        if form == "text" and out is None and len(asked) == 1:
            stream = show.Stream(Console(soft_wrap=True, highlight=False), errors, asked[0])
            for generation in generate(model, asked, partner, options, on_piece=stream):
                stream.end(generation)
            return
        found = _counted(generate(model, asked, partner, options), len(asked), "generate")
        if form == "text":
            ordered = sorted(found, key=lambda text: text.index)
            if out is None:
                show.text(ordered, Console(highlight=False), errors)
            else:
                write_atomic(out, "".join(f"{text.prompt}{text.text}\n\n" for text in ordered).encode())
        elif form == "html":
            page = show.html(sorted(found, key=lambda text: text.index), f"{Path(run).name} and {who.partner}")
            _write(page, out)
        elif out is None:
            show.write_jsonl(found, sys.stdout)
        else:
            target = io.StringIO()
            show.write_jsonl(found, target)
            write_atomic(out, target.getvalue().encode())


def run_delegation(run: Path, options: dict[str, Any], fit: bool, again: bool, as_json: bool) -> None:
    from lacy.cascade.evaluation import delegation

    with _Count("delegation") as count:
        found = delegation.evaluate(
            run.absolute(),
            delegation.Options(**options),
            fit=fit,
            again=again,
            tell=lambda _, told: count(round(1000 * told["done"]), 1000),
        )
    _show(found, as_json, delegation.table(found))


def run_leakage(
    run: Path,
    who: PartnerOptions,
    how: dict[str, Any],
    place: dict[str, Any],
    options: dict[str, Any],
    again: bool,
    as_json: bool,
) -> None:
    from lacy.cascade.evaluation import leakage

    model, generating = _model(str(run), place, how, who.partner != "none")
    with _partner(model, who, generating) as partner, _Count("containment" if partner else "leakage") as count:
        found = leakage.evaluate(
            model,
            partner,
            leakage.Options(**options),
            generating,
            identity=who.identity,
            again=again,
            tell=lambda d, n: count(d, n),
        )
    table = _figures(f"{found.kind}, {found.options['documents']} documents")
    table.add_row("facts asked for", f"{found.figures['pairs']:,.0f}")
    table.add_row("came out", _percent(found.figures["contained"]))
    if partner is not None:
        table.add_row("positions called", _percent(found.figures["called"]))
        table.add_row("calls in vain", f"{found.figures['missed']:,.0f}")
    for kind, told in sorted(found.details["by_type"].items(), key=lambda item: -item[1]["pairs"]):
        table.add_row(f"  {kind}, {told['pairs']:,}", _percent(told["contained"]))
    _show(found, as_json, table)


def run_factscore(
    run: Path,
    who: PartnerOptions,
    how: dict[str, Any],
    place: dict[str, Any],
    entities: Path,
    knowledge: Path,
    template: str,
    chats: dict[str, Any],
    index: Path | None,
    options: dict[str, Any],
    again: bool,
    as_json: bool,
) -> None:
    import pyarrow as pa

    from lacy.cascade.evaluation import factscore, results
    from lacy.cascade.evaluation.answers import Remembering
    from lacy.cascade.evaluation.knowledge import open_knowledge
    from lacy.cascade.language_model import results_folder
    from lacy.labelers.llm.model_folders import fingerprint

    settings = factscore.Options(**options)
    names = [line.strip() for line in _lines(entities) if line.strip()]
    if not names or "{}" not in template:
        raise CascadeError(f"{entities} names nobody" if not names else "--template has no {} for the entity")
    model, generating = _model(str(run), place, how, who.partner != "none")
    folder = results_folder(model.folder.absolute())
    asked = {
        "entities": names,
        "template": template,
        "knowledge": _identity(knowledge),
        "splitter": chats["splitter"],
        "judge": chats["judge"],
        "prompts": {name: factscore.prompt(name).sha256 for name in ("split", "verify")},
        **who.identity,
        "generating": generating.model_dump(exclude={"batch"}),
        **settings.model_dump(exclude={"batch"}),
    }
    saved = None if again else results.read(folder, "factscore")
    if saved is None or saved[0].options != asked:
        with _Count("passages") as count:
            source = open_knowledge(
                knowledge, index or folder.parent / "knowledge", tell=lambda n, total: count(n, total)
            )
        texts, calls = _texts(model, who, generating, names, template, folder / "factscore.texts.json")
        remembered = folder / "factscore.answers.jsonl"

        def chat(role: str) -> Remembering:
            model_name, servers = chats[role], chats[f"{role}_server"]
            name = json.dumps(fingerprint(model_name), sort_keys=True) if not servers else model_name
            return Remembering(lambda: _chat(model_name, servers, who.trust_remote_code), name, remembered)

        splitter = chat("splitter")
        try:
            with _Count("split") as count:
                splits = factscore.split(splitter, names, texts, settings, tell=lambda d, n: count(d, n))
        finally:
            splitter.close()  # two models in this process might not fit side by side
        judge = chat("judge")
        try:
            with _Count("verify") as count:
                judgements = factscore.verify(judge, source, splits, settings, tell=lambda d, n: count(d, n))
        finally:
            judge.close()
        summary = factscore.summary(judgements, settings)
        found = results.Result(
            kind="factscore",
            checkpoint=model.folder.name,
            options=asked,
            figures=summary.figures.model_dump() | calls,
            details={"judgements": [judgement.model_dump() for judgement in summary.judgements], "texts": texts},
        )
        results.save(folder, found, pa.Table.from_pylist([item.model_dump() for item in summary.items]))
    else:
        found = saved[0]
    table = _figures("factscore")
    for name, value in found.figures.items():
        is_share = name in ("score", "init_score", "responded", "called")
        table.add_row(
            name.replace("_", " "), _percent(value) if is_share else "none" if value is None else f"{value:,.4g}"
        )
    _show(found, as_json, table)


def _texts(
    model: Any, who: PartnerOptions, options: Any, names: list[str], template: str, kept: Path
) -> tuple[list[str], dict[str, float]]:
    """What the cascade writes about each entity, and how it called; kept, as a judge may fail after hours of it."""
    from lacy.cascade.generate import generate, require_answered

    prompts = [template.replace("{}", name) for name in names]
    asked = {"prompts": prompts, "who": who.identity, "how": options.model_dump(exclude={"batch"})}
    try:
        before = json.loads(kept.read_bytes())
        if before["asked"] == asked:
            return before["texts"], before["calls"]
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none yet, or not whole
    with _partner(model, who, options) as partner:
        written = list(_counted(generate(model, prompts, partner, options), len(prompts), "generate"))
    require_answered(written)
    texts = [text.text for text in sorted(written, key=lambda text: text.index)]
    positions = sum(text.positions for text in written)
    calls = {
        "called": sum(text.calls for text in written) / max(1, positions),
        "missed": float(sum(text.missed for text in written)),
    }
    write_atomic(kept, json.dumps({"asked": asked, "texts": texts, "calls": calls}).encode())
    return texts, calls


def _identity(source: Path) -> list[Any]:
    """Of a file or folder: names, sizes and times of its files."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()]


def run_nlu(run: Path, tasks: list[str], place: dict[str, Any], options: dict[str, Any], as_json: bool) -> None:
    from lacy.cascade.evaluation import nlu, results
    from lacy.cascade.language_model import open_model, results_folder

    model = open_model(run.absolute(), **place)
    found, units = nlu.evaluate(model, tasks, **options)
    results.save(results_folder(model.folder), found, units)
    table = _figures("nlu, <CALL> forbidden")
    for name, value in found.figures.items():
        if not name.endswith(".stderr"):
            error = found.figures.get(f"{name}.stderr")
            table.add_row(name, "none" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error else ""))
    _show(found, as_json, table)


def run_compare(runs: list[Path], page: Path | None, as_json: bool) -> None:
    from lacy.cascade.evaluation import compare

    found = compare.compare([run.absolute() for run in runs])
    if page is not None:
        write_atomic(page, compare.page(found).encode())
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        compare.show(found, _tables())
    if page is not None:
        console_for_messages().print(f"{page} written")


def _model(run: str, place: dict[str, Any], how: dict[str, Any], calls: bool) -> tuple[Any, Any]:
    """The small model, and the options of its generation with the weight of the combined score."""
    from lacy.cascade.calls import read_fitted
    from lacy.cascade.generate import Options
    from lacy.cascade.language_model import open_model
    from lacy.labelers.llm.model_folders import resolve

    weight = how.pop("weight", None)
    options = Options(**how)
    model = open_model(Path(run).absolute() if Path(run).is_dir() else resolve(run), **place)
    if options.call_score == "combined" and weight is None and calls:
        fitted = read_fitted(model.folder)
        if fitted is None:
            raise CascadeError(f"the combined score has no weight yet: lacy eval delegation {run} --fit, or --weight")
        weight = fitted.weight
    return model, options.model_copy(update={"weight": weight or 0.0})


@contextmanager
def _partner(model: Any, who: PartnerOptions, options: Any) -> Iterator[Any]:
    """A partner that survives its failures, or None for "none"."""
    if who.partner == "none":
        yield None
        return
    from lacy.cascade.partners import Amount, Patient

    amount = Amount(who.partner_tokens, who.partner_words)
    opened, close = _opened(model, who, amount, options)
    partner = Patient(opened)
    try:
        yield partner
    finally:
        partner.close()
        close()


def _opened(model: Any, who: PartnerOptions, amount: Any, options: Any) -> tuple[Any, Any]:
    """A partner, and what frees its engine."""
    from lacy.cascade.language_model import open_model
    from lacy.cascade.partners import InProcess, Server, Vllm
    from lacy.cascade.vocabulary import open_vocabulary
    from lacy.labelers.llm.model_folders import resolve

    sampling, trust = options.sampling, who.trust_remote_code
    if who.partner.startswith(("http://", "https://")):
        from lacy.labelers.llm.client import api_key, base_url

        known: dict[str, Any] = {}
        if who.partner_tokenizer:
            vocabulary, begin, end = open_vocabulary(resolve(who.partner_tokenizer), trust_remote_code=trust)
            known = {"vocabulary": vocabulary, "begin": begin, "ends": frozenset() if end is None else {end}}
        server = Server(
            base_url(who.partner), who.partner_model, model.vocabulary, amount, sampling,
            key=api_key(), timeout=who.partner_timeout, **known,
        )  # fmt: skip
        return server, lambda: None
    name = resolve(who.partner)
    if who.partner_engine == "vllm":
        from lacy.labelers.llm.vllm_scorer import close_engine, open_engine

        vocabulary, begin, end = open_vocabulary(name, trust_remote_code=trust)
        engine = open_engine(name, "auto", 1, trust, {"max_num_seqs": options.batch, "enable_prefix_caching": True})
        ends = frozenset() if end is None else frozenset([end])
        partner = Vllm(who.partner, engine, vocabulary, begin, ends, model.vocabulary, amount, sampling)
        return partner, lambda: close_engine(engine)
    larger = open_model(name, device=model.device.type, trust_remote_code=trust)
    return InProcess(larger, model.vocabulary, amount, sampling, slots=options.batch), lambda: None


def _chat(model: str, servers: list[str], trust_remote_code: bool) -> Any:
    from lacy.labelers.llm.load import chat

    if servers:
        return chat("server", model, servers=[url for given in servers for url in given.split(",")], patience=PATIENCE)
    return chat("vllm", model, trust_remote_code=trust_remote_code)


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """From --prompt, from a file (JSONL with "prompt", else a prompt a line), or from standard input as one."""
    if given and file:
        raise CascadeError("prompts come from --prompt or from --prompts, not from both")
    if file is not None:
        lines = [line for line in _lines(file) if line.strip()]
        if file.suffix == ".jsonl":
            try:
                return [str(json.loads(line)["prompt"]) for line in lines]
            except (ValueError, LookupError, TypeError):
                raise CascadeError(f'{file} is not one JSON object with "prompt" a line') from None
        return lines
    if given:
        return given
    if sys.stdin.isatty():
        raise CascadeError("nothing to continue: say --prompt TEXT or --prompts FILE")
    text = sys.stdin.read().rstrip("\n")
    return [text] if text else []


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CascadeError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text)
    else:
        write_atomic(out, text.encode())


def _show(found: Any, as_json: bool, table: Any) -> None:
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        _tables().print(table)


def _tables() -> Console:
    """Where there is no terminal, wide enough for all of them."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def _figures(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(title)
    table.add_column("", justify="right")
    return table


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _counted(texts: Iterable[Any], total: int, name: str) -> Iterator[Any]:
    with _Count(name) as count:
        for done, text in enumerate(texts, start=1):
            count(done, total)
            yield text


class _Count:
    """A bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, name: str):
        self._name = name
        self._console = console_for_messages()
        self._bar = Progress(
            TextColumn(name), BarColumn(24), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeRemainingColumn(), console=self._console, transient=True,
        )  # fmt: skip
        self._task: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> "_Count":
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._console.is_terminal:
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task(self._name, total=total)
            self._bar.update(self._task, completed=done, total=total or done)
        elif time.monotonic() - self._said > PLAIN_INTERVAL:
            self._said = time.monotonic()
            self._console.print(f"{self._name}: {done:,}" + (f" of {total:,}" if total else ""))
