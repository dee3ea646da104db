"""Uploads models to the Hugging Face hub."""

import tempfile
from typing import Any

import huggingface_hub


class Uploads:
    """The method `push_to_hub`, for classes with a `save_pretrained`."""

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **writing: Any,
    ) -> str:
        """Uploads the files of `save_pretrained` in one commit, whose address it returns.

        repo_id: "name" or "organization/name", made if it is missing, private: then unlisted;
        token: True or None for the one that `hf auth login` stored; revision: the branch, made if
        it is missing; create_pr: opens a pull request instead; writing: for `save_pretrained`. No
        README is written. Raises huggingface_hub's errors.
        """
        message = commit_message or f"Upload {type(self).__name__}"
        api = huggingface_hub.HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **writing)  # first, so that no error leaves an empty model
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
