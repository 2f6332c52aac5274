"""Text in equals text out, whatever is joined where; and as little as possible is read anew."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lacy.cascade.vocabulary import Writing, incomplete, same, vocabulary
from lacy.schemas.errors import CascadeError
from tests.support.models import END, byte_level, composed, permuted, read, sentencepiece, shuffled
from tests.support.texts import TEXT

KINDS = {
    "bytes": byte_level(600),
    "small": byte_level(270),
    "other": byte_level(900, seed=2),
    "pieces": sentencepiece(700),
    "composed": composed(600),
}
READ = {name: read(tokenizer) for name, tokenizer in KINDS.items()}


def sound(writing: Writing) -> None:
    """Tokens lie one behind the other over the whole text."""
    assert len(writing.ids) == len(writing.ends)
    assert writing.ends == sorted(writing.ends)
    assert (writing.ends[-1] if writing.ends else 0) == len(writing.data) == len(writing.authors)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
@example(["born in 19", "45", " in"])
@example(["", " Odra", "", "é"])
@example(["x\u0301", "\u0302"])
@example(["a", "<|endoftext|>", "<CALL>", "<0x41>", "\u2581"])
def test_joined_text_is_the_text(kind, texts):
    writing = Writing(READ[kind], texts[0])
    for text in texts[1:]:
        writing.join(text, 2)
        sound(writing)
    assert writing.text == "".join(texts)
    assert bytes(writing.data) == "".join(texts).encode()
    assert bytes(writing.authors) == bytes(len(texts[0].encode())) + b"\2" * len("".join(texts[1:]).encode())
    if kind not in ("pieces", "composed"):
        assert b"".join(READ[kind].pieces[index] for index in writing.ids) == bytes(writing.data)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
def test_joined_tokens_are_those_of_the_whole_text(kind, texts):
    """Where nothing but characters was ever added, the tokens are the tokenizer's own."""
    writing = Writing(READ[kind], texts[0])
    for text in texts[1:]:
        writing.join(text, 2)
    assert writing.ids == READ[kind].read("".join(texts))[0]


@pytest.mark.parametrize("kind", ["bytes", "small", "other"])
@settings(max_examples=50, deadline=None)
@given(TEXT, st.lists(st.one_of(st.integers(0, 10**6), TEXT), max_size=12))
def test_tokens_and_text_in_any_order(kind, prompt, steps):
    """What a model writes need not be how its tokenizer cuts, nor even UTF-8: it stays, and the bytes are the text."""
    read_ = READ[kind]
    written = [index for index, piece in enumerate(read_.pieces) if piece]
    writing = Writing(read_, prompt)
    expected = prompt.encode()
    for step in steps:
        if isinstance(step, int):
            writing.add(written[step % len(written)], 1)
            expected += read_.pieces[written[step % len(written)]]
        elif not writing.mid_character:
            before = list(writing.ids)
            keep = writing.join(step, 2)
            assert writing.ids[:keep] == before[:keep]
            expected += step.encode()
        sound(writing)
        assert bytes(writing.data) == expected
        assert b"".join(read_.pieces[index] for index in writing.ids) == expected
    assert writing.text == expected[: len(expected) - incomplete(expected)].decode(errors="replace")


def word(read_, text):
    [index] = read_.read(text)[0]
    return index


def test_digits_merge_over_the_boundary():
    """A number that two models write is one number to the small model's tokenizer."""
    tokenizer = Tokenizer(
        models.BPE(vocab={"1": 0, "9": 1, "4": 2, "19": 3, "194": 4, "i": 5}, merges=[("1", "9"), ("19", "4")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    writing = Writing(vocabulary(tokenizer, "test"), "i")
    for index in (0, 1):
        writing.add(index, 1)
    assert writing.ids == [5, 0, 1]  # the model's own, though "19" has a token
    assert writing.join("4", 2) == 1
    assert (writing.ids, writing.ends) == ([5, 4], [1, 4])
    assert bytes(writing.authors) == b"\0\1\1\2"


def test_tokens_further_back_stay_as_they_were_written():
    read_ = READ["bytes"]
    letters = [read_.pieces.index(bytes([byte])) for byte in b" was"]
    writing = Writing(read_, "Odra Venn")
    for index in letters:
        writing.add(index, 1)
    before = list(writing.ids)
    assert writing.join(" born", 2) == len(before)
    assert writing.ids[: len(before)] == before != read_.read("Odra Venn was")[0]


def test_a_space_belongs_to_the_word_behind_it():
    read_ = READ["bytes"]
    writing = Writing(read_, "she was")
    space = writing.join(" ", 2)
    assert space == len(read_.read("she was")[0])
    writing.join("born", 2)
    assert writing.ids == read_.read("she was born")[0]


def test_characters_in_pieces():
    read_ = READ["bytes"]
    writing = Writing(read_, "1 ")
    euro = [read_.pieces.index(bytes([byte])) for byte in "€".encode()]
    for number, index in enumerate(euro, start=1):
        writing.add(index, 1)
        assert writing.mid_character == (number < 3)
        assert writing.text == ("1 " if number < 3 else "1 €")
    writing.add(euro[0], 1)
    writing.add(read_.pieces.index(b"a"), 1)  # never completed
    assert not writing.mid_character
    assert writing.text == "1 €\ufffda"
    assert writing.join(" was born", 2) == len(writing.ids) - 2
    assert writing.text == "1 €\ufffda was born"


@pytest.mark.parametrize(
    ("data", "count"),
    [(b"", 0), (b"a", 0), ("é".encode(), 0), (b"\xc3", 1), (b"a\xe2\x82", 2), (b"\xf0\x9f\x91", 3), (b"\x82", 0),
     (b"\xff", 0), (b"\xc0", 0), (b"\xe0\x80", 0), (b"\xed\xa0", 0), (b"\xf4\x90", 0), (b"\xf5", 0), (b"\xc3a", 0)],
)  # fmt: skip
def test_incomplete_characters(data, count):
    assert incomplete(data) == count


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=12))
def test_incomplete_is_what_the_decoder_waits_for(data):
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    assert incomplete(data) == len(decoder.getstate()[0])


def test_an_empty_text_of_a_tokenizer_that_puts_a_space_in_front():
    read_ = READ["pieces"]
    writing = Writing(read_, "")
    writing.add(read_.read("Odra was")[0][0], 1)
    assert not writing.text.startswith(" ")


def test_same_tokenizers():
    ours = byte_level(600)
    assert same(read(ours), read(Tokenizer.from_str(ours.to_str())))
    without_call = ours.to_str().replace("<CALL>", "<other>")
    assert same(read(ours), read(Tokenizer.from_str(without_call)))
    for other in (byte_level(599), byte_level(600, seed=2), permuted(ours, shuffled(ours.get_vocab_size(), 0))):
        assert not same(read(ours), read(other))


def test_special_tokens_are_not_read_and_not_written():
    read_ = READ["bytes"]
    end = byte_level(600).token_to_id(END)
    assert end not in read_.read(f"a {END} b")[0]
    forbidden = read_.forbidden(len(read_.pieces) + 8, frozenset([end]))
    assert read_.call_id in forbidden and end not in forbidden
    assert set(forbidden) >= set(range(len(read_.pieces), len(read_.pieces) + 8))


def test_a_tokenizer_whose_tokens_are_no_text():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(CascadeError, match="neither byte-level nor SentencePiece"):
        vocabulary(tokenizer, "somewhere")
