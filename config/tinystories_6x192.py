"""Stories letter by letter: 6 layers of width 192 without biases, for comparing ways of quantization.

TinyStories needs the Hugging Face Hub; without it, --dataset=shakespeare_char trains the same model on the plays.
"""

dataset = "tinystories"
out_dir = "out-tinystories-6x192"

n_layer = 6
n_head = 6
n_embd = 192
block_size = 256
bias = False
dropout = 0.0

batch_size = 32
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1

eval_interval = 250
eval_iters = 20
