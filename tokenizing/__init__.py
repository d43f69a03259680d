"""What tokenizer.py is made of: where a tokenizer comes from, what that describes, and what encodes as described."""
