"""What summarize.py is made of."""
