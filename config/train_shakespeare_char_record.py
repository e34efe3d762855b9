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
pos, mlp, qk_norm, tie_weights, softcap, smear = 'rope', 'relu2', True, False, 15.0, True

optimizer, muon_lr, muon_momentum, learning_rate, min_lr, beta2 = 'muon', 0.025, 0.9, 0.012, 0.0, 0.99
lr_schedule, cooldown_frac, warmup_iters, context_warmup = 'wsd', 0.8, 10, 0.6
max_iters = 6000  # two cores made between 5,750 and 6,000, more of them with short contexts
eval_interval = 250
eval_iters = 20
log_interval = 10

if device == 'cpu':
    max_minutes = 20.0
