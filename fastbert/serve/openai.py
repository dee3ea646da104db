"""OpenAI's route for embeddings."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from numpy.typing import NDArray

from fastbert.serve.abilities import Embedding
from fastbert.serve.refusal import OPENAI, Refusal, json_response
from fastbert.serve.requests import OpenAIBody
from fastbert.serve.service import Service


def routes(service: Service) -> APIRouter:
    """The routes of OpenAI's API: /v1/embeddings."""
    router = APIRouter(prefix=OPENAI.rstrip("/"))

    @router.post("/embeddings")
    async def embeddings(body: OpenAIBody) -> Response:
        """An embedding of each text, scaled to length 1 as OpenAI's are."""
        if body.dimensions is not None:
            raise Refusal(422, "dimensions: the model's vectors have a fixed width; omit the field")
        texts = service.prompted(service.texts(_texts(body.input)), None)
        features, scores = await service.read(service.served.embedding, texts, body.truncate)
        tokens = sum(feature.num_tokens for feature in features)
        return await service.in_thread(
            _answer, scores, body.encoding_format, service.served.name, tokens
        )

    return router


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        hint = ""
        if isinstance(texts, list) and texts and isinstance(texts[0], int | list):
            hint = ", not tokens, whose vocabulary would be another model's"
        raise Refusal(422, f"input: expected a text or a list of texts{hint}")
    return texts


def _answer(scores: Sequence[Any], encoding: str, name: str, tokens: int) -> Response:
    vectors = Embedding.vectors(scores, normalize=True)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, encoding)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "model": name, "usage": usage})


def _written(vector: NDArray[np.float32], encoding: str) -> str | list[float]:
    if encoding == "float":
        numbers: list[float] = vector.tolist()
        return numbers
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
