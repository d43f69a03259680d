"""Many requests on one model: requests → a scheduler → pages → the batched decoder → pieces of text.

A request's tokens, text and log-probabilities are the same, bit for bit, whatever else is computed beside it.
"""
