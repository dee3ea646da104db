"""Reads Hugging Face's files beside a vocabulary that define how its tokenizer treats a text."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers

from fastbert.check import InputError, first_line
from fastbert.system.files import read_json

# The names that transformers has given BERT's tokenizer.
_BERT = tuple(
    f"{name}Tokenizer"
    for name in (
        *("Bert", "ConvBert", "DistilBert", "DPRContextEncoder", "DPRQuestionEncoder"),
        *("DPRReader", "Electra", "LayoutLM", "Lxmert", "MobileBert", "RetriBert", "SqueezeBert"),
    )
)
_ANY = ("PreTrainedTokenizer", "TokenizersBackend")  # a tokenizer.json defines what these do
_LISTS = ("extra_special_tokens", "additional_special_tokens")


class TokenizerConfig:
    """What transformers reads beside a tokenizer.json or a vocab.txt, in `directory`.

    is_berts: whether transformers takes BERT's settings from here instead of a tokenizer.json.
    Raises InputError for files that are not JSON objects.
    """

    def __init__(self, directory: Path) -> None:
        self.file = directory / "tokenizer_config.json"
        self.settings = read_json(self.file) or {}
        of_model = (read_json(directory / "config.json") or {}).get("tokenizer_class")
        kind = self.settings.get("tokenizer_class") or of_model or _BERT[0]
        if not isinstance(kind, str):
            raise InputError(f"{self.file}: tokenizer_class: expected a name, got {kind!r}")
        self.kind = kind.removesuffix("Fast").removesuffix("Legacy")
        self.is_berts = self.kind in _BERT and self.file.is_file()

    def require_wordpiece(self, file: Path) -> None:
        """Raises InputError for a vocab.txt whose tokenizer divides words in another way."""
        if self.kind not in (*_BERT, *_ANY):
            raise InputError(
                f"tokenizer {file}: expected the vocab.txt of a BertTokenizer, got one of a "
                f"{self.kind}, which may divide texts in another way"
            )

    def normalizer(self) -> normalizers.BertNormalizer:
        """The normalizer of transformers' BertTokenizer; InputError for a wrong setting."""
        return normalizers.BertNormalizer(
            lowercase=self._flag("do_lower_case", True),
            strip_accents=self._flag("strip_accents", None),
            handle_chinese_chars=self._flag("tokenize_chinese_chars", True),
        )

    def _flag(self, name: str, default: bool | None) -> Any:
        value = self.settings.get(name, default)
        if not isinstance(value, bool) and value is not default:
            raise InputError(f"{self.file}: {name}: expected true or false, got {value!r}")
        return value

    def add_tokens(self, tokenizer: Tokenizer) -> None:
        """Adds the tokens that transformers adds, in place; existing ones do not change.

        Raises InputError for malformed tokens, and if a token's id differs from the files'.
        """
        try:
            tokens = self._tokens()
        except InputError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.file}: the added tokens in this file, or in the files beside it, do not "
                f"have transformers' form: {first_line(error)}"
            ) from error
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([token for token, _ in tokens if token.content not in known])
        for token, number in tokens:
            got = tokenizer.token_to_id(token.content)
            if number not in (None, got):
                raise InputError(
                    f"{self.file}: it or added_tokens.json gives {token.content!r} the id {number},"
                    f" but the vocabulary gives {got}; use files that were saved together"
                )

    def _tokens(self) -> list[tuple[AddedToken, int | None]]:
        """The tokens that the files list, with their ids if given, the lowest id first."""
        said = self.settings
        if "added_tokens_decoder" in said:
            listed = said["added_tokens_decoder"].items()
            numbered = {int(number): AddedToken(**token) for number, token in listed}
            special = _special(said)
        else:  # files from transformers before 4.34
            more = read_json(self.file.with_name("special_tokens_map.json")) or {}
            special = _special(said) | _special(more)
            named = [value for key, value in (said | more).items() if key.endswith("_token")]
            named = [value["content"] if isinstance(value, dict) else value for value in named]
            is_special = {*named, *special}
            added = read_json(self.file.with_name("added_tokens.json")) or {}
            numbered = {
                number: AddedToken(token, special=token in is_special)
                for token, number in added.items()
            }
        rest = special.keys() - {token.content for token in numbered.values()}
        return [
            *((numbered[number], number) for number in sorted(numbered)),
            *((token, None) for content, token in special.items() if content in rest),
        ]


def _special(said: dict[str, Any]) -> dict[str, AddedToken]:
    """A file's special tokens besides the named ones ([CLS] etc.), by content."""
    found = {}
    for name in _LISTS:
        tokens = said.get(name) or []
        if isinstance(tokens, dict):  # by name
            tokens = list(tokens.values())
        if not isinstance(tokens, list):
            raise TypeError(f"{name} is not a list")
        for token in tokens:
            options = {"content": token} if isinstance(token, str) else dict(token)
            options.pop("__type", None)
            found[options["content"]] = AddedToken(**options | {"special": True})
    return found
