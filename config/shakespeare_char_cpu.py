"""The baby GPT for a laptop, with the settings of nanoGPT's README: 0.8 M parameters, minutes on a CPU.

Its published validation loss is 1.88.
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
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1

eval_interval = 250
