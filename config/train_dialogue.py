"""A model that answers questions, from nothing: prepare with `python data/dialogue/prepare.py`.

Ten minutes on two CPU cores. Then `python sample.py --out_dir=out-dialogue --chat` to talk to it, and
`python data/dialogue/score.py` for its accuracy on combinations that it has never seen.
"""
out_dir = 'out-dialogue'
dataset = 'dialogue'
wandb_project = 'dialogue'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 16
block_size = 256  # the longest dialogue has 250 characters
n_layer = 4
n_head = 4  # answers copy words from several places of the question
n_embd = 128
dropout = 0.0

# by the clock, on any machine
max_minutes = 10.0
eval_interval = 500
eval_iters = 20
log_interval = 10

# the recipe of Shakespeare's characters on a CPU; without its short contexts, which would cut dialogues
pos, norm, mlp, qk_norm, tie_weights, smear = 'rope', 'rmsnorm', 'relu2', True, False, True
optimizer, muon_lr, muon_momentum, learning_rate, min_lr = 'muon', 0.015, 0.9, 0.015, 0.0
lr_schedule, cooldown_frac, warmup_iters = 'wsd', 0.8, 10
