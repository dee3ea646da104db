"""fastbert's own models in other people's training loops: Trainer's and Accelerate's."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastbert
from tests.models.elsewhere_case import SHAPE, masked_lm, own, rows
from tests.versions import IS_V4


def arguments(directory, **options):
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, **options}
    return transformers.TrainingArguments(directory, **options)


def rows_of_words():
    return [{**row, "labels": row["input_ids"]} for row in rows()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_evaluates_saves_and_goes_on(checkpointing, tmp_path):
    def trainer(model):
        options = arguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=4,
            save_steps=2,
            gradient_checkpointing=checkpointing,
            seed=3,
        )
        return transformers.Trainer(model, options, train_dataset=rows(), eval_dataset=rows())

    model = own(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    loop = trainer(model)
    loop.train()
    loss = loop.evaluate()["eval_loss"]
    again = own(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    other = trainer(again)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert model.is_gradient_checkpointing == checkpointing


def test_trainer_saves_a_model_whose_decoder_is_tied(tmp_path):
    model, options = masked_lm(), arguments(tmp_path, max_steps=2, save_steps=2)
    transformers.Trainer(model, options, train_dataset=rows_of_words()).train()
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

    batches = rows_of_words()
    options = arguments(
        tmp_path,
        max_steps=1,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    loop = transformers.Trainer(
        masked_lm(), options, train_dataset=batches, eval_dataset=batches, callbacks=[Saves()]
    )
    loop.train()
    again = fastbert.BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-1")
    for name, value in loop.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_tensorboard_is_told_the_configuration_and_operations_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    options = arguments(tmp_path, max_steps=1, report_to=["tensorboard"])
    loop = transformers.Trainer(own(), options, train_dataset=rows())
    loop.train()
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE))
    for options in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
        assert own().num_parameters(**options) == theirs.num_parameters(**options)
    words = sum(row["input_ids"].numel() for row in rows()[:8])
    # 4.57 asks for a method of transformers' own models, and counts nothing without it
    counted = 0 if IS_V4 else 6 * words * theirs.num_parameters(exclude_embeddings=True)
    assert loop.state.total_flos == counted


def test_accelerate_trains_saves_and_goes_on(tmp_path):
    from accelerate import Accelerator

    batches = rows_of_words()

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
