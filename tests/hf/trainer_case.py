"""A short run of Hugging Face's Trainer, over sentences that a classifier can learn."""

import torch
import transformers

from tests.hf.training_case import SHAPE, gradients


class Sentences(torch.utils.data.Dataset):
    """Ids that a classifier can learn: the second token tells the label."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(4, 16, (), generator=generator))
        ids = torch.randint(10, SHAPE["vocab_size"], (length,), generator=generator)
        ids[1] = 5 + index % 3
        return {
            "input_ids": ids.tolist(),
            "token_type_ids": [index % 2] * length,
            "attention_mask": [1] * length,
            "labels": index % 3,
            "text": "a column that no model takes",
        }


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in rows])
        for name in rows[0].keys() - {"labels"}
    }
    return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


class Gradients(transformers.TrainerCallback):
    """Keeps the gradients of the first optimizer step, and the loss of each."""

    def __init__(self):
        self.first, self.losses = None, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.first = self.first or gradients(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [float(logs["loss"])] if "loss" in logs else []


def train(model, folder, dataset=None, collator=collate, **options):
    """Two optimizer steps of 8 sequences unless told otherwise: (trainer, Gradients)."""
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "max_steps": 2,
            "max_grad_norm": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        | options
    )
    seen = Gradients()
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=dataset or Sentences(),
        eval_dataset=Sentences(),
        data_collator=collator,
        compute_metrics=accuracy,
        callbacks=[seen],
    )
    trainer.train()
    return trainer, seen


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}
