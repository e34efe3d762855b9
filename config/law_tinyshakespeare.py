"""A scaling law of your own on tiny Shakespeare's characters, by sweep.py: three numbers of FLOPs, five sizes.

    python data/shakespeare_char/prepare.py
    python sweep.py config/law_tinyshakespeare.py --n_embd=32,48,64,96,128 --flops=2e12,6e12,1.8e13 --law --jobs=2

--flops sets max_iters of each run, so that all sizes compute equally long. Together they are 1.3e14 FLOPs: less than 45
minutes on two cores that train at 50 GFLOP/s. Give --n_embd even for a single run of train.py.
"""
out_dir = 'out-law'
dataset = 'shakespeare_char'

# the size is --n_embd alone: depth, context and the size of a head stay
n_layer = 4
n_head = n_embd // 16  # heads of 16 channels fit all five widths
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
dropout = 0.0  # a law is about models that do not memorise; see the epochs that plan.py prints
bias = False

# the architecture and optimizer of config/train_shakespeare_char.py on a CPU
pos = 'rope'
norm = 'rmsnorm'
mlp = 'relu2'
qk_norm = True
tie_weights = False
smear = True
optimizer = 'muon'
muon_lr = 0.015
muon_momentum = 0.9
learning_rate = 0.015
min_lr = 0.0
lr_schedule = 'wsd'  # the rate reaches zero at the end of each run, or the losses would not compare
cooldown_frac = 0.8
warmup_iters = 10

eval_interval = 1000
eval_iters = 4
log_interval = 20
