"""Fine-tuning: reading, training, measuring and running a BERT with a task's head."""
