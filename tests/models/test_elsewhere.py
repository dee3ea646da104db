"""fastbert's own models in other people's loops: Trainer, and transformers' arguments."""

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastbert
from tests.versions import IS_V4

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "num_labels": 3,
}


def own(**options):
    torch.manual_seed(0)
    config = fastbert.BertConfig(**{**SHAPE, **options})
    return fastbert.BertForSequenceClassification(config)


def rows():
    torch.manual_seed(1)
    one = {"attention_mask": torch.ones(10, dtype=torch.long)}
    return [
        {**one, "input_ids": torch.randint(5, 99, (10,)), "labels": torch.tensor(number % 3)}
        for number in range(16)
    ]


def test_weights_are_drawn_as_hugging_face_does():
    words = own(vocab_size=999).get_input_embeddings().weight
    assert not words[0].any()  # of padding
    assert words[1:].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_evaluates_saves_and_goes_on(checkpointing, tmp_path):
    def trainer(model):
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=4,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
            seed=3,
        )
        return transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows())

    model = own(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    loop = trainer(model)
    loop.train()
    loss = loop.evaluate()["eval_loss"]
    again = own(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    other = trainer(again)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert model.is_gradient_checkpointing == checkpointing


def test_what_transformers_sets_on_a_configuration_is_kept_and_fields_are_not_changed():
    config = fastbert.BertConfig(**SHAPE)
    config.use_cache = False
    for one in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert one.use_cache is False
        assert one.to_dict()["use_cache"] is False
        assert one._commit_hash is None
        assert not hasattr(one, "hidden_sizes")
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"hidden_size.*replace"):
        config.hidden_size = 3


def test_every_so_many_layers_are_computed_again():
    model = own()
    model.gradient_checkpointing_enable(every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in model.bert.encoder.layer] == [
        True,
        False,
        True,
    ]
    for given, expected in ((None, False), ({"use_reentrant": True}, True)):
        model.gradient_checkpointing_enable(given)
        for layer in model.bert.encoder.layer:
            assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": expected}
    with pytest.raises(ValueError, match="every_n_layers of at least 1, got 0"):
        model.gradient_checkpointing_enable(every_n_layers=0)
    with pytest.raises(ValueError, match=r"offload=False, got True; use torch\.autograd\.graph"):
        model.gradient_checkpointing_enable(offload=True)


@pytest.fixture
def directory(tmp_path):
    own().bfloat16().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": torch.float64}, torch.float64),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
    ],
)
def test_from_pretrained_takes_a_dtype(option, dtype, directory):
    model = fastbert.BertForSequenceClassification.from_pretrained(directory, **option)
    assert model.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("device_map", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}, None])
def test_from_pretrained_takes_one_device(device_map, directory):
    model = fastbert.BertModel.from_pretrained(directory, device_map=device_map)
    expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert model.device.type == expected


def test_from_pretrained_takes_a_configuration(directory):
    for config in (
        fastbert.BertConfig(**SHAPE, hidden_act="relu"),
        transformers.BertConfig(**SHAPE, hidden_act="relu"),
    ):
        model = fastbert.BertModel.from_pretrained(
            directory, config=config, output_attentions=False
        )
        assert model.config.hidden_act == "relu"


def test_from_pretrained_reads_a_configuration_and_a_folder_inside(directory):
    (directory.parent / "other").mkdir(exist_ok=True)
    other = fastbert.BertConfig(**SHAPE, hidden_act="relu")
    other.save_pretrained(directory.parent / "other")
    model = fastbert.BertModel.from_pretrained(
        directory.parent, subfolder=directory.name, config=directory.parent / "other"
    )
    assert model.config.hidden_act == "relu"


@pytest.mark.parametrize(
    "option",
    [
        {"low_cpu_mem_usage": True, "use_safetensors": True, "weights_only": True},
        {"variant": None, "output_loading_info": False, "subfolder": None},
    ],
)
def test_options_that_ask_for_nothing_are_taken(option, directory):
    fastbert.BertModel.from_pretrained(directory, **option, add_pooling_layer=False)


def test_a_constructor_of_a_users_own_gets_all_other_options(directory):
    class Own(fastbert.BertModel):
        def __init__(self, config, **options):
            super().__init__(config)
            self.options = options

    model = Own.from_pretrained(directory, pools=False, margin=0.5, use_safetensors=True)
    assert model.options == {"pools": False, "margin": 0.5}


def test_options_of_a_download_are_the_hubs(monkeypatch, directory):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(directory.parent)

    monkeypatch.setattr("fastbert.checkpoint.snapshot_download", download)
    fastbert.BertModel.from_pretrained(
        "some/model", subfolder=directory.name, revision="v2", cache_dir="/somewhere"
    )
    assert f"{directory.name}/*.json" in asked["allow_patterns"]
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == (
        "some/model",
        "v2",
        "/somewhere",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int64"}, "dtype: expected a floating-point dtype"),
        ({"dtype": "half precision"}, "dtype: expected a floating-point dtype"),
        ({"device_map": {"bert": 0, "classifier": 1}}, "device_map: expected one device"),
        ({"attn_implementation": "eager"}, r"only options .*, got attn_implementation; leave it"),
        ({"output_loading_info": True}, "BertModel.from_pretrained: .*got output_loading_info"),
    ],
)
def test_from_pretrained_refuses(options, message, directory):
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel.from_pretrained(directory, **options)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", ".", "##s"]
LABELS = {
    "id2label": {0: "entailment", 1: "neutral", 2: "contradiction"},
    "label2id": {"entailment": 0, "neutral": 1, "contradiction": 2},
}


def numbers(found):
    """All numbers in what a pipeline gives, in order."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        return [number for one in found for number in numbers(one)]
    return [] if isinstance(found, str) or found is None else [float(found)]


@pytest.mark.parametrize(
    ("task", "head", "asked"),
    [
        ("fill-mask", "ForMaskedLM", (["the cat [MASK] on", "the [MASK]"],)),
        ("text-classification", "ForSequenceClassification", (["the cat", "mats on the mat ."],)),
        ("token-classification", "ForTokenClassification", (["the cat sat", "mats"],)),
        ("zero-shot-classification", "ForSequenceClassification", ("the cat sat", ["mat", "on"])),
        ("feature-extraction", "Model", (["the cat sat", "mats on"],)),  # of one length
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipelines_of_transformers_run_them(task, head, asked, batch_size, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE | LABELS | {"vocab_size": len(WORDS)})
    theirs = getattr(transformers, f"Bert{head}")(config).eval()
    theirs.save_pretrained(tmp_path)
    # what feature extraction reads by number it has made a plain dict of before
    options = {"return_dict": False} if task == "feature-extraction" else {}
    ours = getattr(fastbert, f"Bert{head}").from_pretrained(tmp_path, **options)
    expected, found = [], []
    for model, given in ((theirs, expected), (ours, found)):
        pipeline = transformers.pipeline(
            task, model=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu"
        )
        given += numbers(pipeline(*asked))
        assert "ipeline" in repr(pipeline)
    assert len(found) > 1
    assert found == pytest.approx(expected, abs=1e-4)


def masked_lm():
    torch.manual_seed(0)
    return fastbert.BertForMaskedLM(fastbert.BertConfig(**SHAPE))


def test_trainer_saves_a_model_whose_decoder_is_tied(tmp_path):
    batches = [{**row, "labels": row["input_ids"]} for row in rows()]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    model = masked_lm()
    transformers.Trainer(model, arguments, train_dataset=batches).train()
    directory = tmp_path / "checkpoint-2"
    model.config.save_pretrained(directory)
    again = fastbert.BertForMaskedLM.from_pretrained(directory)
    theirs = transformers.BertForMaskedLM.from_pretrained(directory)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert torch.equal(theirs.state_dict()[name], value)


def test_trainer_ends_with_a_checkpoint_that_the_model_itself_has_written(tmp_path):
    """Which has tied weights once."""

    class Saves(transformers.TrainerCallback):
        def on_save(self, args, state, control, model=None, **others):
            model.save_pretrained(tmp_path / f"checkpoint-{state.global_step}")

    batches = [{**row, "labels": row["input_ids"]} for row in rows()]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=1,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    loop = transformers.Trainer(
        masked_lm(), arguments, train_dataset=batches, eval_dataset=batches, callbacks=[Saves()]
    )
    loop.train()
    again = fastbert.BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-1")
    for name, value in loop.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_tensorboard_is_told_the_configuration_and_operations_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, report_to=["tensorboard"], use_cpu=True, disable_tqdm=True
    )
    loop = transformers.Trainer(own(), arguments, train_dataset=rows())
    loop.train()
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE))
    for options in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
        assert own().num_parameters(**options) == theirs.num_parameters(**options)
    words = sum(row["input_ids"].numel() for row in rows()[:8])
    # 4.57 asks for a method of transformers' own models, and counts nothing without it
    counted = 0 if IS_V4 else 6 * words * theirs.num_parameters(exclude_embeddings=True)
    assert loop.state.total_flos == counted


def test_a_hook_of_the_word_embeddings_sees_the_batch():
    """Trainer's neftune_noise_alpha sets one that reads three dimensions."""
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
    ours = fastbert.BertModel(fastbert.BertConfig(**SHAPE)).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(5, 99, (2, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    for model in (ours, theirs):
        model.get_input_embeddings().register_forward_hook(
            lambda module, ids, output: output + 1 / (output.size(1) * output.size(2))
        )
    found, expected = (model(ids, mask)[0][mask] for model in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_a_call_that_is_traced_or_exported_is_refused():
    ids, mask = torch.ones(2, 2, 7, dtype=torch.int64)
    for call in (
        lambda: torch.jit.trace(own().eval(), (ids, mask), strict=False),
        lambda: torch.export.export(own().eval(), (ids, mask), strict=False),
    ):
        with pytest.raises(ValueError, match=r"a call with values.*patched by fastbert\.patch"):
            call()


def test_a_state_has_hugging_faces_names_and_each_tensor_its_own_memory():
    model = masked_lm()
    state = model.state_dict()
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE)).state_dict()
    assert set(state) >= {name for name in theirs if "position_ids" not in name}
    memory = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(memory)) == len(memory)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is dict(model.named_parameters(remove_duplicate=False))[name]


def test_accelerate_trains_saves_and_goes_on(tmp_path):
    from accelerate import Accelerator

    batches = [{**row, "labels": row["input_ids"]} for row in rows()]

    def prepared(model):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = torch.utils.data.DataLoader(batches, batch_size=4)
        return accelerator, *accelerator.prepare(model, optimizer, loader)

    def train(accelerator, model, optimizer, loader):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()

    torch.manual_seed(0)
    one = prepared(masked_lm().train())
    train(*one)
    one[0].save_state(tmp_path / "state")
    one[0].save_model(one[1], tmp_path / "model")
    train(*one)
    two = prepared(masked_lm().train())
    two[0].load_state(tmp_path / "state")
    train(*two)
    for a, b in zip(one[1].parameters(), two[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "model" / "model.safetensors").exists()
    accelerator, model = two[:2]
    options = {"push_to_hub": False, "token": None}  # which ask for nothing
    options |= {"save_function": accelerator.save, "state_dict": accelerator.get_state_dict(model)}
    for is_main in (False, True):
        plain = accelerator.unwrap_model(model)
        plain.save_pretrained(tmp_path / "ours", is_main_process=is_main, **options)
        assert (tmp_path / "ours").exists() == is_main
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert names == dict(plain.named_parameters()).keys()  # tied ones once
    read = fastbert.BertForMaskedLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(read[name], x) for name, x in model.state_dict().items())
    for unknown in ({"safe_serialization": False}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match="save_pretrained: expected safetensors, and no other"):
            plain.save_pretrained(tmp_path / "other", **unknown)
