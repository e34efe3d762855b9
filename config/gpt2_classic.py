"""GPT-2's architecture, AdamW and the cosine schedule with nanoGPT's learning rates. Put it after any other config:
`python train.py config/train_shakespeare_char.py config/gpt2_classic.py`.
"""
pos = 'learned'
norm = 'layernorm'
mlp = 'gelu'
qk_norm = False
tie_weights = True
softcap = 0.0
smear = False
if window:  # attention to all positions takes long in long contexts: shorter ones, as many tokens per update
    block_size = block_size // 4
    batch_size = 4 * batch_size
window = 0

optimizer = 'adamw'
learning_rate = 6e-4
min_lr = 6e-5
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
epoch_decay = 0.0
grad_clip = 1.0
decay_lr = True
lr_schedule = 'cosine'
warmup_iters = 2000
context_warmup = 0.0

if n_embd < 768:  # a small network, as in nanoGPT's config for Shakespeare
    learning_rate = 1e-3  # small networks tolerate high rates
    min_lr = 1e-4
    beta2 = 0.99  # few tokens per update: average over more updates
    warmup_iters = 100
