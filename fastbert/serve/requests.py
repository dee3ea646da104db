"""The bodies of requests."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastbert.serve.abilities import MaskFilling

Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Text = str | Texts
Sequence = Annotated[list[str], Field(min_length=1, max_length=2, fail_fast=True)]
Direction = Literal["Right", "right"]


class Body(BaseModel):
    """Base class of the bodies, which refuses unknown fields and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class EmbedBody(Body):
    """normalize: scale to length 1; prompt_name: the prompt from the model's files to put before
    each text; truncate: by default the server's --truncate."""

    inputs: Text
    normalize: bool = True
    truncate: bool | None = None
    truncation_direction: Direction = "Right"
    prompt_name: str | None = None
    dimensions: int | None = None


class RerankBody(Body):
    """raw_scores: logits instead of probabilities; return_text: repeat each text in the answer."""

    query: str
    texts: Texts
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None
    truncation_direction: Direction = "Right"


class QuestionBody(Body):
    """A question, and the context that contains its answer."""

    question: str
    context: str


class PredictBody(Body):
    """inputs: for sequences a text, a pair of texts, or a list of lists of one or two texts; for
    entities a text, or a list of lists of one text; for reading comprehension a question with its
    context, or a list of such questions."""

    inputs: (
        str
        | QuestionBody
        | Sequence
        | Annotated[list[Sequence], Field(min_length=1, fail_fast=True)]
        | Annotated[list[QuestionBody], Field(min_length=1, fail_fast=True)]
    )
    raw_scores: bool = False
    truncate: bool | None = None
    truncation_direction: Direction = "Right"


class FillMaskBody(Body):
    """inputs: texts with [MASK] tokens; top_k: the number of words for each [MASK]."""

    inputs: Text
    top_k: Annotated[int, Field(ge=1, le=MaskFilling.MOST)] = 5
    truncate: bool | None = None


class TokenizeBody(Body):
    """add_special_tokens: with [CLS] and [SEP]; prompt_name: as in `EmbedBody`."""

    inputs: Text
    add_special_tokens: bool = True
    prompt_name: str | None = None


class OpenAIBody(Body):
    """OpenAI's fields, and truncate as in `EmbedBody`.

    model and user have no effect, because a server has one model.
    """

    input: Any
    model: str | None = None
    user: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    truncate: bool | None = None
