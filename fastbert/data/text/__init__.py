"""Text: which files a corpus is, its documents, sentences and words, and the tokenizer."""
