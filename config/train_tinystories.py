"""TinyStories with a model of 30 million parameters. Prepare them with `python data/tinystories/prepare.py`.

20,000 updates of 16,384 tokens read two thirds of the stories once. Rotary positions, RMSNorm and QK-norm as in recent
models, and AdamW as for GPT-2. Without an NVIDIA GPU a small model trains for ten minutes.

This config has only been run for a few updates, on invented stories in the same format, because the stories could not
be downloaded where it was written. So there is no loss to compare with.
"""
out_dir = 'out-tinystories'
dataset = 'tinystories'
wandb_project = 'tinystories'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 64  # 64 x 256 = 16,384 tokens per update
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384  # 19.3 million of the parameters are the embedding
dropout = 0.0  # no story is read twice
pos = 'rope'
norm = 'rmsnorm'
qk_norm = True

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 500
max_iters = 20000
eval_interval = 1000
eval_iters = 100
log_interval = 10

if not device.startswith('cuda'):  # a CPU or a Mac
    max_minutes = 10.0  # the schedule follows the clock, so a slow machine finishes too
    batch_size = 16  # small updates, and many of them
    block_size = 128
    n_layer = 4
    n_head = 2
    n_embd = 128
    eval_interval = 250
    eval_iters = 10  # 10 x 2,048 = 20,480 tokens of each split
    # The recipe for small models without a GPU; each config that uses it has the same lines, and a test compares them.
    # Tuned on a held-out tenth of two training texts. docs/experiments.md says what each choice is worth.
    pos = 'rope'  # rotary positions instead of a learned table
    norm = 'rmsnorm'  # cheaper than LayerNorm
    mlp = 'relu2'  # squared ReLU
    qk_norm = True  # bounds the attention logits, so the learning rate can be high
    tie_weights = False  # the output head has its own weights
    smear = True  # adds part of the previous token's embedding to each token's
    optimizer = 'muon'  # for the matrices of the blocks; AdamW trains the rest
    muon_lr = 0.015
    muon_momentum = 0.9  # runs of some hundred updates learn more with it than with 0.95
    learning_rate = 0.015  # AdamW's peak, for embeddings, head and norms
    min_lr = 0.0  # most is learned while the rate falls, so it falls to zero
    beta2 = 0.99  # few tokens per update: average over more updates
    lr_schedule = 'wsd'  # constant, then a linear decay
    cooldown_frac = 0.8  # the last fraction of the schedule, in which the rate decays
    warmup_iters = 10
    epoch_decay = 0.2  # the more often a text is read, the more weight decay
    context_warmup = 0.6  # short contexts first: more updates in the same time
