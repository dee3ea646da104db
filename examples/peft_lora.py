"""Trains a LoRA adapter on a patched model, and loads it onto the unpatched one."""

import tempfile

import peft
import torch
import transformers

import fastbert

config = transformers.BertConfig(hidden_size=96, num_hidden_layers=2)
base = transformers.BertForSequenceClassification(config)
base.save_pretrained(folder := tempfile.mkdtemp())
lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
model = peft.get_peft_model(fastbert.patch(base), lora)
input_ids, labels = torch.randint(1000, 30000, (8, 16)), torch.arange(8) % 2
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(10):
    model(input_ids, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.save_pretrained(f"{folder}/adapter")
unpatched = transformers.BertForSequenceClassification.from_pretrained(folder)
loaded = peft.PeftModel.from_pretrained(unpatched, f"{folder}/adapter").eval()
expected = model.eval()(input_ids).logits
torch.testing.assert_close(loaded(input_ids).logits, expected, rtol=1e-4, atol=1e-5)
