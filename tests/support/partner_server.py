"""Models and servers for the tests of partners: real ones, made small.

python -m tests.support.partner_server [N]      a server of completions that says " 17." to everything, on a free port;
                                         when N texts have been continued, the next one kills it
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.faulty_proxy import FaultyProxy

ROOT = Path(__file__).parents[2]


def write_model(
    folder: Path, texts: list[str], *, entries: int = 600, context: int = 128, spread: float = 0.6, learn: str = ""
) -> Path:
    """A Llama of two layers in a folder, with a byte-level BPE trained on `texts`: <|endoftext|> 0, <CALL> 1.

    spread  of its random weights: wide enough that it does not repeat itself
    learn   a text that it is trained on, with the end behind it, until it writes it by heart; "" for none
    """
    import torch

    from lacy.pipeline.train_tokenizer import train
    from tests.support import corpora
    from tests.support.llama import tiny_llama

    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    corpus = corpora.write(folder.parent / f"{folder.name}.jsonl", rows)
    _, entries = train([str(corpus)], folder, vocab_size=entries)
    wide = 0.1 if learn else spread
    network = tiny_llama(entries, context, initializer_range=wide, bos_token_id=0, eos_token_id=0).train()
    if learn:
        from tokenizers import Tokenizer

        ids = torch.tensor([[0, *Tokenizer.from_file(str(folder / "tokenizer.json")).encode(learn).ids, 0]])
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for _ in range(200):
            loss = network(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss < 0.01:
                break
        assert loss < 0.02, "it has not learned its text"
    network.save_pretrained(str(folder))
    return folder


def completion(path: str, body: Any) -> tuple[int, Any]:
    """What a server of completions says that has one model, "made", which writes one token, " 17."."""
    if path == "/v1/models":
        return 200, {"object": "list", "data": [{"id": "made", "object": "model"}]}
    return 200, answered(" 17.")


def answered(text: Any, finish: str = "length", tokens: int = 1) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return {"object": "text_completion", "choices": [choice], "usage": {"completion_tokens": tokens}}


def mortal(texts: int) -> Callable[[str, Any], tuple[int, Any]]:
    """`completion` that kills its own process while it is asked for more than so many texts, slowly."""
    count = itertools.count(1)

    def answer(path: str, body: Any) -> tuple[int, Any]:
        if body is not None:
            time.sleep(0.01)  # so that those beside it are in the works
            if next(count) > texts:
                os.kill(os.getpid(), signal.SIGKILL)
        return completion(path, body)

    return answer


@contextmanager
def server_process(texts: int | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The base URL of a server in a process of its own, and the process; it dies after so many texts."""
    command = [sys.executable, "-m", __name__, *([] if texts is None else [str(texts)])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


if __name__ == "__main__":
    with FaultyProxy(mortal(int(sys.argv[1])) if sys.argv[1:] else completion) as proxy:
        print(proxy.url, flush=True)
        signal.pause()
