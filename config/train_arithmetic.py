r"""Adding, subtracting, multiplying and dividing numbers up to 99: `python data/arithmetic/prepare.py` first.

Then `python data/arithmetic/score.py` asks every held-out problem, and
`python sample.py --out_dir=out-arithmetic --start=$'\n12+34=' --stop=$'\n' --temperature=0 --num_samples=1` one.
"""
out_dir = 'out-arithmetic'
dataset = 'arithmetic'
wandb_project = 'arithmetic'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 64
block_size = 96  # the longest line has 87 characters
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

# by the clock, on any machine
max_minutes = 12.0
eval_interval = 500
eval_iters = 20
log_interval = 10
always_save_checkpoint = True  # the operands cannot be foreseen, so the loss hardly tells which model calculates best

# an earlier recipe for Shakespeare's characters
pos, mlp, qk_norm, tie_weights, softcap = 'rope', 'relu2', True, False, 15.0
optimizer, muon_lr, learning_rate, min_lr = 'muon', 0.03, 6e-3, 0.0
lr_schedule, cooldown_frac, warmup_iters = 'wsd', 0.8, 10
