"""The parts of BERT, as nn.Modules over `fastbert.ops`, under Hugging Face's names."""
