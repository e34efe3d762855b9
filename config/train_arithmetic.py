r"""Add, subtract, multiply and divide numbers up to 99. Prepare the problems with `python data/arithmetic/prepare.py`.

Then `python data/arithmetic/score.py` asks every held-out problem. To ask one:
`python sample.py --out_dir=out-arithmetic --start='\n12+34=' --stop='\n' --temperature=0 --num_samples=1`.
The same small model trains for twelve minutes on every machine.
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

max_minutes = 12.0  # the schedule follows the clock
eval_interval = 500
eval_iters = 20
log_interval = 10
always_save_checkpoint = True  # the operands are random, so the loss hardly shows which model calculates best

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

context_warmup = 0.0  # not in this config: a shorter context would cut the lines
