"""A GPT of its own for your Chinese text in GPT-2's BPE: put it at data/chinese/input.txt, then
`python data/chinese/prepare.py`. (config/finetune_chinese.py starts from GPT-2's weights instead.)
"""
out_dir = 'out-chinese'
dataset = 'chinese'
wandb_project = 'chinese'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 16
block_size = 512
n_layer = 8
n_head = 8
n_embd = 512
dropout = 0.1

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
