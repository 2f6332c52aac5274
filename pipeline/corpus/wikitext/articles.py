"""MediaWiki pages as plain text: one `<page>` of a dump in, an article that reads like prose out.

`clean` works in passes, each linear in the text, so that a hostile page costs no more than an honest one:

1. comments and extension tags (`<ref>`, `<math>`, `<nowiki>`, ...) are cut or replaced, then HTML tags;
2. tables are cut, by lines;
3. external links give way to their labels, brackets without a partner are removed, and everything that
   mwparserfromhell could misread is hidden, so that it never has to try a reading and take it back (which is where
   its time becomes quadratic);
4. mwparserfromhell parses each line that still has templates or links; templates that carry prose are rendered by
   templates.py, all others vanish, and links become their labels;
5. lines become paragraphs, list items and sections; sections without prose are dropped.

Between the passes some noncharacters (U+FDD0 to U+FDEF, which no text may hold) stand for hidden markup and for marks
of our own; the last pass turns them back.
"""

# ruff: noqa: RUF001  (letters of other scripts are meant here)

import html
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Node, Template, Wikilink
from mwparserfromhell.wikicode import Wikicode

from lacy.pipeline.corpus.wikitext.templates import FUNCTIONS, LITERALS, names, pairs, renderer

MAX_WIKITEXT = 4 << 20  # characters; MediaWiki itself takes at most 2 MiB a page
MAX_DEPTH = 16  # of nested templates and links; mwparserfromhell gives up a little above 40
MAX_FORMULA = 80  # characters of LaTeX that are still worth a try

# Sections without prose of their own, by title in lower case. They go with their subsections.
REFERENCE_SECTIONS = names(
    """
    additional reading|bibliography|citations|cited sources|endnotes|explanatory notes|external link|external links|
    footnotes|further information|further reading|general references|inline citations|literature|notes|
    notes and citations|notes and references|primary sources|printed sources|reference|references|
    references and further reading|references and notes|references and sources|secondary sources|see also|
    selected bibliography|sources|sources and further reading|suggested reading|web sources|works cited
    """,
    "|",
)

_HIDDEN = "{}[]<>|'=*#:;"
_HIDE = str.maketrans({char: chr(0xFDD0 + i) for i, char in enumerate(_HIDDEN)})
_SHOW = str.maketrans({chr(0xFDD0 + i): char for i, char in enumerate(_HIDDEN)})
_GAP = "\ufde0"  # something without prose stood here
_CUT = "\ufde1"  # the rest of the line is the remains of an unclosed template or image
_LINE = "\ufde2"  # a line break, within a paragraph or a template
_EDGE = "\ufde3"  # nothing: keeps brackets apart

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2060\ufeff]")
_NO_CHARACTER = re.compile("[\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_SPACES = re.compile("[\t\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000 ]+")


@dataclass(frozen=True)
class Page:
    """A page of the article namespace. `id` is its decimal page id, `text` its wikitext."""

    id: str
    title: str
    text: str


def parse_page(xml: bytes) -> Page | None:
    """Reads one `<page>...</page>` element of a MediaWiki dump, UTF-8, without its surrounding `<mediawiki>`.

    Returns None for what is no article: a redirect, a page outside namespace 0, a content model other than wikitext.
    Of several revisions the last counts. Raises ValueError with a short reason where the element is malformed; a
    declaration or processing instruction, which could define entities, counts as malformed.
    """
    try:
        source = xml.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    if "<!" in source or "<?" in source:
        raise ValueError("a page must not hold XML declarations")
    try:
        page = ET.fromstring(source)
    except ET.ParseError as error:
        raise ValueError(f"not well-formed XML: {error}") from None
    if page.tag != "page":
        raise ValueError("the element is not <page>")
    if _child_text(page, "ns") != "0" or page.find("redirect") is not None:
        return None
    page_id, title = _child_text(page, "id"), _child_text(page, "title")
    if not (page_id.isascii() and page_id.isdigit()):
        raise ValueError("the page has no numeric <id>")
    if not title:
        raise ValueError("the page has no <title>")
    revisions = page.findall("revision")
    if not revisions:
        raise ValueError("the page has no <revision>")
    if _child_text(revisions[-1], "model") not in ("", "wikitext"):
        return None
    text = revisions[-1].findtext("text") or ""
    if text[:64].lstrip()[:9].upper() == "#REDIRECT":
        return None
    return Page(page_id, title, text)


def _child_text(element: ET.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def clean(title: str, wikitext: str) -> str:
    """The article as plain text: the title, a blank line, then one line for each paragraph, list item and heading.

    A heading ends with a period and stands before at least one line of its own or of a subsection. Sections named in
    REFERENCE_SECTIONS, tables, images, formulas beyond a simple one, and templates that carry no prose are left out.
    The text holds no control characters and no spaces but U+0020, and ends without a newline; an article without any
    prose is its title alone.

    Never fails on broken markup. Raises ValueError for a text of more than MAX_WIKITEXT characters.
    """
    if len(wikitext) > MAX_WIKITEXT:
        raise ValueError(f"wikitext of {len(wikitext)} characters, more than {MAX_WIKITEXT}")
    text = _strip_unwanted(wikitext)
    text = _strip_html(_strip_extensions(text))
    text = _balance(_strip_external_links(_strip_tables(_BEHAVIOUR_SWITCH.sub("", text))))
    heading = _SPACES.sub(" ", _strip_unwanted(title.replace("\n", " "))).strip()
    body = "\n".join(_join_sections(_read_sections(text)))
    return f"{heading}\n\n{body}" if body else heading


def _strip_unwanted(text: str) -> str:
    return _NO_CHARACTER.sub("", _CONTROL.sub("", text))


# Pass 1: comments and tags.

_BEHAVIOUR_SWITCH = re.compile(r"__[A-Z]{3,30}__")
_DROPPED_TAGS = (
    "categorytree|ce|gallery|graph|hiero|imagemap|includeonly|indicator|inputbox|mapframe|maplink|pre|ref|references|"
    "score|section|source|style|syntaxhighlight|table|templatedata|templatestyles|timeline"
)
_EXTENSION = re.compile(rf"<!--|<({_DROPPED_TAGS}|chem|math|nowiki|poem)(?=[\s/>])([^<>]*)>", re.IGNORECASE)
_BLOCK_TAGS = names("blockquote center dd div dl dt h1 h2 h3 h4 h5 h6 hr ol p ul")
_LINE_TAGS = names("br li")
_INLINE_TAGS = names(
    """
    a abbr b bdi bdo big caption cite code data del dfn em font i ins kbd mark noinclude nowiki onlyinclude q rb rp rt
    rtc ruby s samp small span strike strong sub sup tbody td tfoot th thead time tr tt u var
    """
) | names(_DROPPED_TAGS, "|")
_HTML_TAG = re.compile(r"</?([a-z][a-z0-9]*)(?=[\s/>])[^<>]*>", re.IGNORECASE)
_SUPERSCRIPT = re.compile(r"<sup>([0-9+\-\u2212]{1,8})</sup>", re.IGNORECASE)
_SUPERSCRIPT_DIGITS = str.maketrans("0123456789+-\u2212", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻")


def _strip_extensions(text: str) -> str:
    """Comments and the tags whose content is not wikitext, leftmost first as MediaWiki reads them.

    A tag without its closing tag is removed alone; a comment without its end hides the rest of the page.
    """
    pieces: list[str] = []
    closers: dict[str, tuple[int, int]] = {}  # by tag: the next closing tag, or the end of the text for none
    at = 0
    while match := _EXTENSION.search(text, at):
        pieces.append(text[at : match.start()])
        at = match.end()
        if match[1] is None:
            end = text.find("-->", at)
            at = len(text) if end < 0 else end + 3
            if text[match.start() - 1 : match.start()] == "\n" == text[at : at + 1]:
                at += 1  # a comment that has a line to itself takes the line with it
            continue
        name = match[1].lower()
        if match[2].endswith("/"):
            pieces.append(_EDGE if name == "nowiki" else _GAP)
            continue
        if name not in closers or closers[name][0] < at:
            closer = re.compile(rf"</{name}(?=[\s>])[^<>]*>", re.IGNORECASE).search(text, at)
            closers[name] = closer.span() if closer else (len(text), len(text))
        start, end = closers[name]
        if start == end or (name == "ref" and _REF.search(text, at, start)):
            continue
        content, at = text[at:start], end
        if name == "nowiki":
            pieces.append(content.translate(_HIDE))
        elif name == "poem":
            pieces.append("\n\n" + _strip_extensions(content).strip().replace("\n", _LINE) + "\n\n")
        elif name in ("math", "chem"):
            pieces.append(_formula(content))
        else:
            pieces.append(_GAP)
    pieces.append(text[at:])
    return "".join(pieces)


_REF = re.compile(r"<ref(?=[\s>])[^<>/]*>", re.IGNORECASE)


def _strip_html(text: str) -> str:
    def replace(tag: re.Match[str]) -> str:
        name = tag[1].lower()
        if name in _BLOCK_TAGS:
            return "\n\n"
        if name in _LINE_TAGS:
            return _LINE
        return "" if name in _INLINE_TAGS else tag[0]

    text = _SUPERSCRIPT.sub(lambda digits: digits[1].translate(_SUPERSCRIPT_DIGITS), text)
    return _HTML_TAG.sub(replace, text)


_LATEX_TEXT = re.compile(r"\\(?:mathrm|mathbf|mathit|mathbb|mathcal|text|textrm|operatorname|rm|bf) ?\{([^{}\\]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac ?\{([^{}\\]{1,12})\} ?\{([^{}\\]{1,12})\}")
_LATEX_COMMAND = re.compile(r"\\([A-Za-z]+|[,;:! ])")
_LATEX_POWER = re.compile(r"\^ ?(?:\{([0-9+\-]{1,8})\}|([0-9]))")
_LATEX_INDEX = re.compile(r"_ ?(?:\{([0-9A-Za-z]{1,8})\}|([0-9A-Za-z]))")
_LATEX_SYMBOLS = pairs("""
    alpha=α beta=β gamma=γ delta=δ epsilon=ε varepsilon=ε zeta=ζ eta=η theta=θ iota=ι kappa=κ lambda=λ mu=μ nu=ν xi=ξ
    pi=π rho=ρ sigma=σ tau=τ upsilon=υ phi=φ varphi=φ chi=χ psi=ψ omega=ω Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ Xi=Ξ Pi=Π
    Sigma=Σ Phi=Φ Psi=Ψ Omega=Ω times=× cdot=· pm=± leq=≤ le=≤ geq=≥ ge=≥ neq=≠ ne=≠ approx=≈ equiv=≡ sim=~ infty=∞
    to=→ rightarrow=→ Rightarrow=⇒ in=∈ subset=⊂ cup=∪ cap=∩ emptyset=∅ forall=∀ exists=∃ neg=¬ land=∧ wedge=∧ lor=∨
    vee=∨ ldots=… dots=… cdots=… aleph=ℵ hbar=ħ ell=ℓ degree=° circ=∘ sin=sin cos=cos tan=tan log=log ln=ln exp=exp
    max=max min=min quad= left= right= displaystyle=
    """) | {"!": "", ",": " ", ";": " ", ":": " ", " ": " "}


def _formula(latex: str) -> str:
    """A formula simple enough for a line of text, such as "x² + y²"; else a gap."""
    if len(latex) > MAX_FORMULA:
        return _GAP
    text = _LATEX_TEXT.sub(lambda m: m[1], latex)
    text = _LATEX_FRACTION.sub(lambda m: f"{m[1]}/{m[2]}", text)
    text = _LATEX_COMMAND.sub(lambda m: _LATEX_SYMBOLS.get(m[1], "\\"), text)
    text = _LATEX_POWER.sub(lambda m: (m[1] or m[2]).translate(_SUPERSCRIPT_DIGITS), text)
    text = _LATEX_INDEX.sub(lambda m: m[1] or m[2], text)
    text = " ".join(text.split())
    return _GAP if not text or re.search(r"[\\{}^_&]", text) else text.translate(_HIDE)


# Pass 2: tables.

_TABLE_END = re.compile(r"[ \t]*\|\}(?!\}(?!\}))")


def _strip_tables(text: str) -> str:
    """Cuts `{| ... |}` with what is nested in it. A table without an end loses its first line here, and its rows (lines
    that begin with a bar) when lines are read."""
    if "{|" not in text:
        return text
    lines = text.split("\n")
    depth_change = [0] * (len(lines) + 1)
    starts: list[int] = []
    for number, line in enumerate(lines):
        if line.lstrip(" \t:*#").startswith("{|"):
            starts.append(number)
        elif starts and (end := _TABLE_END.match(line)):
            depth_change[starts.pop()] += 1
            depth_change[number] -= 1
            lines[number] = line[end.end() :]
    for number in starts:
        lines[number] = ""
    kept: list[str] = []
    depth = 0
    for line, change in zip(lines, depth_change, strict=False):
        depth += change
        if not depth:
            kept.append(line)
    return "\n".join(kept)


# Pass 3: external links and brackets.

_EXTERNAL_LINK = re.compile(
    r"\[(?:(?:https?|ftps?|sftp|ircs?|news|gopher|telnet|git|svn):)?//[^\s\[\]]*+([^\[\]\n]*+)\]?", re.I
)
_BRACKET = re.compile(r"(\{\{|\}\}|\[\[|\]\]|[|=\n{}\[\]<>])")
_OPEN = {opening: opening + _EDGE for opening in ("{{", "[[")}
_CLOSE = {"}}": "{{", "]]": "[["}
_IMAGE_START = re.compile(r"\s*(?:file|image|category):", re.IGNORECASE)


def _strip_external_links(text: str) -> str:
    return _EXTERNAL_LINK.sub(lambda link: link[1].strip() or _GAP, text)


@dataclass(slots=True)
class _Pair:
    """A pair of brackets that is still open.

    mwparserfromhell reads no title that holds a link or, in a link, a newline, and no argument's name that holds
    templates.
    """

    start: int  # index of its piece
    opening: str
    in_title: bool = True
    nested: bool = False  # the current argument holds another pair
    valid: bool = True


def _balance(text: str) -> str:
    """Leaves only bracket pairs that mwparserfromhell reads as templates and links, with no newline within a pair.

    A bracket without a partner is removed; an unclosed template or image is marked, so that the rest of its line can be
    cut. Single brackets are hidden. After this a line of the text is a unit that can be parsed alone.
    """
    pieces = _BRACKET.split(text)
    stack: list[_Pair] = []
    templates_open = 0
    for i in range(1, len(pieces), 2):
        piece = pieces[i]
        top = stack[-1] if stack else None
        if piece in _OPEN:
            stack.append(_Pair(i, piece))
            templates_open += piece == "{{"
        elif piece in _CLOSE:
            pieces[i] = ""
            if piece == "}}" and templates_open:
                while stack[-1].opening != "{{":
                    _leave_open(pieces, stack.pop())
                    stack[-1].nested = True
                    stack[-1].valid = stack[-1].valid and not stack[-1].in_title
                templates_open -= 1
            elif top is None or top.opening != _CLOSE[piece]:
                continue
            pair = stack.pop()
            pieces[pair.start] = ""
            valid = pair.valid and len(stack) < MAX_DEPTH
            if valid:
                pieces[pair.start], pieces[i] = _OPEN[pair.opening], piece
            if stack:
                stack[-1].nested = True
                if stack[-1].in_title and (piece == "]]" or not valid):
                    stack[-1].valid = False
        elif piece == "|":
            if top:
                top.in_title = top.nested = False
        elif piece == "=":
            if top and (top.nested or top.opening == "[["):
                pieces[i] = piece.translate(_HIDE)
        elif piece == "\n":
            if top and top.in_title and top.opening == "[[":
                top.valid = False
        else:
            pieces[i] = piece.translate(_HIDE)
    for pair in stack:
        _leave_open(pieces, pair)
    depth = 0
    for i in range(1, len(pieces), 2):
        if pieces[i] == "\n" and depth:
            pieces[i] = _LINE
        depth += (pieces[i] in _OPEN.values()) - (pieces[i] in _CLOSE)
    return "".join(pieces)


def _leave_open(pieces: list[str], pair: _Pair) -> None:
    is_cut = pair.opening == "{{" or _IMAGE_START.match(pieces[pair.start + 1])
    pieces[pair.start] = _CUT if is_cut else ""


# Pass 4: templates and links.

_BLANK = " \t\n" + _LINE + _EDGE
_NAMESPACE = re.compile(r"\s*([^:|]{1,40}):")
_DROPPED_NAMESPACES = frozenset(("file", "image", "category"))
_LANGUAGE_PREFIX = re.compile(r"[a-z]{2,3}(?:-[a-z]{2,10}){0,2}|simple")
_PIPE_TRICK = re.compile(r"([^,(]*[^,( ])(?: \(|, ).*")


def _expand(line: str) -> str:
    """The line with its templates and links rendered, and no bracket pair left."""
    if "{{" in line or "[[" in line:
        line = _render(mwparserfromhell.parse(_EDGE + line, skip_style_tags=True))
    return re.sub(f"{_CUT}[^{_LINE}]*", "", line) if _CUT in line else line


def _render(code: Wikicode) -> str:
    return "".join(_render_node(node) for node in code.nodes)


def _render_node(node: Node) -> str:
    if isinstance(node, Template):
        return _render_template(node)
    if isinstance(node, Wikilink):
        return _render_link(node)
    if isinstance(node, ExternalLink):  # a bare address in the text
        return _render(node.url)
    return str(node)


def _render_link(link: Wikilink) -> str:
    title = _render(link.title).replace(_EDGE, "").strip()
    label = None if link.text is None else _render(link.text)
    shown = title.startswith(":")
    target = title.removeprefix(":").strip()
    if namespace := _NAMESPACE.match(target):
        name = namespace[1].strip()
        if not shown and (name.lower() in _DROPPED_NAMESPACES or _LANGUAGE_PREFIX.fullmatch(name)):
            return _GAP
    if label is None:
        return target
    if label.strip():
        return label
    target = target[namespace.end() :].strip() if namespace else target
    trick = _PIPE_TRICK.fullmatch(target)
    return trick[1] if trick else target


def _render_template(template: Template) -> str:
    title = str(template.name).replace(_EDGE, "").strip(_BLANK)
    name = title.lower().replace("_", " ").removeprefix("template:").strip()
    if name in LITERALS:
        return LITERALS[name].translate(_HIDE).replace("\n", _LINE)
    function, colon, operand = title.partition(":")
    if colon and (apply := FUNCTIONS.get(function.lower())):
        return apply(_render(mwparserfromhell.parse(operand.strip())))
    render = renderer(name)
    if render is None:
        return _GAP
    arguments = {str(p.name).strip(_BLANK): _render(p.value).strip(_BLANK) for p in template.params}
    return render(arguments).replace("\n", _LINE) or _GAP


# Pass 5: lines, paragraphs and sections.

_LIST_MARKS = "*#:;"
_QUOTES = re.compile(r"'{2,}")
_PARENTHESES = re.compile(r"\(([^()]*)\)")
_SEPARATOR = re.compile(r"([;,])")
_WORD = re.compile(r"\w+")
_GAP_RUN = re.compile(f"[ ,;{_GAP}]+")
_SPACE_BEFORE = re.compile(r" (?=[.,;:!?)\]](?:\s|$))")
# Words that say nothing once the template that they introduce is gone.
_LEAD_WORDS = names("pronounced pronunciation or also and ipa locally listen us uk english in native")


@dataclass
class _Section:
    level: int
    heading: str
    lines: list[str]


def _read_sections(text: str) -> list[_Section]:
    """The sections in order, the first without a heading; each line is a paragraph or a list item, in plain text."""
    sections = [_Section(0, "", [])]
    paragraph: list[str] = []

    def end_paragraph() -> None:
        sections[-1].lines.extend(_finish(" ".join(paragraph)))
        paragraph.clear()

    for raw in text.split("\n"):
        line = raw.strip()
        if line.startswith("=") and (heading := _read_heading(line)):
            end_paragraph()
            sections.append(heading)
        elif not line.strip(_BLANK + "-"):
            end_paragraph()
        elif line[0] in _LIST_MARKS:
            end_paragraph()
            sections[-1].lines.extend(_finish(_expand(line.lstrip(_LIST_MARKS))))
        elif line[0] != "|" and not (line[0] == "!" and "!!" in line[1:]):
            paragraph.append(_expand(line))
    end_paragraph()
    return sections


def _read_heading(line: str) -> _Section | None:
    left, right = len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("="))
    level = min(left, right, 6)
    if not right or len(line) <= 2 * level:
        return None
    return _Section(level, " ".join(_finish(_expand(line[level:-level]))), [])


def _join_sections(sections: list[_Section]) -> list[str]:
    kept: list[_Section] = []
    reference_level = 7
    for section in sections:
        if section.level <= reference_level:
            is_reference = section.heading.lower().rstrip(".: ") in REFERENCE_SECTIONS
            reference_level = section.level if is_reference else 7
        if reference_level == 7:
            kept.append(section)
    lines: list[str] = []  # from the last to the first
    filled = [False] * 8  # by level: whether a kept section of this level follows, under the same heading
    for section in reversed(kept):
        if not section.lines and not any(filled[section.level + 1 :]):
            continue
        filled[section.level :] = [True] + [False] * (7 - section.level)
        lines.extend(reversed(section.lines))
        if section.heading:
            lines.append(section.heading if section.heading[-1] in ".?!" else section.heading.rstrip(":; ") + ".")
    return lines[::-1]


def _finish(text: str) -> list[str]:
    """Plain lines from expanded wikitext: quotes, entities, gaps and hidden marks resolved; lines without a letter left
    out."""
    text = _QUOTES.sub(_unquote, text.replace(_EDGE, ""))
    if "&" in text:
        text = _CONTROL.sub("", html.unescape(text))
    lines = []
    for line in text.split(_LINE):
        line = _SPACES.sub(" ", line.replace("\n", " ")).strip()
        line = line.lstrip(_LIST_MARKS).strip()
        if _GAP in line:
            line = _close_gaps(line)
        line = line.translate(_SHOW)
        if any(map(str.isalpha, line)):
            lines.append(line)
    return lines


def _unquote(quotes: re.Match[str]) -> str:
    """Two, three or five are italic, bold or both; what is more is apostrophes."""
    return "'" * {2: 0, 3: 0, 4: 1, 5: 0}.get(len(quotes[0]), len(quotes[0]) - 5)


def _close_gaps(line: str) -> str:
    """Mends what a vanished template leaves: "Earl ({gap}; born 1751)" becomes "Earl (born 1751)"."""
    line = _GAP_RUN.sub(_close_gap, _PARENTHESES.sub(_close_parentheses, line))
    return _SPACE_BEFORE.sub("", line).strip()


def _close_parentheses(group: re.Match[str]) -> str:
    """Leaves out the parts between commas and semicolons that are a gap and no more than the words introducing it."""
    if _GAP not in group[1]:
        return group[0]
    kept = ""
    parts = ["", *_SEPARATOR.split(group[1])]
    for separator, part in zip(parts[::2], parts[1::2], strict=True):
        if _LEAD_WORDS.issuperset(_WORD.findall(part.lower())) and (_GAP in part or not part.strip()):
            continue
        kept += separator + part if kept else part.lstrip()
    return f"({kept.strip()})" if kept else _GAP


def _close_gap(run: re.Match[str]) -> str:
    if _GAP not in run[0]:
        return run[0]
    before, after = run.string[: run.start()][-1:], run.string[run.end() : run.end() + 1]
    marks = run[0].replace(_GAP, "").replace(" ", "")
    if not before or before in "([" or not after or after in ")].:!?":
        return ""
    return f"{marks[0]} " if marks else " " if " " in run[0] else ""
