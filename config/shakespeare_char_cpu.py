"""The baby GPT for a laptop, in the shape of nanoGPT's README: 0.8 M parameters, minutes on a CPU.

nanoGPT reports a validation loss of 1.88 with a learning rate of 1e-3, an estimate from 20 random batches. Measured
over the whole validation text that rate ended at 1.909 here, and three times as large a one at 1.765.
"""

dataset = "shakespeare_char"
out_dir = "out-shakespeare-char-cpu"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False
dropout = 0.0

batch_size = 12
max_iters = 2000
learning_rate = 3e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1

eval_interval = 250
