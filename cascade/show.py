"""Show generated texts to people and programs: in color on a terminal, as plain text, as JSONL, as an HTML page.

Generated text is untrusted. Characters that would control a terminal or reverse the direction of writing are shown as
visible marks; line ends and tabs stay. JSONL has the text as it is, with these characters escaped.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Final, TextIO

import numpy as np
from rich.console import Console
from rich.text import Text

from lacy.cascade.generate import Author, Finish, Generation, Piece, Token
from lacy.schemas.pages import template
from lacy.schemas.printable import BIDI, printable

PROMPT: Final = "dim"
STYLES: Final[dict[Author, str]] = {"slm": "", "partner": "bold cyan", "both": "italic magenta"}
MISSED: Final = "underline yellow"
_FINISHES: Final[dict[Finish, str]] = {
    "end": "the text ended",
    "length": "as long as was asked for",
    "context": "the model's context is full",
}
_ESCAPES = str.maketrans({code: f"\\u{code:04x}" for code in [*range(0x7F, 0xA0), *BIDI, 0x2028, 0x2029]})
_printable = partial(printable, keep_lines=True)


def text(generations: Iterable[Generation], console: Console, errors: Console) -> None:
    """Print texts with their prompts, in the given order.

    On a terminal the partner's tokens are colored, tokens that the small model wrote because the partner did not answer
    are underlined, the cost of each text follows it, and a legend comes last. Otherwise `console` gets the texts alone,
    without marks and with an empty line between two of them, and `errors` gets the costs.
    """
    seen: set[str] = set()
    for number, generation in enumerate(generations):
        if number:
            console.file.write("\n")
        if not console.is_terminal:
            console.file.write(_printable(generation.prompt + generation.text) + "\n")
            console.file.flush()
            errors.print(_cost(generation, numbered=True), soft_wrap=True)
            continue
        shown = Text(_printable(generation.prompt), style=PROMPT)
        shown = Text.assemble(shown, *(_styled(token) for token in generation.tokens))
        console.print(shown)
        console.print(_cost(generation), style="dim")
        seen |= {"missed" if token.missed else token.by for token in generation.tokens}
    legend = _legend(seen)
    if console.is_terminal and legend:
        console.print(Text.assemble("\n", legend))


class Stream:
    """Prints the pieces of one text as they come: give it to `generate` as `on_piece`, then call `end`.

    For one prompt only, as pieces of several texts are interleaved. A piece has the style of its author, so nothing is
    "both", even if the small model's tokenizer later joins characters of two authors.
    """

    def __init__(self, console: Console, errors: Console, prompt: str):
        self._console, self._errors = console, errors
        self._write(prompt, PROMPT)

    def __call__(self, piece: Piece) -> None:
        self._write(piece.text, MISSED if piece.missed else STYLES[piece.by])

    def end(self, generation: Generation) -> None:
        """End the line and print the cost of the text, as `text` does."""
        self._write("\n", "")
        target = self._console if self._console.is_terminal else self._errors
        target.print(_cost(generation), style="dim", soft_wrap=not self._console.is_terminal)

    def _write(self, characters: str, style: str) -> None:
        if self._console.is_terminal:
            self._console.out(_printable(characters), style=style, end="", highlight=False)
        else:
            self._console.file.write(_printable(characters))
            self._console.file.flush()


def write_jsonl(generations: Iterable[Generation], file: TextIO) -> None:
    """Write one JSON object per text, in the order of the prompts, each as soon as those before it are written.

    The fields are those of `Generation` and `Token`. All but the seconds are the same for the same input and options;
    a number that is not finite is null. Texts that have ended are written even if `generations` raises.
    """
    waiting: dict[int, Generation] = {}
    following = 0

    def write(generation: Generation) -> None:
        file.write(generation.model_dump_json().translate(_ESCAPES) + "\n")

    try:
        for generation in generations:
            waiting[generation.index] = generation
            while (ready := waiting.pop(following, None)) is not None:
                write(ready)
                following += 1
    finally:
        for index in sorted(waiting):
            write(waiting[index])
        file.flush()


def html(generations: Iterable[Generation], title: str) -> str:
    """A self-contained page without scripts: the costs, then each text with its tokens by author.

    A token's scores are in its title. The background of the small model's tokens shows the rank of the call score among
    those of the same text.
    """
    texts = sorted(generations, key=lambda generation: generation.index)
    return template("lacy.cascade", "generations.html", printable=_printable).render(
        title=title,
        texts=[
            {"of": generation, "tokens": _ranked(generation), "finish": _FINISHES[generation.finish]}
            for generation in texts
        ],
        total={
            name: sum(getattr(generation, name) for generation in texts)
            for name in ("positions", "calls", "partner_tokens", "missed")
        },
        share=_share,
    )


def _styled(token: Token) -> Text:
    """A token in its author's style. White space in front of a missed token is not underlined."""
    shown = _printable(token.text)
    if not token.missed:
        return Text(shown, style=STYLES[token.by])
    word = shown.lstrip()
    return Text.assemble(shown[: len(shown) - len(word)], (word, MISSED))


def _legend(seen: set[str]) -> Text:
    meanings = {
        "partner": ("the partner's", STYLES["partner"]),
        "both": ("the small model's and the partner's", STYLES["both"]),
        "missed": ("the small model's, where the partner did not answer", MISSED),
    }
    shown = [Text(*meaning) for kind, meaning in meanings.items() if kind in seen]
    return Text(", ").join(shown)


def _cost(generation: Generation, numbered: bool = False) -> Text:
    parts = [
        _count(generation.positions, "position"),
        f"{_count(generation.calls, 'call')} ({_share(generation.calls, generation.positions)})",
        _count(generation.partner_tokens, "partner token"),
    ]
    if generation.missed:
        reason = " ".join(_printable(generation.failure or "").split())
        parts.append(f"{generation.missed:,} missed" + (f" ({reason})" if reason else ""))
    parts.append(f"{generation.seconds:.1f} s, {generation.partner_seconds:.1f} of them for the partner")
    parts.append(_FINISHES[generation.finish])
    return Text((f"text {generation.index}: " if numbered else "") + "; ".join(parts))


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _ranked(generation: Generation) -> list[dict[str, object]]:
    """Text, class, title and rank of each token; the rank is the share of the text's scores below its own."""
    scores = np.array([math.nan if token.score is None else token.score for token in generation.tokens])
    known = np.sort(scores[np.isfinite(scores)])
    ranks = np.searchsorted(known, scores) / max(1, len(known) - 1)
    return [
        {
            "text": _printable(token.text),
            "kind": "missed" if token.missed else token.by,
            "title": _title(token),
            "rank": f"{rank:.2f}" if token.by == "slm" and not token.missed and math.isfinite(score) else None,
        }
        for token, score, rank in zip(generation.tokens, scores, ranks, strict=True)
    ]


def _title(token: Token) -> str:
    author = {"slm": "small model", "partner": "partner", "both": "small model and partner"}[token.by]
    parts = [f"token {token.id}, {author}"]
    if token.called:
        parts.append("failed call" if token.missed else "called")
    parts += [
        f"{name} {value:.3g}"
        for name in ("margin", "uncertainty", "score")
        if (value := getattr(token, name)) is not None and math.isfinite(value)
    ]
    return ", ".join(parts)
