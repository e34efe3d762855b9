"""Characters of Water Margin: prepare with `python data/shuixu_char/prepare.py --input=shuihuzhuan.txt`.

On a GPU nanoGPT's baby GPT, whose validation loss is lowest within the first thousand iterations: ckpt.pt keeps that
model. On a CPU a smaller one, by the clock.
"""
out_dir = 'out-shuixu-char'
dataset = 'shuixu_char'
wandb_project = 'shuixu-char'
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
    batch_size, n_layer, n_head, n_embd, dropout = 16, 4, 2, 128, 0.0
    eval_iters, eval_interval = 4, 250
    # what learned most, tried on the last tenth of Shakespeare's and Water Margin's train.bin
    pos, norm, mlp, qk_norm, tie_weights, smear = 'rope', 'rmsnorm', 'relu2', True, False, True
    optimizer, muon_lr, muon_momentum, learning_rate, min_lr = 'muon', 0.015, 0.9, 0.015, 0.0
    lr_schedule, cooldown_frac, warmup_iters, context_warmup = 'wsd', 0.8, 10, 0.6
