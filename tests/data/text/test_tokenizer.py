# ruff: noqa: RUF001 -- Chinese stops are meant
import json
import resource
import tempfile
import time

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertTokenizer

from fastbert.check import InputError
from fastbert.data import load_tokenizer, save_tokenizer, special_tokens, train_tokenizer
from fastbert.data.text.tokenizer import _LONG_WORD
from fastbert.system.files import Unwritable

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    "unbelievable 中文 don't",
    "Ünbelievable CAFÉ\u200b naïve ß İstanbul",
    "我们去公园吧！Python很好。한국어 日本語テスト",
    "a\tb\r\nc \x00\ufffd d — e…",
    "snake_case C++ 3.14 $5 a/b #hash ##ing",
    "[MASK] and [SEP] inside",
    "",
]


def sentences():
    words = ["unbelievable", "believe", "able", "don't", "can't", "naïve", "café", "Ünder"]
    words += ["running", "run", "ran", "3.14", "C++"]
    yield from (f"{a} {b} {c}" for a in words for b in words for c in words[:4])
    yield from ["中文很好。我们去公园吧！"] * 20
    yield from ["한국어 日本語テスト a/b #hash ##ing"] * 20


@pytest.fixture(scope="module", params=[True, False], ids=["lowercase", "cased"])
def trained(request):
    return train_tokenizer(sentences(), 200, lowercase=request.param)


def test_special_tokens_come_first_and_the_ids_have_no_gaps(trained):
    assert special_tokens(trained) == (0, 1, 2, 3, 4)
    assert [trained.id_to_token(i) for i in range(5)] == SPECIAL
    assert sorted(trained.get_vocab().values()) == list(range(trained.get_vocab_size()))
    assert trained.get_vocab_size() <= 200


def test_a_full_temporary_directory_is_named(tmp_path, monkeypatch):
    """Not that of the run, whose disk may be another one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # fails as a full disk does
    try:
        with pytest.raises(Unwritable, match=f"^{tmp_path}: cannot be written .*TMPDIR"):
            train_tokenizer(["some words"] * 10_000, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_fills_the_vocabulary_where_the_text_allows():
    assert train_tokenizer(sentences(), 60).get_vocab_size() == 60


def test_letters_get_half_of_a_small_vocabulary_the_most_frequent_first():
    texts = ["abc"] * 9 + ["".join(map(chr, range(0x4E00, 0x4F00)))] + ["的"] * 50
    vocab = train_tokenizer(texts, 45).get_vocab()
    assert {"的", "a", "b", "c", "##a", "##b", "##c", "abc"} <= vocab.keys()
    assert sum(len(token.removeprefix("##")) == 1 for token in vocab) == 20


def test_training_is_deterministic(documents):
    """The library's own trainer is not: its hash maps are seeded at random, each one anew."""
    texts = [sentence for document in documents for sentence in document]
    first, *others = (train_tokenizer(iter(texts), 150).to_str() for _ in range(4))
    assert others == [first] * 3


def test_a_word_of_known_letters_is_never_unknown(trained):
    assert "[UNK]" not in trained.encode("nnnu nudv v3v C+n").tokens


@pytest.mark.parametrize("text", TEXTS)
def test_tokenises_like_huggingfaces_bert_tokenizer(trained, text, tmp_path):
    lowercase = json.loads(trained.to_str())["normalizer"]["lowercase"]
    vocabulary = tmp_path / "vocab.txt"
    entries = sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
    vocabulary.write_text("".join(f"{token}\n" for token, _ in entries), "utf-8")
    theirs = BertTokenizer(str(vocabulary), do_lower_case=lowercase)
    assert trained.encode(text).ids == theirs(text)["input_ids"]


def test_pairs_and_decoding(trained):
    encoding = trained.encode("believe", "run")
    assert encoding.tokens[0] == "[CLS]"
    assert encoding.tokens[-1] == "[SEP]"
    assert encoding.tokens.count("[SEP]") == 2
    border = encoding.tokens.index("[SEP]") + 1
    assert encoding.type_ids == [0] * border + [1] * (len(encoding) - border)
    assert trained.decode(trained.encode("unbelievable running").ids) == "unbelievable running"


def test_saved_files_give_transformers_the_same_ids(trained, tmp_path):
    save_tokenizer(trained, tmp_path)
    BertConfig(vocab_size=trained.get_vocab_size()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == special_tokens(trained).mask
    texts = TEXTS[:-1]  # transformers takes an empty second text for none
    for a, b in zip(texts, reversed(texts), strict=True):
        encoding, single = trained.encode(a, b), trained.encode(a)
        assert theirs(a, b)["input_ids"] == encoding.ids
        assert theirs(a, b)["token_type_ids"] == encoding.type_ids
        assert theirs(a)["input_ids"] == single.ids
        assert theirs.decode(single.ids) == trained.decode(single.ids, skip_special_tokens=False)


@pytest.mark.parametrize("strips", [True, False])
def test_accents_are_stripped_by_the_saved_files_as_in_training(strips, tmp_path):
    plain = train_tokenizer(["a café"] * 9, 60, lowercase=not strips, strip_accents=strips)
    save_tokenizer(plain, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for tokenizer in (plain, load_tokenizer(tmp_path)):
        assert tokenizer.normalizer.normalize_str("é") == ("e" if strips else "é")
        assert tokenizer.encode("a café").ids == theirs("a café")["input_ids"]


@pytest.mark.parametrize("name", ["", "tokenizer.json", "vocab.txt"])
def test_saved_files_load_again(trained, tmp_path, name):
    save_tokenizer(trained, tmp_path)
    if name == "vocab.txt":
        (tmp_path / "tokenizer.json").unlink()
    loaded = load_tokenizer(tmp_path / name)
    assert loaded.to_str() == trained.to_str()  # the cache of a corpus goes by it
    for text in TEXTS:
        assert loaded.encode(text, "b").ids == trained.encode(text, "b").ids
        assert loaded.encode(text, "b").type_ids == trained.encode(text, "b").type_ids


def test_a_bare_vocab_lower_cases(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "é", "e"]) + "\n", "utf-8")
    assert load_tokenizer(tmp_path).encode("É", add_special_tokens=False).tokens == ["e"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).encode("é", add_special_tokens=False).tokens == ["é"]


def test_a_loaded_tokenizer_neither_cuts_nor_pads(trained, tmp_path):
    copy = Tokenizer.from_str(trained.to_str())
    copy.enable_truncation(4)
    copy.enable_padding(length=100)
    copy.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("run " * 9).ids == trained.encode("run " * 9).ids


def test_another_pipeline_survives_saving(tmp_path):
    ours = Tokenizer(
        models.WordPiece({t: i for i, t in enumerate([*SPECIAL, "don't", "x"])}, unk_token="[UNK]")
    )
    ours.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    ours.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ours.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    save_tokenizer(loaded, tmp_path / "again")
    BertConfig(vocab_size=7).save_pretrained(tmp_path / "again")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs("DON'T", "x")["input_ids"] == [2, 5, 3, 6, 3]
    assert theirs("DON'T", "x")["token_type_ids"] == [0, 0, 0, 1, 1]


def vocab_text(*tokens):
    return "\n".join(tokens) + "\n"


BPE = Tokenizer(models.BPE()).to_str()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer.json: "),
        ("tokenizer.json", '{"model": 3}', "tokenizer.json: not a tokenizer.json: "),
        ("tokenizer.json", b"\xff", "tokenizer.json: not a tokenizer.json: "),
        ("tokenizer.json", BPE, "expected a WordPiece tokenizer, got BPE"),
        ("vocab.txt", b"\xff\n", "vocab.txt: not a vocab.txt: not UTF-8"),
        ("vocab.txt", "", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ("vocab.txt", vocab_text(*SPECIAL[:4], "a"), r"vocab.txt: the vocabulary lacks \[MASK\]"),
        ("vocab.txt", vocab_text(*SPECIAL, "a", "a"), "6 different tokens but ids up to 6"),
        ("config.json", "{}", "holds neither tokenizer.json nor vocab.txt"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_bad_paths_and_options(tmp_path, trained):
    with pytest.raises(InputError, match=r"nowhere: cannot be read: No such file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be written"):
        save_tokenizer(trained, tmp_path / "file")
    (tmp_path / "vocab.txt").write_text(vocab_text(*SPECIAL))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"_config.json: expected a JSON object, got list"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="--vocab-size: expected more than the 5 special tokens"):
        train_tokenizer(sentences(), 5)
    with pytest.raises(InputError, match="there is no text to train on"):
        train_tokenizer(["", " \t"], 100)
    with pytest.raises(InputError, match=r"the vocabulary lacks \[PAD\]"):
        special_tokens(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_none_of_it(name, tmp_path):
    plain = train_tokenizer(["a cat and a hat"] * 9, 60, lowercase=False)
    save_tokenizer(plain, tmp_path)
    if name != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == plain.get_vocab()
    assert again.encode("A cat").tokens == plain.encode("A cat").tokens


def test_characters_that_are_words_need_no_piece_inside_of_one():
    vocab = train_tokenizer(["北京 a bad, bad cat"] * 9, 60).get_vocab()
    assert {"北", "京", ",", "##a", "##d"} <= vocab.keys()
    assert not {"##北", "##京", "##,"} & vocab.keys()


def test_a_word_without_end_takes_no_time_and_is_unknown():
    """The trainer's time grows by the square of a word's length."""
    long = "abcde" * 100_000
    started = time.perf_counter()
    tokenizer = train_tokenizer([f"a cat {long} and a hat"] * 2, 60)
    assert time.perf_counter() - started < 10
    assert tokenizer.encode(f"{long} cat", add_special_tokens=False).tokens[0] == "[UNK]"
    assert tokenizer.token_to_id("cat") is not None
    assert "电影" * 100 in _LONG_WORD.sub(" ", "电影" * 100)  # each of its characters is a word
    assert _LONG_WORD.sub(" ", "a-b." * 100) == "a-b." * 100
