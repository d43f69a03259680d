"""nanoGPT's baby GPT: 10.6 M parameters that spell Shakespeare; minutes on a GPU.

Its published validation loss is 1.4697. Measured there on random windows of the same text, with the exact GELU.
"""

dataset = "shakespeare_char"
out_dir = "out-shakespeare-char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
bias = False
dropout = 0.2
attn_dropout = 0.2

batch_size = 64
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1

eval_interval = 250  # it overfits: the best weights are not the last ones
