"""A scaling law measured on tiny Shakespeare's characters with sweep.py: three numbers of FLOPs, five sizes.

    python data/shakespeare_char/prepare.py
    python sweep.py config/law_tinyshakespeare.py --n_embd=32,48,64,96,128 --flops=5e11,1.5e12,4.5e12 --law

--flops sets max_iters, so that all sizes compute the same amount. Together the runs are 3.3e13 FLOPs, which took one
core eleven minutes (docs/results.md). The size is --n_embd; give it for a single run of train.py, too.
"""
out_dir = 'out-law'
dataset = 'shakespeare_char'

# only n_embd varies; depth, context and the size of a head are the same for all
n_layer = 4
n_head = n_embd // 16  # heads of 16 channels fit all five widths
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
dropout = 0.0
bias = False

# the architecture and the rates of config/train_shakespeare_char.py on a CPU, without its window and epoch_decay
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
