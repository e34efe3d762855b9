"""How well OpenAI's GPT-2 with 1558M parameters predicts OpenWebText: `python train.py config/eval_gpt2_xl.py`.

nanoGPT published 2.54 for the validation split; the last line here, over the whole of it, should come close. GPT-2 was
trained on WebText, which was never released, so a model trained on OpenWebText itself ends lower.
"""
init_from = 'gpt2-xl'
dataset = 'openwebtext'
eval_only = True  # print the losses, write nothing

batch_size = 4  # the logits take 2 GB, the weights 6.2; fewer change no result
