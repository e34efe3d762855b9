"""Evaluate OpenAI's GPT-2 with 124M parameters on OpenWebText: `python train.py config/eval_gpt2.py`.

nanoGPT's README gives 3.12 for the validation split; the printed loss, over the whole split, should come close. GPT-2
was trained on WebText, which was never released, so a model trained on OpenWebText itself reaches a lower loss.
"""
init_from = 'gpt2'
dataset = 'openwebtext'
eval_only = True  # print the losses and write nothing

batch_size = 8  # the logits take 4 GB in all; a smaller batch gives the same result
