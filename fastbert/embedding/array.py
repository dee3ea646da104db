"""`fastbert embed` into one .npy: everything is in memory; input and output may be pipes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbert.check import InputError
from fastbert.config.options import read_delimiter
from fastbert.data.formats.tables import read_table, read_text
from fastbert.data.formats.texts import BEGINNING, Text, texts_of
from fastbert.embedding.model import Embedder
from fastbert.system.console import tracked
from fastbert.system.files import is_stream, output


def embed(
    model: str | Path,
    source: Path,
    *,
    text_column: str = "text",
    delimiter: str | None = None,
    **options: Any,
) -> NDArray[np.float32]:
    """Embeddings (N, hidden_size) float32 of the texts of a file, in order.

    source: a .txt with one text per line, a table, or a stream of either; text_column: a table's
    column with the texts; options: `Embedder`'s. All texts are read and tokenised before the model
    runs. Raises InputError for a file that cannot be read and for a text that is too long.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedder = Embedder(model, device, **options)
    texts = _texts(source, text_column, delimiter)
    embeddings = embedder(texts, lambda batches: tracked(batches, "embedding"))
    embedder.warn_of_words(source)
    return embeddings


def _texts(source: Path, column: str, delimiter: str | None) -> list[Text]:
    """The texts of a file or a stream, one for each line, or for each row of a table.

    Empty texts are kept, so that each line or row has its embedding.
    """
    if not is_stream(source):
        if texts := list(texts_of(source, column, delimiter).rows()):
            return texts
        raise InputError(f"{source}: has no rows")
    if delimiter is None and source.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
        lines = read_text(source).removesuffix("\n").split("\n")
        found = [(f"{source}, line {i}", x.rstrip("\r")) for i, x in enumerate(lines, start=1)]
    else:
        rows = read_table(source, [column], delimiter and read_delimiter(delimiter))
        found = [(r.where, "" if r.values[column] == "" else r.text(column)) for r in rows]
    return [Text(where, text, BEGINNING) for where, text in found]


def write_npy(path: str | Path, array: NDArray[Any]) -> None:
    """Writes the array to a name that ends in .npy; the file appears whole or not at all."""
    require_npy(path)
    array = np.ascontiguousarray(array)
    with output(path) as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)  # not np.save, which calls `tell` and fails on a pipe


def require_npy(path: str | Path) -> None:
    """Raises InputError unless the path ends in .npy or is a stream; directories get shards."""
    if not is_stream(path) and Path(path).suffix != ".npy":
        raise InputError(f"--out {path}: expected a name that ends in .npy, or a directory")
