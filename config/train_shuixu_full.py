"""Water Margin and its sequels in GPT-2's BPE. Prepare them with `python data/shuixu_full/prepare.py`.

The WHY42 tutorial trains two sizes. This file is the larger one. The first one is nanoGPT's baby GPT:

    python train.py config/train_shuixu_full.py --batch_size=64 --block_size=256 --n_layer=6 --n_head=6 --n_embd=384

Without an NVIDIA GPU a small model trains for ten minutes. Most of its parameters embed the 50,257 tokens, of which
Chinese text uses few; `--tokenizer=bpe` in prepare learns tokens that fit the text.
"""
out_dir = 'out-shuixu-full'
dataset = 'shuixu_full'
wandb_project = 'shuixu-full'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 16  # 16 x 512 = 8,192 tokens per update
block_size = 512
n_layer = 8
n_head = 8
n_embd = 768
dropout = 0.2

learning_rate = 6e-4  # GPT-2's for this width
min_lr = 6e-5
warmup_iters = 100
max_iters = 5000
eval_interval = 250
eval_iters = 100
log_interval = 10

if not device.startswith('cuda'):  # a CPU or a Mac
    max_minutes = 10.0  # the schedule follows the clock, so a slow machine finishes too
    batch_size = 16  # small updates, and many of them
    block_size = 128
    n_layer = 4
    n_head = 2
    n_embd = 128
    dropout = 0.0  # a few minutes are too short to memorise the text
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
