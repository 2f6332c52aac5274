"""`lacy report`: one HTML page about a dataset, to open in a browser and to share.

The page needs no network and no other file: styles, script and data are in it, and its content security policy allows
nothing else. It has a summary, charts of the figures of `stats.compute`, and a view to read documents in, with their
tokens tinted by label or loss. The documents travel as compressed JSON and become text nodes, never markup; everything
else goes through jinja2, which escapes it. The same dataset gives the same bytes.
"""

import base64
import gzip
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import markupsafe

from lacy.schemas.codes import ENT_TYPES, LABELS, POS
from lacy.schemas.errors import DatasetError
from lacy.schemas.files import write_atomic
from lacy.schemas.manifest import Manifest, at, label_sets, read_complete
from lacy.schemas.pages import source, template
from lacy.schemas.printable import printable
from lacy.stats import excerpts
from lacy.stats.answers import require_place
from lacy.stats.compute import compute
from lacy.stats.figures import BIN_WIDTH, BINS, QUANTILES, Agreement, Losses, Stats

_PACKAGE: Final = "lacy.stats"
DOCUMENTS: Final = 50
BY_LOSS: Final = ("lacy", "loss")  # policies whose scores are losses
TOKENS: Final = 8_000  # of a document
DOCUMENT_BYTES: Final = 90_000  # of the page, on average: 4.5 MB for 50 documents
_SHARE_DRAWN: Final = 0.001  # of the tokens; the loss chart ends where bins hold less
_SHARE_TICKS: Final = (0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def write(
    dataset: str | os.PathLike[str],
    out: str | Path,
    *,
    labels: str | None = None,
    where: str | None = None,
    documents: int | Sequence[str] = DOCUMENTS,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> None:
    """Write the page of a dataset to `out`, atomically.

    `labels`, `where` and `on_stage` are those of `stats.compute.compute`; the first two also select the documents that
    can be read. `documents` is their number, see `lacy.stats.excerpts.choose`, or their ids. The page holds the first
    tokens of long documents: at most TOKENS, and fewer where it would become too large.

    Raises DatasetError for a dataset that is missing, unfinished or damaged, and for a label set or a document that it
    does not have; SqlError for a condition that DuckDB does not understand; UsageError where `out` cannot be written
    or is in the dataset.
    """
    folder = at(dataset)
    manifest = read_complete(folder)
    require_place(Path(out), folder)
    if isinstance(documents, int) and documents < 0:
        raise DatasetError(f"{documents} documents: pass 0 or more, or their ids", usage=True)
    figures = compute(folder, labels, where=where, on_stage=on_stage)
    on_stage("reading documents")
    if isinstance(documents, int):
        ids = None if where is None else excerpts.matching(folder, figures.labels, where)
        rows = excerpts.choose(folder, manifest, figures.labels, documents, ids)
    else:
        rows = excerpts.find(folder, documents)
    data = _data(folder, manifest, figures, rows)
    write_atomic(Path(out), page(figures, manifest, data, spread=isinstance(documents, int)).encode())


@dataclass(frozen=True)
class Data:
    """Documents of the reading view."""

    packed: str  # JSON, gzip, base64
    documents: int
    cut: int  # documents that are not whole
    tokens: int  # that a document may have at most


def _data(folder: Path, manifest: Manifest, figures: Stats, rows: Sequence[excerpts.Row]) -> Data:
    """Pack the documents into at most DOCUMENT_BYTES each on average; few may take as much space as DOCUMENTS."""
    sets = label_sets(folder)
    limit = TOKENS
    while True:
        documents = excerpts.read(folder, rows, list(sets), limit)
        content = {
            "sets": [
                {"name": printable(name), "policy": found.policy, "action": found.action, "threshold": found.threshold}
                for name, found in sets.items()
            ],
            "chosen": list(sets).index(figures.labels) if figures.labels is not None else None,
            "budgets": [[pick.budget, pick.threshold] for pick in figures.budgets if pick.threshold is not None],
            "policy": figures.policy,
            "names": {"pos": POS, "ent": ENT_TYPES, "label": LABELS},
            "codes": excerpts.CODES,
            "units": excerpts.LOSS_UNITS,
            "documents": documents,
        }
        packed = _pack(content)
        if len(packed) <= DOCUMENT_BYTES * max(DOCUMENTS, len(rows)) or limit == 1:
            cut = sum(document["tokens"] > len(document["start"]) for document in documents)
            return Data(packed, len(documents), cut, limit)
        longest = max(len(document["start"]) for document in documents)
        limit = max(1, int(min(limit, longest) * min(0.9, DOCUMENT_BYTES * max(DOCUMENTS, len(rows)) / len(packed))))


def _pack(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def page(figures: Stats, manifest: Manifest, data: Data, *, spread: bool) -> str:
    """Fill the page. `spread`: the documents were chosen, not named by the user."""
    style, script = source(_PACKAGE, "report.css"), source(_PACKAGE, "report.js")
    filled = template(_PACKAGE, "report.html", printable=printable, share=_share, number=_number)
    student = "student" in manifest.models  # policies by loss take its losses then
    mine = next((found for found in figures.label_sets if found.name == figures.labels), None)
    return filled.render(
        stats=figures,
        mine=mine,
        name=printable(Path(figures.dataset).resolve().name),
        made=_made(manifest),
        verb="ignored" if mine and mine.action == "ignore" else "delegated",
        quantiles=QUANTILES,
        losses=_losses(figures.losses, mine.threshold if mine and mine.policy in BY_LOSS and not student else None),
        scorer="student" if student else "reference",
        budgets=_budgets(figures),
        agreement=_agreement(figures),
        data=data,
        spread=spread,
        style=markupsafe.Markup(style),
        style_hash=_hash(style),
        script=markupsafe.Markup(script),
        script_hash=_hash(script),
    )


def _hash(source: str) -> str:
    """The hash by which a content security policy allows a source."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _made(manifest: Manifest) -> list[tuple[str, str]]:
    """The corpus, models and options of the dataset, as the manifest names them."""
    named = {"tokenizer": manifest.tokenizer} | manifest.models
    made = []
    for role, about in named.items():
        name = (
            next((about[key] for key in ("name", "spacy") if about.get(key)), None) if isinstance(about, dict) else None
        )
        if name is not None:
            made.append((printable(role), printable(str(name))))
    corpus = [printable(file.path.rsplit("/", 1)[-1]) for file in manifest.corpus]
    if corpus:
        made.append(("corpus", f"{corpus[0]} and {len(corpus) - 1:,} more" if len(corpus) > 1 else corpus[0]))
    if "lacy" in manifest.versions:
        made.append(("version", printable(manifest.versions["lacy"])))
    return made


# Charts: the template draws them from places in percent, so that they fit any width.


@dataclass(frozen=True)
class Curve:
    name: str
    path: str  # of SVG, in a box of 100 by 100
    area: str


def _losses(losses: Losses, threshold: float | None) -> dict[str, Any] | None:
    """Shares of the factual and the other tokens by loss, on a square-root scale: most tokens have little loss."""
    kinds = {"factual": losses.factual_bins, "other": losses.other_bins}
    shares = {name: [count / sum(bins) for count in bins] for name, bins in kinds.items() if sum(bins)}
    if not shares:
        return None
    drawn = max(place for bins in shares.values() for place, share in enumerate(bins) if share >= _SHARE_DRAWN) + 1
    nats = max(2, -(-drawn * BIN_WIDTH // 2) * 2)
    width = 100 * BIN_WIDTH / nats
    highest = max(share for bins in shares.values() for share in bins)
    top = highest * 1.05

    def height(share: float) -> float:
        return 100 - 100 * math.sqrt(share / top)

    curves = []
    for name, bins in shares.items():
        inside = bins[: round(nats / BIN_WIDTH)]
        heights = [height(share) for share in inside]
        path = f"M0 {heights[0]:.2f}" + "".join(
            f"V{y:.2f}H{place * width:.2f}" for place, y in enumerate(heights, start=1)
        )
        curves.append(Curve(name, path, f"{path}V100H0Z"))
    return {
        "curves": curves,
        "x": [(100 * tick / nats, f"{tick:g}{'+' if tick == BINS * BIN_WIDTH else ''}") for tick in _ticks(nats)],
        "y": [(height(tick), f"{tick:.0%}") for tick in _SHARE_TICKS if tick <= top],
        "threshold": None if threshold is None or threshold > nats else (100 * threshold / nats, threshold),
        "bins": [
            (place * BIN_WIDTH, {name: (kinds[name][place], bins[place]) for name, bins in shares.items()})
            for place in range(len(next(iter(shares.values()))))
            if any(kinds[name][place] for name in shares)
        ],
        "width": BIN_WIDTH,
    }


def _ticks(top: float) -> list[float]:
    step = next(step for step in (0.5, 1, 2, 4, 8, 16) if top / step <= 8)
    return [step * place for place in range(int(top / step) + 1)]


def _budgets(figures: Stats) -> dict[str, Any] | None:
    """The lowest and the mean loss of what a policy would choose, by budget."""
    picks = [(pick, pick.threshold, pick.nll / pick.tokens) for pick in figures.budgets if pick.threshold is not None]
    if not picks:
        return None
    right = max(pick.budget for pick, *_ in picks) * 1.06
    top = 1.15 * max(mean for *_, mean in picks) or 1
    places = [100 * pick.budget / right for pick, *_ in picks]
    lines = {"mean": [mean for *_, mean in picks], "lowest": [threshold for _, threshold, _ in picks]}
    return {
        "lines": {
            name: [(x, 100 - 100 * max(0, y) / top, _number(y)) for x, y in zip(places, values, strict=True)]
            for name, values in lines.items()
        },
        "x": [(x, f"{pick.budget:.0%}") for x, (pick, *_) in zip(places, picks, strict=True)],
        "rows": [(pick, mean, list(pick.pos.items())[:3]) for pick, _, mean in picks],
    }


def _agreement(figures: Stats) -> list[tuple[Agreement, float, float, float]]:
    """Widths of what the first alone, both and the second alone choose, for each pair; the largest sum is 100."""
    most = max((pair.only_a + pair.both + pair.only_b for pair in figures.agreement), default=0) or 1
    return [
        (pair, 100 * pair.only_a / most, 100 * pair.both / most, 100 * pair.only_b / most) for pair in figures.agreement
    ]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:z.2f}"
