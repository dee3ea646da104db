"""Text that every Python has."""

from pydoc_data.topics import topics

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of 24 documents."""
    path = tmp_path_factory.mktemp("corpus") / "topics.txt"
    documents = (topics[name].replace("\n\n", "\n") for name in sorted(topics)[:24])
    path.write_text("\n\n".join(documents))
    return path
