"""What tokenizer.py is made of: HuggingFace's tokenizer files, what they describe, and added tokens in a text."""
