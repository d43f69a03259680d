"""What is added to a model without changing it: files of adapters → what the engine takes."""
