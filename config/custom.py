"""A text of your own, which data/custom/prepare.py has prepared: a model of a laptop's size, minutes on a CPU."""

dataset = "custom"
out_dir = "out-custom"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
dropout = 0.1  # short texts are soon known by heart

batch_size = 12
max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1

eval_interval = 250
threads = 1  # such small matrices gain nothing by more
