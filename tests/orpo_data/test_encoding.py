import gzip
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from orpo_data import encoding
from orpo_data.encoding import Encoder
from orpo_data.errors import OrpoError
from orpo_data.pieces import SPLITS, WHITE_SPACE, cut, cut_pairs, separators

CORPUS = [
    "The gardener's fern won't grow, I've said; it'll need 250 days (at 20 °C) of light!\n\n1. Water it.\n2. Don't.",
    "user\nassistant\n\n\nHuman: naïve café?\tdef f(x):\n    return x  # 3.14\n\n\n",
    "Да! Щедрый июль. Ἡ γῆς ζῇ. 苔は静かに育つ。 🌿🌿 👩\u200d🌾",
] * 3


def train(*parts: Any, normalizer: Any = None, added: list[Any] | None = None, **trainer: Any) -> Tokenizer:
    """A byte-level BPE whose merges do join spaces, line ends and punctuation wherever the parts let them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts)) if len(parts) > 1 else parts[0]
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"vocab_size": 900, "initial_alphabet": alphabet, "show_progress": False} | trainer
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(**settings))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(added or [])
    return tokenizer


def byte_level(**options: bool) -> Any:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))


def split(name: str, behavior: str = "isolated") -> list[Any]:
    return [pre_tokenizers.Split(Regex(SPLITS[name]), behavior), byte_level(use_regex=False)]


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: train(byte_level()),
    "smollm": lambda: train(pre_tokenizers.Digits(individual_digits=True), byte_level()),
    "lacking bytes": lambda: train(byte_level(), initial_alphabet=[chr(i) for i in range(33, 127)]),
    "spaces added": lambda: train(byte_level(), added=["  ", "<s x>", "o k", "é n", "a."]),
    **{name: lambda name=name: train(*split(name)) for name in SPLITS},
    "qwen-2, NFC": lambda: train(*split("qwen-2"), normalizer=normalizers.NFC()),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    """One for all tests, so that its table is full of earlier texts."""
    return Encoder(tokenizer)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return KINDS["gpt-2"]()


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    file = Path(os.environ.get("ORPO_CACHE", "")) / "SmolLM2-135M-Instruct" / "tokenizer.json"
    if not file.is_file():
        pytest.skip("real tokenizer not present: ORPO_CACHE/SmolLM2-135M-Instruct")
    return Tokenizer.from_file(str(file))


def whole(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def pieces(tokenizer: Tokenizer, texts: list[str]) -> list[list[str]]:
    pairs = cut_pairs(tokenizer)
    assert pairs is not None
    found, rows = cut(pa.array(texts, pa.string()), pairs)
    return [found[start:end].to_pylist() for start, end in zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True)]


class Spy:
    """A tokenizer that notes the texts it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.seen += texts
        return self._tokenizer.encode_batch_fast(texts, **options)


# --- where texts are cut ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Water the fern.", ["Water", " the", " fern", "."]),
        ("Don't 'tis, we'll", ["Don't", " 'tis", ",", " we'll"]),
        ("a  b   c", ["a", "  b", "   c"]),  # a run of spaces belongs to what follows: a look-ahead sees both
        ("end  ", ["end", "  "]),
        ("  start", ["  start"]),
        ("one\n\n two", ["one", "\n\n two"]),
        ("a.\n\nb", ["a", ".\n\nb"]),
        ("3.14 x2y", ["3.14", " x2y"]),
        ("tab\t b", ["tab", "\t b"]),
        ("é b\xa0 c\u3000 d", ["é", " b\xa0 c\u3000 d"]),  # no cut behind white space of any kind
        ("ζῇς δὲ", ["ζῇς", " δὲ"]),
        ("x\u2013y,z", ["x\u2013y", ",z"]),
        ("", []),
    ],
)
def test_pieces(gpt2, text, expected):
    assert [piece for piece in pieces(gpt2, [text])[0] if piece] == expected


def test_pieces_of_each_text_are_its_own(gpt2):
    texts = ["a b", "", " b", "c", "", ""]
    assert ["".join(found) for found in pieces(gpt2, texts)] == texts
    assert pieces(gpt2, []) == []


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@given(texts=st.lists(st.text("aZ 9.'\n\xa0\u3000\u00e9\U0001f33f", max_size=12), max_size=4))
def test_pieces_do_not_depend_on_how_much_is_looked_at_together(window, texts):
    tokenizer = KINDS["smollm"]()
    whole = pieces(tokenizer, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orpo_data.pieces._WINDOW", window)
        assert pieces(tokenizer, texts) == whole


def test_added_tokens_stay_whole(gpt2):
    assert pieces(gpt2, ["<|im_start|>user\nHi<|im_end|>\n"]) == [["<|im_start|>user", "\nHi", "<|im_end|>\n"]]
    spaced = train(byte_level(), added=["o k", "a."])
    assert pieces(spaced, ["a. o k. z z."]) == [["a.", " o k", ".", " z", " z", "."]]


def test_digits_are_pieces_where_the_tokenizer_parts_them():
    assert pieces(KINDS["smollm"](), ["a  25, 3d\u00e9 4\u0660"]) == [
        ["a", "  ", "2", "5", ",", " ", "3", "d\u00e9", " ", "4\u0660"]
    ]
    late = train(*split("qwen-2")[:1], pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=False))
    together = train(pre_tokenizers.Digits(individual_digits=False), byte_level())
    for other in (late, together):
        assert pieces(other, ["a  25,"]) == [["a", "  25,"]]


def test_white_space_is_what_the_expressions_call_so():
    every = [char for char in map(chr, range(sys.maxunicode + 1)) if not 0xD800 <= ord(char) < 0xE000]
    matched = pre_tokenizers.Split(Regex(r"\s"), "isolated").pre_tokenize_str("x".join(every))
    assert {char for char, _ in matched if len(char) == 1 and char != "x"} == set(WHITE_SPACE)


def test_normalization_joins_nothing_at_a_cut():
    """Exhaustive: whatever stands before a space, and whatever follows the ASCII character that opens a piece."""
    form = normalizers.NFC().normalize_str
    end = chr(sys.maxunicode)  # joins with nothing
    every = [char for char in map(chr, range(sys.maxunicode)) if not 0xD800 <= ord(char) < 0xE000]
    spaced, alone = (form("".join(char + behind for char in every)) for behind in (" " + end, end))
    assert spaced == alone.replace(end, " " + end)
    openings = [char for char in map(chr, range(128)) if not char.isalnum()]
    marked = [opening + char for opening in openings for char in every if unicodedata.combining(char)]
    behind_letter, alone = (form("".join(before + text for text in marked)) for before in (end + "a", end))
    assert behind_letter == alone.replace(end, end + "a")


# --- ids -------------------------------------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    [
        *"aZé1٣Ⅷß\u017f' \t\n\r.,-/_\0\x1c漢🌿\u0301\u0338\u0378\U000e0001",
        *"\x85\xa0\u180e\u2000\u200b\u200d\u2028\u3000\ufeff\u1fef\u212a",
        *(
            "'s",
            "'S",
            "'ll",
            "\t's",
            "n't",
            "  ",
            "\n\n",
            "\r\n",
            " \n ",
            "e\u0301",
            "\u03c2 ",
            "\u03c1 ",
            "1234",
            "...",
        ),
        *(
            "the",
            " grow",
            "<|im_start|>",
            "<|im_end|>",
            "<|im",
            "<s x>",
            "o k",
            "é n",
            "e\u0301 n",
            "\n1.",
            " 20",
            "👩\u200d🌾",
        ),
    ]
)
HOSTILE = st.one_of(st.lists(FRAGMENTS, max_size=12).map("".join), st.text(max_size=12))


@given(texts=st.lists(HOSTILE, max_size=6))
def test_ids_are_those_of_whole_texts(tokenizer, encoder, texts):
    encoded = encoder.encode(pa.array(texts, pa.string()))
    assert encoded.type == pa.list_(pa.int32())
    assert encoded.to_pylist() == whole(tokenizer, texts)


@given(texts=st.lists(HOSTILE, min_size=1, max_size=6), data=st.data())
def test_a_slice_is_encoded_like_a_copy(gpt2, texts, data):
    start = data.draw(st.integers(0, len(texts)))
    length = data.draw(st.integers(0, len(texts)))
    part = pa.array(texts, pa.string()).slice(start, length)
    assert Encoder(gpt2).encode(part).to_pylist() == whole(gpt2, part.to_pylist())


def test_corpus_is_exact_and_seen_by_the_tokenizer_once(tokenizer):
    spy = Spy(tokenizer)
    encoder = Encoder(spy)
    texts = pa.array(CORPUS)
    assert encoder.encode(texts).to_pylist() == whole(tokenizer, CORPUS)
    distinct = {piece for found in pieces(tokenizer, CORPUS) for piece in found}
    new, sample = spy.seen[:-5], spy.seen[-5:]
    assert sample == [CORPUS[i] for i in (0, 1, 2, 4, 8)]
    assert len(new) == 1
    assert sorted(new[0].split(next(iter(separators(tokenizer))))[1:]) == sorted(distinct)
    spy.seen.clear()
    assert encoder.encode(texts).to_pylist() == whole(tokenizer, CORPUS)
    assert spy.seen == [CORPUS[16 - len(CORPUS)]]


@given(columns=st.lists(st.lists(HOSTILE, max_size=4), max_size=4))
def test_several_columns_are_encoded_like_each(tokenizer, encoder, columns):
    encoded = encoder.encode_all([pa.array(texts, pa.string()) for texts in columns])
    assert [ids.to_pylist() for ids in encoded] == [whole(tokenizer, texts) for texts in columns]


def test_what_columns_have_in_common_is_seen_by_the_tokenizer_once(gpt2):
    spy = Spy(gpt2)
    columns = [["one and two"], ["two and three"], ["three and one"]]
    encoded = Encoder(spy).encode_all([pa.array(texts) for texts in columns])
    assert [ids.to_pylist() for ids in encoded] == [whole(gpt2, texts) for texts in columns]
    seen = spy.seen[0].split(next(iter(separators(gpt2))))[1:]
    assert sorted(seen) == sorted({"one", "two", "three", " and", " one", " two", " three"})


def test_empty_columns(encoder):
    assert encoder.encode_all([]) == []
    assert encoder.encode(pa.array([], pa.string())).to_pylist() == []
    assert encoder.encode(pa.array(["", ""])).to_pylist() == [[], []]


def test_very_long_words_and_runs(tokenizer, encoder):
    texts = ["ab" * 20_000, " " * 20_000, "\n" * 5_000 + "x", "漢字" * 5_000, "a b" * 10_000]
    assert encoder.encode(pa.array(texts)).to_pylist() == whole(tokenizer, texts)


@pytest.mark.parametrize("latest", [0, 500, 1 << 20])
def test_a_piece_is_seen_by_the_tokenizer_once_whichever_table_it_is_in(gpt2, monkeypatch, latest):
    monkeypatch.setattr(encoding, "_LATEST", latest)
    spy = Spy(gpt2)
    encoder = Encoder(spy)
    for start in (*range(0, 100, 10), 95, 0, 45):
        texts = [f"number {i} of many" for i in range(start, start + 10)]
        assert encoder.encode(pa.array(texts)).to_pylist() == whole(gpt2, texts)
    new = "".join(text for text in spy.seen if not text.startswith("number"))  # without the sample of whole texts
    seen = Counter(new.split(next(iter(separators(gpt2))))[1:])
    assert {"number", " of", " 0", " 9", " 99", " 104"} <= {*seen}
    assert seen.total() == len(seen)


@given(batches=st.lists(st.lists(HOSTILE, max_size=4), max_size=6), latest=st.integers(0, 500), memory=st.integers(0))
def test_ids_are_the_same_however_small_the_tables(gpt2, batches, latest, memory):
    with mock.patch.multiple(encoding, _LATEST=latest, _MEMORY=memory):
        encoder = Encoder(gpt2)
        for texts in batches:
            assert encoder.encode(pa.array(texts, pa.string())).to_pylist() == whole(gpt2, texts)


@given(batches=st.lists(st.lists(HOSTILE, max_size=4), max_size=4), kinds=st.integers(1, 3), latest=st.integers(0, 500))
def test_pieces_with_one_hash_keep_their_own_ids(gpt2, batches, kinds, latest):
    def few(pieces):
        return np.array([len(piece) % kinds for piece in pieces.to_pylist()], np.uint64)

    with mock.patch.multiple(encoding, _hashes=few, _LATEST=latest):
        encoder = Encoder(gpt2)
        for texts in batches:
            assert encoder.encode(pa.array(texts, pa.string())).to_pylist() == whole(gpt2, texts)


def test_table_is_begun_anew_when_full(gpt2, monkeypatch):
    monkeypatch.setattr(encoding, "_MEMORY", 8_000)
    monkeypatch.setattr(encoding, "_LATEST", 2_000)
    spy = Spy(gpt2)
    encoder = Encoder(spy)
    for start in range(0, 1000, 50):
        texts = [f"number {i} of many" for i in range(start, start + 50)]
        assert encoder.encode(pa.array(texts)).to_pylist() == whole(gpt2, texts)
    pieces = [text for text in spy.seen if not text.startswith("number")]  # without the sample of whole texts
    assert 2 < "".join(pieces).count(" of") < 20
    for table, most in zip(encoder._tables, (30_000, 2_000), strict=True):
        assert table.bytes <= most
        assert len(table.ids) == len(table.pieces)


@given(texts=st.sets(HOSTILE, max_size=12).map(sorted))
def test_pieces_shown_together_keep_their_ids(tokenizer, encoder, texts):
    """Whatever the pieces are."""
    assert encoder._encode_pieces(pa.array(texts, pa.string())).to_pylist() == whole(tokenizer, texts)


def test_pieces_are_shown_together(gpt2, monkeypatch):
    monkeypatch.setattr(encoding, "_TOGETHER", 2)
    spy = Spy(gpt2)
    Encoder(spy)._encode_pieces(pa.array([" fern", "fern", ".\n"]))
    assert spy.seen == ["<|im_end|> fern<|im_end|>fern", "<|im_end|>.\n"]


def test_between_pieces_stands_a_token_that_none_of_them_has(gpt2):
    spy = Spy(gpt2)
    Encoder(spy)._encode_pieces(pa.array(["fern", "<|im_end|>\n"]))
    assert spy.seen == ["<|im_start|>fern<|im_start|><|im_end|>\n"]
    spy.seen.clear()
    Encoder(spy)._encode_pieces(pa.array(["<|im_start|>user", "<|im_end|>\n"]))
    assert spy.seen == ["<|im_start|>user", "<|im_end|>\n"]


def test_separators_are_overlapped_by_no_other_token():
    def found(*added: str) -> list[str]:
        return list(separators(train(byte_level(), added=list(added))))

    assert found() == ["<|im_end|>", "<|im_start|>"]
    assert found("b<") == ["b<"]  # behind a b, "<|im_end|>" would lose its first character
    assert found("<|im_end|>\n") == ["<|im_end|>\n", "<|im_start|>"]  # of two tokens the longer one is taken
    assert found("bob") == ["<|im_end|>", "<|im_start|>"]  # "bo" and "bob" one after the other begin with it
    added = train(byte_level(), added=["fern"])
    assert separators(added)["fern"] == added.token_to_id("fern")


@given(texts=st.sets(st.text("<|im_end|>ab\n", max_size=12), max_size=12).map(sorted))
def test_pieces_that_end_like_separators_begin_keep_their_ids(texts):
    tokenizer = KINDS["spaces added"]()
    assert Encoder(tokenizer)._encode_pieces(pa.array(texts, pa.string())).to_pylist() == whole(tokenizer, texts)


def test_pieces_are_shown_alone_if_the_tokenizer_does_not_take_added_tokens_out(gpt2):
    literal = Tokenizer.from_str(gpt2.to_str())
    literal.encode_special_tokens = True
    texts = [" fern", " grow", ", "]
    assert Encoder(literal)._encode_pieces(pa.array(texts)).to_pylist() == whole(literal, texts)


def test_threads_share_one_encoder(gpt2, monkeypatch):
    monkeypatch.setattr(encoding, "_MEMORY", 8_000)
    encoder = Encoder(gpt2)
    batches = [[f"{word} number {i % 97}, and {i}" for i in range(200)] for word in "abcdefghijklmnop"]
    with ThreadPoolExecutor(4) as pool:
        encoded = list(pool.map(lambda batch: encoder.encode(pa.array(batch)).to_pylist(), batches))
    assert encoded == [whole(gpt2, batch) for batch in batches]


# --- tokenizers for which it would not hold --------------------------------------------------------------------------


def token(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, **flags)


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = byte_level()
    return tokenizer


def truncated() -> Tokenizer:
    tokenizer = train(byte_level())
    tokenizer.enable_truncation(5)
    return tokenizer


OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "prefix space": lambda: train(byte_level(add_prefix_space=True)),
    "no expression": lambda: train(byte_level(use_regex=False)),
    "unknown expression": lambda: train(pre_tokenizers.Split(Regex(r"\w+ \w+|."), "isolated"), byte_level()),
    "pieces removed": lambda: train(*split("llama-3", "removed")),
    "SentencePiece": lambda: train(pre_tokenizers.Metaspace()),
    "other normalizer": lambda: train(byte_level(), normalizer=normalizers.Strip()),
    "NFC before added tokens": lambda: train(byte_level(), normalizer=normalizers.NFC(), added=["K x"]),
    "token that strips": lambda: train(byte_level(), added=[token("<x>", rstrip=True)]),
    "token that is a word": lambda: train(byte_level(), added=[token("fern", single_word=True)]),
    "word piece": word_piece,
    "truncation": truncated,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_tokenizers_get_whole_texts(kind):
    tokenizer = OTHERS[kind]()
    assert cut_pairs(tokenizer) is None
    texts = [*CORPUS, "", "a <x> b fern", " K x \u212a x "]
    spy = Spy(tokenizer)
    assert Encoder(spy).encode(pa.array(texts)).to_pylist() == whole(tokenizer, texts)
    assert spy.seen == texts


def test_dropout_gets_whole_texts(gpt2):
    dropping = Tokenizer.from_str(gpt2.to_str())
    dropping.model.dropout = 0.5
    assert cut_pairs(dropping) is None


def test_a_sample_of_texts_is_also_encoded_whole(gpt2, monkeypatch):
    monkeypatch.setattr(encoding, "_CHECKED", 8)
    texts, seen = [f"text {i} of some" for i in range(36)], []
    whole = Encoder._encode_whole
    monkeypatch.setattr(Encoder, "_encode_whole", lambda self, some: seen.extend(some) or whole(self, some))
    encoder = Encoder(gpt2)
    for start, end in ((0, 1), (1, 4), (4, 4), (4, 7), (7, 36)):
        encoder.encode(pa.array(texts[start:end], pa.string()))
    assert [texts.index(text) for text in seen if text in texts] == [0, 1, 2, 4, 8, 16, 24, 32]


def test_a_wrong_cut_is_noticed(gpt2, monkeypatch):
    monkeypatch.setattr(encoding, "cut_pairs", lambda tokenizer: np.ones(256 * 256, np.bool_))
    with pytest.raises(OrpoError, match="a text cut in pieces has other ids"):
        Encoder(gpt2).encode(pa.array(["return     x", "x"]))


# --- real tokenizer, real texts --------------------------------------------------------------------------------------


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else value.values():
            yield from strings(item)


@given(texts=st.lists(HOSTILE, max_size=6))
def test_smollm2_on_hostile_texts(smollm2, texts):
    assert Encoder(smollm2).encode(pa.array(texts, pa.string())).to_pylist() == whole(smollm2, texts)


@pytest.mark.slow
def test_smollm2_on_real_texts(smollm2, real_data):
    encoder = Encoder(smollm2)
    for file in sorted(real_data.rglob("*.gz")):
        rows = gzip.decompress(file.read_bytes()).decode()
        values = json.loads(rows) if ".json.gz" in file.name else map(json.loads, rows.splitlines())
        texts = [text.replace("\n\nHuman:", "<|im_end|>\n<|im_start|>user\n") for text in strings(list(values))]
        assert encoder.encode(pa.array(texts)).to_pylist() == whole(smollm2, texts)


@pytest.mark.slow
def test_every_code_point_in_every_context(tokenizer):
    """Before and behind all that a text is cut between; beyond the first plane, one in 31."""
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 31)]
    texts = [f"a{char} {char}b.{char} {char}{char}'s\n{char}" for char in map(chr, codes)]
    assert Encoder(tokenizer).encode(pa.array(texts)).to_pylist() == whole(tokenizer, texts)
