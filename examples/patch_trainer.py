"""Fine-tunes a Hugging Face classifier with Trainer; fastbert is the one line that patches it."""

import tempfile

import transformers

import fastbert

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "very", "good", "bad", "film"]
tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
texts = ["a good film", "a bad film", "a very good film", "a very very bad film"] * 16
rows = [{**tokenizer(text), "labels": int("good" in text)} for text in texts]

config = transformers.BertConfig(vocab_size=10, hidden_size=96, num_hidden_layers=2)
model = fastbert.patch(transformers.BertForSequenceClassification(config))
options = transformers.TrainingArguments(
    tempfile.mkdtemp(), learning_rate=1e-3, num_train_epochs=10, disable_tqdm=True
)
trainer = transformers.Trainer(model, options, train_dataset=rows, processing_class=tokenizer)
trainer.train()
assert trainer.evaluate(rows)["eval_loss"] < 0.5
