"""Put after any other config: GPT-2's architecture, AdamW and the cosine schedule, with nanoGPT's rates."""
pos, norm, mlp = 'learned', 'layernorm', 'gelu'
qk_norm, tie_weights, softcap, smear = False, True, 0.0, False
optimizer, beta1, weight_decay, grad_clip = 'adamw', 0.9, 0.1, 1.0
lr_schedule, decay_lr, context_warmup = 'cosine', True, 0.0
_small = n_embd < 768
learning_rate = 1e-3 if _small else 6e-4  # small networks bear more
min_lr = learning_rate / 10
beta2 = 0.99 if _small else 0.95  # few tokens an iteration: average over more of them
warmup_iters = 100 if _small else 2000
