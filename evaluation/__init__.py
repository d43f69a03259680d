"""What evaluate.py measures of a model, and how it shows it: one file for each."""
