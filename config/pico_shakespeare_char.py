"""A very small one: 1.4 M parameters that spell Shakespeare."""

dataset = "shakespeare_char"
out_dir = "out-pico-shakespeare-char"

n_layer = 3
n_head = 4
n_embd = 192
block_size = 128
bias = False
dropout = 0.0

batch_size = 16
max_iters = 3000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1

eval_interval = 250
