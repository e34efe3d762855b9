"""How well OpenAI's GPT-2 with 124M parameters predicts OpenWebText: `python train.py config/eval_gpt2.py`.

nanoGPT published 3.12 for the validation split; the last line here, over the whole of it, should come close. GPT-2 was
trained on WebText, which was never released, so a model trained on OpenWebText itself ends lower.
"""
init_from = 'gpt2'
dataset = 'openwebtext'
eval_only = True  # print the losses, write nothing

batch_size = 8  # the logits take 10 bytes x 50257 x 1024 each, 4 GB together; fewer change no result
