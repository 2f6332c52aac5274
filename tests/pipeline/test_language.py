"""Which texts look English, and when a corpus gives a warning."""

import gzip
import json

import pytest

from lacy.pipeline.corpus.sources import find_files, plan_parts
from lacy.pipeline.language import is_english, language_warning
from tests.support import corpora

GERMAN = (
    "Die kleine Stadt liegt am Ufer des Flusses und wurde im Jahr 1243 zum ersten Mal erwähnt. Nach dem Krieg zogen "
    "viele Menschen in den Norden, weil dort Arbeit zu finden war. Heute leben hier etwa zwanzigtausend Einwohner, von "
    "denen die meisten in der nahen Großstadt arbeiten. Das alte Rathaus wird seit einigen Jahren als Museum genutzt."
)
FRENCH = (
    "La petite ville se trouve au bord de la rivière et fut mentionnée pour la première fois en 1243. Après la guerre, "
    "beaucoup de gens partirent vers le nord, car on y trouvait du travail. Aujourd'hui, environ vingt mille habitants "
    "y vivent, dont la plupart travaillent dans la grande ville voisine. L'ancienne mairie sert maintenant de musée."
)
CHINESE = (
    "这座小城位于河岸\uff0c最早的记载可以追溯到一二四三年。战争结束之后\uff0c许多人迁往北方\uff0c因为那里可以找到工作。"
    * 6
)
ENGLISH = (
    "The small town lies on the bank of the river and was first mentioned in 1243. After the war many people moved to "
    "the north, because there was work to be found. Today about twenty thousand people live here, most of whom work in "
    "the city nearby. The old town hall was closed for a long time and has been a museum for some years."
)
CODE = """
def merge(tables, key, *, how="left"):
    found = {row[key]: row for row in tables[0]}
    for table in tables[1:]:
        for row in table:
            if row[key] in found or how == "outer":
                found.setdefault(row[key], {}).update(row)
    return sorted(found.values(), key=lambda row: (row[key], len(row)))
"""
TABLE = "Team | P | W | D | L | Pts\n" + "\n".join(f"Rovers {n} | {n} | 3 | 4 | {n + 1} | 13" for n in range(40))
NAMES = ", ".join(["Anna Berger", "Otto Lang", "Mina Kerr", "Jules Petit"] * 20)


@pytest.mark.parametrize("text", [GERMAN, FRENCH, CHINESE], ids=["German", "French", "Chinese"])
def test_other_languages(text):
    assert is_english(text) is False


@pytest.mark.parametrize(
    "text", ["", "Guten Tag.", CODE * 3, TABLE, NAMES], ids=["empty", "short", "code", "table", "names"]
)
def test_texts_that_say_nothing_of_a_language(text):
    assert is_english(text) is None


def test_english():
    assert is_english(ENGLISH) is True
    assert is_english(f"{ENGLISH} {CODE} {NAMES[:200]}") is not False


def test_real_english_gives_no_warning(dev_data):
    for path in sorted(dev_data.glob("*-dev.jsonl.gz")):
        with gzip.open(path) as file:
            verdicts = [is_english(json.loads(line)["text"]) for line in file]
        assert verdicts.count(False) <= 0.002 * len(verdicts) and verdicts.count(True) > 0.7 * len(verdicts)
        assert language_warning(plan_parts(find_files([str(path)]), 1 << 20)) == ""


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.parquet"])
def test_the_warning_names_the_share_and_the_first_document(tmp_path, name):
    rows = [{"id": f"en-{n}", "text": f"{n} {ENGLISH}"} for n in range(15)]
    rows += [{"id": f"de-{n}", "text": f"{n} {GERMAN}"} for n in range(5)]
    path = corpora.write(tmp_path / name, rows)
    warning = language_warning(plan_parts(find_files([str(path)]), 1 << 20))
    assert warning.startswith("25% of 20 sampled documents do not look English (the first is de-0): ")
    assert "\n" not in warning


def test_a_few_documents_of_another_language_give_no_warning(tmp_path):
    rows = [{"id": str(n), "text": GERMAN if n == 7 else ENGLISH} for n in range(20)]
    path = corpora.write(tmp_path / "c.jsonl", rows)
    assert language_warning(plan_parts(find_files([str(path)]), 1 << 20)) == ""
