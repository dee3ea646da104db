"""Readers of labelled examples and of texts: tables, CoNLL, SQuAD, lines of text."""
