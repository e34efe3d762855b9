"""Evaluate OpenAI's GPT-2 with 350M parameters on OpenWebText: `python train.py config/eval_gpt2_medium.py`.

nanoGPT's README gives 2.84 for the validation split; the printed loss, over the whole split, should come close. GPT-2
was trained on WebText, which was never released, so a model trained on OpenWebText itself reaches a lower loss.
"""
init_from = 'gpt2-medium'
dataset = 'openwebtext'
eval_only = True  # print the losses and write nothing

batch_size = 8  # the logits take 4 GB, the weights 1.4; a smaller batch gives the same result
