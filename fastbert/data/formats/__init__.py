"""Readers of labelled examples and texts: tables, CoNLL, SQuAD, lines of text."""
