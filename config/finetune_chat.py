"""Teach a trained model to answer: GPT-2 by default, or any run of yours.

    python data/text/prepare.py --input=rows.jsonl --tokenizer=gpt2 --name=chat
    python train.py config/finetune_chat.py
    python sample.py --out_dir=out-chat --chat

For your model prepare the rows with its tokenizer, --tokenizer=out-mytext, and train with
--init_from=out-mytext. Rows are {"messages": [...]}, {"prompt", "completion"}, or any two keys: see data/README.md.
"""
out_dir = 'out-chat'
dataset = 'chat'
wandb_project = 'chat'
wandb_run_name = 'finetune'

init_from = 'gpt2'
dropout = 0.1  # rows are few, and are read several times

# 4 x 8 = 32 dialogues per iteration, each cut after 512 tokens
block_size = 512
batch_size = 4
gradient_accumulation_steps = 8
max_iters = 1000
eval_interval = 50
eval_iters = 20
patience = 5
log_interval = 10

learning_rate = 5e-5  # low, so that it keeps what it learned from text; ten times as much for a model of a few million
warmup_iters = 50

if not device.startswith('cuda'):  # a fifth of the updates, each an eighth as long
    block_size = 128
    gradient_accumulation_steps = 4
    max_iters = 200
