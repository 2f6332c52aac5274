"""`lacy generate`, `lacy eval` and `lacy compare` as a user runs them, on a small run trained here."""

import json
import os
import pty
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import LACY, run_lacy
from tests.stats.conftest import by_loss
from tests.support import corpora, models
from tests.support.faulty_proxy import FaultyProxy
from tests.support.partner_server import answered, server_process
from tests.support.tales import BEGIN, labelled, marked, tale

TOKENIZER, LARGER = models.byte_level(600), models.byte_level(900, seed=2)
TALES = [marked(f"tale-{number}", tale(number), TOKENIZER) for number in range(40)]
PROMPT = f"{BEGIN} Odra Venn the 3 was"
QUICK = ["--new-tokens", 8]
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, lacy) -> Path:
    """A run that nothing was evaluated of."""
    folder = tmp_path_factory.mktemp("run")
    labelled(folder / "dataset", TALES, TOKENIZER, sets={"lacy": by_loss(4.0)})
    sizes = ["--model", "tiny", "--context", 128, "--batch", 4, "--gt-tokens", 3000, "--holdout", 0.3]
    done = lacy("train", folder / "dataset", "--out", folder / "run", *sizes, "--loader-workers", 0)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def partner(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "larger"
    return models.save(folder, LARGER, models.llama(LARGER, 2))


@pytest.fixture
def oracle() -> Iterator[FaultyProxy]:
    """A server of completions that knows the tales by heart, and goes on with the next word."""

    def answer(path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "oracle", "max_model_len": 512}]}
        known = next((text for text in (made.text for made in TALES) if body["prompt"] in text), None)
        rest = "" if known is None else known[known.index(body["prompt"]) + len(body["prompt"]) :]
        word = re.match(r"\s*\S*", rest)[0]
        return 200, answered(word, finish="length" if word else "stop")

    with FaultyProxy(answer) as proxy:
        yield proxy


def copy(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def texts(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for text in found:
        assert "".join(token["text"] for token in text["tokens"]) == text["text"]
    return found


def parts(text: dict[str, Any]) -> list[Any]:
    """What is the same in any batch: scores may differ in their last digit."""
    names = ("id", "text", "by", "called", "missed")
    return [text["index"], text["calls"], *([token[name] for name in names] for token in text["tokens"])]


def test_the_text_alone_on_standard_output(run, lacy, tmp_path):
    done = run_lacy("generate", run, "--prompt", PROMPT, "--partner", "none", *QUICK, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT) and done.stdout.endswith("\n") and "\x1b" not in done.stdout
    assert len(done.stdout) > len(PROMPT) + 1
    cost = r"8 positions; 0 calls \(0\.0%\); 0 partner tokens; \d+\.\d s, 0\.0 of them for the partner; as long as .*\n"
    assert re.fullmatch(cost, done.stderr)
    (tmp_path / "text").write_text(PROMPT + "\n")
    piped = lacy("generate", run, "--partner", "none", *QUICK, stdin=str(tmp_path / "text"))
    assert (piped.returncode, piped.stdout) == (0, done.stdout)
    both = lacy("generate", run, "--prompt", PROMPT, "--prompt", "Later", "--partner", "none", *QUICK)
    assert both.stdout.startswith(done.stdout + "\nLater") and both.stdout.count("\n") == 3
    assert [line.split(":")[0] for line in both.stderr.splitlines()] == ["text 0", "text 1"]


def test_a_server_as_partner_and_jsonl(run, lacy, oracle, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\n{BEGIN} Odra Venn the 17 was born in\n")
    asked = ["generate", run, "--prompts", tmp_path / "prompts.txt", "--partner", oracle.url, "--new-tokens", 24]
    found = texts(lacy(*asked, "--budget", 0.5, "--format", "jsonl"))
    assert [text["index"] for text in found] == [0, 1] and found[0]["prompt"] == PROMPT
    calls = sum(text["calls"] for text in found)
    assert 0 < calls < sum(text["positions"] for text in found) and len(oracle.requests) == calls
    for text in found:
        tokens = text["tokens"]
        assert sum(token["called"] for token in tokens) == text["calls"] and not text["missed"]
        assert {token["by"] for token in tokens} >= {"slm", "partner"}
        assert all(token["by"] != "slm" for token in tokens if token["called"])
        assert {"margin", "uncertainty", "score"} <= set(tokens[0])
    again = lacy(*asked, "--budget", 0.5, "--format", "jsonl", "--out", tmp_path / "out.jsonl", "--batch", 1)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [parts(text) for text in written] == [parts(text) for text in found]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT, "id": 7}) + "\n")
    asked[3] = tmp_path / "prompts.jsonl"
    told = lacy(*asked, "--budget", 1, "--partner-timeout", 5)
    born = "born in Port 3 Hale in 1703. She had 103"
    assert told.stdout.startswith(f"{PROMPT} {born}") and "(100.0%)" in told.stderr


def test_a_server_that_is_killed_in_the_middle(run, lacy, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{BEGIN} Odra Venn the {number}\n" for number in range(6)))
    asked = ["--prompts", tmp_path / "prompts.txt", "--budget", 0.5, "--new-tokens", 24, "--batch", 2]
    with server_process(9) as (url, _):
        found = texts(lacy("generate", run, *asked, "--partner", url, "--format", "jsonl"))
    assert [text["index"] for text in found] == list(range(6)) and sum(text["missed"] for text in found) > 20
    assert 5 <= sum(text["calls"] - text["missed"] for text in found) <= 9
    for text in found:
        missed = [token for token in text["tokens"] if token["missed"]]
        assert len(missed) == text["missed"] > 0 and url in text["failure"]
        assert all(token["called"] and token["by"] == "slm" for token in missed)
    with server_process(9) as (url, _):
        told = lacy("generate", run, *asked, "--partner", url)
    assert told.returncode == 0
    assert len(re.findall(rf"text \d: .*; \d+ missed \({url}: .+\); ", told.stderr)) == 6
    with server_process(9) as (url, _):
        failed = lacy("eval", "leakage", run, "--pairs", 12, "--partner", url, "--budget", 0.5)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert re.match(
        rf"lacy: \d+ of \d+ calls failed \({url}: .*\): rerun the same command to measure again", failed.stderr
    )
    assert not (run / "eval").exists()


def test_a_model_as_partner_and_html(run, lacy, partner, tmp_path):
    page = tmp_path / "page.html"
    asked = ["--prompt", "<b>Odra</b> & Venn", "--prompt", PROMPT, "--partner", partner, "--call-score", "uncertainty"]
    done = lacy("generate", run, *asked, "--budget", 0.4, "--new-tokens", 30, "--format", "html", "--out", page)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    html = page.read_text()
    assert "&lt;b&gt;Odra&lt;/b&gt; &amp; Venn" in html and "<b>Odra" not in html and "<script" not in html
    assert PROMPT in html and 'class="partner"' in html
    piped = lacy("generate", run, *asked, "--budget", 0.4, "--new-tokens", 30, "--format", "html")
    assert piped.stdout.startswith("<!DOCTYPE html>") and "&lt;b&gt;Odra" in piped.stdout


MISTAKES = [
    (["generate", "nowhere", "--prompt", "x"], 2, "nowhere is neither a folder nor in the local cache, and HF_HUB"),
    (["generate", "{tmp}", "--prompt", "x"], 2, "is neither a run with a checkpoint nor a model folder"),
    (["generate", "{run}"], 2, "nothing to continue: pass --prompt TEXT or --prompts FILE"),
    (["generate", "{run}", "--prompt", "x", "--prompts", "{run}/log.jsonl"], 2, "not from both"),
    (["generate", "{run}", "--prompts", "{tmp}/none.txt"], 2, "none.txt cannot be read: No such file"),
    (["generate", "{run}", "--prompts", "{run}/log.jsonl"], 2, 'does not have one JSON object with "prompt" per line'),
    (["generate", "{run}", "--prompt", "x", "--format", "xml"], 2, "--format: 'xml' is not one of 'text'"),
    (["generate", "{run}", "--prompt", "x", "--budget", "0.1", "--threshold", "0"], 2, "not by both"),
    (["generate", "{run}", "--prompt", "x", "--call-score", "best"], 2, "--call-score: "),
    (["generate", "{run}", "--prompt", "x", "--top-p", "0"], 2, "--top-p: "),
    (["generate", "{run}", "--prompt", "x", "--partner-engine", "magic"], 2, "--partner-engine: "),
    (["generate", "{run}", "--prompt", "x", "--partner-timeout", "0"], 2, "--partner-timeout: "),
    (
        ["generate", "{run}", "--prompt", "x", "--call-score", "combined", "--partner", "{partner}"],
        2,
        "no weight yet: lacy eval delegation {run} --fit, or --weight",
    ),
    (["generate", "{run}", "--prompt", "x", "--partner", "/no/partner"], 2, "/no/partner"),
    (["generate", "{run}", "--prompt", "x", "--partner", "http://127.0.0.1:9"], 1, "no partner at http://127.0.0.1:9"),
    (["eval", "delegation", "nowhere"], 2, "is neither a run with a checkpoint nor a model folder"),
    (["eval", "delegation", "{run}", "--holdout", "0.9"], 2, "has documents that"),
    (["eval", "leakage", "{run}", "--new-tokens", "120"], 2, "ask for fewer --new-tokens"),
    (
        ["eval", "factscore", "{run}", "--entities", "{tmp}/x", "--knowledge", "x", "--judge", "x"],
        2,
        "x cannot be read",
    ),
    (["compare", "nowhere"], 2, "is neither a run with a checkpoint nor a model folder"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_line(arguments, code, message, lacy, run, partner, tmp_path):
    names = {"run": run, "partner": partner, "tmp": tmp_path}
    keyboard, terminal = pty.openpty()
    try:
        done = lacy(*(argument.format(**names) for argument in arguments), stdin=os.ttyname(terminal))
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("lacy: ") and message.format(**names) in done.stderr
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 500 and done.stdout == ""


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own(run):
    done = run_lacy("generate", run, "--prompt", "x", "--partner", "http://127.0.0.1:9", env=OFFLINE)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("lacy: no partner at http://127.0.0.1:9 (")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, run, lacy) -> Path:
    """A run with a weight for the combined score, and the results of two evaluations."""
    run = copy(run, tmp_path_factory.mktemp("evaluated") / "evaluated")
    for arguments in (["delegation", run, "--fit"], ["leakage", run, "--pairs", 20]):
        done = lacy("eval", *arguments)
        assert done.returncode == 0, done.stderr
    return run


def test_a_fitted_score_decides_calls(evaluated, lacy, partner):
    (checkpoint,) = (evaluated / "checkpoints").iterdir()
    weight = json.loads((checkpoint / "call.json").read_text())["weight"]
    found = result(lacy("eval", "delegation", evaluated, "--json"))
    assert (found["kind"], found["checkpoint"]) == ("delegation", checkpoint.name)
    assert found["options"]["weight"] == weight and found["options"]["fit"] is True, "what --fit saved"
    assert 0 <= found["figures"]["auc.combined.factual_wrong"] <= 1
    assert "AUC" in lacy("eval", "delegation", evaluated).stdout
    asked = ["--prompt", PROMPT, "--partner", partner, "--call-score", "combined", "--new-tokens", 30]
    (text,) = texts(lacy("generate", evaluated, *asked, "--format", "jsonl"))
    scored = [token for token in text["tokens"] if token["score"] is not None]
    assert text["calls"] and len(scored) > 10
    for token in scored:
        assert token["score"] == pytest.approx(token["margin"] + weight * token["uncertainty"], abs=1e-4)


def test_what_it_leaks_and_what_the_cascade_knows(run, lacy, oracle, tmp_path):
    run = copy(run, tmp_path / "run")
    leaked = result(lacy("eval", "leakage", run, "--pairs", 12, "--json"))
    assert (leaked["kind"], leaked["options"]["documents"], leaked["figures"]["called"]) == ("leakage", "trained", 0)
    assert leaked["figures"]["pairs"] == 12 and leaked["figures"]["contained"] < 0.5
    asked = ["eval", "leakage", run, "--pairs", 12, "--partner", oracle.url, "--budget", 1]
    found = result(lacy(*asked, "--json"))
    assert (found["kind"], found["options"]["documents"]) == ("containment", "held-out")
    assert found["figures"] == {"contained": 1.0, "called": 1.0, "missed": 0.0, "pairs": 12.0}
    requests = len(oracle.requests)
    assert requests > 12
    table = lacy(*asked)
    assert table.returncode == 0 and re.search(r"came out +100\.0%", table.stdout) and "GPE" in table.stdout
    assert len(oracle.requests) == requests, "the saved result was printed"
    (folder,) = (run / "eval").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        f"{kind}.{suffix}" for kind in ("leakage", "containment") for suffix in ("json", "parquet")
    }


def test_understanding(run, lacy, tmp_path):
    run = copy(run, tmp_path / "run")
    rows = [{"question": f"Odra Venn the {number} was born in", "choices": [" Port", " glass"]} for number in range(9)]
    (tmp_path / "tales.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tales", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "tales.jsonl"}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{0}}",
        "doc_to_choice": "{{choices}}", "target_delimiter": "",
    }  # fmt: skip
    (tmp_path / "tales.yaml").write_text(yaml.safe_dump(task))
    found = result(lacy("eval", "nlu", run, "--task", tmp_path / "tales.yaml", "--offline", "--json"))
    assert found["kind"] == "nlu" and 0 <= found["figures"]["tales.acc"] <= 1
    assert found["figures"]["tales.acc"] * 9 == pytest.approx(round(found["figures"]["tales.acc"] * 9))


class ChatServer:
    """Takes each sentence for a fact, and believes what stands in the passages word for word."""

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        if body is None:
            return 200, {"data": [{"id": "made", "max_model_len": 4096}]}
        assert path == "/v1/chat/completions" and body["temperature"] == 0
        said = body["messages"][-1]["content"]
        if sentence := re.search(r"^Sentence: (.*)$", said, re.MULTILINE):
            answer: dict[str, Any] = {"facts": [sentence[1]]}
        else:
            passages, claim = said.split("Claim: ")
            answer = {"supported": claim.splitlines()[0] in passages}
        return 200, {"choices": [{"message": {"content": json.dumps(answer)}}]}


def test_factscore(run, lacy, oracle, tmp_path):
    run = copy(run, tmp_path / "run")
    names = ["Odra Venn the 3", "Odra Venn the 5"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    truth = "born in Port 3 Hale in 1703. Nobody counted her lamps."
    pages = [{"id": "1", "title": names[0], "text": f"She was {truth}"}, {"id": "2", "title": names[1], "text": "No."}]
    knowledge = corpora.write(tmp_path / "pages.jsonl", pages)
    with FaultyProxy(ChatServer()) as judge:
        asked = [
            "eval", "factscore", run, "--entities", tmp_path / "names.txt", "--knowledge", knowledge,
            "--judge", "made", "--judge-server", judge.url, "--partner", oracle.url, "--budget", 1,
            "--template", f"{BEGIN} {{}} was", "--new-tokens", 80,
        ]  # fmt: skip
        found = result(lacy(*asked, "--gamma", 0, "--json"))
        assert [text.strip() for text in found["details"]["texts"]] == [
            f"born in Port {n} Hale in {1700 + n}. She had {100 + n} lamps and came from Upper Sarn {n}."
            for n in (3, 5)
        ]
        figures = found["figures"]
        assert (figures["texts"], figures["facts"], figures["supported"], figures["responded"]) == (2, 4, 1, 1)
        assert figures["score"] == figures["init_score"] == pytest.approx((1 / 2 + 0) / 2)
        first, written = len(judge.requests), len(oracle.requests)
        assert first == 4 + 4
        assert result(lacy(*asked, "--gamma", 0, "--json")) == found
        assert (len(judge.requests), len(oracle.requests)) == (first, written), "nothing is asked again"
        penalised = result(lacy(*asked, "--again", "--json"))
        assert penalised["figures"]["init_score"] == figures["init_score"] > penalised["figures"]["score"]
        assert len(judge.requests) == first, "its answers are kept"
        assert (penalised["figures"]["called"], penalised["figures"]["missed"]) == (1, 0)
        assert len(oracle.requests) == written, "the texts are kept"
        result(lacy(*asked, "--partner-words", 2, "--json"))
        assert len(oracle.requests) > written, "another partner"
    told = lacy(*asked)
    assert told.returncode == 0 and re.search(r"facts +4 ", told.stdout)


@pytest.mark.slow
def test_a_score_that_was_killed_asks_only_the_rest(run, lacy, oracle, tmp_path):
    run = copy(run, tmp_path / "run")
    (tmp_path / "names.txt").write_text("Odra Venn the 3\nOdra Venn the 5\n")
    knowledge = corpora.write(tmp_path / "pages.jsonl", [{"id": "1", "title": "Sarn", "text": "Lamps in Sarn."}])
    answer, judging, killed = ChatServer(), threading.Event(), threading.Event()

    def slow(path: str, body: Any) -> tuple[int, Any]:
        if body is not None and "Claim: " in body["messages"][-1]["content"]:
            judging.set()
            killed.wait(30)
        return answer(path, body)

    with FaultyProxy(slow) as judge:
        asked = [
            "eval", "factscore", run, "--entities", tmp_path / "names.txt", "--knowledge", knowledge, "--judge", "made",
            "--judge-server", judge.url, "--partner", oracle.url, "--budget", 1, "--template", f"{BEGIN} {{}} was",
        ]  # fmt: skip
        process = subprocess.Popen([LACY, *map(str, asked)], env=OFFLINE)
        assert judging.wait(280)
        process.kill()
        process.wait()
        killed.set()
        written = len(oracle.requests)
        splits = [body for _, body in judge.requests if "Sentence: " in body["messages"][-1]["content"]]
        assert written and splits
        figures = result(lacy(*asked, "--json"))["figures"]
        assert figures["facts"] == len(splits) and figures["unverified"] == 0
        assert len(oracle.requests) == written
        assert splits == [body for _, body in judge.requests if "Sentence: " in body["messages"][-1]["content"]]


def test_runs_side_by_side(evaluated, run, lacy, tmp_path):
    page = tmp_path / "runs.html"
    done = lacy("compare", evaluated, run, "--page", page, "--json")
    rows = result(done)["rows"]
    assert [row["name"] for row in rows] == ["evaluated", "run"]
    assert rows[0]["figures"]["leakage.contained"] is not None and set(rows[0]["missing"]) >= {"factscore", "nlu"}
    assert {"delegation", "leakage"} <= set(rows[1]["missing"]) and not any(rows[1]["figures"].values())
    assert done.stderr == f"{page} written\n"
    html = page.read_text()
    assert "<svg" in html and "evaluated" in html and not re.search(r"<script|(src|href)=.?http", html)
    table = lacy("compare", evaluated, run)
    assert table.returncode == 0 and "evaluated" in table.stdout and "lacy eval delegation" in table.stdout


@pytest.mark.slow
def test_from_a_corpus_to_what_it_leaks(small_model, tmp_path):
    corpus = corpora.write(tmp_path / "corpus.jsonl", corpora.documents(60, seed=4))
    for name, more in (("whole", []), ("bare", ["--no-text"])):
        out = tmp_path / name
        done = run_lacy("label", corpus, "--out", out, "--reference", small_model, "--workers", 1, *more)
        assert done.returncode == 0, done.stderr
        sizes = ["--model", "tiny", "--context", 128, "--batch", 4, "--gt-tokens", 3000, "--holdout", 0.3]
        done = run_lacy("train", out, "--out", tmp_path / f"run-{name}", *sizes, "--loader-workers", 0)
        assert done.returncode == 0, done.stderr
    found = result(run_lacy("eval", "leakage", tmp_path / "run-whole", "--json", env=OFFLINE))
    assert found["figures"]["pairs"] > 20 and {"DATE", "GPE", "PERSON"} <= set(found["details"]["by_type"])
    done = run_lacy("eval", "leakage", tmp_path / "run-bare", env=OFFLINE)
    assert done.returncode == 1 and done.stderr.startswith("lacy: ") and done.stderr.count("\n") == 1
    assert "has no text (lacy label --no-text)" in done.stderr
    for kind in ("delegation", "leakage"):
        done = run_lacy("eval", kind, tmp_path / "run-whole", "--dataset", tmp_path / "nowhere", env=OFFLINE)
        assert done.returncode == 2 and "nowhere is not a dataset" in done.stderr and done.stderr.count("\n") == 1
