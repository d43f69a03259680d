"""What tokenizer.py is made of: HuggingFace's tokenizer files, and added tokens in a text."""
