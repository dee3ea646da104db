"""What the files beside a vocabulary say counts here as it does in transformers."""

import json

import pytest
from transformers import AutoTokenizer, BertConfig

from fastbert.check import InputError
from fastbert.data import load_tokenizer, save_tokenizer
from tests.versions import needs_v5

WORDS = "the man The Man café cafe Cafe 中 国 ##国 中国 e 1 [ ] / ##1"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
V = len(VOCAB)
TEXT = "The Man's Café 中国 [E1]the man[/E1] e1 [e1] [MASK] man"
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
E1, END = ({"content": text, **PLAIN} for text in ("[E1]", "[/E1]"))
DECODER = {str(V + 1): END | {"special": False}, str(V): E1 | {"special": True}}
ADDED = {"[/E1]": V + 1, "[E1]": V}


@pytest.fixture
def write_files(tmp_path):
    def write_files(name, config=None, **others):
        """Writes the vocabulary as vocab.txt or (cased) tokenizer.json, and the others' JSON."""
        (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB), "utf-8")
        if name == "tokenizer.json":
            (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
            save_tokenizer(load_tokenizer(tmp_path), tmp_path)
            for other in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
                (tmp_path / other).unlink()
        BertConfig(vocab_size=V).save_pretrained(tmp_path)
        for file, contents in {"tokenizer_config": config, **others}.items():
            if contents is not None:
                (tmp_path / f"{file}.json").write_text(json.dumps(contents))
        return tmp_path

    return write_files


@needs_v5
@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    "files",
    [
        {"config": {}},
        {"config": {"do_lower_case": False, "tokenizer_class": "BertTokenizerFast"}},
        {"config": {"strip_accents": False, "tokenizer_class": None}},
        {"config": {"do_lower_case": False, "strip_accents": True}},
        {"config": {"tokenize_chinese_chars": False, "tokenizer_class": "ElectraTokenizer"}},
        {"config": {"added_tokens_decoder": DECODER}},
        {"config": {"added_tokens_decoder": DECODER}, "added_tokens": {"[other]": 3}},
        {"config": {}, "added_tokens": ADDED},
        {"config": {"do_lower_case": False}, "added_tokens": {"[/E1]": V, "man": 6}},
        {"config": {"additional_special_tokens": ["[E1]", "[/E1]"]}},
        {"config": {}, "special_tokens_map": {"additional_special_tokens": ["[/E1]", "[E1]"]}},
        {"config": {"additional_special_tokens": ["[E1]"]}, "added_tokens": ADDED},
        {"config": {"extra_special_tokens": [{**E1, "__type": "AddedToken"}]}},
        {"config": {}, "special_tokens_map": {"extra_special_tokens": [E1]}},
    ],
    ids=str,
)
def test_texts_are_divided_as_transformers_does(write_files, name, files):
    directory = write_files(name, **files)
    theirs, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    assert ours.encode(TEXT).ids == theirs(TEXT)["input_ids"]
    save_tokenizer(ours, directory / "saved")
    BertConfig().save_pretrained(directory / "saved")
    for is_there in (True, False):
        if not is_there:
            (directory / "saved" / "tokenizer.json").unlink()
        again = load_tokenizer(directory / "saved", model_vocab_size=len(ours.get_vocab()) + 63)
        assert again.to_str() == ours.to_str()
        theirs = AutoTokenizer.from_pretrained(directory / "saved")
        assert theirs(TEXT)["input_ids"] == ours.encode(TEXT).ids


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_a_tokenizer_json_speaks_for_itself(write_files, config):
    config = config and config | {"do_lower_case": None, "tokenize_chinese_chars": False}
    tokenizer = load_tokenizer(write_files("tokenizer.json", config))
    assert tokenizer.encode("The中国").tokens[1:-1] == ["The", "中", "国"]


def test_a_cleaning_that_transformers_would_undo_survives_saving(write_files):
    directory = write_files("tokenizer.json")
    file = directory / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"clean_text": true', '"clean_text": false'))
    tokenizer = load_tokenizer(directory)
    save_tokenizer(tokenizer, directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    for text in ("the\x00", "man"):
        assert load_tokenizer(directory).encode(text).ids == tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids


def test_added_tokens_count_as_entries_of_the_vocabulary(write_files):
    directory = write_files("vocab.txt", {}, added_tokens=ADDED)
    assert load_tokenizer(directory, model_vocab_size=V + 65).get_vocab_size() == V + 2
    for size in (V + 1, V + 66):
        with pytest.raises(InputError, match=f"has {V + 2} entries, but the checkpoint has {size}"):
            load_tokenizer(directory, model_vocab_size=size)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config": {"do_lower_case": None}}, "do_lower_case: expected true or false, got None"),
        ({"config": {"strip_accents": "no"}}, "strip_accents: expected true or false, got 'no'"),
        ({"config": {"tokenize_chinese_chars": []}}, "tokenize_chinese_chars: expected"),
        ({"config": {"tokenizer_class": 3}}, "tokenizer_class: expected a name, got 3"),
        ({"config": {"added_tokens_decoder": []}}, "added tokens"),
        ({"config": {"added_tokens_decoder": {"a": E1}}}, "added tokens"),
        ({"config": {"added_tokens_decoder": {"5": {"content": 5}}}}, "added tokens"),
        ({"config": {"added_tokens_decoder": {"5": "[E1]"}}}, "added tokens"),
        ({"config": {"extra_special_tokens": "[E1]"}}, "extra_special_tokens is not a list"),
        ({"config": {"additional_special_tokens": [5]}}, "added tokens"),
        ({"special_tokens_map": {"extra_special_tokens": [{"lstrip": 1}]}}, "added tokens"),
        ({"added_tokens": {"[E1]": 5}}, rf"'\[E1\]' the id 5, but the vocabulary gives {V}"),
        ({"added_tokens": {"[E1]": V, "[E2]": "a"}}, "added tokens"),
        ({"special_tokens_map": {"extra_special_tokens": [{}]}}, "added tokens"),
        ({"added_tokens": []}, "added_tokens.json: expected a JSON object, got list"),
        ({"config": {"tokenizer_class": "BertJapaneseTokenizer"}}, "of a BertJapaneseTokenizer"),
    ],
    ids=str,
)
def test_files_that_say_nothing_sensible_are_an_error(write_files, files, said):
    directory = write_files("vocab.txt", **files)
    with pytest.raises(InputError, match=said) as error:
        load_tokenizer(directory)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [([*VOCAB, "man"], "remove duplicate lines"), (VOCAB[2:], r"\[UNK\] in the vocabulary, got")],
)
def test_added_tokens_mend_no_vocabulary(tmp_path, lines, said):
    (tmp_path / "vocab.txt").write_text("\n".join(lines), "utf-8")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": ["[PAD]", "[UNK]", "[E1]"]})
    )
    with pytest.raises(InputError, match=said):
        load_tokenizer(tmp_path)


def test_other_names_of_berts_tokenizer(write_files):
    directory = write_files("vocab.txt", {"tokenizer_class": "MobileBertTokenizerFast"})
    bert = write_files("vocab.txt")
    assert load_tokenizer(directory).to_str() == load_tokenizer(bert).to_str()


def test_the_models_file_may_name_the_class(write_files):
    """As that of cl-tohoku/bert-base-japanese does."""
    directory = write_files("vocab.txt", {"do_lower_case": False})
    (directory / "config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(InputError, match="got one of a BertJapaneseTokenizer"):
        load_tokenizer(directory)


@pytest.mark.parametrize("longest", [16, None])
def test_transformers_cuts_texts_to_what_the_model_computes(write_files, longest):
    directory = write_files("vocab.txt")
    save_tokenizer(load_tokenizer(directory), directory, max_length=longest)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert len(theirs("man " * 600, truncation=True)["input_ids"]) == (longest or 602)
