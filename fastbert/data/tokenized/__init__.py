"""A tokenised corpus: building it, its files, and the counts of its tokens and bigrams."""
