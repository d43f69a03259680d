"""The experiment behind checkpoints/shakespeare: 3.6 M parameters, 1 MB of plays, an hour on two CPU cores."""

dataset = "shakespeare_bpe"
out_dir = "out-shakespeare-bpe"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 512

# About 20 passes over the text: few enough that half of nanoGPT's usual dropout is enough beside BPE-dropout.
dropout = 0.1
bpe_dropout = 0.1

# Small steps, many of them: on a CPU a larger batch makes no token cheaper.
batch_size = 4
short_block_size = 128
short_share = 0.7
max_iters = 4500
learning_rate = 1.2e-3
min_lr = 5e-5
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
ema_decay = 0.997

eval_interval = 300
