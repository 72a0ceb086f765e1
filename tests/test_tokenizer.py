import base64
import json
import pathlib
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimistral import files, shipped, tokenizer, tokenizer_files
from minimistral.tokenizer import (
    CONTROL_TOKENS,
    PATTERN,
    Tokenizer,
    count_words,
    encode_plain,
    load_tokenizer,
    merge_pair,
    ranks_from_merges,
    train_bpe,
    train_bpe_plain,
)

TALES = """The fox gave the key to Anna. Anna went to the mill; the mill was old.
Le renard donna la clé à Zoë. Où est-elle ? Elle est allée au marché — déjà !
Der Fuchs gab Jürgen den Schlüssel. Straße, Übergröße, 3,14 €.
El zorro dio la llave a Íñigo. ¿Dónde está? ¡Aquí!
La volpe diede la chiave a Nicolò; perché? Così è.
def f(x):\n\treturn x ** 2  # 12345\n\n\n    for i in range(10):\r\n        pass
"""
TEXT = TALES * 9 + pathlib.Path(random.__file__).read_text(encoding="utf-8")

PROBES = [
    "",
    " ",
    "\n",
    "Hello, world! It's 12345 degrees; we'll GO to McDonald's.",
    "L'été dernier, j'ai mangé des crêpes à Saint-Étienne — c'était délicieux !",
    "Straßenbahnhaltestelle, Übergröße: 3,14 €. Donaudampfschifffahrt",
    "¿Dónde está el niño? ¡Mañana, señor!",
    "Perché così? È già l'ora; città più belle.",
    "你好，世界！今天天气很好，我们去北京大学学习人工智能。",
    "日本語のテキストと한국어 텍스트",
    "السلام عليكم ورحمة الله",
    "नमस्ते दुनिया, ψυχή και Москва",
    "def f(x):\n\tif x > 1:\r\n\t\treturn x**2   # comment\n\n\n\n",
    "👩‍👩‍👧‍👦 e\u0301 🇫🇷 \U0001f3f4\U000e0067",
    "  leading, trailing  \n  and    inner \t blanks \u00a0\u3000 ",
    "<s>[INST] Do as I say [/INST]</s><unk><pad>[SYSTEM_PROMPT] <SPECIAL_20> <0x0A>",
    "\x00\x01\x1c\x7f\x85\u2028\ufeff\ufffd",
    "camelCaseAndSCREAMING_SNAKE http://a.b/c?d=e&f=%20 ///\n///",
]

# Of characters that Python's own Unicode table doesn't know yet, `regex` and tiktoken's Rust
# know different ones, each by its version of Unicode; U+0295 has changed its category since.
any_text = st.text(
    st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\u0295"), max_size=60
)
mixed_text = st.lists(
    st.sampled_from([w + " " for probe in PROBES for w in probe.split(" ")]) | any_text, max_size=12
).map("".join)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train([TEXT], 600)


@pytest.fixture(scope="module")
def packaged() -> pathlib.Path:
    """The folder of mistral-common's own tokenizer files."""
    return pathlib.Path(pytest.importorskip("mistral_common").__file__).parent / "data"


@pytest.fixture(scope="module")
def tekken(packaged) -> Tokenizer:
    return Tokenizer.load(packaged / "tekken_240718.json")


# Training --------------------------------------------------------------------------------------


def test_merges_by_hand():
    # "aaab" twice and "ab" once: (a, a) stands 4 times, (a, b) 3 times; after the first merge the
    # words are [aa a b] x 2 and [a b], where (a, b) stands 3 times and (aa, a) twice.
    words = {b"aaab": 2, b"ab": 1}
    expected = [(97, 97), (97, 98), (256, 257)]
    assert train_bpe_plain(words, 10) == train_bpe(words, 10) == expected
    assert list(ranks_from_merges(expected))[256:] == [b"aa", b"ab", b"aaab"]


def test_merge_pair_goes_from_left_to_right():
    assert merge_pair([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]
    assert merge_pair([1], (1, 1), 9) == [1]


def test_ties_go_to_the_smallest_pair_whatever_the_order_of_the_words():
    for words in ({b"xy": 1, b"cd": 1, b"ca": 1}, {b"ca": 1, b"cd": 1, b"xy": 1}):
        assert train_bpe_plain(words, 3) == [(99, 97), (99, 100), (120, 121)]
        assert train_bpe(words, 3) == [(99, 97), (99, 100), (120, 121)]


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text("aab ", min_size=1, max_size=14), st.integers(1, 5), max_size=12),
    st.integers(0, 40),
)
def test_fast_training_gives_the_plain_merges(words, n_merges):
    counts = {word.encode(): n for word, n in words.items()}
    merges = train_bpe(counts, n_merges)
    assert merges == train_bpe_plain(counts, n_merges)
    assert len(ranks_from_merges(merges)) == 256 + len(merges)  # no two tokens spell the same


def test_fast_training_gives_the_plain_merges_on_text():
    counts = count_words([TEXT])
    merges = train_bpe(counts, 60)
    assert len(merges) == 60 and merges == train_bpe_plain(counts, 60)


def test_words_are_counted_over_all_texts_and_cut_by_the_pattern():
    counts = count_words(["It's 42 days", "days ago\n\n"])
    assert counts == {
        b"It": 1, b"'s": 1, b" ": 1, b"4": 1, b"2": 1, b" days": 1, b"days": 1, b" ago": 1,
        b"\n\n": 1,
    }  # fmt: skip


def test_vocab_size_counts_control_tokens_bytes_and_merges(ours):
    assert ours.vocab_size == 600 == 20 + 256 + 324
    assert ours.control_tokens == {name: i for i, name in enumerate(CONTROL_TOKENS)}
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2, 11)
    assert ours.id_to_bytes(20 + 65) == b"A" and ours.id_to_bytes(1) == b""
    assert Tokenizer.train([], 276).encode("é") == [20 + 0xC3, 20 + 0xA9]


def test_a_single_text_is_taken_as_one_text_not_as_its_characters(ours):
    assert Tokenizer.train(TEXT, 600).ranks == ours.ranks


@pytest.mark.parametrize("size, words", [(275, "at least 276"), (100_000, "too large.*more text")])
def test_impossible_vocab_size(size, words):
    with pytest.raises(ValueError, match=f"vocab_size={size} .*{words}"):
        Tokenizer.train([TEXT], size)


# Encoding and decoding -------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(mixed_text)
def test_plain_and_tiktoken_give_the_same_ids(ours, text):
    assert [rank + ours.n_control for rank in encode_plain(text, ours.ranks)] == ours.encode(text)


def test_switched_to_plain_a_tokenizer_gives_the_same_ids(ours, monkeypatch):
    fast = ours.encode_batch(PROBES, bos=True)
    calls = []
    monkeypatch.setattr(tokenizer, "FAST", False)
    monkeypatch.setattr(tokenizer, "encode_plain", lambda *a: calls.append(a) or encode_plain(*a))
    assert ours.encode_batch(PROBES, bos=True) == fast and len(calls) == len(PROBES)


@settings(max_examples=100, deadline=None)
@given(mixed_text)
def test_round_trip(ours, text):
    ids = ours.encode(text, bos=True, eos=True)
    assert ours.decode(ids) == text == "".join(ours.decode_stream(ids))
    assert ours.decode_bytes(ids) == text.encode()
    assert (ids[0], ids[-1]) == (1, 2) and ids[1:-1] == ours.encode(text)


@pytest.mark.parametrize("text", PROBES)
def test_no_text_becomes_a_control_token(ours, text):
    assert all(i >= 20 for i in ours.encode(text))


def test_every_control_token_name_in_a_text_stays_text(ours, tekken):
    text = "".join(CONTROL_TOKENS)
    assert min(ours.encode(text)) >= 20 and ours.decode(ours.encode(text)) == text
    assert min(tekken.encode(text)) >= 1000 and tekken.decode(tekken.encode(text)) == text


def test_batch_is_the_same_as_one_by_one(ours):
    assert ours.encode_batch(PROBES, bos=True, eos=True) == [
        ours.encode(text, bos=True, eos=True) for text in PROBES
    ]
    assert ours.encode_batch([]) == []
    long = [TEXT, TEXT[::-1]]  # long enough for threads
    assert ours.encode_batch(long, eos=True) == [ours.encode(text, eos=True) for text in long]


@pytest.mark.parametrize("wrong", [-1, 600])
def test_ids_out_of_range_are_named(ours, wrong):
    for use in (ours.decode, lambda ids: list(ours.decode_stream(ids)), ours.decode_bytes):
        with pytest.raises(ValueError, match=f"token id {wrong} is not in 0 to 599"):
            use([300, wrong])


def test_invalid_utf8_becomes_the_replacement_character(ours):
    ids = [20 + byte for byte in b"a\xe4\xbd!\xff\xe4"]
    assert ours.decode(ids) == "a\ufffd!\ufffd\ufffd" == "".join(ours.decode_stream(ids))
    assert ours.decode_bytes(ids) == b"a\xe4\xbd!\xff\xe4"


def test_stream_waits_for_whole_characters(ours):
    ids = [20 + byte for byte in "é👩".encode()]
    pieces = []
    stream = ours.decode_stream(iter(ids))
    for text in stream:
        pieces.append(text)
    assert pieces == ["é", "👩"]
    assert list(ours.decode_stream(ids[:-1])) == ["é", "\ufffd"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 599), max_size=30))
def test_stream_of_any_ids_is_their_text(ours, ids):
    assert "".join(ours.decode_stream(ids)) == ours.decode(ids)


@pytest.mark.parametrize("text, words", [("ab\ud83d", "character 2"), (b"ab", "got bytes")])
def test_texts_that_are_none(ours, text, words):
    for use in (ours.encode, lambda t: ours.encode_batch(["a", t]), lambda t: count_words(["a", t])):
        with pytest.raises(ValueError, match=words):
            use(text)
    with pytest.raises(ValueError, match=words):
        encode_plain(text, ours.ranks)


def test_a_run_of_blanks_that_tiktoken_would_panic_on(ours):
    with pytest.raises(ValueError, match="1,000,000 blanks"):
        ours.encode("a" + " " * 1_000_000)
    text = "a" + " " * 900_000
    assert ours.decode(ours.encode(text)) == text


# Files: ours and Tekken's ----------------------------------------------------------------------


def test_saved_file_is_read_back_and_is_small(tmp_path, ours):
    path = ours.save(tmp_path / "model")
    assert path == tmp_path / "model" / "tekken.json" and list(path.parent.iterdir()) == [path]
    again = Tokenizer.load(path)
    assert (again.ranks, again.control_tokens) == (ours.ranks, ours.control_tokens)
    assert (again.pattern, again.version) == (PATTERN, "v3")
    assert path.stat().st_size < 60 * 600  # Tekken's records alone take 50 bytes each
    before = path.read_bytes()
    assert again.save(path) == path and path.read_bytes() == before


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, ours, monkeypatch):
    path = ours.save(tmp_path / "tekken.json")
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        Tokenizer.train([TEXT], 400).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_mistral_common_reads_our_file(tmp_path, ours):
    module = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    theirs = module.Tekkenizer.from_file(ours.save(tmp_path))
    assert (theirs.n_words, theirs.version.value, theirs.pad_id) == (600, "v3", 11)
    for text in PROBES:
        ids = ours.encode(text, bos=True, eos=True)
        assert theirs.encode(text, True, True) == ids and theirs.decode(ids) == ours.decode(ids)
    for name, i in ours.control_tokens.items():
        assert theirs.get_special_token(name) == i


@pytest.fixture(scope="module")
def their_tekken(packaged):
    module = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    return module.Tekkenizer.from_file(packaged / "tekken_240718.json")


def test_tekken_has_mistral_commons_ids(tekken, their_tekken):
    assert (tekken.vocab_size, tekken.n_control, tekken.version) == (131_072, 1000, "v3")
    assert (tekken.bos_id, tekken.eos_id, tekken.pad_id, tekken.unk_id) == (1, 2, 11, 0)
    assert tekken.pattern == PATTERN
    assert tekken.control_tokens["[TOOL_CONTENT]"] == 19
    assert tekken.control_tokens["<SPECIAL_999>"] == 999
    assert tekken.encode("Hello, world!") == [22177, 1044, 4304, 1033]
    for text in PROBES:
        ids = tekken.encode(text, bos=True, eos=True)
        assert ids == their_tekken.encode(text, True, True)
        assert [rank + 1000 for rank in encode_plain(text, tekken.ranks)] == ids[1:-1]
        assert tekken.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(mixed_text)
def test_tekken_has_mistral_commons_ids_on_any_text(tekken, their_tekken, text):
    assert tekken.encode(text) == their_tekken.encode(text, False, False)


def test_both_packaged_tekken_files_are_the_same_vocabulary(packaged, tekken):
    newer = Tokenizer.load(packaged / "tekken_240911.json")
    assert newer.ranks == tekken.ranks and newer.pattern == tekken.pattern


def _changed(path: pathlib.Path, change) -> pathlib.Path:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_listed_special_tokens_are_honoured(tmp_path, ours):
    names = [*CONTROL_TOKENS, "[THINK]", "[/THINK]"]

    def v13(data):
        data["config"].update(version="v13", default_num_special_tokens=25, default_vocab_size=605)
        data["special_tokens"] = [
            {"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)
        ]

    path = _changed(ours.save(tmp_path), v13)
    newer = Tokenizer.load(path)
    assert newer.version == "v13" and newer.control_tokens["[/THINK]"] == 21
    assert newer.control_tokens["<SPECIAL_24>"] == 24 and newer.vocab_size == 605
    assert newer.encode("The fox") == [i + 5 for i in ours.encode("The fox")]
    newer.save(path)
    assert Tokenizer.load(path).control_tokens == newer.control_tokens
    module = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    theirs = module.Tekkenizer.from_file(path)
    assert theirs.encode("The fox", True, False) == newer.encode("The fox", bos=True)
    assert theirs.get_special_token("[THINK]") == 20


def test_a_version_3_file_without_a_list_has_tekkens_twenty_names(tmp_path, ours):
    path = _changed(ours.save(tmp_path), lambda data: data.pop("special_tokens"))
    assert Tokenizer.load(path).control_tokens == ours.control_tokens


def _vocab(i, **fields):
    return lambda data: data["vocab"][i].update(fields)


DAMAGE = {
    "no config": (lambda d: d.pop("config"), "'config' is missing"),
    "no vocab": (lambda d: d.pop("vocab"), "'vocab' is missing"),
    "vocab of another type": (lambda d: d.update(vocab={}), "'vocab' must be of type list"),
    "no pattern": (lambda d: d["config"].pop("pattern"), "'pattern' is missing"),
    "broken pattern": (lambda d: d["config"].update(pattern="(a"), "no regular expression"),
    "size as text": (lambda d: d["config"].update(default_vocab_size="600"), "of type int"),
    "vocab cut": (lambda d: d.update(vocab=d["vocab"][:400]), "580, .*400 entries"),
    "too few bytes": (lambda d: d["config"].update(default_vocab_size=100), "80, .*256"),
    "rank missing": (
        lambda d: d["vocab"].append(d["vocab"].pop(300)),
        r"vocab\[300\] must have rank 300, found 301",
    ),
    "rank twice": (_vocab(300, rank=299), r"vocab\[300\] must have rank 300, found 299"),
    "not base64": (_vocab(310, token_bytes="$$$"), "rank 310 is no base64"),
    "base64 cut": (_vocab(310, token_bytes="YWJ"), "rank 310 is no base64"),
    "bytes missing": (lambda d: d["vocab"][310].pop("token_bytes"), "'token_bytes' is missing"),
    "bytes in disorder": (_vocab(65, token_bytes="Qg=="), "rank 65 must be the byte b'A'"),
    "token twice": (
        _vocab(300, token_bytes=base64.b64encode(b"a").decode()),
        "rank 300 repeats the bytes b'a'",
    ),
    "newer without special tokens": (
        lambda d: (d["config"].update(version="v11"), d.pop("special_tokens")),
        "version v11 needs special_tokens",
    ),
    "too many special tokens": (
        lambda d: d["special_tokens"].append({"rank": 20, "token_str": "[A]"}),
        "21 special tokens, but default_num_special_tokens = 20",
    ),
    "special tokens twice": (
        lambda d: d["special_tokens"][3].update(token_str="<s>"),
        "distinct names",
    ),
    "special tokens in disorder": (
        lambda d: d["special_tokens"].reverse(),
        r"special_tokens\[0\] must be a record with rank 0",
    ),
    "Hugging Face's": (
        lambda d: (d.clear(), d.update(model={"type": "BPE"}, added_tokens=[])),
        "Hugging Face's tokenizer.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_clear_error(tmp_path, ours, damage):
    change, message = DAMAGE[damage]
    path = _changed(ours.save(tmp_path), lambda data: change(data) and None)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>Please log in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b'{"config": {', "not JSON"),
        (b"\xff\xfe{\x00}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "found a list"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, content, message):
    path = tmp_path / "tekken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


# Which file ------------------------------------------------------------------------------------


def test_the_newest_file_of_a_folder_wins(tmp_path, ours):
    def found():
        path, reason = tokenizer_files.find_tokenizer_file(tmp_path)
        return path.name, reason

    def add(name):
        (tmp_path / name).write_bytes(b"")

    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no tekken.json and no tokenizer.model.*Hugging Face's"):
        load_tokenizer(tmp_path)
    add("tokenizer.model")
    assert found() == ("tokenizer.model", "the only tokenizer file in the folder")
    for newer in ("tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.model.v7m1"):
        add(newer)
        assert found()[0] == newer
    add("tokenizer.model.v2")
    add("tokenizer.model.v10.bak")
    assert found()[0] == "tokenizer.model.v7m1"
    ours.save(tmp_path)
    name, reason = found()
    assert name == "tekken.json" and "newer than tokenizer.model.v7m1, tokenizer.model.v3" in reason
    assert load_tokenizer(tmp_path).ranks == ours.ranks
    assert load_tokenizer(str(tmp_path / "tekken.json")).ranks == ours.ranks


def test_shipped_names(tmp_path, ours, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    ours.save(tmp_path / "tales-tiny")
    assert load_tokenizer("tales-tiny").ranks == ours.ranks
    with pytest.raises(ValueError, match="'tales-big' is neither a folder.*tales-tiny"):
        load_tokenizer("tales-big")
    with pytest.raises(ValueError, match="neither a folder"):
        load_tokenizer("../tales-tiny")


def test_nothing_there_or_another_kind_of_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.json"):
        Tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "vocab.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.txt: .*tokenizer\.model"):
        Tokenizer.load(tmp_path / "vocab.txt")


# SentencePiece ---------------------------------------------------------------------------------

SPM = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}


@pytest.fixture(scope="module", params=SPM)
def pieces(request, packaged):
    """One SentencePiece version: its name, our tokenizer, mistral-common's."""
    pytest.importorskip("sentencepiece")
    theirs = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece")
    path = packaged / SPM[request.param]
    return request.param, Tokenizer.load(path), theirs.SentencePieceTokenizer(path)


def test_sentencepiece_has_mistral_commons_ids(pieces):
    version, mine, theirs = pieces
    assert mine.version == version == theirs.version.value
    assert mine.vocab_size == theirs.n_words == (32_000 if version == "v1" else 32_768)
    assert (mine.bos_id, mine.eos_id, mine.unk_id, mine.pad_id) == (1, 2, 0, None)
    for text in PROBES:
        ids = mine.encode(text, bos=True, eos=True)
        assert ids == theirs.encode(text, True, True)
        assert not set(ids[1:-1]) & set(mine.control_tokens.values())
        assert mine.decode(ids) == theirs.decode(ids) == "".join(mine.decode_stream(ids)) == text
    assert mine.encode_batch(PROBES) == [mine.encode(text) for text in PROBES]
    assert mine.control_tokens.items() >= {"<s>": 1, "</s>": 2}.items()
    assert all(theirs.is_special(i) for name, i in mine.control_tokens.items() if name != "<unk>")


@settings(max_examples=60, deadline=None)
@given(mixed_text.filter(lambda text: "\u2581" not in text))
def test_sentencepiece_has_mistral_commons_ids_on_any_text(pieces, text):
    _, mine, theirs = pieces
    ids = mine.encode(text)
    assert ids == theirs.encode(text, False, False)
    assert mine.decode(ids) == text == "".join(mine.decode_stream(ids))


def test_sentencepiece_bytes_ranges_and_texts_that_are_none(pieces):
    version, mine, _ = pieces
    first_byte = 3 if version == "v1" else 771
    assert mine.id_to_bytes(first_byte + 10) == b"\n" and mine.id_to_bytes(1) == b""
    assert mine.decode_bytes(mine.encode("Hi you")) == b" Hi you"
    with pytest.raises(ValueError, match="token id 40000 is not in 0 to"):
        mine.decode([40_000])
    with pytest.raises(ValueError, match="surrogate"):
        mine.encode("\ud83d")
    with pytest.raises(ValueError, match="read, not trained"):
        type(mine).train(["a"], 300)


def test_a_bare_tokenizer_model_tells_its_version_by_its_control_tokens(pieces, tmp_path):
    version, mine, _ = pieces
    path = mine.save(tmp_path)
    assert path.name == f"tokenizer.model.{version}"
    bare = tmp_path / "bare" / "tokenizer.model"
    assert mine.save(bare) == bare and bare.read_bytes() == path.read_bytes()
    again = load_tokenizer(bare.parent)
    assert again.version == version and again.encode("Hi") == mine.encode("Hi")


def test_damaged_sentencepiece_files(packaged, tmp_path):
    pytest.importorskip("sentencepiece")
    whole = (packaged / SPM["v1"]).read_bytes()
    damaged = {
        "empty": b"",
        "web page": b"<!DOCTYPE html>",
        "git lfs pull": b"version https://git-lfs.github.com/spec/v1",
        "no SentencePiece model": whole[:100_000],
        "ParseFromArray": random.Random(1).randbytes(1000),
    }
    path = tmp_path / "tokenizer.model"
    for message, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            Tokenizer.load(path)
        assert str(path) in str(error.value)


def test_without_sentencepiece_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model.v3").write_bytes(b"x")
    with pytest.raises(ImportError, match=r'pip install "minimistral\[real\]"'):
        load_tokenizer(tmp_path)
