"""`lacy tokenizer`: train a byte-level BPE tokenizer for the small model on a corpus."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from lacy.labelers import tokenize
from lacy.pipeline.corpus import spool
from lacy.pipeline.corpus.readers import read
from lacy.pipeline.corpus.sources import Range, find_files, plan_parts
from lacy.schemas.errors import CorpusError, TokenizerError, UsageError

PIECE = 1 << 24  # bytes of corpus read at a time
FEWEST_ENTRIES = 256 + 2  # bytes and special tokens


def train(corpus: list[str], out: Path, vocab_size: int = 32000, limit: int | None = None) -> tuple[int, int]:
    """Train on every document of a corpus, or its first `limit`, and write a tokenizer folder.

    The vocabulary has at most `vocab_size` entries, with `<|endoftext|>` and `<CALL>` among them as special tokens; a
    small corpus gives fewer, when it has no pair left to merge. Returns (documents read, entries).

    Raises UsageError for a vocabulary that cannot hold all bytes, CorpusError, TokenizerError when `out` is in use.
    """
    if vocab_size < FEWEST_ENTRIES:
        raise UsageError(
            f"--vocab-size {vocab_size} is too small: all bytes and two special tokens are {FEWEST_ENTRIES} entries"
        )
    if out.exists() and any(out.iterdir()):
        raise TokenizerError(f"{out} has files in it: choose a new folder with --out")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenize.END, tokenize.CALL],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = 0

    def counted() -> Iterator[str]:
        nonlocal documents
        for text in _texts(corpus, limit):
            documents += 1
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not documents:
        raise CorpusError("no document to train a tokenizer on")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        written = Path(folder) / out.name
        tokenize.save(tokenize.describe(str(out), tokenizer, None, tokenize.END), written)
        if out.exists():
            out.rmdir()
        os.replace(written, out)
    return documents, tokenizer.get_vocab_size()


def _texts(corpus: list[str], limit: int | None) -> Iterator[str]:
    left = limit
    folder = Path(tempfile.mkdtemp(prefix="lacy-"))
    try:
        for item in plan_parts(find_files(corpus), PIECE):
            for part in [item] if isinstance(item, Range) else spool.cut(item, folder, PIECE, set()):
                texts = read(part).texts[:left]
                spool.discard(folder, part)
                yield from texts
                if left is not None:
                    left -= len(texts)
                    if left <= 0:
                        return
    finally:
        shutil.rmtree(folder, ignore_errors=True)
