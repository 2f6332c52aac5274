"""Texts that are hard on a tokenizer: any Unicode, and numbers, dates and names, with white space of all kinds."""

from hypothesis import strategies as st

CHARACTERS = st.characters(exclude_categories=("Cs",))
MONTHS = ("January", "May", "December")
FACTS = st.one_of(
    st.integers(0, 10**9).map(str),
    st.floats(0, 10**6, allow_nan=False).map(lambda x: f"{x:,.2f}"),
    st.builds("{} {} {}".format, st.integers(1, 31), st.sampled_from(MONTHS), st.integers(800, 2030)),
    st.builds("{:04}-{:02}-{:02}".format, st.integers(1, 2030), st.integers(1, 12), st.integers(1, 31)),
    st.sampled_from(
        ["Odra Venn", "O'Brien-Łoś", "Ålesund", "北京市", "São Tomé", "naïve", "\u0627\u0644\u0642", "👩‍👩‍👧", "🇵🇱"]
    ),
)
SPACES = st.sampled_from(["", " ", "  ", "\n", "\n\n", " \t", "\u00a0", "\u3000"])
TEXT = st.lists(st.one_of(st.text(CHARACTERS, max_size=8), FACTS, SPACES), max_size=5).map("".join)
