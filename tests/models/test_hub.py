"""`push_to_hub`, with a stub of the hub's interface."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers

import fastbert
from tests.models.pretraining_case import SHAPE


@pytest.fixture
def hub(monkeypatch):
    """The calls that were made, and the files that were uploaded."""
    real, calls, files = huggingface_hub.HfApi, [], {}

    class Hub:
        def __init__(self, token=None):
            calls.append(("HfApi", {"token": token}))

        def __getattr__(self, name):
            def call(*args, **kwargs):
                bound = inspect.signature(getattr(real, name)).bind(self, *args, **kwargs)
                given = {key: value for key, value in bound.arguments.items() if key != "self"}
                calls.append((name, given))
                if name == "upload_folder":
                    folder = Path(given.pop("folder_path"))
                    files.update({path.name: path.read_bytes() for path in folder.iterdir()})
                    return "the commit"
                return SimpleNamespace(repo_id=f"me/{given['repo_id']}")

            return call

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return SimpleNamespace(calls=calls, files=files)


def test_a_model_is_uploaded_as_transformers_would(hub, tmp_path):
    model = fastbert.BertForMaskedLM(fastbert.BertConfig(**SHAPE)).eval()
    options = {"private": True, "token": "t", "revision": "dev", "create_pr": True}
    said = {"commit_message": "one", "commit_description": "two"}
    assert model.push_to_hub("name", **options, **said, max_shard_size="1GB") == "the commit"
    assert hub.calls == [
        ("HfApi", {"token": "t"}),
        ("create_repo", {"repo_id": "name", "private": True, "exist_ok": True}),
        ("create_branch", {"repo_id": "me/name", "branch": "dev", "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/name", "revision": "dev", "create_pr": True, **said}),
    ]
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(5, 12)[None]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits)


def test_what_save_pretrained_refuses_makes_no_repository(hub):
    model = fastbert.BertModel(fastbert.BertConfig(**SHAPE))
    with pytest.raises(ValueError, match="save_pretrained: expected safetensors"):
        model.push_to_hub("name", tags=["bert"])
    assert [name for name, _ in hub.calls] == ["HfApi"]


def test_transformers_arguments_are_taken():
    theirs = inspect.signature(transformers.PreTrainedModel.push_to_hub).parameters
    ours = inspect.signature(fastbert.BertModel.push_to_hub).parameters
    assert theirs.keys() - ours.keys() <= {"max_shard_size", "tags", "use_temp_dir", "kwargs",
                                           "safe_serialization", "deprecated_kwargs"}  # fmt: skip
