"""Small corpora that the tests write themselves."""

import bz2
import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

NAMES = ["Ada Byron", "Otto Lang", "Mina Kerr", "Jules Petit", "Rosa Klein", "Hugo Stein", "Ines Prado", "Karl Weiss"]
TOWNS = ["Dresden", "Lyon", "Porto", "Turin", "Leeds", "Gdansk", "Utrecht", "Bergen"]
WORK = ["painter", "engineer", "composer", "chemist", "surveyor", "printer", "botanist", "pilot"]


def sentence(random: random.Random) -> str:
    name, town, work = random.choice(NAMES), random.choice(TOWNS), random.choice(WORK)
    year = random.randint(1700, 1990)
    return random.choice(
        [
            f"{name} was born in {town} in {year}, the child of a {work}.",
            f"In {year}, {name} moved to {town} and worked there as a {work}.",
            f"The {work} wrote {random.randint(2, 40)} letters, and nobody knows what became of them.",
            f"Some people say that the weather in {town} was better then \u2013 it was not.",
            f"Later {name} married, left for {town} and opened a small workshop.",
        ]
    )


def documents(count: int, seed: int = 0, sentences: int = 6) -> list[dict]:
    random_ = random.Random(seed)
    rows = []
    for number in range(count):
        text = " ".join(sentence(random_) for _ in range(random_.randint(1, 2 * sentences - 1)))
        rows.append(
            {"id": f"doc-{seed}-{number}", "text": f"{random_.choice(NAMES)}\n\n{text}\nLater life.\n{text[:80]}"}
        )
    return rows


def jsonl(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format and compression that the file's suffixes name."""
    data = jsonl(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=max(1, len(rows) // 3))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(data, mtime=0))
    elif path.suffix == ".zst":
        half = len(data) // 2  # two frames
        compressor = zstandard.ZstdCompressor()
        path.write_bytes(compressor.compress(data[:half]) + compressor.compress(data[half:]))
    elif path.suffix == ".bz2":
        half = len(data) // 2  # two streams
        path.write_bytes(bz2.compress(data[:half]) + bz2.compress(data[half:]))
    else:
        path.write_bytes(data)
    return path


def dump(pages: list[tuple[str, str, str]]) -> bytes:
    """A MediaWiki dump of (id, title, wikitext)."""
    from xml.sax.saxutils import escape

    body = "".join(
        f"  <page>\n    <title>{escape(title)}</title>\n    <ns>0</ns>\n    <id>{page}</id>\n    <revision>\n"
        f"      <id>1</id>\n      <model>wikitext</model>\n      <format>text/x-wiki</format>\n"
        f'      <text xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n'
        for page, title, text in pages
    )
    return f'<mediawiki xml:lang="en">\n  <siteinfo><sitename>W</sitename></siteinfo>\n{body}</mediawiki>\n'.encode()
