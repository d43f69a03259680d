"""Checkpoints of every kind → the model's parameters. A tensor goes one way through these rooms, down.

Where from (location, hub) → container (what files are made of) → family (a table: stored name → parameter) → numbers
of the type asked for. checkpoint.py joins them; weight_loader.py is the door.
"""
