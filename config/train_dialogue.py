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

max_minutes = 10.0  # on any machine
eval_interval = 500
eval_iters = 20
log_interval = 10

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
context_warmup = 0.0  # instead: short contexts would cut dialogues
