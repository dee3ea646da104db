"""BERT's parts as nn.Modules that run `fastbert.ops`, under Hugging Face's names."""
