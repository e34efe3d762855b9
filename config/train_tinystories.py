"""TinyStories by a model of 30 million parameters: prepare with `python data/tinystories/prepare.py`.

64 x 256 = 16,384 tokens an iteration; 20,000 iterations read two thirds of the stories once.
"""
out_dir = 'out-tinystories'
dataset = 'tinystories'
wandb_project = 'tinystories'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384  # 19.3 million of the parameters are the embedding
dropout = 0.0  # no story is read twice

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 500
max_iters = 20000
eval_interval = 1000
eval_iters = 100
log_interval = 10

if device == 'cpu':
    max_minutes = 10.0
    batch_size, block_size, n_layer, n_head, n_embd = 16, 128, 4, 2, 128
    eval_iters, eval_interval = 10, 250
    # what learned most in 90 seconds, tried on the last tenth of train.bin
    pos, mlp, qk_norm, tie_weights, softcap = 'rope', 'relu2', True, False, 15.0
    optimizer, muon_lr, learning_rate, min_lr = 'muon', 0.03, 6e-3, 0.0
    lr_schedule, cooldown_frac, warmup_iters = 'wsd', 0.8, 10
