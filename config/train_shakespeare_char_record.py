"""Shakespeare in characters in twenty minutes on two CPU cores.

Prepare the text with `python data/shakespeare_char/prepare.py`. It is config/train_shakespeare_char.py with a wider
model, lower rates and more weight decay, because the text is read many times. Its loss has not been measured yet.
"""
out_dir = 'out-shakespeare-char-record'
dataset = 'shakespeare_char'
wandb_project = 'shakespeare-char'
wandb_run_name = 'record'

gradient_accumulation_steps = 1
batch_size = 4
block_size = 1024
window = 64
n_layer = 4
n_head = 3
n_embd = 192
pos = 'rope'
norm = 'rmsnorm'
mlp = 'relu2'
qk_norm = True
tie_weights = False
smear = True

optimizer = 'muon'
muon_lr = 0.01
muon_momentum = 0.9
learning_rate = 0.006
min_lr = 0.0
beta2 = 0.99
epoch_decay = 0.2  # the more often a text is read, the more weight decay
lr_schedule = 'wsd'
cooldown_frac = 1.0  # the rate decays from the beginning
warmup_iters = 10
context_warmup = 0.2
max_iters = 5000  # on an NVIDIA GPU; elsewhere the run ends after max_minutes
eval_interval = 250
eval_iters = 20
log_interval = 10

if not device.startswith('cuda'):  # a CPU or a Mac
    max_minutes = 20.0  # the schedule follows the clock
