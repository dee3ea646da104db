"""The path of a request: tokenising in threads, the model's queue, and the answer."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastbert.config.serve import ServeConfig
from fastbert.data.formats.tables import encodable
from fastbert.finetune.features import Feature
from fastbert.serve.abilities import Ability
from fastbert.serve.batcher import Batcher
from fastbert.serve.loading import Served
from fastbert.serve.refusal import Refusal

Result = TypeVar("Result")


class Service:
    """What all routes share: limits, prompts, threads and the queue.

    `texts` replaces lone surrogates, which can be neither tokenised nor written.
    """

    def __init__(self, served: Served, batcher: Batcher, config: ServeConfig) -> None:
        self.served, self.batcher, self.config = served, batcher, config
        self.threads = ThreadPoolExecutor(config.tokenize_threads, "fastbert-tokenize")

    def texts(self, given: str | Sequence[str]) -> list[str]:
        """The request's texts as a list; raises Refusal 413 for more than --max-texts."""
        texts = [given] if isinstance(given, str) else list(given)
        self.check_count(len(texts))
        return [encodable(text) for text in texts]

    def check_count(self, count: int) -> None:
        """Raises Refusal 413 for more inputs than --max-texts."""
        if count > self.config.max_texts:
            raise Refusal(413, f"{count} texts, more than the {self.config.max_texts} of a request")

    def prompted(self, texts: list[str], name: str | None) -> list[str]:
        """Puts the named prompt, or the model's default one, before each text; 422 if unknown."""
        prompts = self.served.prompts
        name = self.served.default_prompt if name is None else name
        if name is None:
            return texts
        if name not in prompts:
            known = ", ".join(prompts) or "none, because the model has no prompts"
            raise Refusal(422, f"prompt_name: no prompt {encodable(name)!r}, expected: {known}")
        return [prompts[name] + text for text in texts]

    async def read(
        self, ability: Ability, inputs: Sequence[Any], truncate: bool | None
    ) -> tuple[list[Feature], list[Any]]:
        """The features of the inputs, and the model's scores.

        truncate: None uses --truncate, if the ability may cut texts off
        """
        cut = ability.cuts and self.config.truncate if truncate is None else truncate
        features = await self.in_thread(ability.features, inputs, cut)
        return features, await self.batcher.scores(ability, features)

    async def in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Calls the function in one of the tokenizer's threads, and returns its result."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, function, *arguments)
