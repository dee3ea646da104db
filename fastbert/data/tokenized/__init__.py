"""A tokenised corpus: how it is built, its files, and the counts of its tokens and bigrams."""
