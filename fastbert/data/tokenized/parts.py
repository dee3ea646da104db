"""The parts of a cache during its construction, and merging them into its arrays."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbert.data.text.encoding import EncodedDocuments
from fastbert.system.files import output

PART_CHARACTERS = 4_000_000  # characters of a part; encoding it takes seconds and about 100 MB


class Part(NamedTuple):
    """A file of `EncodedDocuments`, and its counts.

    documents_read: documents of the corpus, including the omitted ones without tokens
    """

    path: Path
    documents_read: int
    tokens: int
    sentences: int
    documents: int


def batches(documents: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    """Groups consecutive documents into batches of at least PART_CHARACTERS, one for each part."""
    batch: list[list[str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document))
        if size >= PART_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def part_file(directory: Path, number: int) -> Path:
    """The path of a part: its number in six digits, .npz."""
    return directory / f"{number:06d}.npz"


def write_part(path: Path, documents_read: int, encoded: EncodedDocuments) -> Part:
    """Writes the documents' arrays as a part; raises Unwritable."""
    arrays = encoded._asdict()
    counts = (documents_read, *map(len, list(arrays.values())[1:]))
    with output(path) as file:
        np.savez(file, counts=np.array(counts), **arrays)
    return Part(path, *counts)


def complete_parts(directory: Path) -> dict[int, Part]:
    """The readable parts by number; damaged parts, for example after a power cut, are ignored."""
    parts = {}
    for path in directory.glob("[0-9]*.npz"):
        try:
            with np.load(path) as arrays:
                parts[int(path.stem)] = Part(path, *arrays["counts"].tolist())
        except Exception:  # a damaged zip raises almost anything; the part is encoded again
            continue
    return parts


def merge(parts: Sequence[Part], directory: Path, dtype: type) -> None:
    """Concatenates the parts into the four array files of a `TokenizedCorpus`.

    dtype: dtype of the tokens. Raises Unwritable if a file cannot be written.
    """
    tokens, sentences, documents = (
        sum(getattr(part, name) for part in parts) for name in ("tokens", "sentences", "documents")
    )
    _write_array(directory, "tokens", dtype, tokens, _arrays(parts, "tokens"))
    _write_array(directory, "word_starts", np.bool_, tokens, _arrays(parts, "word_starts"))
    for name, size in (("sentence", sentences), ("document", documents)):
        ends = _running_sum(_arrays(parts, f"{name}_lengths"))
        _write_array(directory, f"{name}_offsets", np.int64, size + 1, ends)


def _arrays(parts: Iterable[Part], name: str) -> Iterator[NDArray[Any]]:
    for part in parts:
        with np.load(part.path) as arrays:
            yield arrays[name]


def _running_sum(lengths: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Turns lengths into offsets: 0, and then the end of each."""
    ends = np.zeros(1, np.int64)
    yield ends
    for some in lengths:
        if len(some):
            ends = ends[-1] + np.cumsum(some)
            yield ends


def _write_array(
    directory: Path, name: str, dtype: type, size: int, arrays: Iterable[NDArray[Any]]
) -> None:
    """Writes a .npy file array by array; a memory map would fill the memory with dirty pages."""
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": (size,),
    }
    with output(directory / f"{name}.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(array.astype(dtype, copy=False).data)
