"""Token ids and offsets: exact on all of Unicode, for byte-level and for other tokenizers."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lacy.labelers import tokenize

TEXTS = [
    "Ada Lovelace was born in London in 1815.",
    "\n\nTwo  spaces, a tab\t, and a line end.\r\n",
    "na\u00efve e\u0301 \u0301alone \u65e5\u672c\u8a9e \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001d4b3\U0001d4b4",
    "a<CALL>b <|endoftext|> <CALL>",
    "nul\x00inside \ufeff bom \u202e rtl \u05d0\u05d1",
    " ",
    "x",
]


def byte_level(vocab_size: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        ["Ada Lovelace was born in London in 1815."] * 3,
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False),
    )
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["special"]]
    return Tokenizer.from_str(json.dumps(spec))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, tokenizer in (("bytes", byte_level()), ("pieces", sentencepiece_like())):
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        made[name] = str(folder)
    return made


def pieces(tokens, document):
    begin, end = tokens.offsets[document : document + 2]
    return tokens.ids[begin:end], tokens.starts[begin:end], tokens.ends[begin:end]


def assert_covers(text, starts, ends):
    """Tokens cover the text without gaps; tokens that overlap share one character."""
    assert starts[0] == 0 and ends[-1] == len(text)
    assert (starts < ends).all() and (np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all()
    assert (starts[1:] <= ends[:-1]).all()
    inside = starts[1:] < ends[:-1]
    assert (ends[:-1][inside] - starts[1:][inside] == 1).all()


def test_byte_level_offsets_are_the_bytes_of_the_tokens(folders):
    tokenizer = tokenize.load(folders["bytes"])
    tokens = tokenize.encode(tokenizer, TEXTS)
    backend = Tokenizer.from_str(tokenizer.json)
    for document, text in enumerate(TEXTS):
        ids, starts, ends = pieces(tokens, document)
        assert_covers(text, starts, ends)
        assert backend.decode(ids.tolist(), skip_special_tokens=False) == text
        for index in np.flatnonzero(starts[1:] >= ends[:-1]):
            assert backend.decode(ids[: index + 1].tolist(), skip_special_tokens=False) == text[: ends[index]]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60), max_size=4))
def test_any_text_survives(folders, texts):
    tokenizer = tokenize.load(folders["bytes"])
    tokens = tokenize.encode(tokenizer, texts)
    backend = Tokenizer.from_str(tokenizer.json)
    for document, text in enumerate(texts):
        ids, starts, ends = pieces(tokens, document)
        assert backend.decode(ids.tolist(), skip_special_tokens=False) == text
        if text:
            assert_covers(text, starts, ends)
        else:
            assert len(ids) == 0


def test_other_tokenizers_use_the_librarys_offsets(folders):
    tokenizer = tokenize.load(folders["pieces"])
    text = "Ada was \u65e5 born 1815"
    ids, starts, ends = pieces(tokenize.encode(tokenizer, [text]), 0)
    assert len(ids) == len(starts) and starts[0] == 0 and ends[-1] == len(text)
    assert (np.diff(starts) >= 0).all() and (starts <= ends).all()
    covered = {place for start, end in zip(starts, ends, strict=True) for place in range(start, end)}
    assert covered >= {place for place, character in enumerate(text) if character != " "}


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_call_in_the_text_is_text(folders, kind):
    tokenizer = tokenize.load(folders[kind])
    tokens = tokenize.encode(tokenizer, ["say <CALL> now", "<CALL>"])
    assert tokenizer.call_id == tokenizer.vocab_size - 1
    assert tokenizer.call_id not in tokens.ids
    assert len(tokens.ids) > 4


def test_loading_again_gives_the_same_tokenizer(folders, tmp_path):
    tokenizer = tokenize.load(folders["bytes"])
    tokenize.save(tokenizer, tmp_path / "saved")
    again = tokenize.load(str(tmp_path / "saved"))
    assert (again.sha256, again.call_id, again.vocab_size) == (
        tokenizer.sha256,
        tokenizer.call_id,
        tokenizer.vocab_size,
    )


def test_saved_folder_opens_in_transformers(folders, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenize.load(folders["bytes"])
    tokenize.save(tokenizer, tmp_path / "saved")
    opened = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert opened.convert_tokens_to_ids("<CALL>") == tokenizer.call_id
    assert opened.eos_token == "<|endoftext|>"
    assert opened("born in London")["input_ids"] == tokenize.encode(tokenizer, ["born in London"]).ids.tolist()


def test_bos_is_seen_but_not_added(tmp_path):
    from tokenizers.processors import TemplateProcessing

    backend = byte_level()
    backend.add_special_tokens(["<s>"])
    plain = tokenize.encode(_saved(backend, tmp_path / "plain"), ["Ada"]).ids.tolist()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    tokenizer = _saved(backend, tmp_path / "bos")
    assert tokenizer.bos_id == backend.token_to_id("<s>")
    assert tokenize.encode(tokenizer, ["Ada"]).ids.tolist() == plain


def _saved(backend, folder):
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return tokenize.load(str(folder))


def test_positions_and_documents(folders):
    tokens = tokenize.encode(tokenize.load(folders["bytes"]), ["ab", "", "c"])
    assert tokens.position.tolist() == [*range(tokens.offsets[1]), *range(tokens.offsets[3] - tokens.offsets[2])]
    assert set(tokens.document) == {0, 2}
    assert [len(row) for row in tokens.lists(tokens.ids).to_pylist()] == np.diff(tokens.offsets).tolist()


def test_a_lone_surrogate_is_refused(folders):
    with pytest.raises(tokenize.TokenizerError, match="not valid Unicode"):
        tokenize.encode(tokenize.load(folders["bytes"]), ["bad \ud800"])


def test_a_missing_tokenizer_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(tokenize.TokenizerError) as error:
        tokenize.load(str(tmp_path / "empty"))
    assert "\n" not in str(error.value)
