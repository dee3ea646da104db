"""Fine-tuning on labelled data, and what a fine-tuned model says of new text."""
