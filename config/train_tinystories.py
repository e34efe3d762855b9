"""TinyStories by a model of 30 million parameters: prepare with `python data/tinystories/prepare.py`.

64 x 256 = 16,384 tokens an iteration; 20,000 iterations read two thirds of the stories once. Rotary positions, RMSNorm
and QK-norm as in recent models, AdamW as in GPT-2's; on a CPU Muon. Where this was written the stories could not be
fetched, so only a few updates were run, on stories made up in their format: no loss is promised, here or on a CPU.
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
pos, norm, qk_norm = 'rope', 'rmsnorm', True

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
    # as for Shakespeare's characters
    mlp, tie_weights, smear = 'relu2', False, True
    optimizer, muon_lr, muon_momentum, learning_rate, min_lr = 'muon', 0.015, 0.9, 0.015, 0.0
    lr_schedule, cooldown_frac, warmup_iters, context_warmup = 'wsd', 0.8, 10, 0.6
