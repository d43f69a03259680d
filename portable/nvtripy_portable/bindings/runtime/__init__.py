"""The runtime half: arrays, streams and compiled functions."""
