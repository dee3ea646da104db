"""Text: the files of a corpus, its documents, sentences and words, and the tokenizer."""
