"""Fine-tuning: reads examples, then trains, measures and runs BERT with a task's head."""
