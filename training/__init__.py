"""A text → batches → a HuggingFace folder: what train.py and data/*/prepare.py are made of."""
