"""FActScore: how many of the facts in a model's texts a knowledge source supports.

The measure of Min et al. 2023 (arXiv 2305.14251), in three steps:

1. `split`: a language model splits each sentence of a text into atomic facts;
2. `verify`: for each fact, passages are looked up in the knowledge source, on the page of the text's subject if it has
   one, and a language model decides whether they support the fact;
3. `summary`: the score of a text is the share of its facts that are supported, times the length penalty
   exp(1 - gamma / n) if it has n < gamma facts; the overall score is the mean over the texts that respond.

A text that declines to respond has no score, and lowers the share of texts that respond. The authors' program computes
the same (github.com/shmsw25/FActScore: `score`, `init_score` without the penalty, `respond_ratio`,
`num_facts_per_response`); as there, facts that a text repeats count each time.

Differences: the prompts are our own, sentences are found by a rule (`sentences`) and passages by BM25
(`lacy.cascade.evaluation.knowledge`). If a model gives no usable answer, even when asked once more, the fact has no
verdict: it is left out of its text's share, and counted.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lacy.cascade.evaluation.knowledge import Knowledge, Passage
from lacy.cascade.evaluation.options import FactscoreOptions as Options
from lacy.labelers.llm.chat import Chat, Conversation
from lacy.labelers.llm.prompts import Prompt, ask_json, parse_answer, read_prompt

MAX_FACTS: Final = 24  # of a sentence
MAX_FACT: Final = 400  # characters

Tell = Callable[[int, int], None]  # conversations done, and their total


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Split(_Model):
    """A text and its atomic facts, in order.

    declined  whether the text is empty or declines to answer; it was not split then
    unsplit   sentences without a usable answer of the model; `problem` is the reason for the first
    """

    entity: str
    text: str
    declined: bool = False
    facts: list[str] = []
    unsplit: list[str] = []
    problem: str = ""


class Fact(_Model):
    """A fact and its verdict; None without one, for the reason in `problem`.

    passages  ids of the passages it was checked against, nearest first; without any it counts as not supported
    """

    text: str
    supported: bool | None
    passages: list[str] = []
    problem: str = ""


class Judgement(_Model):
    """A text and the verdicts on its facts; `page`: whether the knowledge source has a page with the entity's name."""

    entity: str
    text: str
    declined: bool = False
    page: bool = True
    facts: list[Fact] = []
    unsplit: list[str] = []


class Item(_Model):
    """The numbers of one text, the unit of means and intervals.

    abstained   whether it declines, or was split and has no fact
    facts       atomic facts; `verified` with a verdict, `supported` with a positive one, `repeated` word for word
    init_score  supported / verified; None if none is verified
    score       with the length penalty for the number of facts
    """

    entity: str
    abstained: bool
    facts: int
    verified: int
    supported: int
    repeated: int
    init_score: float | None
    score: float | None


class Figures(_Model):
    """The figures of all texts.

    score, init_score   means over the texts with a score, with and without the length penalty; None without any
    responded           share of the texts that do not abstain
    facts_per_response  mean over the texts with facts
    texts               `abstained` of them do, `unjudged` respond but have no verdict, the others have scores
    facts               `supported`, not supported, or `unverified`; `repeated` as in `Item`
    unsplit             sentences without an answer, whose facts are unknown
    without_page        texts with facts whose entity has no page: checked against the whole source
    """

    score: float | None
    init_score: float | None
    responded: float | None
    facts_per_response: float | None
    texts: int
    abstained: int
    unjudged: int
    facts: int
    supported: int
    unverified: int
    repeated: int
    unsplit: int
    without_page: int


class Summary(_Model):
    """Figures, the items that they summarize, one per text, and the judgements behind these."""

    gamma: float
    figures: Figures
    items: list[Item]
    judgements: list[Judgement]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    facts: Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_FACT)]], Field(max_length=MAX_FACTS)]


class _Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    supported: bool


SPLIT_SCHEMA: Final[dict[str, Any]] = _Facts.model_json_schema()
VERIFY_SCHEMA: Final[dict[str, Any]] = _Verdict.model_json_schema()


def factscore(
    splitter: Chat,
    judge: Chat,
    knowledge: Knowledge,
    entities: Sequence[str],
    texts: Sequence[str],
    options: Options | None = None,
    tell: Tell | None = None,
) -> Summary:
    """Score texts, each about the entity with the same index: all three steps.

    Raises what the models raise. With a `Remembering` chat for each model, no question is asked twice, not even after
    an interruption.
    """
    options = options or Options()
    return summary(verify(judge, knowledge, split(splitter, entities, texts, options, tell), options, tell), options)


def split(
    chat: Chat, entities: Sequence[str], texts: Sequence[str], options: Options, tell: Tell | None = None
) -> list[Split]:
    """The atomic facts of each text, sentence by sentence; a fact that a sentence repeats is taken once.

    A text that `declines` is not split. Raises ValueError if the numbers of texts and entities differ.
    """
    declined = [declines(text) for text in texts]
    questions = [
        (number, entity, sentence)
        for number, (entity, text) in enumerate(zip(entities, texts, strict=True))
        if not declined[number]
        for sentence in sentences(text)
    ]

    def conversation(index: int, again: bool) -> Conversation:
        _, entity, sentence = questions[index]
        return prompt("split").conversation({"entity": entity, "sentence": sentence}, again=again)

    answers = ask_json(
        chat,
        conversation,
        len(questions),
        SPLIT_SCHEMA,
        parse_facts,
        max_tokens=options.split_tokens,
        batch=options.batch,
        on_progress=tell,
    )
    facts: list[list[str]] = [[] for _ in texts]
    unsplit: list[list[str]] = [[] for _ in texts]
    problems = [""] * len(texts)
    for (number, _, sentence), (atomic, problem) in zip(questions, answers, strict=True):
        if atomic is None:
            unsplit[number].append(sentence)
            problems[number] = problems[number] or problem
        else:
            facts[number] += dict.fromkeys(atomic)
    return [
        Split(
            entity=entity,
            text=text,
            declined=declined[number],
            facts=facts[number],
            unsplit=unsplit[number],
            problem=problems[number],
        )
        for number, (entity, text) in enumerate(zip(entities, texts, strict=True))
    ]


def verify(
    chat: Chat, knowledge: Knowledge, splits: Sequence[Split], options: Options, tell: Tell | None = None
) -> list[Judgement]:
    """A verdict on each fact, from the passages that are nearest to the entity's name and the fact together.

    The nearest passage is last in the prompt, next to the claim, as in the authors' program.
    """
    nearest: list[list[Passage]] = []
    for each in splits:
        queries = [f"{each.entity} {fact}" for fact in each.facts]
        nearest += knowledge.search(queries, options.passages, each.entity)
    facts = [(each.entity, fact) for each in splits for fact in each.facts]
    asked = [number for number, passages in enumerate(nearest) if passages]

    def conversation(index: int, again: bool) -> Conversation:
        entity, fact = facts[asked[index]]
        passages = "\n\n".join(f"{passage.title}\n{passage.text}" for passage in reversed(nearest[asked[index]]))
        return prompt("verify").conversation({"entity": entity, "fact": fact, "passages": passages}, again=again)

    answers = ask_json(
        chat,
        conversation,
        len(asked),
        VERIFY_SCHEMA,
        parse_verdict,
        max_tokens=options.verify_tokens,
        batch=options.batch,
        on_progress=tell,
    )
    verdicts: list[tuple[bool | None, str]] = [(False, "")] * len(facts)
    for number, answer in zip(asked, answers, strict=True):
        verdicts[number] = answer
    judged = iter(
        [
            Fact(text=fact, supported=supported, passages=[passage.id for passage in passages], problem=problem)
            for (_, fact), passages, (supported, problem) in zip(facts, nearest, verdicts, strict=True)
        ]
    )
    return [
        Judgement(
            entity=each.entity,
            text=each.text,
            declined=each.declined,
            page=bool(knowledge.pages(each.entity)),
            facts=[next(judged) for _ in each.facts],
            unsplit=each.unsplit,
        )
        for each in splits
    ]


def summary(judgements: Iterable[Judgement], options: Options | None = None) -> Summary:
    """The scores of judgements, which may come from a file; asks no model."""
    judgements = list(judgements)
    gamma = (options or Options()).gamma
    items = [_item(judgement, gamma) for judgement in judgements]
    abstained = sum(item.abstained for item in items)
    facts = sum(item.facts for item in items)
    figures = Figures(
        score=_mean(item.score for item in items if item.score is not None),
        init_score=_mean(item.init_score for item in items if item.init_score is not None),
        responded=(len(items) - abstained) / len(items) if items else None,
        facts_per_response=_mean(item.facts for item in items if item.facts),
        texts=len(items),
        abstained=abstained,
        unjudged=sum(not item.abstained and item.score is None for item in items),
        facts=facts,
        supported=sum(item.supported for item in items),
        unverified=facts - sum(item.verified for item in items),
        repeated=sum(item.repeated for item in items),
        unsplit=sum(len(judgement.unsplit) for judgement in judgements),
        without_page=sum(bool(judgement.facts) and not judgement.page for judgement in judgements),
    )
    return Summary(gamma=gamma, figures=figures, items=items, judgements=judgements)


def length_penalty(facts: int, gamma: float) -> float:
    """exp(1 - gamma / facts) for fewer than `gamma` facts, else 1, as in the program of Min et al. 2023."""
    return math.exp(1 - gamma / facts) if facts < gamma else 1.0


def declines(text: str) -> bool:
    """Whether a text is blank, or begins by saying that the model cannot or will not answer.

    Models without instruction tuning hardly ever do.
    """
    return not text.strip() or _DECLINES.match(text) is not None


def sentences(text: str) -> list[str]:
    """The sentences of a text, by a rule that would rather join two than split one.

    A sentence ends with its line, or with a mark followed by white space, but not after an abbreviation or an initial,
    nor before a lower-case letter. Single words are joined to a neighbor, as in the authors' program.
    """
    result = []
    for line in text.splitlines():
        ends = [match.end() for match in _END.finditer(line)]
        pieces = [
            piece for start, end in zip([0, *ends], [*ends, len(line)], strict=True) if (piece := line[start:end])
        ]
        joined: list[str] = []
        for piece in pieces:
            if joined and _belong_together(joined[-1], piece):
                joined[-1] += piece
            else:
                joined.append(piece)
        result += [sentence for piece in joined if (sentence := piece.strip())]
    return result


def parse_facts(answer: str) -> list[str] | None:
    """The facts of an answer that follows `SPLIT_SCHEMA`, with or without a code fence around it; else None."""
    parsed = parse_answer(answer, _Facts)
    return None if parsed is None else [stripped for fact in parsed.facts if (stripped := fact.strip())]


def parse_verdict(answer: str) -> bool | None:
    """The verdict of an answer that follows `VERIFY_SCHEMA`, with or without a code fence around it; else None."""
    parsed = parse_answer(answer, _Verdict)
    return None if parsed is None else parsed.supported


def prompt(name: Literal["split", "verify"]) -> Prompt:
    """A prompt, as shipped."""
    return read_prompt("lacy.cascade.evaluation", f"{name}_prompt.md")


_END = re.compile(r"[.!?][\"')\]\u2019\u201d\u00bb]*\s+|[。！？][」』）]*\s*")  # noqa: RUF001
_INITIAL = re.compile(r"(?:^|[\s(.])[^\W\d_]\.\s*$")
_LAST_WORD = re.compile(r"(\S+)\.\s*$")
_ABBREVIATIONS: Final = (
    " adm al approx apr aug ave bros ca capt cf cmdr co col corp cpl dec dept dr ed eds esp est feb fig fl fr gen gov"
    " hon inc jan jr lt ltd maj mr mrs ms mt nov oct op pp prof pvt rep rev sen sep sept sgt sr st trans univ viz vol"
    " vols vs e.g i.e u.s u.k "
)
_DECLINES = re.compile(
    r"\s*(?:i['\u2019]m sorry|i am sorry|sorry\b|i apologi[sz]e|as an ai\b|(?:unfortunately, )?(?:i|we) "
    r"(?:do not|don['\u2019]t|cannot|can['\u2019]t|could not|couldn['\u2019]t|am unable to|am not able to|have no) "
    r"(?:have|know|find|provide|give|write|answer|tell|information|knowledge))",
    re.IGNORECASE,
)


def _belong_together(before: str, after: str) -> bool:
    if before.rstrip()[-1:] in "。！？」』）":  # noqa: RUF001
        return False
    last = _LAST_WORD.search(before)
    return (
        after[0].islower()
        or len(before.split()) < 2
        or len(after.split()) < 2
        or _INITIAL.search(before) is not None
        or (last is not None and f" {last[1].lstrip('(').lower()} " in _ABBREVIATIONS)
    )


def _item(judgement: Judgement, gamma: float) -> Item:
    facts = len(judgement.facts)
    verified = sum(fact.supported is not None for fact in judgement.facts)
    supported = sum(fact.supported is True for fact in judgement.facts)
    init_score = supported / verified if verified else None
    return Item(
        entity=judgement.entity,
        abstained=judgement.declined or not (judgement.facts or judgement.unsplit),
        facts=facts,
        verified=verified,
        supported=supported,
        repeated=facts - len({fact.text for fact in judgement.facts}),
        init_score=init_score,
        score=None if init_score is None else init_score * length_penalty(facts, gamma),
    )


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return math.fsum(values) / len(values) if values else None
