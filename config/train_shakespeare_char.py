"""Characters of Shakespeare: prepare with `python data/shakespeare_char/prepare.py`.

On a GPU nanoGPT's baby GPT; on a CPU a smaller model with a longer context, three minutes by the clock.
"""
from lib.machine.device import native_bf16

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # a megabyte is soon learned by heart

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 5000
eval_interval = 250
eval_iters = 200
log_interval = 10

if device == 'cpu':
    max_minutes = 3.0
    # in float32 what learned most of Shakespeare in three minutes; with bfloat16 more tokens are read
    n_layer, n_embd = (4, 128) if native_bf16() else (3, 96)
    batch_size, n_head, dropout = 16, 2, 0.0
    eval_iters, eval_interval = 4, 250
    # what learned most, tried on the last tenth of Shakespeare's train.bin
    pos, norm, mlp, qk_norm, tie_weights, smear = 'rope', 'rmsnorm', 'relu2', True, False, True
    optimizer, muon_lr, muon_momentum, learning_rate, min_lr = 'muon', 0.015, 0.9, 0.015, 0.0
    lr_schedule, cooldown_frac, warmup_iters, context_warmup = 'wsd', 0.8, 10, 0.6
