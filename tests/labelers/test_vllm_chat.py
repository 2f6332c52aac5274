"""The vLLM chat on a real engine and a real model, and the judge on it.

A process can hold only one engine on a CPU, and other tests hold one, so these engines live in a process of their own.
"""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lacy.labelers.judge import parse, passages
from lacy.labelers.llm import load, model_folders
from lacy.labelers.llm.vllm_chat import VllmChat, without_system
from lacy.schemas.errors import ModelError

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

SCRIPT = """
import dataclasses, json, sys, time
from lacy.labelers.llm import load
from lacy.labelers.judge import judge

model, texts, others, max_tokens = json.load(sys.stdin)
began = time.monotonic()
chat = load.chat("vllm", model, dtype="float32", window=2048, kv_cache_memory_bytes=1 << 28)
loaded = time.monotonic()
replies = []
ask = chat.ask
def keep(conversations, schema, max_tokens):
    got = ask(conversations, schema, max_tokens)
    replies.extend(dataclasses.asdict(reply) for reply in got)
    return got
chat.ask = keep
verdicts = judge(chat, texts, max_tokens=max_tokens)
judged = time.monotonic()
plain = [dataclasses.asdict(reply) for reply in ask(others, None, 8)] if others else []
chat.close()
chat.close()
found = {
    name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(verdicts).items()
}
seconds = [round(loaded - began, 1), round(judged - loaded, 1)]
print(json.dumps({"verdicts": found, "replies": replies, "plain": plain, "context": chat.context, "seconds": seconds}))
"""

TEXTS = [
    "Mira Oldan was born in 1902 in Teverin, the daughter of a baker, and studied law there.",
    "The bridge over the Sarn was built by Jost Werrel in 1931. It is 412 metres long and made of granite.",
]


def judge_in_a_process(texts: list[str], others: list[Any], max_tokens: int, timeout: int) -> dict[str, Any]:
    try:
        model = model_folders.get_model()
    except ModelError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([str(model), texts, others, max_tokens]),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(result: dict[str, Any], texts: list[str]) -> None:
    """Every window has a verdict or is counted, and what is complete follows the schema."""
    verdicts, replies = result["verdicts"], result["replies"]
    windows = [(index, *window) for index, text in enumerate(texts) for window in passages(text)]
    assert verdicts["windows_judged"] + verdicts["windows_unjudged"] == len(windows)
    assert verdicts["windows_unjudged"] == len(verdicts["unjudged_document"])
    assert verdicts["spans"] == len(verdicts["span_document"])
    assert len(windows) <= len(replies) <= 2 * len(windows)
    usable = 0
    for reply in replies:
        assert (reply["text"] is None) != (reply["error"] is None)
        try:
            json.loads(reply["text"])
        except ValueError:  # cut off
            assert parse(reply["text"]) is None
            continue
        assert parse(reply["text"]) is not None
        usable += 1
    assert usable == verdicts["windows_judged"]
    for index, start, end, score in zip(
        *(verdicts[f"span_{name}"] for name in ("document", "starts", "ends", "scores")), strict=True
    ):
        words = texts[index][start:end]
        assert words.strip() == words != ""
        assert 0 < score <= 1


@needs_vllm
@pytest.mark.slow
def test_a_real_model_judges() -> None:
    others = [
        [{"role": "user", "content": "Say yes."}],
        [{"role": "user", "content": "word " * 3000}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "Say no."}],
    ]
    result = judge_in_a_process(TEXTS, others, max_tokens=160, timeout=300)
    check(result, TEXTS)
    assert result["verdicts"]["windows_judged"] >= 1
    assert result["context"] == 2048
    first, long, odd, last = result["plain"]
    assert first["text"]
    assert last["text"]
    assert "the model reads 2048" in long["error"]
    assert "cannot be tokenized" in odd["error"]
    print(f"load, judge: {result['seconds']} s")


@needs_vllm
@pytest.mark.slow
def test_a_real_model_judges_real_documents(dev_data: Path) -> None:
    """20 documents; minutes on a CPU."""
    with gzip.open(dev_data / "dwiki-dev.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"][:600] for line, _ in zip(lines, range(20), strict=False)]
    result = judge_in_a_process(texts, [], max_tokens=640, timeout=550)
    check(result, texts)
    counts = {name: value for name, value in result["verdicts"].items() if isinstance(value, int)}
    print(f"{counts}; load, judge: {result['seconds']} s")


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install 'lacy\\[vllm\\]'"):
        load.chat("vllm", "model")


def test_an_unknown_chat_is_refused() -> None:
    with pytest.raises(ValueError, match="known: vllm, server"):
        load.chat("other", "model")  # type: ignore[arg-type]


@needs_vllm
def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the model"):
        load.chat("vllm", str(tmp_path))


def test_a_window_must_fit_the_model(small_model: Path) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ValueError, match="longer than the model's context of 256"):
        load.chat("vllm", str(small_model), window=257)


class Tokenizer:
    """One token per character; a template that knows no system message, or none."""

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def apply_chat_template(self, conversation: list[dict[str, str]], **settings: object) -> list[int]:
        assert settings["return_dict"] is False
        if conversation[0]["role"] == "system":
            raise ValueError("System role not supported")
        return self.encode("".join(f"<{message['role']}>{message['content']}" for message in conversation))


def prompted(template: str | None, conversation: list[dict[str, str]], context: int = 100) -> str:
    loaded = object.__new__(VllmChat)
    loaded.tokenizer, loaded.context = Tokenizer(template), context
    prompt = loaded._prompt(conversation)
    return prompt if isinstance(prompt, str) else "".join(map(chr, prompt))


CONVERSATION = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Text."}]


def test_conversations_are_put_into_the_model_s_form() -> None:
    assert prompted("template", CONVERSATION) == "<user>Rules.\n\nText."
    assert prompted("template", CONVERSATION[1:]) == "<user>Text."
    assert prompted(None, CONVERSATION) == "Rules.\n\nText.\n\n"
    assert "System role not supported" in prompted("template", CONVERSATION[:1])
    assert "has 11 tokens, and the model reads 11" in prompted("template", CONVERSATION[1:], context=11)
    assert without_system(CONVERSATION) == [{"role": "user", "content": "Rules.\n\nText."}]
