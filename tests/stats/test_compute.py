"""Every figure against a plain count over the values that the dataset was written from."""

import json
import unicodedata
from bisect import bisect
from collections import Counter, defaultdict
from itertools import combinations

import fsspec
import pytest

from lacy.schemas.codes import DELEGATE, ENT_TYPES, IGNORE, LEARN, POS
from lacy.schemas.errors import DatasetError, SqlError
from lacy.schemas.manifest import label_sets, read_complete
from lacy.stats import compute as module
from lacy.stats.compute import compute
from lacy.stats.figures import BIN_WIDTH, BINS, BUDGETS, QUANTILES
from tests.stats.conftest import by_loss, corpus, document, write

SETS = ["lacy", "a 'quoted' set"]
WHERES = [  # on a token, and the label set that is looked at
    (None, lambda doc, place, labels: True),
    ("source LIKE '%:2'", lambda doc, place, labels: doc.source.endswith(":2")),
    (
        "pos = 'NOUN' OR ref_nll > 6 -- to the end",
        lambda doc, place, labels: noun(doc, place) or (loss(doc, place) or 0) > 6,
    ),
    (
        "word LIKE 'geese%' AND label = 'learn'",
        lambda doc, place, labels: geese(doc, place) and label(doc, place, labels) == LEARN,
    ),
    ("position < 0", lambda *_: False),
]


def noun(doc, place):
    return POS[doc.signals["pos"][place]] == "NOUN"


def geese(doc, place):
    return (doc.word(place)[0] or "").startswith("geese")


def loss(doc, place, column="ref_nll"):
    return doc.signals[column][place]


def tokens(documents):
    return [(doc, place) for doc in documents for place in range(len(doc.spans))]


def factual(doc, place):
    return doc.signals["factual"][place]


def label(doc, place, labels):
    return LEARN if labels is None else doc.labels[labels][place]


def mean(values):
    values = [value for value in values if value is not None]
    return pytest.approx(sum(values) / len(values)) if values else None


def group(name, members, labels):
    losses = [loss(*member) for member in members]
    return {
        "name": name,
        "tokens": len(members),
        "factual": sum(factual(*member) for member in members),
        "delegated": sum(label(*member, labels) == DELEGATE for member in members),
        "ignored": sum(label(*member, labels) == IGNORE for member in members),
        "scored": sum(nll is not None for nll in losses),
        "nll": pytest.approx(sum(nll or 0 for nll in losses)),
        "mean_nll": mean(losses),
    }


def grouped(members, key, labels):
    found = defaultdict(list)
    for member in members:
        found[key(*member)].append(member)
    return {name: group(name, members, labels) for name, members in found.items()}


def most_first(groups):
    return sorted(groups.values(), key=lambda found: (-found["tokens"], found["name"]))


def dumped(groups):
    return [found.model_dump() for found in groups]


@pytest.fixture(params=WHERES, ids=lambda where: str(where[0])[:20])
def looked_at(request, documents):
    """A condition, and the tokens that it holds for, given the label set that is looked at."""
    where, holds = request.param
    return where, lambda labels: [member for member in tokens(documents) if holds(*member, labels)]


def test_totals_and_label_sets(dataset, documents, looked_at):
    where, find = looked_at
    members = find("lacy")
    stats = compute(dataset, where=where)
    assert (stats.where, stats.labels, stats.notes) == (where, "lacy", [])
    assert stats.documents == len({doc.doc_id for doc, _ in members})
    assert (stats.tokens, stats.factual) == (len(members), sum(factual(*member) for member in members))
    found = {labels.name: labels for labels in stats.label_sets}
    assert found.keys() == set(SETS)
    for name, labels in found.items():
        codes = Counter(label(*member, name) for member in members)
        assert (labels.delegated, labels.ignored) == (codes[DELEGATE], codes[IGNORE])
        assert labels.factual == sum(factual(*member) for member in members if label(*member, name) != LEARN)
        assert (labels.budget, labels.threshold, labels.policy, labels.tokens) == (0.15, 6.0, "lacy", len(members))
    if where is None:
        whole = read_complete(dataset)
        assert (stats.documents, stats.tokens, stats.factual) == (whole.documents, whole.tokens, whole.factual)
        assert stats.bad == whole.bad > 0
        assert found["lacy"].delegated and found["a 'quoted' set"].ignored
        assert len(members) == whole.tokens
        for name, decided in label_sets(dataset).items():
            assert found[name].delegated == sum(part.delegated for part in decided.parts)
            assert found[name].delegated + found[name].ignored == decided.chosen


@pytest.mark.parametrize("labels", [*SETS, None])
def test_groups(dataset, bare, documents, labels, looked_at):
    where, find = looked_at
    stats = compute(dataset if labels else bare, labels, where=None if labels is None else where, by="doc_id[:3] || ''")
    members = tokens(documents) if labels is None else find(labels)
    for column, names in (("pos", POS), ("ent_type", ENT_TYPES)):
        expected = grouped(members, lambda doc, place: names[doc.signals[column][place]], labels)  # noqa: B023
        assert dumped(getattr(stats, column)) == most_first(expected)
    for figure, begins, value in (
        ("position", module.POSITIONS, lambda doc, place: place),
        ("length", module.LENGTHS, lambda doc, place: len(doc.spans)),
    ):
        found = grouped(members, lambda doc, place: bisect(begins, value(doc, place)) - 1, labels)  # noqa: B023
        expected = [found[place] | {"name": getattr(stats, figure)[n].name} for n, place in enumerate(sorted(found))]
        assert dumped(getattr(stats, figure)) == expected
    assert dumped(stats.groups) == most_first(grouped(members, lambda doc, place: doc.doc_id[:3], labels))


def test_names_of_ranges(dataset):
    stats = compute(dataset)
    assert [found.name for found in stats.position] == ["0", "1-15", "16-63", "64-255"]
    assert [found.name for found in stats.length] == ["1-63", "64-255"]
    assert module._names(module.LENGTHS)[-2:] == ["4,096-16,383", "16,384+"]


def test_losses(dataset, looked_at):
    where, find = looked_at
    members = find("lacy")
    losses = compute(dataset, where=where).losses
    for name, flag in (("factual", True), ("other", False)):
        values = [loss(*member) for member in members if factual(*member) == flag and loss(*member) is not None]
        assert getattr(losses, name) == [quantile(values, share) for share in QUANTILES if values]
        bins = Counter(min(int(value / BIN_WIDTH), BINS - 1) for value in values)
        assert getattr(losses, f"{name}_bins") == [bins[place] for place in range(BINS)] * bool(values)


def quantile(values, share):
    """Linear between the two values around it."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return pytest.approx(values[low] + (values[high] - values[low]) * (place - low), rel=1e-6)


@pytest.mark.parametrize("student", [True, False])
@pytest.mark.parametrize("policy", ["lacy", "loss"])
def test_budgets(tmp_path, policy, student):
    documents = corpus()
    write(tmp_path, documents, sets={"mine": by_loss(5.0)}, without=[] if student else ["student_nll"])
    path = tmp_path / "labels" / "mine" / "_policy.json"
    path.write_text(path.read_text().replace('"policy": "lacy"', f'"policy": "{policy}"'))
    stats = compute(tmp_path)
    column, members = "student_nll" if student else "ref_nll", tokens(documents)
    candidates = [member for member in members if policy == "loss" or factual(*member)]
    scored = sorted(
        (-loss(*member, column), *member[0].doc_id) for member in candidates if loss(*member, column) is not None
    )
    assert stats.policy == policy and [pick.budget for pick in stats.budgets] == list(BUDGETS)
    for pick in stats.budgets:
        assert pick.threshold == -scored[min(round(pick.budget * len(members)), len(scored)) - 1][0]
        picked = [member for member in candidates if (loss(*member, column) or -1) >= pick.threshold]
        assert pick.tokens == len(picked) and pick.nll == pytest.approx(sum(loss(*m, column) for m in picked))
        for figure, names in (("pos", POS), ("ent_type", ENT_TYPES)):
            counts = Counter(names[doc.signals[figure][place]] for doc, place in picked)
            expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            assert list(getattr(pick, figure).items()) == expected
    assert stats.budgets[0].tokens < stats.budgets[-1].tokens


def test_a_budget_of_no_token(tmp_path):
    (pick, *_) = compute(write(tmp_path, [document("d", "two words")])).budgets
    assert (pick.threshold, pick.tokens, pick.pos) == (None, 0, {})


def test_agreement(dataset, looked_at):
    where, find = looked_at
    members = find("lacy")
    (found,) = compute(dataset, where=where).agreement
    assert (found.a, found.b) == tuple(sorted(SETS))
    pairs = [(label(*member, found.a), label(*member, found.b)) for member in members]
    assert found.both == sum(a != LEARN != b for a, b in pairs)
    assert found.only_a == sum(a != LEARN == b for a, b in pairs)
    assert found.only_b == sum(a == LEARN != b for a, b in pairs)
    assert found.neither == sum(a == LEARN == b for a, b in pairs)
    assert found.same == sum(a == b for a, b in pairs)
    if len(set(pairs)) > 1:
        observed, chance = found.same / len(pairs), 0.0
        for code in (LEARN, DELEGATE, IGNORE):
            chance += sum(a == code for a, _ in pairs) * sum(b == code for _, b in pairs) / len(pairs) ** 2
        assert found.kappa == pytest.approx((observed - chance) / (1 - chance))
    else:
        assert found.kappa is None
    kinds, different = Counter(), Counter()
    for (doc, place), (a, b) in zip(members, pairs, strict=True):
        kind = POS[doc.signals["pos"][place]], ENT_TYPES[doc.signals["ent_type"][place]]
        kinds[kind] += 1
        different[kind] += a != b
    most = sorted((kind for kind in different if different[kind]), key=lambda kind: (-different[kind], *kind))
    expected = [(*kind, kinds[kind], different[kind]) for kind in most[: module.DIFFERENCES]]
    assert [tuple(found.model_dump().values()) for found in found.differences] == expected


def test_agreement_of_three(tmp_path):
    stats = compute(
        write(tmp_path, corpus(3), sets={name: by_loss(above) for name, above in zip("cab", (1, 5, 5), strict=True)})
    )
    assert [(found.a, found.b) for found in stats.agreement] == list(combinations("abc", 2))
    same = stats.agreement[0]
    assert (same.kappa, same.same, same.differences) == (1.0, stats.tokens, []) and stats.agreement[1].kappa < 1


def expected_words(members, labels):
    """(occurrences, chosen, all losses, losses of those kept) by word."""
    occurrences = defaultdict(list)
    for doc, place in members:
        word, start = doc.word(place)
        if word is not None:
            occurrences[doc.doc_id, start, word].append((loss(doc, place), label(doc, place, labels) != LEARN))
    words = defaultdict(lambda: [0, 0, [], []])
    for (_, _, word), members in occurrences.items():
        while word and unicodedata.category(word[0]).startswith("P"):
            word = word[1:]
        while word and unicodedata.category(word[-1]).startswith("P"):
            word = word[:-1]
        if not word:
            continue
        losses = [nll for nll, _ in members if nll is not None]
        total, taken = sum(losses) if losses else None, any(flag for _, flag in members)
        words[word][0] += 1
        words[word][1] += taken
        words[word][2].append(total)
        if not taken:
            words[word][3].append(total)
    return words


def as_words(found):
    return [word.model_dump() for word in found]


def expected_word(word, occurrences, taken, losses, kept):
    return {
        "word": word,
        "occurrences": occurrences,
        "chosen": taken,
        "mean_nll": mean(losses),
        "mean_kept_nll": mean(kept),
    }


@pytest.mark.parametrize(("labels", "at_least"), [("lacy", 1), ("lacy", 3), ("a 'quoted' set", 2)])
def test_words(dataset, documents, labels, at_least, monkeypatch, looked_at):
    where, find = looked_at
    members = find(labels)
    monkeypatch.setattr(module, "_rare", lambda tokens: at_least)
    stats = compute(dataset, labels, where=where)
    words = expected_words(members, labels)
    often = sorted((word for word in words if words[word][1]), key=lambda word: (-words[word][1], word))
    assert as_words(stats.chosen_words) == [expected_word(word, *words[word]) for word in often[: module.WORDS]]

    kept = {
        word: sum(losses) / len(losses)
        for word, (occurrences, taken, _, all_losses) in words.items()
        if occurrences - taken >= at_least and (losses := [loss for loss in all_losses if loss is not None])
    }
    highest = sorted(kept, key=lambda word: (-kept[word], word))
    assert as_words(stats.kept_words) == [expected_word(word, *words[word]) for word in highest[: module.WORDS]]
    assert where or {"geese", "🦆🦆", "red]Not"} <= words.keys()
    assert stats.kept_at_least == at_least


@pytest.mark.parametrize(("tokens", "times"), [(0, 1), (19_999, 1), (20_000, 2), (49_999, 4), (50_000, 5), (10**9, 5)])
def test_how_often_a_word_is_kept_at_least(tokens, times):
    assert module._rare(tokens) == times


def test_the_label_set_looked_at(tmp_path):
    sets = {"zeta": by_loss(1.0), "alpha": by_loss(9.0)}
    write(tmp_path, corpus(3), sets=sets)
    assert compute(tmp_path).labels == "alpha"
    assert compute(tmp_path, "zeta").labels == "zeta"
    with pytest.raises(DatasetError, match="no label set 'lacy': it has alpha, zeta"):
        compute(tmp_path, "lacy")


def test_without_text_and_labels(bare):
    stats = compute(bare)
    assert stats.labels is None and stats.label_sets == []
    assert stats.chosen_words == stats.kept_words == []
    assert "without text" in stats.notes[0]
    with pytest.raises(DatasetError, match="no label set 'lacy': lacy decide makes one"):
        compute(bare, "lacy")


def test_without_labels_words_are_listed(tmp_path):
    stats = compute(write(tmp_path, corpus(), sets={}))
    assert stats.chosen_words == [] and len(stats.kept_words) == module.WORDS


def test_without_losses(tmp_path):
    docs = corpus(3)
    for doc in docs:
        doc.signals["ref_nll"] = [None] * len(doc.spans)
    sets = {"factual": lambda doc, place: DELEGATE if factual(doc, place) else LEARN}
    write(tmp_path, docs, sets=sets, without=["student_nll"])
    stats = compute(tmp_path)
    assert stats.losses.factual == stats.losses.other == stats.kept_words == []
    assert stats.chosen_words and stats.chosen_words[0].mean_nll is None
    assert "without a reference model" in stats.notes[0] and stats.budgets == []


def test_without_documents(empty):
    stats = compute(empty)
    assert (stats.documents, stats.tokens, stats.pos) == (0, 0, [])


def test_json(dataset):
    stats = compute(dataset)
    loaded = json.loads(stats.model_dump_json())
    assert loaded["pos"][0]["mean_nll"] == stats.pos[0].mean_nll
    assert loaded["chosen_words"][0]["word"] == stats.chosen_words[0].word


def test_a_wrong_condition_or_column_is_one_line(dataset):
    for options, match in (
        ({"where": "nonsense > 1"}, "--where: Binder Error.*nonsense"),
        ({"where": "1 = 1); DROP VIEW tokens; SELECT (1"}, "--where: 3 statements"),
        ({"where": "1 = 1) OR ((true"}, "--where: Parser Error"),
        ({"by": "nonsense"}, "--by: Binder Error.*nonsense"),
        ({"by": "pos; SELECT 1"}, "--by: "),
        ({"where": " "}, "--where is empty"),
        ({"by": ""}, "--by is empty"),
    ):
        with pytest.raises(SqlError, match=match) as error:
            compute(dataset, **options)
        assert "\n" not in str(error.value)


def test_a_column_with_many_values(dataset, monkeypatch):
    monkeypatch.setattr(module, "GROUPS", 3)
    stats = compute(dataset, by="doc_id")
    assert len(stats.groups) == 3 and stats.notes == ["only the 3 largest groups"]


def test_stages_are_told(dataset):
    told = []
    compute(dataset, where="true", on_stage=told.append)
    assert told == ["finding the tokens", "grouping", "counting tokens", "ordering losses", "counting words"]


def test_in_an_object_store(dataset):
    store = fsspec.filesystem("memory")
    for file in dataset.rglob("*.*"):
        store.pipe(f"/figures/{file.relative_to(dataset)}", file.read_bytes())
    local = compute(dataset, where="pos = 'NOUN'", by="part")
    remote = compute("memory://figures", where="pos = 'NOUN'", by="part")
    assert remote.model_copy(update={"dataset": local.dataset}) == local
