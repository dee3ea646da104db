"""The routes of text-embeddings-inference, and /fill-mask."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response

from fastbert.serve.abilities import Embedding
from fastbert.serve.loading import about
from fastbert.serve.metrics import Metrics
from fastbert.serve.predictions import SEQUENCES, Prediction
from fastbert.serve.refusal import Refusal, json_response
from fastbert.serve.requests import (
    EmbedBody,
    FillMaskBody,
    PredictBody,
    QuestionBody,
    RerankBody,
    TokenizeBody,
)
from fastbert.serve.service import Service

CANNOT = 424  # text-embeddings-inference's status if the model is of another kind

_MOST_FILLED = 20_000_000  # characters of an answer, which repeats a text for each filled-in word


def routes(service: Service, metrics: Metrics) -> APIRouter:
    """All routes except OpenAI's."""
    router = APIRouter()
    served = service.served

    @router.post("/embed")
    async def embed(body: EmbedBody) -> Response:
        """A vector for each text."""
        if body.dimensions is not None:
            raise Refusal(422, "dimensions: the model's vectors have a fixed width; omit the field")
        texts = service.prompted(service.texts(body.inputs), body.prompt_name)
        _, scores = await service.read(served.embedding, texts, body.truncate)
        return await service.in_thread(_vectors, scores, body.normalize)

    @router.post("/rerank")
    async def rerank(body: RerankBody) -> Response:
        """Scores how well each text answers the query; the best comes first."""
        if served.prediction is None or not served.reranks:
            raise Refusal(
                CANNOT,
                f"{served.name} cannot rerank: it does not give one score to a pair of texts",
            )
        (query,), texts = service.texts(body.query), service.texts(body.texts)
        pairs = [(query, text) for text in texts]
        features, scores = await service.read(served.prediction, pairs, body.truncate)
        means = served.prediction.means(pairs, features, scores)
        shares = [served.prediction.shares(own, body.raw_scores)[0] for own in means]
        ranked = [
            {"index": number, "score": share}
            | ({"text": texts[number]} if body.return_text else {})
            for number, share in enumerate(shares)
        ]
        return json_response(sorted(ranked, key=lambda one: -one["score"]))

    @router.post("/predict")
    async def predict(body: PredictBody) -> Response:
        """The fine-tuned model's prediction for an input, or for each input of a list."""
        ability = served.prediction
        if ability is None:
            raise Refusal(
                CANNOT,
                f"{served.name} cannot predict: it is not fine-tuned for "
                "classification, multi-label classification, regression, entities or reading "
                "comprehension",
            )
        is_batch, inputs = _inputs(body, ability, service)
        features, scores = await service.read(ability, inputs, body.truncate)
        said = await service.in_thread(ability.answers, inputs, features, scores, body.raw_scores)
        return json_response(said if is_batch else said[0])

    @router.post("/fill-mask")
    async def fill_mask(body: FillMaskBody) -> Response:
        """The likeliest words for each [MASK] of a text, or of each text of a list."""
        ability = served.mask_filling
        if ability is None:
            raise Refusal(CANNOT, f"{served.name} cannot fill masks: it has no masked-LM head")
        texts = service.texts(body.inputs)
        size = body.top_k * sum(len(text) * text.count("[MASK]") for text in texts)
        if size > _MOST_FILLED:
            raise Refusal(
                413,
                f"the answer would have {size:,} characters, more than {_MOST_FILLED:,}; lower "
                "top_k or send fewer texts",
            )
        _, scores = await service.read(ability, texts, body.truncate)
        pairs = zip(texts, scores, strict=True)
        answers = [ability.answer(text, own, body.top_k) for text, own in pairs]
        return json_response(answers[0] if isinstance(body.inputs, str) else answers)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        """The tokens of each text, with start and stop in characters of the text."""
        texts = service.texts(body.inputs)
        if body.prompt_name is not None:
            texts = service.prompted(texts, body.prompt_name)
        return await service.in_thread(_tokens, served.tokenizer, texts, body.add_special_tokens)

    @router.get("/info")
    async def info() -> Response:
        """The model and the limits."""
        return json_response(about(served, service.config))

    @router.get("/metrics")
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _vectors(scores: Sequence[Any], normalize: bool) -> Response:
    return json_response(Embedding.vectors(scores, normalize).tolist())


def _inputs(
    body: PredictBody, ability: Prediction, service: Service
) -> tuple[bool, list[tuple[str, ...]]]:
    """Whether the request has a list of inputs, and the texts of each input."""
    given, task = body.inputs, ability.settings.task
    is_batch = isinstance(given, list) and not isinstance(given[0], str)
    inputs: list[Any] = given if is_batch else [given]  # type: ignore[assignment]
    service.check_count(len(inputs))
    if body.raw_scores and task not in SEQUENCES:
        raise Refusal(422, f"raw_scores: not for {task}, whose scores are probabilities")
    if isinstance(inputs[0], QuestionBody) != (task == "qa"):
        form = '{"question": ..., "context": ...}' if task == "qa" else "texts"
        raise Refusal(422, f"inputs: expected {form}, because the model's task is {task}")
    found = []
    for number, one in enumerate(inputs):
        texts = [one] if isinstance(one, str) else one
        if isinstance(one, QuestionBody):
            texts = [one.question, one.context]
        if len(texts) not in ability.num_texts:
            wanted = " or ".join("a pair" if n == 2 else "one text" for n in ability.num_texts)
            raise Refusal(
                422,
                f"input {number}: expected {wanted}, got {len(texts)} texts; write a list of "
                'inputs as [["a"], ["b"]]',
            )
        found.append(tuple(service.texts(texts)))
    return is_batch, found


def _tokens(tokenizer: Any, texts: list[str], add_special_tokens: bool) -> Response:
    encodings = tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
    return json_response(
        [
            [
                {
                    "id": number,
                    "text": token if special else text[start:stop],
                    "special": bool(special),
                    "start": None if special else start,
                    "stop": None if special else stop,
                }
                for number, token, special, (start, stop) in zip(
                    one.ids, one.tokens, one.special_tokens_mask, one.offsets, strict=True
                )
            ]
            for text, one in zip(texts, encodings, strict=True)
        ]
    )
