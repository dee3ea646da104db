"""`ServeConfig`: the options of a server."""

import dataclasses
import os
from pathlib import Path

from fastbert.check import InputError
from fastbert.config.options import (
    POOLINGS,
    REQUIRED,
    Bounds,
    at_least,
    check_options,
    of_limits,
    of_model,
    of_server,
)

KEY_VARIABLE = "FASTBERT_API_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything that determines a server; its fields are the command line's options.

    Raises InputError, which names the option, for a value out of range.
    """

    model: str = of_model(REQUIRED, "Directory of a model or a run, or a hub name.")
    pooling: str | None = of_model(
        None,
        "Embeddings are the mean of all tokens, or cls; by default as in the model's files of "
        "sentence-transformers, else mean.",
        choices=POOLINGS,
    )
    max_seq_len: int | None = of_model(
        None,
        "Longest sequence, in tokens; by default the training's.",
        bounds=at_least(3),
    )
    truncate: bool = of_model(
        False,
        "Cut longer texts off unless the request says otherwise (not for ner and qa).",
    )
    precision: str | None = of_model(
        None,
        "auto, bf16, fp16 or fp32; by default the fine-tuning's, else auto; auto is bf16 autocast "
        "if the hardware has it, else fp32.",
    )
    batch_tokens: int | None = of_model(
        None,
        "Tokens per batch; by default 1,024 on a CPU and 16,384 on a GPU.",
        bounds=at_least(1),
    )
    host: str = of_server("127.0.0.1", "Address to listen on; 0.0.0.0 is every IPv4 address.")
    port: int = of_server(
        8080,
        "Port to listen on; 0 takes a free one.",
        bounds=Bounds("between 0 and 65535", 0, 65535),
    )
    api_key_file: Path | None = of_server(
        None,
        f"File with the key that requests need; by default {KEY_VARIABLE} has it, if it is set.",
    )
    tokenize_threads: int = of_server(
        2, "Threads that tokenise texts.", bounds=Bounds("1 to 256", 1, 256)
    )
    max_body: int = of_limits(2_000_000, "Largest request, in bytes.", bounds=at_least(1))
    max_texts: int = of_limits(2048, "Most texts in a request.", bounds=at_least(1))
    max_requests: int = of_limits(
        512, "Most requests at a time; further ones are refused.", bounds=at_least(1)
    )
    max_queue: int = of_limits(8192, "Most sequences that wait for the model.", bounds=at_least(1))
    timeout: float = of_limits(
        60.0,
        "Seconds after which a request fails.",
        bounds=Bounds("above 0 and at most 86400", 0, 86400, low_open=True),
    )

    def __post_init__(self) -> None:
        check_options(self)

    def api_key(self) -> str | None:
        """The key that requests must have, from api_key_file or the environment, or None.

        Raises InputError if the file cannot be read, or if the key is empty or has blanks or
        characters other than printable ASCII.
        """
        if self.api_key_file is None:
            source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
            if key is None:
                return None
        else:
            source = f"--api-key-file {self.api_key_file}"
            try:
                key = self.api_key_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8"
                raise InputError(f"{source}: cannot be read: {reason}") from None
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"{source}: expected a key of ASCII characters without blanks")
        return key
