"""Fine-tune GPT-2 on Chuck Norris facts so that it invents facts instead of memorising them.

Prepare them with `python data/chucknorris/prepare.py`. Compared with config/finetune_chuck_norris.py, this recipe has
a quarter of the tokens per update, dropout, a learning rate that decays, and early stopping. The number to beat is the
tutorial's validation loss, 3.3339. This config has not been measured: GPT-2's weights could not be downloaded where it
was written.
"""
out_dir = 'out-chuck-norris'
dataset = 'chucknorris'
wandb_project = 'chuck-norris'
wandb_run_name = 'better'

init_from = 'gpt2-medium'
dropout = 0.1  # 1,500 facts are soon memorised

# a fact is one line, so 256 tokens hold several: 8 x 256 x 4 = 8,192 tokens per update
block_size = 256
batch_size = 8
gradient_accumulation_steps = 4
max_iters = 100
eval_interval = 5  # the best model comes early, and only that one is kept in ckpt.pt
eval_iters = 10
patience = 4  # stop after four evaluations without a better one
log_interval = 1

learning_rate = 3e-5
warmup_iters = 5

if not device.startswith('cuda'):  # a CPU or a Mac: the smallest GPT-2, on short windows
    init_from = 'gpt2'
    block_size = 128
    batch_size = 4
    max_iters = 60
