"""Water Margin and its sequels in GPT-2's BPE: prepare with `python data/shuixu_full/prepare.py --input=FOLDER`.

8 layers, 8 heads, 768 wide, context 512 on a GPU; on a CPU a small model, by the clock: most of its numbers are the
embedding of 50,257 tokens, of which Chinese uses few (--tokenizer=bpe learns ones that fit).
"""
out_dir = 'out-shuixu-full'
dataset = 'shuixu_full'
wandb_project = 'shuixu-full'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 16
block_size = 512
n_layer = 8
n_head = 8
n_embd = 768
dropout = 0.2

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 100
max_iters = 5000
eval_interval = 250
eval_iters = 100
log_interval = 10

if device == 'cpu':
    max_minutes = 10.0
    batch_size, block_size, n_layer, n_head, n_embd, dropout = 16, 128, 4, 2, 128, 0.0
    eval_iters, eval_interval = 10, 250
    # an earlier recipe for Shakespeare's characters
    pos, mlp, qk_norm, tie_weights, softcap = 'rope', 'relu2', True, False, 15.0
    optimizer, muon_lr, learning_rate, min_lr = 'muon', 0.03, 6e-3, 0.0
    lr_schedule, cooldown_frac, warmup_iters = 'wsd', 0.8, 10
