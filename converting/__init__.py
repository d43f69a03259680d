"""A checkpoint → files for each rank, in TensorRT-LLM's format. convert_checkpoint.py is the door."""
