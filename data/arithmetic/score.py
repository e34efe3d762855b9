"""Score a model on every held-out problem of data/arithmetic: the fraction of exact answers per operation.

    python data/arithmetic/score.py --out_dir=out-arithmetic
"""
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError, configure
from lib.machine import device as devices
from lib.text import data_folder
from lib.weights.load_model import load_model
from model import KVCache

out_dir = 'out-arithmetic'  # folder of the training run, relative to the working directory
device = 'auto'  # cpu | cuda | mps; the best available unless given
show = 5  # wrong answers to print


def truth(problem):
    """Return the correct answer to a problem such as '12+34='."""
    op = next(op for op in '+-*/' if op in problem)
    a, b = map(int, problem[:-1].split(op))
    if op == '/':
        return f'{a // b}' + (f'r{a % b}' if a % b else '')
    return str({'+': a + b, '-': a - b, '*': a * b}[op])


def held_out(tok):
    """Return the problems of the validation split, each as '\\n12+34=': a newline begins every line of the data."""
    path = data_folder.folder('arithmetic') / 'val.bin'
    if not path.exists():
        raise UserError(f'{path} not found. Run: python data/arithmetic/prepare.py')
    lines = tok.decode(np.fromfile(path, tok.dtype)).splitlines()
    return ['\n' + line[:line.index('=') + 1] for line in lines if line]


@torch.inference_mode()
def answers(model, tok, prompts, device):
    """Return the model's most likely continuation of each prompt, up to the end of the line.

    prompts: list of str of the same length, because they are one batch.
    """
    idx = torch.tensor([tok.encode(prompt) for prompt in prompts], device=device)  # (B, T)
    cache, rows, end = KVCache(model.config, len(prompts), device, model.dtype), [], tok.encode('\n')[0]
    for _ in range(model.config.block_size - idx.size(1)):
        logits, _ = model(idx, cache=cache)
        idx = logits[:, -1, :tok.vocab_size].argmax(-1, keepdim=True)  # (B, 1): the most likely token
        rows.append(idx)
        if len(rows) % 8 == 0 and (torch.cat(rows, 1) == end).any(1).all():
            break
    return [tok.decode(row).split('\n')[0] for row in torch.cat(rows, 1).cpu()]


def check(s):
    problem = devices.device_problem(s['device'])
    return [problem] if problem else []


def main(argv=None):
    settings = configure(globals(), argv, early={'device': devices.pick_device},
                         check=check)
    model, tok, _ = load_model('resume', out_dir)
    model = model.to(settings['device'])
    by_length = {}
    for prompt in held_out(tok):
        by_length.setdefault(len(prompt), []).append(prompt)
    right, asked, wrong = Counter(), Counter(), []
    for prompts in by_length.values():
        for prompt, answer in zip(prompts, answers(model, tok, prompts, settings['device']), strict=True):
            op = next(op for op in '+-*/' if op in prompt)
            asked[op] += 1
            expected = truth(prompt.strip())
            if answer.split('=')[-1] == expected:
                right[op] += 1
            else:
                wrong.append(f'{prompt.strip()}{answer}  (expected {expected})')
    for op in '+-*/':
        print(f'{op}  {right[op]:,} of {asked[op]:,} ({right[op] / max(1, asked[op]):.2%})')
    print('\n'.join(wrong[:show]))


if __name__ == '__main__':
    main()
