import base64
import gzip
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lacy.schemas import manifest
from lacy.schemas.codes import DELEGATE, ENT_TYPES, IGNORE, LEARN, POS
from lacy.schemas.errors import DatasetError, SqlError, UsageError
from lacy.schemas.printable import printable
from lacy.stats import excerpts, report
from lacy.stats.compute import compute
from tests.stats import conftest

pytest_plugins = ["tests.stats.browser"]

HOSTILE = {
    "html": '</script><script>alert("1")</script><img src=x onerror=alert(2)><b>bold</b> &amp; <!-- ]]> {{ 7*7 }} ${1}',
    "rtl": "English, then שלום עולם and مرحبا بالعالم.\nعربي أولا, \u202eturned around\u202c.",
    "nul": "a\x00b \x1b[31m red? \u2028 a new line\r\nand\tmore",
    "long": "w" * 10_000,
    "<b id=x>bold</b>": "🦆🦆 quack, 🦆 the geese; e\u0301te\u0301 \U0001d518nicode",
    "empty": "",
}


def unpacked(page: Path) -> dict:
    [packed] = Parsed(page).data
    return json.loads(gzip.decompress(base64.b64decode(packed)))


class Parsed(HTMLParser):
    """Tags of a page, what its scripts of data hold, and its visible text."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.data: list[str] = []
        self.text: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if tag == "script" and attributes.get("type") == "text/plain":
            self.data += data.split()
        elif tag not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def page(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    report.write(dataset, out)
    return out


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """The page of a corpus that would do harm as markup; the folder's name would, too."""
    folder = tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(3)>"
    sets = {"lacy": conftest.by_loss(5.0), "<i>set": conftest.by_loss(2.0)}
    conftest.write(folder, [conftest.document(doc_id, text) for doc_id, text in HOSTILE.items()], sets=sets)
    out = folder.parent / "report.html"
    report.write(folder, out)
    return out


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """The page of two short documents."""
    folder = tmp_path_factory.mktemp("few") / "d"
    documents = [conftest.document(f"d{n}", " ".join(conftest.SENTENCES[n : n + 2]), n) for n in (0, 3)]
    report.write(conftest.write(folder, documents), folder.parent / "report.html")
    return folder.parent / "report.html"


def of_utf16(text: str, start: int, length: int) -> str:
    return text.encode("utf-16-le")[2 * start : 2 * (start + length)].decode("utf-16-le", "surrogatepass")


def test_the_data_are_those_of_the_dataset(page, documents):
    data = unpacked(page)
    assert [found["name"] for found in data["sets"]] == sorted(conftest.SETS)
    assert [found["id"] for found in data["documents"]] == [document.doc_id for document in documents]
    for found, document in zip(data["documents"], documents, strict=True):
        signals, text = document.signals, printable(document.text, keep_lines=True)
        assert found["text"] == text and len(text) == len(document.text)
        assert found["tokens"] == len(document.spans)
        starts = np.cumsum(found["start"]).tolist()
        pieces = [of_utf16(text, *span) for span in zip(starts, found["length"], strict=True)]
        assert pieces == [text[start:end] for start, end in document.spans]

        def codes(packed: str) -> list[int]:
            return [ord(character) - data["codes"] for character in packed]

        assert codes(found["factual"]) == signals["factual"]
        assert codes(found["pos"]) == signals["pos"] and codes(found["ent"]) == signals["ent_type"]
        assert codes(found["correct"]) == [1 + correct for correct in signals["ref_correct"]]
        for short, column, unit in (
            ("ref", "ref_nll", 1000),
            ("student", "student_nll", 1000),
            ("judge", "judge", 100),
        ):
            assert found[short] == [None if value is None else round(value * unit) for value in signals[column]]
        for name, labels in zip(sorted(conftest.SETS), found["labels"], strict=True):
            assert codes(labels) == document.labels[name]
    assert data["names"] == {"pos": list(POS), "ent": list(ENT_TYPES), "label": ["learn", "delegate", "ignore"]}


def test_the_documents_are_the_most_delegated_and_an_even_spread(tmp_path):
    documents = [conftest.document(f"d{n}", "geese " * (40 if n != 3 else 4)) for n in range(20)]
    many = {"d5": 30, "d11": 20, "d17": 25, "d3": 6}

    def decide(document, token):
        return IGNORE if token < many.get(document.doc_id, 0) else LEARN

    folder = conftest.write(tmp_path, documents, sets={"lacy": decide})
    whole = manifest.read_complete(folder)

    def chosen(labels, count, ids=None):
        rows = excerpts.choose(folder, whole, labels, count, ids)
        return [document["id"] for document in excerpts.read(folder, rows, [], 10)]

    # "d3" has the largest share but is short; of the other 17, the middles of three thirds
    assert chosen("lacy", 6) == ["d2", "d5", "d9", "d11", "d16", "d17"]
    assert chosen("lacy", 1) == ["d5"]
    assert chosen("lacy", 0) == []
    assert chosen("lacy", 99) == [f"d{n}" for n in range(20)]
    assert chosen(None, 4) == ["d2", "d7", "d12", "d17"]
    assert chosen("lacy", 2, ["d3", "d4", "not there"]) == ["d3", "d4"]


def test_documents_that_are_asked_for(dataset, documents, tmp_path):
    ids = [documents[9].doc_id, documents[2].doc_id]
    report.write(dataset, tmp_path / "r.html", documents=ids, labels="a 'quoted' set")
    data = unpacked(tmp_path / "r.html")
    assert [found["id"] for found in data["documents"]] == ids
    assert data["sets"][data["chosen"]]["name"] == "a 'quoted' set"


def test_a_condition_is_also_one_for_the_documents(dataset, documents, tmp_path):
    quoted = documents[4].doc_id.replace("'", "''")
    report.write(dataset, tmp_path / "r.html", where=f"doc_id = '{quoted}' -- this one")
    assert [found["id"] for found in unpacked(tmp_path / "r.html")["documents"]] == [documents[4].doc_id]
    report.write(dataset, tmp_path / "r.html", where="doc_id = '<i>nobody</i>'")
    assert unpacked(tmp_path / "r.html")["documents"] == []
    assert "doc_id = '<i>nobody</i>'" in Parsed(tmp_path / "r.html").text
    with pytest.raises(SqlError):
        report.write(dataset, tmp_path / "r.html", where="no_such_column > 1")


def test_the_same_dataset_gives_the_same_bytes(dataset, page, tmp_path):
    report.write(dataset, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
    assert os.listdir(tmp_path) == ["again.html"]


def test_long_documents_are_cut_to_the_size_of_the_page(tmp_path, monkeypatch):
    long = [conftest.document(f"long {n}", "geese fly. " * 2000, n) for n in range(3)]
    folder = conftest.write(tmp_path / "d", [*long, conftest.document("short", "🦆🦆 geese")])
    monkeypatch.setattr(report, "DOCUMENT_BYTES", 400)
    report.write(folder, tmp_path / "r.html")
    data, text = unpacked(tmp_path / "r.html"), " ".join(Parsed(tmp_path / "r.html").text)
    assert len(Parsed(tmp_path / "r.html").data[0]) <= 400 * report.DOCUMENTS
    shown = {found["id"]: len(found["start"]) for found in data["documents"]}
    assert shown["short"] == len(conftest.split("🦆🦆 geese"))
    limit = shown["long 0"]
    assert 100 < limit < len(long[0].spans) and shown["long 1"] == shown["long 2"] == limit
    for found in data["documents"]:
        assert {len(found[name]) for name in ("start", "length", "pos", "ref")} == {shown[found["id"]]}
    assert data["documents"][0]["text"] == long[0].text[: long[0].spans[limit - 1][1]]
    assert f"3 long documents are cut to the first {limit:,} tokens" in text


def test_fifty_long_documents_stay_below_five_megabytes(tmp_path):
    draw = np.random.default_rng(0)
    words = ["".join(map(chr, draw.integers(97, 123, draw.integers(2, 9)))) for _ in range(5000)]
    document = conftest.document("0", " ".join(draw.choice(words, 9_000)))
    assert len(document.spans) > report.TOKENS
    folder = conftest.write(tmp_path / "d", [document])
    whole = manifest.read_complete(folder)
    rows = excerpts.choose(folder, whole, "lacy", 1) * 50
    figures = compute(folder)
    packed = report._data(folder, whole, figures, rows)
    page = report.page(figures, whole, packed, spread=True)
    assert packed.documents == 50 and 1_000_000 < len(page.encode()) < 5_000_000


def test_what_is_missing_is_said(bare, empty, tmp_path):
    report.write(bare, tmp_path / "bare.html")
    text = " ".join(Parsed(tmp_path / "bare.html").text)
    assert "lacy decide" in text and "--no-text" in text
    found = unpacked(tmp_path / "bare.html")["documents"][0]
    ids = conftest.corpus()[0].signals["token_ids"]
    assert found["text"] == " ".join(map(str, ids)) and "student" not in found and "judge" not in found
    report.write(empty, tmp_path / "empty.html")
    assert "The page has no documents." in " ".join(Parsed(tmp_path / "empty.html").text)


def test_errors_say_what_to_do(dataset, tmp_path):
    out = tmp_path / "r.html"
    out.write_text("as it was")
    with pytest.raises(DatasetError, match=r"has no document 'd99'"):
        report.write(dataset, out, documents=["d99"])
    with pytest.raises(DatasetError, match=r"no label set 'x'"):
        report.write(dataset, out, labels="x")
    with pytest.raises(DatasetError, match=r"-1 documents"):
        report.write(dataset, out, documents=-1)
    with pytest.raises(DatasetError, match=r"is not a dataset"):
        report.write(tmp_path, out)
    with pytest.raises(UsageError, match=r"is in the dataset"):
        report.write(dataset, dataset / "labels" / "r.html")
    with pytest.raises(UsageError, match=r"is a folder"):
        report.write(dataset, tmp_path)
    assert out.read_text() == "as it was"


def test_labels_of_other_documents_are_damage(tmp_path):
    documents = [conftest.document(f"d{n}", "Odra Venn counts geese.") for n in range(3)]
    folder = conftest.write(tmp_path / "d", documents)
    other = conftest.write(
        tmp_path / "other", [conftest.document(f"e{n}", "Odra Venn counts geese.") for n in range(3)]
    )
    [part] = [part.name for part in manifest.read_complete(folder).parts if part.rows]
    rows = excerpts.choose(folder, manifest.read_complete(folder), None, 3)
    manifest.labels_path(folder, "lacy", part).write_bytes(manifest.labels_path(other, "lacy", part).read_bytes())
    with pytest.raises(DatasetError, match=r"damaged: run lacy check"):
        excerpts.read(folder, rows, ["lacy"], 10)
    manifest.signals_path(folder, part).write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"damaged: run lacy check"):
        excerpts.read(folder, rows, [], 10)


def test_corpus_text_is_no_markup(hostile):
    parsed = Parsed(hostile)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 2 and not {"img", "b", "i", "link", "iframe"} & set(tags)
    for _, attributes in parsed.tags:
        assert not {"src", "style"} & attributes.keys() and not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "<img src=x onerror=alert(3)>" in parsed.text and "<i>set" in parsed.text
    assert "http://" not in hostile.read_text() and "https://" not in hostile.read_text()


def test_the_figures_are_those_of_compute(page, dataset, documents):
    figures = compute(dataset)
    text = [piece.strip() for piece in Parsed(page).text if piece.strip()]

    def after(*names: str) -> list[str]:
        """What follows these; StopIteration where they do not stand together."""
        place = next(place for place in range(len(text)) if tuple(text[place : place + len(names)]) == names)
        return text[place + len(names) :]

    assert after("tokens")[0] == f"{figures.tokens:,}"
    assert after("factual", f"{figures.factual / figures.tokens:.1%}")
    assert f"All {len(documents)} documents" in " ".join(text)
    for title, groups in (("By part of speech", figures.pos), ("By entity type", figures.ent_type)):
        rest = after(title)
        for group in groups:
            place = rest.index(group.name or "(none)")
            shares = (group.factual, group.delegated + group.ignored)
            expected = [*(f"{share / group.tokens:.1%}" for share in shares), f"{group.tokens / figures.tokens:.1%}"]
            assert rest[place + 1 : place + 5] == [*expected, f"{group.mean_nll:.2f}"]
    bins = after("nats from", "factual", "share", "other", "share")
    assert bins[:2] == ["0.00", f"{figures.losses.factual_bins[0]:,}"]
    for pick in figures.budgets:
        rest = after(f"{pick.budget:.0%}", f"{pick.tokens / figures.tokens:.1%}")
        assert rest[:2] == [f"{pick.threshold:.2f}", f"{pick.nll / pick.tokens:.2f}"]
    [pair] = figures.agreement
    rest = after(pair.a, ",", pair.b)
    shares = (f"{share / figures.tokens:.1%}" for share in (pair.both, pair.same))
    assert rest[:3] == [*shares, f"{pair.kappa:.2f}"]
    for labels in figures.label_sets:
        chosen = labels.delegated + labels.ignored
        shares = [f"{share / figures.tokens:.1%}" for share in (labels.delegated, labels.ignored)]
        assert after(labels.name, "lacy", "15.0%")[:4] == [*shares, f"{labels.factual / chosen:.1%}", "6.00"]
    for name, losses in (("factual", figures.losses.factual), ("other", figures.losses.other)):
        assert after(name, f"{losses[0]:.2f}")[:4] == [f"{loss:.2f}" for loss in losses[1:]]
    for word in figures.chosen_words:
        assert after(word.word, f"{word.chosen:,}", f"{word.occurrences:,}", f"{word.mean_nll:.2f}")
    for word in figures.kept_words:
        assert after(word.word, f"{word.occurrences - word.chosen:,}", f"{word.mean_kept_nll:.2f}")


# In a browser


def opened(visit, path: Path, **options):
    page = visit(path, **options)
    page.wait_for_selector("#reader:not([hidden])")
    return page


def tokens(page, kind: str) -> list[str]:
    return page.locator(f"#text .{kind}").all_text_contents()


def at(page) -> int:
    """The number of the document in view."""
    return int(page.locator("#document").input_value())


def signals(page) -> dict[str, str]:
    return dict(
        zip(
            page.locator("#signals dl:first-of-type dt").all_text_contents(),
            page.locator("#signals dl:first-of-type dd").all_text_contents(),
            strict=True,
        )
    )


def pieces(document, chosen) -> list[str]:
    """The text of the tokens that are chosen, without the space before it; tokens of one character once."""
    spans = dict.fromkeys(document.spans[token] for token in chosen)
    texts = [printable(document.text, keep_lines=True)[start:end] for start, end in spans]
    return [text.lstrip() or text for text in texts]


def test_hostile_text_shows_as_text(visit, hostile):
    page = opened(visit, hostile)
    assert page.locator("h1").text_content() == "<img src=x onerror=alert(3)>"
    for number, (doc_id, text) in enumerate(HOSTILE.items()):
        page.select_option("#document", str(number))
        assert page.locator("#heading").text_content() == doc_id
        assert page.locator("#text").evaluate("of => of.textContent") == printable(text, keep_lines=True)
        assert page.locator("#text :not(span)").count() == 0
    page.select_option("#document", str(list(HOSTILE).index("nul")))
    assert "a␀b ␛[31m" in page.locator("#text").text_content()
    page.select_option("#document", str(list(HOSTILE).index("long")))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.select_option("#labels", "set 0")
    assert page.locator("#labels option").first.text_content() == "<i>set"


def test_right_to_left_lines_run_from_right_to_left(visit, hostile):
    page = opened(visit, hostile)
    page.select_option("#document", str(list(HOSTILE).index("rtl")))
    edges = page.evaluate(
        """() => {
            const spans = [...document.querySelectorAll("#text span")].map((span) => span.getBoundingClientRect());
            const box = document.querySelector("#text").getBoundingClientRect();
            const bottom = Math.max(...spans.map((span) => span.bottom));
            const last = spans.filter((span) => Math.abs(span.bottom - bottom) < 4);
            return [spans[0].left - box.left, box.right - Math.max(...last.map((span) => span.right))];
        }"""
    )
    assert all(abs(edge) < 2 for edge in edges)  # the first line begins at the left, the last at the right


def test_labels_and_policies(visit, page, documents):
    shown = opened(visit, page)
    order = sorted(conftest.SETS)
    for number in (0, 7):
        shown.select_option("#document", str(number))
        for place, name in enumerate(order):
            shown.select_option("#labels", f"set {place}")
            for kind, code in (("delegate", DELEGATE), ("ignore", IGNORE)):
                chosen = [token for token, label in enumerate(documents[number].labels[name]) if label == code]
                assert tokens(shown, kind) == pieces(documents[number], chosen)
    assert "ignored in training" not in shown.locator("#legend").text_content()
    shown.select_option("#labels", label="a 'quoted' set")
    assert "ignored in training" in shown.locator("#legend").text_content()
    style = shown.locator("#text .ignore").first.evaluate("of => getComputedStyle(of).textDecorationLine")
    assert style == "underline"  # not by colour alone


@pytest.mark.parametrize("rule", ["lacy", "loss"])
def test_the_slider_relabels(visit, page, documents, rule):
    shown = opened(visit, page)
    shown.select_option("#document", "3")
    shown.select_option("#labels", f"rule {rule}")

    def chosen(document, threshold):
        signals = document.signals
        return [
            token
            for token, nll in enumerate(signals["student_nll"])
            if token and nll >= threshold and (rule == "loss" or signals["factual"][token])
        ]

    width = shown.locator("#threshold").bounding_box()["width"]
    for threshold in (9.2, 3.3, 0):
        shown.locator("#threshold").fill(str(threshold))
        assert shown.locator("#threshold").bounding_box()["width"] == width, "it keeps its size while it is dragged"
        assert tokens(shown, "delegate") == pieces(documents[3], chosen(documents[3], threshold))
        share = sum(len(chosen(d, threshold)) for d in documents) / sum(len(d.spans) for d in documents)
        assert (
            shown.locator("#picked").text_content()
            == f"{threshold:.2f} nats: {100 * share:.1f}% of the tokens on this page"
        )
    assert shown.locator("#labels").input_value() == f"rule {rule}"


def test_moving_the_slider_leaves_the_label_sets(visit, page):
    shown = opened(visit, page)
    assert shown.locator("#labels").input_value() == "set 1"
    shown.locator("#threshold").press("ArrowRight")
    assert shown.locator("#labels").input_value() == "rule lacy"
    shown.get_by_role("button", name="30%").click()
    [wanted] = [threshold for budget, threshold in unpacked(page)["budgets"] if budget == 0.3]
    assert float(shown.locator("#threshold").input_value()) == pytest.approx(wanted, abs=0.006)


def test_hover_shows_the_signals_and_a_click_keeps_them(visit, page, documents):
    shown = opened(visit, page)
    shown.select_option("#document", "0")
    document, token = documents[0], 5
    place = list(dict.fromkeys(document.spans)).index(document.spans[token])
    span = shown.locator(f"#text [data-piece='{place}']")
    span.hover()
    of = document.signals
    expected = {
        "position": str(token),
        "label": ["learn", "delegate", "ignore"][document.labels["lacy"][token]],
        "factual": "yes" if of["factual"][token] else "no",
        "part of speech": POS[of["pos"][token]] or "none",
        "entity": ENT_TYPES[of["ent_type"][token]] or "none",
        "loss, reference": f"{of['ref_nll'][token]:.2f} nats",
        "reference right": "yes" if of["ref_correct"][token] else "no",
        "chosen by": ", ".join(s for s in sorted(conftest.SETS) if document.labels[s][token]) or "no label set",
    }
    seen = signals(shown)
    assert {name: seen[name] for name in expected} == expected
    shown.locator("#heading").hover()
    assert signals(shown) == {}
    span.click()
    shown.locator("#heading").hover()
    assert signals(shown) == seen
    shown.keyboard.press("Escape")
    assert signals(shown) == {}


def test_colours_by_loss_factual_and_judge(visit, page, documents):
    shown = opened(visit, page)
    shown.select_option("#document", "1")
    shown.get_by_label("loss", exact=True).check()
    student, spans = documents[1].signals["student_nll"], documents[1].spans
    highest = [token for token, nll in enumerate(student) if nll is not None and nll >= 8]
    assert set(tokens(shown, "shade7")) == set(pieces(documents[1], highest))
    assert tokens(shown, "unscored") == pieces(documents[1], [0])
    assert len(set(spans[token] for token in highest)) == len(tokens(shown, "shade7"))
    assert "8+" in shown.locator("#legend").text_content()
    shown.get_by_label("factual", exact=True).check()
    factual = [token for token, of in enumerate(documents[1].signals["factual"]) if of]
    assert tokens(shown, "factual") == pieces(documents[1], factual)
    shown.get_by_label("judge", exact=True).check()
    assert shown.locator("#text .shade7").count() > 0


def test_search(visit, page, documents):
    shown = opened(visit, page)
    hits = [number for number, of in enumerate(documents) for _ in range(of.text.lower().count("örskär was"))]
    among = len(set(hits))
    assert len(hits) > 1
    shown.select_option("#document", "0")
    shown.keyboard.press("/")
    shown.keyboard.type("ÖRSKÄR WAS")
    for number, document in enumerate(hits):
        assert shown.locator("#found").text_content() == f"{number + 1} of {len(hits)}, in {among} documents"
        assert at(shown) == document
        assert "Örsk" in "".join(tokens(shown, "now")).replace(" ", "")
        shown.keyboard.press("Enter")
    shown.keyboard.press("Shift+Enter")
    assert at(shown) == hits[-1]
    shown.fill("#search", "(.*[")
    assert shown.locator("#found").text_content() == "not found"
    shown.fill("#search", "[red]Not markup[/red], {nor} %s a <b>f-o")
    assert shown.locator("#found").text_content() == "not found"
    shown.fill("#search", "<b>format</b>;")
    assert (
        shown.locator("#found")
        .text_content()
        .endswith(f", in {sum('<b>format</b>;' in of.text for of in documents)} documents")
    )
    shown.locator("#search").press("Escape")
    assert tokens(shown, "hit") == [] and shown.locator("#found").text_content() == ""


def test_next_most_delegated(visit, page, documents):
    shown = opened(visit, page)
    share = [sum(label != LEARN for label in of.labels["lacy"]) / len(of.spans) for of in documents]
    order = sorted(range(len(documents)), key=lambda number: (-share[number], number))
    for number in [*order, order[0]]:
        assert at(shown) == number
        shown.keyboard.press("n")


def test_keyboard(visit, page, documents):
    shown = opened(visit, page)
    shown.select_option("#document", "0")
    shown.locator("#document").evaluate("of => of.blur()")
    for key, document in (("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0), ("k", len(documents) - 1), ("j", 0)):
        shown.keyboard.press(key)
        assert at(shown) == document
    shown.keyboard.press("t")
    shown.keyboard.press("ArrowRight")
    assert signals(shown)["position"] == "0"
    shown.keyboard.press("ArrowRight")
    assert signals(shown)["position"] == "1" and at(shown) == 0
    assert "factual" in shown.locator("#spoken").text_content()
    first = shown.locator("#text .pinned").bounding_box()
    shown.keyboard.press("ArrowDown")
    assert shown.locator("#text .pinned").bounding_box()["y"] > first["y"]
    shown.keyboard.press("ArrowUp")
    assert shown.locator("#text .pinned").bounding_box()["y"] == first["y"]
    shown.keyboard.press("End")
    assert shown.locator("#text .pinned").get_attribute("data-piece") == str(len(set(documents[0].spans)) - 1)
    shown.keyboard.press("Escape")
    assert shown.locator("#text .pinned").count() == 0
    shown.keyboard.press("l")
    assert shown.locator("#labels").input_value() == "rule lacy"
    shown.keyboard.press("c")
    assert shown.locator("#text").get_attribute("data-colour") == "loss"
    shown.keyboard.press("?")
    assert shown.get_by_role("dialog").is_visible()
    shown.keyboard.press("Escape")
    assert not shown.get_by_role("dialog").is_visible()


def test_tokens_of_one_character(visit, hostile):
    shown = opened(visit, hostile)
    shown.select_option("#document", str(list(HOSTILE).index("<b id=x>bold</b>")))
    shown.locator("#text span", has_text="🦆").first.click()
    assert shown.locator("#signals dl").count() == 2
    assert shown.locator("#signals dl dd:first-of-type").all_text_contents()[0] == "0"


def test_dark(visit, page):
    colours = []
    for scheme in ("light", "dark"):
        shown = opened(visit, page, color_scheme=scheme)
        colours.append(
            shown.evaluate(
                "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].map("
                "(of) => of.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
            )
        )
    (light_back, light_text), (dark_back, dark_text) = colours
    assert light_back - light_text > 500 and dark_text - dark_back > 500


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shades_are_told_apart_without_hue(visit, page, scheme):
    """The more loss, the further from the page in luminance; and lines that are seen on each say what is delegated."""
    shown = opened(visit, page, color_scheme=scheme)
    shown.get_by_label("loss", exact=True).check()
    found = shown.locator("#legend .swatch").evaluate_all(
        "all => all.map((of) => getComputedStyle(of).backgroundColor.match(/[0-9]+/g).map(Number))"
    )
    light = [luminance(colour) for colour in found]
    assert len(found) == 8 and light == sorted(light, reverse=scheme == "light")
    for kind, style in (("delegate", "solid"), ("ignore", "dashed")):
        for place, back in enumerate(light):
            line, colour, drawn = shown.locator("#text").evaluate(
                """(text, kind) => {
                    const span = text.appendChild(document.createElement("span"));
                    span.className = kind;
                    const style = getComputedStyle(span);
                    const colour = style.textDecorationColor.match(/[0-9]+/g).map(Number);
                    return [style.textDecorationLine, colour, style.textDecorationStyle];
                }""",
                f"{kind} shade{place}",
            )
            low, high = sorted((back, luminance(colour)))
            assert (line, drawn) == ("underline", style) and (high + 0.05) / (low + 0.05) >= 3, (kind, place)


def luminance(colour: list[int]) -> float:
    """Relative, as WCAG 2 defines it."""
    red, green, blue = (of / 255 / 12.92 if of <= 10 else ((of / 255 + 0.055) / 1.055) ** 2.4 for of in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_list_of_documents(visit, page, documents):
    shown = opened(visit, page)
    for place, text in enumerate(shown.locator("#document option").all_text_contents()):
        document = documents[place]
        share = sum(label != LEARN for label in document.labels["lacy"]) / len(document.spans)
        first = printable(document.text.lstrip(), keep_lines=True)[:40].split("\n")[0]
        assert text == f"{document.doc_id} · {100 * share:.1f}% · {first}"


def test_a_phone(visit, page, hostile):
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    shown = opened(visit, hostile, **phone)
    for number in range(len(HOSTILE)):
        shown.select_option("#document", str(number))
        assert shown.evaluate("document.documentElement.scrollWidth") == 390
    shown = opened(visit, page, **phone)
    assert not shown.locator("#signals").is_visible()
    token = shown.locator("#text span").nth(30)
    token.tap()
    panel, box = shown.locator("#signals").bounding_box(), token.bounding_box()
    assert panel["width"] == 390 and panel["y"] + panel["height"] == pytest.approx(844, abs=1)
    assert box["y"] + box["height"] <= panel["y"]
    shown.get_by_role("button", name="Close").tap()
    assert not shown.locator("#signals").is_visible()


def test_print(visit, page):
    shown = opened(visit, page, viewport={"width": 760, "height": 1000}, color_scheme="dark")
    shown.emulate_media(media="print")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not shown.locator("#threshold").is_visible() and not shown.locator("#signals").is_visible()
    assert shown.locator("#charts svg.chart").first.is_visible() and shown.locator("#text span").first.is_visible()
    assert shown.evaluate("document.documentElement.scrollWidth") == 760


def test_bare_datasets(visit, bare, empty, tmp_path):
    report.write(bare, tmp_path / "bare.html")
    shown = opened(visit, tmp_path / "bare.html")
    ids = [str(token) for token in conftest.corpus()[at(shown)].signals["token_ids"]]
    assert shown.locator("#text span").all_text_contents() == ids
    shown.locator("#threshold").fill("4.1")
    assert 0 < len(tokens(shown, "delegate")) < len(ids)
    report.write(empty, tmp_path / "empty.html")
    assert visit(tmp_path / "empty.html").locator("#read p").first.inner_text() == "The page has no documents."


def test_without_losses(visit, tmp_path):
    documents = conftest.corpus(3)
    for document in documents:
        document.signals["ref_nll"] = [None for _ in document.spans]
        document.signals["student_nll"] = [None for _ in document.spans]
    folder = conftest.write(tmp_path / "d", documents, sets={"some": lambda document, token: DELEGATE * (token % 2)})
    report.write(folder, tmp_path / "r.html")
    shown = opened(visit, tmp_path / "r.html")
    assert not shown.locator("#threshold").is_visible()
    assert shown.locator("#labels option").all_text_contents() == ["some"]
    assert tokens(shown, "delegate")


@pytest.mark.parametrize("screen", ["light", "dark", "phone"])
def test_accessibility(visit, few, screen):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    options = {"phone": {"viewport": {"width": 390, "height": 844}}, "dark": {"color_scheme": "dark"}}.get(screen, {})
    shown = opened(visit, few, **options)

    def violations(context: str | None = None) -> list[tuple[str, str, str]]:
        found = axe.run(shown, context=context).response["violations"]
        return [(of["id"], of["impact"], node["html"]) for of in found for node in of["nodes"]]

    shown.locator("summary").last.click()
    shown.locator("#text span").nth(12).click()
    assert violations() == []
    shown.keyboard.press("Escape")  # on a phone the signals lie over what is at the bottom
    shown.fill("#search", "the")
    for place, colour in enumerate(("loss", "factual") if screen == "light" else ("loss",)):
        shown.select_option("#labels", f"set {place % 2}")
        shown.get_by_label(colour, exact=True).check()
        assert violations("#reader") == []
    shown.get_by_role("button", name="Keys").click()
    assert violations("#help") == []
