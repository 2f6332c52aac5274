"""The arithmetic of `lacy plan`, against numbers worked out by hand."""

import json

import pytest

from lacy.pipeline.cost import DEFAULTS, Rate, amount, estimate_cost, measured, with_dataset, with_file
from lacy.pipeline.estimate import Estimate, Figure
from lacy.schemas.errors import UsageError

ROUND = {
    "bytes_per_token": 4,
    "tagging_tokens_per_second": 1000,
    "scoring_tokens_per_second_l4": 10_000,
    "deciding_tokens_per_second": 1_000_000,
    "efficiency": 0.5,
    "start_hours": 1,
    "crossing_bytes_per_token": 8,
    "signals_bytes_per_token": 10,
    "labels_bytes_per_token": 5,
    "reads_per_part": 10,
    "writes_per_part": 3,
    "vcpu_hour": 0.1,
    "memory_gb_hour": 0.01,
    "disk_gb_hour": 0.001,
    "gpu_hour_l4": 1,
    "shuffle_gb": 0.02,
    "storage_gb_month": 0.02,
    "million_reads": 0.5,
    "million_writes": 5,
}
RATES = DEFAULTS | {name: Rate(value=value, source="test") for name, value in ROUND.items()}


def test_a_corpus_by_hand():
    """3.6 billion tokens: 1,000 core hours of tagging, 200 hours of a GPU for two models."""
    found = estimate_cost(3.6e9, RATES, models=2, gpu="l4", gpus=1, taggers=10, scorers=20, part_bytes=1_000_000)
    assert found.corpus_bytes == 14.4e9
    assert found.parts == 14_400
    assert found.tagging_core_hours == pytest.approx(1000)
    assert found.scoring_gpu_hours == pytest.approx(200)
    assert found.hours_of["tagging"] == pytest.approx(25)  # 80 cores at half their speed
    assert found.hours_of["scoring"] == pytest.approx(20)  # 20 GPUs likewise
    assert found.hours_of["deciding"] == pytest.approx(0.025)
    assert found.hours == pytest.approx(1 + 25 + 20 + 0.025)
    # A tagger: 8 vCPUs, 32 GB and a disk of 100 GB, 0.8 + 0.32 + 0.1 an hour. A g2-standard-8 is the same, and its L4.
    assert found.money_of["taggers"] == pytest.approx(10 * (1 + 25 + 0.025) * 1.22)
    assert found.money_of["scorers"] == pytest.approx(20 * (1 + 20) * 1.22)
    assert found.money_of["GPUs"] == pytest.approx(20 * (1 + 20) * 1)
    assert found.shuffle_bytes == 28.8e9
    assert found.money_of["shuffle"] == pytest.approx(2 * 28.8 * 0.02)
    assert (found.reads, found.writes) == (144_000, 43_200)
    assert found.money_of["requests"] == pytest.approx(0.072 + 0.216)
    assert found.money == pytest.approx(317.505 + 512.4 + 420 + 1.152 + 0.288)
    assert found.storage_month == pytest.approx((36 + 18) * 0.02)
    assert found.element_bytes == 2_000_000
    assert found.part_minutes == pytest.approx(250_000 / 1000 / 60)


def test_machines_by_hours():
    """Of 41 hours one is for starting, and 20 each are for tagging and scoring."""
    found = estimate_cost(3.6e9, RATES, models=2, gpu="l4", gpus=2, hours=41)
    assert found.taggers == 13  # 1000 / (20 * 8 * 0.5) = 12.5
    assert found.scorers == 10  # 200 / (20 * 2 * 0.5)
    assert found.gpus == 20
    assert found.hours < 41 + found.hours_of["deciding"] + 1e-9


def test_grammar_alone_needs_no_gpu_and_no_second_shuffle():
    found = estimate_cost(3.6e9, RATES, models=0, hours=41)
    assert (found.scorers, found.gpus, found.scoring_gpu_hours, found.shuffle_bytes) == (0, 0, 0, 0)
    assert found.taggers == 7  # 1000 / (40 * 8 * 0.5) = 6.25
    assert found.money_of["GPUs"] == found.money_of["scorers"] == found.money_of["shuffle"] == 0


def test_parts_grow_with_the_corpus_up_to_a_limit_and_then_datasets_are_advised():
    assert estimate_cost(3e9).part_bytes == 1 << 20
    middle = estimate_cost(100e9)
    assert (middle.part_bytes, middle.parts) == (4 << 20, 97_752)  # 2 MiB would make 195,504
    assert "pass --part-bytes 4194304 to lacy label" in middle.notes
    large = estimate_cost(1e12)
    assert large.part_bytes == 16 << 20
    assert "label the corpus as 3 datasets: one dataset is tested with up to 100,000 parts" in large.notes


def test_a_part_that_is_too_large_is_noted():
    notes = estimate_cost(1e12, part_bytes=256 << 20).notes
    assert any("smaller --part-bytes" in note and "crosses" in note for note in notes)
    assert any("a lost machine loses" in note for note in notes)


@pytest.mark.parametrize("text,value", [("3e9", 3e9), ("3B", 3e9), ("1.5t", 1.5e12), ("250k", 250e3), ("12G", 12e9)])
def test_amounts(text, value):
    assert amount(text) == value


@pytest.mark.parametrize("text", ["", "B", "3X", "-1", "0", "nan", "inf", "1e400"])
def test_no_amounts(text):
    with pytest.raises(UsageError, match="is not a number"):
        amount(text)


@pytest.mark.parametrize("given", [{"gpu": "t4"}, {"gpu": "l4", "gpus": 3}, {"hours": 0.1}])
def test_what_cannot_be(given):
    with pytest.raises(UsageError):
        estimate_cost(1e9, **given)


def test_rates_of_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("efficiency: 0.75\nscoring_tokens_per_second: {value: 5e4, source: our H100}\n")
    rates = with_file(DEFAULTS, tmp_path / "a.yaml")
    assert rates["efficiency"] == Rate(value=0.75, source="a.yaml")
    assert rates["scoring_tokens_per_second"] == Rate(value=5e4, source="our H100")
    assert estimate_cost(1e9, rates, gpu="a100").scoring_gpu_hours == pytest.approx(1e9 / 5e4 / 3600)


@pytest.mark.parametrize(
    "text", ["speed: 1", "efficiency: 0", "efficiency: fast", "[1]", "a: [", "efficiency: {value: 1}"]
)
def test_a_file_that_is_none(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match="--rates"):
        with_file(DEFAULTS, tmp_path / "a.yaml")


def test_rates_that_an_estimate_measured(tmp_path):
    def figure(value: float) -> Figure:
        return Figure(value, value, value)

    found = Estimate(
        corpus_bytes=figure(8e6),
        documents=figure(100),
        tokens=figure(2e6),
        signals_bytes=figure(14e6),
        labels_bytes=figure(10e6),
        stages={"read": figure(0.01), "grammar": figure(0.09), "reference": figure(0.05), "write": figure(0.1)},
        hours=figure(1),
        sample_tokens=1234,
        sample_documents=5,
        workers=2,
        engines={"reference": 1},
    )
    (tmp_path / "rates.json").write_text(json.dumps(measured(found)))
    rates = with_file(DEFAULTS, tmp_path / "rates.json")
    assert rates["bytes_per_token"] == Rate(value=4, source="measured: 1,234 tokens of the corpus")
    assert rates["tagging_tokens_per_second"].value == pytest.approx(2e6 / (0.2 * 3600))
    assert rates["scoring_tokens_per_second"].value == pytest.approx(2e6 / (0.05 * 3600))
    assert (rates["signals_bytes_per_token"].value, rates["labels_bytes_per_token"].value) == (7, 5)


def test_sizes_of_a_dataset(tmp_path, labeller, small_model):
    from tests.support import corpora

    path = corpora.write(tmp_path / "a.jsonl", corpora.documents(5, seed=1))
    options = ["--reference", "none", "--tokenizer", small_model, "--policy", "factual"]
    done = labeller("label", path, "--out", tmp_path / "d", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rates, tokens = with_dataset(DEFAULTS, str(tmp_path / "d"))
    signals = sum(part.stat().st_size for part in (tmp_path / "d" / "signals").iterdir())
    labels = sum(part.stat().st_size for part in (tmp_path / "d" / "labels" / "factual").glob("*.parquet"))
    assert rates["bytes_per_token"].value == pytest.approx(path.stat().st_size / tokens)
    assert rates["signals_bytes_per_token"].value == pytest.approx(signals / tokens)
    assert rates["labels_bytes_per_token"].value == pytest.approx(labels / tokens)
    told = labeller("plan", tmp_path / "d", "--tokens", "3B", "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["signals_bytes"] == pytest.approx(3e9 * signals / tokens)
