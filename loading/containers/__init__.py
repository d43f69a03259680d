"""What files are made of: each container gives named tensors from headers alone, and reads one when it is asked to."""
