"""Shakespeare in characters. Prepare the text with `python data/shakespeare_char/prepare.py`.

On an NVIDIA GPU this is nanoGPT's baby GPT. Elsewhere it is a smaller model that trains for three minutes.
With `--max_minutes=1` or less it is smaller still, with 10 or more it is larger, and with 30 or more larger again.
"""
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 64  # 64 x 256 = 16,384 tokens per update
block_size = 256  # context, in characters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # one megabyte is soon memorised

learning_rate = 1e-3  # small networks tolerate high rates
min_lr = 1e-4
beta2 = 0.99  # few tokens per update: average over more updates
warmup_iters = 100
max_iters = 5000
eval_interval = 250
eval_iters = 200
log_interval = 10

if not device.startswith('cuda'):  # a CPU or a Mac
    max_minutes = 3.0  # the schedule follows the clock, so a slow machine finishes too
    batch_size = 4  # 4 x 1,024 = 4,096 tokens: small updates, and many of them
    block_size = 1024  # the first characters of a context are the hardest, and long contexts have few of them
    window = 64  # enough for a model of this size, and cheaper in long contexts
    n_layer = 4
    n_head = 2
    n_embd = 128
    dropout = 0.0  # a few minutes are too short to memorise the text
    eval_interval = 250
    eval_iters = 4  # 4 x 4,096 = 16,384 tokens of each split
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

if not device.startswith('cuda') and max_minutes <= 1:
    n_embd = 96  # a smaller model reads more text in so little time

if not device.startswith('cuda') and max_minutes >= 10:
    n_embd = 192  # there is time for a larger model
    n_head = n_embd // 64  # heads of 64 channels, as in the smaller one
    muon_lr = 0.01  # it needs lower rates
    learning_rate = 0.006
    cooldown_frac = 1.0  # which fall from the beginning
    epoch_decay = 0.4  # and a larger model needs more decay
    context_warmup = 0.2

if not device.startswith('cuda') and max_minutes >= 30:
    n_embd = 256
    n_head = n_embd // 64
