"""One model on several processes: which rank holds what of it (tensor parallelism times pipeline parallelism)."""
