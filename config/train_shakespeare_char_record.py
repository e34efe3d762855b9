"""Characters of Shakespeare, the lowest loss measured here: twenty minutes by the clock on two CPU cores.

Prepare with `python data/shakespeare_char/prepare.py`.
"""
out_dir = 'out-shakespeare-char-record'
dataset = 'shakespeare_char'
wandb_project = 'shakespeare-char'
wandb_run_name = 'record'

gradient_accumulation_steps = 1
batch_size = 16
block_size = 256
n_layer = 4
n_head = 2
n_embd = 128
pos, norm, mlp, qk_norm, tie_weights, smear = 'rope', 'rmsnorm', 'relu2', True, False, True

optimizer, muon_lr, muon_momentum, learning_rate, min_lr, beta2 = 'muon', 0.01, 0.9, 0.006, 0.0, 0.99
weight_decay = 0.2  # the text is read some ten times
lr_schedule, cooldown_frac, warmup_iters, context_warmup = 'wsd', 1.0, 10, 0.2
max_iters = 3400  # two cores without bfloat16 made 3,250 to 4,250 of the twenty minutes
eval_interval = 250
eval_iters = 20
log_interval = 10

if device == 'cpu':
    max_minutes = 20.0
