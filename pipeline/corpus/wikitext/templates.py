"""The Wikipedia templates that carry prose, each as a function from its arguments to the text that a reader sees.

All other templates (infoboxes, citations, navigation, maintenance) vanish from an article. Names are in lower case with
spaces; arguments without a name are called "1", "2" and so on, and are stripped. What a function returns may hold
newlines, which separate lines, and may be empty.
"""

# ruff: noqa: RUF001  (dashes and signs are meant here)

from collections.abc import Callable

Arguments = dict[str, str]
Renderer = Callable[[Arguments], str]


def names(text: str, separator: str | None = None) -> frozenset[str]:
    """The names in a text that is laid out in lines."""
    return frozenset(name.strip() for name in text.split(separator) if name.strip())


def pairs(text: str) -> dict[str, str]:
    """The "key=value" in a text that is laid out in lines; an underscore in a value stands for a space."""
    return {key: value.replace("_", " ") for key, _, value in (pair.partition("=") for pair in text.split())}


LANGUAGES = pairs("""
    af=Afrikaans am=Amharic ar=Arabic arc=Aramaic arz=Egyptian_Arabic az=Azerbaijani be=Belarusian bg=Bulgarian
    bn=Bengali br=Breton bs=Bosnian ca=Catalan cel=Celtic cop=Coptic cs=Czech cu=Church_Slavonic cy=Welsh
    da=Danish de=German el=Greek en=English eo=Esperanto es=Spanish et=Estonian eu=Basque fa=Persian fi=Finnish
    fr=French fy=West_Frisian ga=Irish gd=Scottish_Gaelic gl=Galician grc=Ancient_Greek grc-gre=Ancient_Greek
    gu=Gujarati gv=Manx haw=Hawaiian he=Hebrew hi=Hindi hr=Croatian hu=Hungarian hy=Armenian id=Indonesian
    is=Icelandic it=Italian ja=Japanese ka=Georgian kab=Kabyle kk=Kazakh km=Khmer kn=Kannada ko=Korean
    ku=Kurdish kw=Cornish ky=Kyrgyz la=Latin lb=Luxembourgish lo=Lao lt=Lithuanian lv=Latvian mi=Māori
    mk=Macedonian ml=Malayalam mn=Mongolian mr=Marathi ms=Malay mt=Maltese my=Burmese nah=Nahuatl nb=Norwegian
    ne=Nepali nl=Dutch nn=Norwegian no=Norwegian oc=Occitan orv=Old_East_Slavic os=Ossetian pa=Punjabi pl=Polish
    ps=Pashto pt=Portuguese qu=Quechua ro=Romanian ru=Russian sa=Sanskrit sc=Sardinian scn=Sicilian sco=Scots
    sd=Sindhi si=Sinhala sk=Slovak sl=Slovene so=Somali sq=Albanian sr=Serbian sv=Swedish sw=Swahili syc=Syriac
    syr=Syriac ta=Tamil te=Telugu tg=Tajik th=Thai tk=Turkmen tl=Tagalog tr=Turkish tt=Tatar ug=Uyghur
    uk=Ukrainian ur=Urdu uz=Uzbek vi=Vietnamese yi=Yiddish zh=Chinese zu=Zulu
    """)
MONTHS = pairs(
    "1=January 2=February 3=March 4=April 5=May 6=June 7=July 8=August 9=September 10=October 11=November 12=December"
)
UNITS = pairs("""
    c=°C f=°F k=K kph=km/h kmh=km/h km2=km² sqkm=km² m2=m² sqm=m² km3=km³ m3=m³ cum=m³ sqmi=sq_mi mi2=sq_mi sqft=sq_ft
    sqin=sq_in cuft=cu_ft cuin=cu_in acre=acres lt=long_tons st=short_tons tonne=t metre=m meter=m foot=ft feet=ft
    inch=in mile=mi miles=mi impgal=imp_gal usgal=US_gal
    """)
RANGE_WORDS = {
    "-": "–",
    "–": "–",
    "to": " to ",
    "to(-)": " to ",
    "and": " and ",
    "or": " or ",
    "x": " × ",
    "×": " × ",
    "by": " by ",
    "+/-": " ± ",
    "±": " ± ",
}
PAIRED_UNITS = {("ft", "in"), ("lb", "oz"), ("st", "lb"), ("mi", "yd"), ("mi", "ft"), ("yd", "ft"), ("hr", "min")}
MUSIC = {"sharp": "♯", "flat": "♭", "natural": "♮", "#": "♯", "b": "♭", "doublesharp": "𝄪", "doubleflat": "𝄫"}


def first(args: Arguments) -> str:
    return args.get("1", "")


def second(args: Arguments) -> str:
    return args.get("2", "")


def last(args: Arguments) -> str:
    return (positional(args) or [""])[-1]


def positional(args: Arguments) -> list[str]:
    values: list[str] = []
    while (key := str(len(values) + 1)) in args:
        values.append(args[key])
    return values


def joined(separator: str) -> Renderer:
    return lambda args: separator.join(value for value in positional(args) if value)


def quotation(args: Arguments) -> str:
    text = args.get("text") or args.get("quote") or args.get("content") or first(args)
    return f"\n{text}\n" if text else ""


def language_text(code: str, text: str) -> str:
    """As in "Greek: Ἀθῆναι"; the text alone where the language has no entry."""
    language = LANGUAGES.get(code.lower(), "")
    return f"{language}: {text}" if language and text else text


def chinese(args: Arguments) -> str:
    labels = {"c": "Chinese", "t": "traditional Chinese", "s": "simplified Chinese", "p": "pinyin", "w": "Wade–Giles"}
    return "; ".join(f"{label}: {args[key]}" for key, label in labels.items() if args.get(key))


def japanese(args: Arguments) -> str:
    """As in "Tokyo Tower (東京タワー, Tōkyō Tawā)"."""
    aside = ", ".join(args[key] for key in ("2", "3") if args.get(key))
    return f"{first(args)} ({aside})" if aside and first(args) else first(args) or aside


def calendar_date(year: str, month: str, day: str, day_first: bool) -> str:
    month = MONTHS.get(month.lstrip("0"), month)
    day = (day.lstrip("0") if month else "") if day.isdecimal() else day
    if day_first or not day:
        return " ".join(part for part in (day, month, year) if part)
    return f"{month} {day}, {year}" if year else f"{month} {day}"


def date(args: Arguments) -> str:
    """Year, month, day as separate arguments, month first unless `df` is set; or one argument that is a date."""
    year, month, day = (args.get(key, "") for key in "123")
    return calendar_date(year, month, day, args.get("df", "").lower() in ("y", "yes", "1", "true"))


def as_of(args: Arguments) -> str:
    if "alt" in args:
        return args["alt"]
    since = "since" in args
    lead = ("Since" if since else "As of") if not args.get("lc") else ("since" if since else "as of")
    year, month, day = (args.get(key, "") for key in "123")
    return f"{lead} {calendar_date(year, month, day, args.get('df', '') != 'US')}"


def grouped(number: str) -> str:
    return f"{int(number):,}" if number.isdecimal() and 4 <= len(number) < 40 else number


def measure(args: Arguments) -> str:
    """The quantity as it was entered ("5 km", "6 ft 2 in", "10 to 15 kg"), without its conversion."""
    values = positional(args)[:12]
    text = ""
    while len(values) >= 3 and values[1].lower() in RANGE_WORDS:
        text += grouped(values[0]) + RANGE_WORDS[values[1].lower()]
        values = values[2:]
    if len(values) < 2:
        return text + "".join(values)
    text += f"{grouped(values[0])} {UNITS.get(values[1].lower(), values[1])}"
    if len(values) >= 4 and (values[1], values[3]) in PAIRED_UNITS:
        text += f" {values[2]} {values[3]}"
    return text


def height(args: Arguments) -> str:
    units = {"ft": "ft", "in": "in", "m": "m", "cm": "cm"}
    return " ".join(f"{args[key]} {unit}" for key, unit in units.items() if args.get(key))


def fraction(args: Arguments) -> str:
    values = positional(args)
    whole, parts = (values[0] + " ", values[1:]) if len(values) == 3 else ("", values)
    return whole + ("1/" + parts[0] if len(parts) == 1 else "/".join(parts))


def power_of_ten(args: Arguments) -> str:
    return f"×10^{first(args)}" if first(args) else ""


def value_with_unit(args: Arguments) -> str:
    text = first(args)
    if second(args):
        text += f" ± {second(args)}"
    if args.get("e"):
        text += f"×10^{args['e']}"
    unit = args.get("u") or args.get("ul") or ""
    return f"{text} {unit}".strip()


def ship(prefix: str) -> Renderer:
    """As in "USS Enterprise (CVN-65)"; the last argument of the template says what to show."""

    def render(args: Arguments) -> str:
        name, number, shown = (args.get(key, "") for key in "123")
        if not number or shown in ("2", "6"):
            return f"{prefix} {name}"
        return number if shown in ("1", "4") else f"{prefix} {name} ({number})"

    return render


def prefixed(prefix: str) -> Renderer:
    return lambda args: prefix + first(args) if first(args) else ""


def span_of_years(prefix: str) -> Renderer:
    return lambda args: prefix + "–".join(value for value in positional(args)[:2] if value)


def sic(args: Arguments) -> str:
    text = "".join(positional(args))
    return text if args.get("hide") else f"{text} [sic]".strip()


def interlanguage_link(args: Arguments) -> str:
    return args.get("lt") or first(args)


def lines(args: Arguments) -> str:
    return "\n".join(["", *positional(args), ""])


def block(args: Arguments) -> str:
    return f"\n{args.get('content') or first(args)}\n"


# What stands for itself, whatever its arguments. The value is text, never markup.
LITERALS: dict[str, str] = {
    "'": "'",
    "'s": "'s",
    "-'": "'",
    "' \"": "' \"",
    "\" '": "\" '",
    "\"'": "\"'",
    "'\"": "'\"",
    "!": "|",
    "pipe": "|",
    "=": "=",
    "ndash": "–",
    "en dash": "–",
    "nsndns": "–",
    "mdash": "—",
    "em dash": "—",
    "mdashb": "—",
    "snd": " – ",
    "snds": " – ",
    "sndash": " – ",
    "spnd": " – ",
    "spndash": " – ",
    "spaced ndash": " – ",
    "spaced en dash": " – ",
    "dash": " – ",
    "spaced mdash": " — ",
    "·": " · ",
    "dot": " · ",
    "middot": " · ",
    "•": " • ",
    "bullet": " • ",
    "nbsp": " ",
    "spaces": " ",
    "space": " ",
    "thinsp": " ",
    "thin space": " ",
    "hair space": " ",
    "hsp": " ",
    "zwsp": "",
    "shy": "",
    "wbr": "",
    "okina": "ʻ",
    "hamza": "ʾ",
    "ayin": "ʿ",
    "sharp": "♯",
    "flat": "♭",
    "natural": "♮",
    "times": "×",
    "minus": "−",
    "prime": "′",
    "degree": "°",
    "infin": "∞",
    "numero": "No.",
    "lbrace": "{",
    "rbrace": "}",
    "lb": "{",
    "rb": "}",
    "(": "{{",
    ")": "}}",
    "br": "\n",
    "break": "\n",
    "poundsign": "£",
}

_BY_NAMES: dict[str, Renderer] = {
    """
    nowrap|nobr|small|smaller|big|larger|abbr|tooltip|abbrlink|sc|smallcaps|small caps|sub|sup|vanchor|visible anchor|
    nobold|noitalic|normal|italic|bold|strong|em|mvar|var|math|key press|keypress|kbd|code|mono|tt|samp|unicode|
    polytonic|hebrew|nastaliq|proper name|as written|nts|number|text|mark|underline|overline|flag|
    flagcountry|flagu|railgauge|track gauge
    """: first,
    "lang|rtl-lang|script|color|colour|sort|resize|transl|transliteration|translit|font color": last,
    "chem|chem2|not a typo|linktext": joined(""),
    "hlist|flatlist|comma separated entries|csl|cslist": joined(", "),
    "sortname": lambda args: " ".join(positional(args)[:2]),
    "bibleverse|bibleref": joined(" "),
    "ubl|ublist|unbulleted list|vunblist|ordered list|bulleted list|plainlist|plain list|columns-list|columns": lines,
    "quote|blockquote|cquote|bquote|quotation|poem quote|poemquote|rquote": quotation,
    "center|centre|block indent|poem": block,
    "zh": chinese,
    "nihongo|nihongo3": japanese,
    """
    birth date|birth date and age|birth-date and age|birth-date|death date|death date and age|death-date and age|
    death-date|start date|start date and age|start-date|end date|end-date|film date|dts|date
    """: date,
    "as of|asof|as-of": as_of,
    "convert|cvt": measure,
    "height": height,
    "frac|fraction|sfrac": fraction,
    "e|esp": power_of_ten,
    "val": value_with_unit,
    "angbr|angle bracket": lambda args: f"⟨{first(args)}⟩" if first(args) else "",
    "gloss": lambda args: f"‘{first(args)}’" if first(args) else "",
    "music": lambda args: MUSIC.get(first(args), ""),
    "sic": sic,
    "ill|illm|interlanguage link|interlanguage link multi|link-interwiki": interlanguage_link,
    "circa|c.|ca.": span_of_years("c. "),
    "floruit|fl.": span_of_years("fl. "),
    "reign|r.": span_of_years("r. "),
    "uss": ship("USS"),
    "hms": ship("HMS"),
    "hmas": ship("HMAS"),
    "hmcs": ship("HMCS"),
    "ss": ship("SS"),
    "rms": ship("RMS"),
    "ms": ship("MS"),
    "mv": ship("MV"),
    "sms": ship("SMS"),
    "ins": ship("INS"),
    "us$|usd": prefixed("US$"),
    "gbp|£": prefixed("£"),
    "eur|euro|€": prefixed("€"),
    "jpy|¥": prefixed("¥"),
    "inr|₹|indian rupee": prefixed("₹"),
    "au$|aud|a$": prefixed("A$"),
    "cad|c$": prefixed("C$"),
    "no.|number sign": prefixed("No. "),
    "p.": prefixed("p. "),
    "vol.": prefixed("vol. "),
    "langx": lambda args: language_text(first(args), second(args)),
}
RENDERERS: dict[str, Renderer] = {name: render for group, render in _BY_NAMES.items() for name in names(group, "|")}

# Parser functions, written {{function:operand}}.
FUNCTIONS: dict[str, Callable[[str], str]] = {
    "formatnum": grouped,
    "lc": str.lower,
    "uc": str.upper,
    "lcfirst": lambda text: text[:1].lower() + text[1:],
    "ucfirst": lambda text: text[:1].upper() + text[1:],
}


def renderer(name: str) -> Renderer | None:
    """The function for a template of this name; None where the template is to vanish."""
    if name in RENDERERS:
        return RENDERERS[name]
    if name.startswith("lang-"):
        return lambda args: language_text(name.removeprefix("lang-"), first(args))
    return None
