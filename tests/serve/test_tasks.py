"""What a server says of texts is what `fastbert predict` and `fill-mask` say, and Hugging Face."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import fastbert
from fastbert.check import InputError
from fastbert.config.serve import ServeConfig
from fastbert.fill_mask import fill_mask
from fastbert.finetune.predict import predict
from fastbert.serve.loading import load
from tests.serve.running import is_alike, running

TEXTS = ["the film was good", "a very bad book", "awful film", "a fine book and a good film"]
LABELS = {
    "classification": ["pos", "neg", "neg", "pos"],
    "multilabel": ["film,good", "book", "film", "film,book,good"],
    "regression": ["0.5", "-1", "-2", "1.5"],
}
CONLL = (
    "john B-PER ; lives O ; in O ; paris B-LOC ; . O ; mary B-PER ; was O ; in O ; "
    "new-berlin B-LOC ; , O ; yes O\n\n"
)
CONTEXT = "john lives in paris , mary lives in berlin"


@pytest.mark.parametrize("task", LABELS)
def test_sequences(learn, task):
    pairs = zip(TEXTS, LABELS[task], strict=True)
    rows = [{"text": text, "label": label} for text, label in pairs]
    run, file = learn(task, "rows.jsonl", rows, stride=4)
    said = predict(run, file)
    long = "good film " * 40
    with running(run) as server:
        answers = server.answer("/predict", inputs=[[text] for text in TEXTS])
        assert is_alike(server.answer("/predict", inputs=TEXTS[0]), answers[0])
        assert server.answer("/predict", inputs=long) != server.answer(
            "/predict", inputs=long, truncate=True
        )
        raw = server.answer("/predict", inputs=TEXTS[0], raw_scores=True)
        about = server.client.get("/info").json()
        assert "expected one text, got 2 texts; write a list" in server.refusal(
            "/predict", 422, inputs=TEXTS[:2]
        )
        assert "cannot rerank" in server.refusal("/rerank", 424, query="a", texts=["b"])
        assert "cannot fill masks" in server.refusal("/fill-mask", 424, inputs="[MASK]")
    assert about["task"] == task
    theirs = transformers.AutoTokenizer.from_pretrained(run / "latest")
    assert len(theirs(long, truncation=True)["input_ids"]) == 48  # as many as the model computes
    for answer, own in zip(answers, said, strict=True):
        scores = [one["score"] for one in answer]
        assert scores == sorted(scores, reverse=True)
        expected = own.get("probabilities", {"score": own.get("score")})
        found = {one["label"]: one["score"] for one in answer}
        assert found == pytest.approx(expected, abs=1e-6)
    numbers = {one["label"]: one["score"] for one in answers[0]}
    logits = torch.tensor([one["score"] for one in raw])
    shares = {"classification": logits.softmax(0), "multilabel": logits.sigmoid()}
    shares = shares.get(task, logits).tolist()
    assert [numbers[one["label"]] for one in raw] == pytest.approx(shares, abs=1e-6)


def test_pairs_and_ranking(learn):
    rows = [{"text": "film", "pair": text, "label": 0.5 * i} for i, text in enumerate(TEXTS)]
    run, file = learn("regression", "rows.jsonl", rows, pair_column="pair")
    expected = [one["score"] for one in predict(run, file)]
    with running(run) as server:
        (answer,) = server.answer("/predict", inputs=["film", TEXTS[0]])
        assert "a pair, got 1 texts" in server.refusal("/predict", 422, inputs="film")
        ranked = server.answer("/rerank", query="film", texts=TEXTS, return_text=True)
    assert answer["score"] == pytest.approx(expected[0], abs=1e-6)
    order = sorted(range(len(TEXTS)), key=lambda number: -expected[number])
    assert [one["index"] for one in ranked] == order
    assert [one["text"] for one in ranked] == [TEXTS[number] for number in order]
    assert [one["score"] for one in ranked] == pytest.approx(
        [expected[number] for number in order], abs=1e-6
    )


def test_a_cross_encoder_from_elsewhere(elsewhere):
    directory, theirs, tokenizer = elsewhere("BertForSequenceClassification", num_labels=1)
    tokens = tokenizer(["good book"] * 4, TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**tokens).logits[:, 0]
    with running(directory) as server:
        raw = server.answer("/rerank", query="good book", texts=TEXTS, raw_scores=True)
        ranked = server.answer("/rerank", query="good book", texts=TEXTS)
        assert "reranker" in server.client.get("/info").json()["model_type"]
    for answer, scores in ((raw, logits), (ranked, logits.sigmoid())):
        assert "text" not in answer[0]
        assert [one["index"] for one in answer] == logits.argsort(descending=True).tolist()
        own = sorted(answer, key=lambda one: one["index"])
        np.testing.assert_allclose([one["score"] for one in own], scores, atol=1e-5)


def test_classes_of_a_checkpoint_from_elsewhere(elsewhere):
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    directory, theirs, tokenizer = elsewhere(
        "BertForSequenceClassification", id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    pipeline = transformers.pipeline("text-classification", theirs, tokenizer=tokenizer, top_k=None)
    with running(directory) as server:
        answers = server.answer("/predict", inputs=[[text] for text in TEXTS])
    for ours, expected in zip(answers, pipeline(TEXTS), strict=True):
        assert [one["label"] for one in ours] == [one["label"] for one in expected]
        scores = [one["score"] for one in expected]
        assert [one["score"] for one in ours] == pytest.approx(scores, abs=1e-5)


def test_entities_with_their_places_in_the_text(learn):
    conll = CONLL.replace(" ; ", "\n")
    words = [line.split()[0] for line in conll.splitlines() if line]
    run, file = learn("ner", "words.conll", conll, max_seq_len=12, stride=4)
    (said,) = predict(run, file)
    text = "  john lives\nin paris. mary was in new-berlin, yes "
    with running(run) as server:
        answer = server.answer("/predict", inputs=text)
        nothing = {"entities": [], "words": []}
        both = server.answer("/predict", inputs=[[text], [""]])
        assert is_alike(both, [answer, nothing])
        assert "truncate: not for ner" in server.refusal(
            "/predict", 422, inputs=text, truncate=True
        )
        assert "raw_scores: not for ner" in server.refusal(
            "/predict", 422, inputs=text, raw_scores=True
        )
        (chinese,) = {len(server.answer("/predict", inputs="北京,a b")["words"])}
        assert chinese == 5
    assert [one["word"] for one in answer["words"]] == said["words"] == words
    assert [one["label"] for one in answer["words"]] == said["labels"]
    for one in (*answer["words"], *answer["entities"]):
        assert text[one["start"] : one["end"]] == one["word"]
        assert 0 < one["score"] <= 1
    assert answer["entities"]
    found = [(one["entity_group"], one["word"].split()) for one in answer["entities"]]
    assert found == [(one["type"], one["words"]) for one in said["entities"]]


def test_answers_to_questions(learn):
    questions = [
        {
            "id": name,
            "question": f"where does {name} ?",
            "answers": [{"text": place, "answer_start": CONTEXT.index(place)}],
        }
        for name, place in (("john", "paris"), ("mary", "berlin"))
    ]
    paragraph = {"context": CONTEXT, "qas": questions}
    squad = {"version": "1.1", "data": [{"title": "", "paragraphs": [paragraph]}]}
    run, file = learn("qa", "squad.json", squad)
    said = predict(run, file)
    inputs = [{"question": one["question"], "context": CONTEXT} for one in questions]
    with running(run) as server:
        answers = server.answer("/predict", inputs=inputs)
        assert is_alike(server.answer("/predict", inputs=inputs[1]), answers[1])
        assert "question" in server.refusal("/predict", 422, inputs="john")
        no_token = server.refusal("/predict", 422, inputs=inputs[0] | {"context": " "})
        assert no_token == "input 0: the context ' ' has no token"
    for answer, own in zip(answers, said, strict=True):
        assert answer["answer"] == own["answer"] == CONTEXT[answer["start"] : answer["end"]]
        assert answer["score"] == pytest.approx(own["probability"], abs=1e-6)


def test_words_for_masks(model, tmp_path):
    directory = shutil.copytree(model, tmp_path / "masked")
    torch.manual_seed(1)
    fastbert.BertForPreTraining(fastbert.BertConfig.from_pretrained(model)).save_pretrained(
        directory
    )
    text = "the [MASK] was [MASK] ."
    expected = fill_mask(directory, text, top=3)
    with running(directory) as server:
        answer = server.answer("/fill-mask", inputs=text, top_k=3)
        both = server.answer("/fill-mask", inputs=["a [MASK]", text], top_k=3)
        assert is_alike(both[1], answer)
        assert "no [MASK] in the text" in server.refusal("/fill-mask", 422, inputs=["a"])
        long = "[MASK] " * 47
        assert "49 tokens, more than the 48" in server.refusal("/fill-mask", 413, inputs=long)
        assert "truncate" in server.refusal("/fill-mask", 422, inputs=text, truncate=True)
        many = ["[MASK] " * 40] * 200
        said = server.refusal("/fill-mask", 413, inputs=many, top_k=100)
        assert said.startswith("the answer would have 224,000,000 characters, more than 20,000,00")
        assert "cannot predict" in server.refusal("/predict", 424, inputs=text)
        assert len(server.answer("/embed", inputs="a")[0]) == 64
    for ours, theirs in zip(answer, expected, strict=True):
        assert [one["token_str"] for one in ours] == [one.word for one in theirs]
        assert [one["sequence"] for one in ours] == [one.text for one in theirs]
        scores = [one.probability for one in theirs]
        assert [one["score"] for one in ours] == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize(
    "kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering"]
)
def test_answers_of_a_random_head_are_refused(kind, model, tmp_path):
    directory = shutil.copytree(model, tmp_path / "bare")
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = [f"BertFor{kind}"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"no (classifier|qa_outp).*, which BertFor{kind} needs"):
        load(ServeConfig(model=str(directory)))


def test_a_masked_lm_without_its_head_embeds_and_fills_nothing(model, tmp_path):
    directory = shutil.copytree(model, tmp_path / "bare")
    config = json.loads((directory / "config.json").read_text())
    text = json.dumps(config | {"architectures": ["BertForMaskedLM"], "id2label": {1: "a", 2: "b"}})
    (directory / "config.json").write_text(text)
    assert load(ServeConfig(model=str(directory))).mask_filling is None
    with pytest.raises(InputError, match=r"no cls.*, which BertForMaskedLM needs; train it"):
        fill_mask(directory, "a [MASK]")


def test_tokens(server, model):
    text = "The film's 北京 zzz"
    (answer,) = server.answer("/tokenize", inputs=text)
    tokenizer = transformers.BertTokenizer.from_pretrained(model)
    assert [one["id"] for one in answer] == tokenizer(text).input_ids
    assert [one["special"] for one in answer] == [True] + [False] * (len(answer) - 2) + [True]
    for one in answer[1:-1]:
        assert text[one["start"] : one["stop"]] == one["text"]
    assert [one["text"] for one in answer][:3] == ["[CLS]", "The", "film"]
    (without,) = server.answer("/tokenize", inputs=[text], add_special_tokens=False)
    assert without == answer[1:-1]


def test_what_is_served_and_how_is_told(server, model):
    about = server.client.get("/info").json()
    assert about["model_id"] == str(model)
    assert about["model_type"] == {"embedding": {"pooling": "mean"}}
    assert about["max_input_length"] == 48
    assert server.client.get("/health").json() == {}
    assert server.client.get("/nothing").json()["error"] == "no such route: /nothing"
    assert server.client.get("/embed").status_code == 405
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/embed", "/rerank", "/predict", "/fill-mask", "/v1/embeddings"} <= paths.keys()
