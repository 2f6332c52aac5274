"""Tasks of lm-evaluation-harness on a tiny model, against log-likelihoods computed by hand in float64."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from lacy.cascade.evaluation import nlu
from lacy.cascade.language_model import Model, open_model
from lacy.schemas.errors import CascadeError

END, CALL = "<|endoftext|>", "<CALL>"
CONTEXT = 48

PEOPLE = ["Odra Venn", "Mira Oldan", "Jost Werrel", "Tarn Ibel"]
TRADES = ["botanist", "bell founder", "glass cutter", "mapmaker of the lower valleys"]
QUESTIONS = [
    {"question": f"{person} of Lumeria was, in year {year}, a", "choices": TRADES, "answer": (number + year) % 4}
    for number, person in enumerate(PEOPLE)
    for year in (3, 14, 159)
] + [
    {"question": f"It is said of Odra Venn: {CALL} {END} She was a", "choices": TRADES[:3], "answer": 2},
    {
        "question": "The valleys of Lumeria are deep and wide. " * 6 + "Their founder was a",
        "choices": TRADES,
        "answer": 1,
    },
]
STORIES = ["Odra Venn was a Lumerian botanist.", "The bell founder of Lumeria was Mira Oldan. " * 4]

CHOICE = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": "{{choices}}",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[END, CALL], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*PEOPLE, *TRADES, *STORIES, "The valleys of Lumeria are deep and wide."], words)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, additional_special_tokens=[CALL]
    ).save_pretrained(folder)
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=320, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return open_model(folder, device="cpu")


@pytest.fixture(scope="module")
def calling(model, tmp_path_factory) -> Model:
    """The same model, but that <CALL> has by far the highest logit at most positions."""
    folder = tmp_path_factory.mktemp("calling")
    for path in model.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    again = open_model(folder, device="cpu")
    again.network.get_output_embeddings().weight[again.call_id] *= 40
    return again


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model) -> Path:
    """Questions with choices, texts to score whole, texts to go on with, each a task; data beside the YAML."""
    folder = tmp_path_factory.mktemp("tasks")
    lines(folder / "data" / "trades.jsonl", QUESTIONS)
    task(folder, "lumeria_trades", CHOICE, "data/trades.jsonl")
    lines(folder / "stories.jsonl", [{"text": text} for text in STORIES])
    rolling = {"dataset_path": "json", "output_type": "loglikelihood_rolling", "test_split": "test"}
    metrics = {"metric_list": [{"metric": "bits_per_byte"}]}
    task(
        folder, "lumeria_stories", rolling | metrics | {"doc_to_text": "", "doc_to_target": "{{text}}"}, "stories.jsonl"
    )
    begun = [{"text": story[:20], "end": greedy(model, story[:20], 6)} for story in STORIES]
    lines(folder / "begun.jsonl", begun)
    generated = {
        "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
        "doc_to_text": "{{text}}", "doc_to_target": "{{end}}",
        "generation_kwargs": {"max_gen_toks": 6, "until": ["\u0000"], "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    task(folder, "lumeria_begun", generated, "begun.jsonl")
    return folder


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def task(folder: Path, name: str, config: dict, data: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"task": name, "dataset_kwargs": {"data_files": {"test": data}}} | config))
    return path


def logits(model: Model, ids: list[int], call: bool) -> np.ndarray:
    """(T, V) float64."""
    network = GPT2LMHeadModel(model.network.config).double().eval()
    network.load_state_dict(model.network.state_dict())
    found = network(torch.tensor([ids])).logits[0].detach().numpy().copy()
    if not call:
        found[:, model.call_id] = -np.inf
    return found


def likelihood(model: Model, context: str, continuation: str, call: bool = False) -> float:
    """Of a continuation after the end token and a context, of which the first tokens go where there is no room."""
    before, whole = (model.vocabulary.tokenizer.encode(text).ids for text in (context, context + continuation))
    assert whole[: len(before)] == before
    answer = whole[len(before) :]
    ids = [0, *before[max(0, len(before) + len(answer) - CONTEXT) :], *answer]
    found = logits(model, ids[:-1], call)[-len(answer) :]
    found -= np.log(np.exp(found).sum(-1, keepdims=True))
    return float(found[np.arange(len(answer)), answer].sum())


def choices(model: Model, call: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Whether each question is answered well, by log-likelihood, and by that for each character."""
    found = []
    for asked in QUESTIONS:
        values = np.array([likelihood(model, asked["question"], f" {choice}", call) for choice in asked["choices"]])
        long = np.array([len(choice) for choice in asked["choices"]])
        found.append((values.argmax() == asked["answer"], (values / long).argmax() == asked["answer"]))
    plain, normal = np.array(found, float).T
    return plain, normal


def greedy(model: Model, text: str, count: int) -> str:
    ids = [0, *model.vocabulary.tokenizer.encode(text).ids]
    start = len(ids)
    for _ in range(count):
        ids.append(int(logits(model, ids, call=False)[-1].argmax()))
    return model.vocabulary.tokenizer.decode(ids[start:])


def test_choices_are_made_by_their_likelihood_without_call(model, tasks) -> None:
    plain, normal = choices(model)
    assert 0 < plain.mean() < 1 and not (plain == normal).all()  # or the test could not tell
    result, units = nlu.evaluate(model, [str(tasks / "lumeria_trades.yaml")], batch=5)
    assert result.figures["lumeria_trades.acc"] == pytest.approx(plain.mean())
    assert result.figures["lumeria_trades.acc_norm"] == pytest.approx(normal.mean())
    error = normal.std(ddof=1) / np.sqrt(len(normal))
    assert result.figures["lumeria_trades.acc_norm.stderr"] == pytest.approx(error)
    assert result.figures["average"] == pytest.approx(normal.mean())
    assert units["value"].to_pylist() == normal.tolist()
    assert units["doc"].to_pylist() == [str(number) for number in range(len(QUESTIONS))]
    assert set(units["task"].to_pylist()) == {"lumeria_trades"}
    assert result.details["tasks"]["lumeria_trades"]["metric"] == "acc_norm,none"


def test_call_has_no_part_in_likelihoods_nor_in_texts(model, calling, tasks) -> None:
    assert (choices(calling, call=True)[1] != choices(model)[1]).any()  # or masking would not matter
    result, units = nlu.evaluate(model, [str(tasks)])
    again, units_again = nlu.evaluate(calling, [str(tasks)])
    assert again.figures == pytest.approx(result.figures)
    assert units_again == units
    assert result.figures["lumeria_begun.exact_match"] == 1
    assert not calling.network._forward_hooks  # what was masked can call again


def test_texts_are_scored_whole_from_the_end_token_on(model, tasks, tmp_path) -> None:
    story = STORIES[0]
    lines(tmp_path / "stories.jsonl", [{"text": story}])
    config = yaml.safe_load((tasks / "lumeria_stories.yaml").read_text())
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    result, units = nlu.evaluate(model, [str(tmp_path / "one.yaml")])
    expected = -likelihood(model, "", story) / len(story.encode()) / np.log(2)
    assert result.figures["lumeria_stories.bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert result.figures["average"] is None
    assert units.num_rows == 0


def test_a_group_counts_as_one_task(model, tasks, tmp_path) -> None:
    lines(tmp_path / "questions.jsonl", QUESTIONS)
    for number in (1, 2, 3):
        task(tmp_path, f"trades_{number}", CHOICE, "questions.jsonl")
    group = {"group": "trades", "task": ["trades_1", "trades_2"], "aggregate_metric_list": [{"metric": "acc_norm"}]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    result, units = nlu.evaluate(model, [str(tmp_path)], limit=3)
    questions = set(zip(units["task"].to_pylist(), units["doc"].to_pylist(), strict=True))
    assert questions == {("trades", f"trades_{task}/{doc}") for task in (1, 2) for doc in range(3)} | {
        ("trades_3", str(doc)) for doc in range(3)
    }
    assert len(units) == 9
    expected = choices(model)[1][:3].mean()
    assert result.figures["trades.acc_norm"] == pytest.approx(expected)
    assert result.figures["average"] == pytest.approx(expected)


@pytest.fixture
def read(model, monkeypatch) -> list[list[int]]:
    """What the network reads: the ids of each sequence."""
    sequences: list[list[int]] = []
    forward = model.network.forward

    def record(input_ids, **options):
        sequences.extend(input_ids.tolist())
        return forward(input_ids, **options)

    monkeypatch.setattr(model.network, "forward", record)
    return sequences


def test_examples_stand_before_a_question(model, tmp_path, read) -> None:
    short = [{"question": f"{letter} is", "choices": ["a", "b"], "answer": 0} for letter in "pqrs"]
    lines(tmp_path / "letters.jsonl", short)
    path = task(tmp_path, "letters", CHOICE | {"fewshot_split": "test"}, "letters.jsonl")
    result, _ = nlu.evaluate(model, [str(path)], num_fewshot=2, limit=1, seed=1)
    texts = [model.vocabulary.tokenizer.decode(ids[1:], skip_special_tokens=False) for ids in read]
    assert {ids[0] for ids in read} == {0}
    assert all(text.startswith(tuple("qrs")) and text.count(" is a\n\n") == 2 and "p is" in text for text in texts)
    assert result.details["tasks"]["letters"]["num_fewshot"] == 2


@pytest.mark.parametrize(
    "question", ["Odra Venn was", f"Odra {END} Venn {CALL} was", "The valleys of Lumeria are deep. " * 9, ""]
)
def test_every_context_begins_with_one_end_token_and_has_no_other(model, tmp_path, read, question) -> None:
    lines(tmp_path / "one.jsonl", [{"question": question, "choices": ["a botanist"], "answer": 0}])
    nlu.evaluate(model, [str(task(tmp_path, "one", CHOICE, "one.jsonl"))], batch=1)
    (ids,) = read
    plain = model.vocabulary.tokenizer.encode(f"{question} a botanist").ids[:-1]
    assert ids == [0, *plain[max(0, len(plain) + 1 - CONTEXT) :]]


def test_a_model_without_call_is_as_it_is(model, tasks) -> None:
    plain, _ = choices(model, call=True)
    result, _ = nlu.evaluate(replace(model, call_id=None), [str(tasks / "lumeria_trades.yaml")])
    assert result.figures["lumeria_trades.acc"] == pytest.approx(plain.mean())


def test_what_cannot_be_had_is_said_in_one_line(model, tmp_path) -> None:
    missing = task(tmp_path, "missing", CHOICE, "nowhere.jsonl")
    with pytest.raises(CascadeError, match=r"task missing or its data is not available: .*nowhere.jsonl"):
        nlu.evaluate(model, [str(missing)])
    remote = task(tmp_path, "remote", CHOICE | {"dataset_path": "lumeria/trades", "dataset_kwargs": {}}, "-")
    with pytest.raises(CascadeError, match=r"task remote or its data is not available: .*a local YAML file"):
        nlu.evaluate(model, [str(remote)], offline=True)
    (tmp_path / "none").mkdir()
    with pytest.raises(CascadeError, match="contains no task"):
        nlu.evaluate(model, [str(tmp_path / "none")])
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(CascadeError, match=r"broken.yaml is not a task: [^\n]+$"):
        nlu.evaluate(model, [str(tmp_path / "broken.yaml")])


@pytest.mark.slow
def test_tasks_of_the_harness_are_known_by_name(model) -> None:
    with pytest.raises(CascadeError, match=r"unknown task hellaswagg \(similar: hellaswag"):
        nlu.evaluate(model, ["hellaswagg"])
    with pytest.raises(CascadeError, match="task arc_easy or its data is not available"):
        nlu.evaluate(model, ["arc_easy"], offline=True)
