"""Score a model on every held-out problem of data/arithmetic: exact answers, by operation.

    python data/arithmetic/score.py --out_dir=out-arithmetic
"""
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError, configure
from lib.machine.device import device_problem, pick_device
from lib.text import dataset
from lib.weights.load_model import load_model
from model import KVCache

out_dir = 'out-arithmetic'  # folder of the training run, relative to the working directory
device = 'auto'  # cpu | cuda | mps; the best there is unless given
show = 5  # wrong answers to print


def truth(problem):
    """Return the answer to '12+34=' and its like."""
    op = next(op for op in '+-*/' if op in problem)
    a, b = map(int, problem[:-1].split(op))
    if op == '/':
        return f'{a // b}' + (f'r{a % b}' if a % b else '')
    return str({'+': a + b, '-': a - b, '*': a * b}[op])


def held_out(tok):
    """Return the problems of the validation split, each behind the newline that begins a line."""
    path = dataset.folder('arithmetic') / 'val.bin'
    if not path.exists():
        raise UserError(f'{path} not found. Run: python data/arithmetic/prepare.py')
    lines = tok.decode(np.fromfile(path, tok.dtype)).splitlines()
    return ['\n' + line[:line.index('=') + 1] for line in lines if line]


@torch.inference_mode()
def answers(model, tok, prompts, device):
    """Return how the model goes on after each of the prompts, which are of one length, up to the end of the line."""
    idx = torch.tensor([tok.encode(prompt) for prompt in prompts], device=device)  # (B, T)
    cache, rows, end = KVCache(model.config, len(prompts), device, model.dtype), [], tok.encode('\n')[0]
    for _ in range(model.config.block_size - idx.size(1)):
        logits, _ = model(idx, cache=cache)
        idx = logits[:, -1, :tok.vocab_size].argmax(-1, keepdim=True)  # (B, 1): the likeliest
        rows.append(idx)
        if len(rows) % 8 == 0 and (torch.cat(rows, 1) == end).any(1).all():
            break
    return [tok.decode(row).split('\n')[0] for row in torch.cat(rows, 1).cpu()]


def main(argv=None):
    settings = configure(globals(), argv, early={'device': pick_device},
                         check=lambda s: list(filter(None, [device_problem(s['device'])])))
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
            right[op] += (fine := answer.split('=')[-1] == truth(prompt.strip()))
            wrong += [f'{prompt.strip()}{answer}  (expected {truth(prompt.strip())})'] * (not fine)
    for op in '+-*/':
        print(f'{op}  {right[op]:,} of {asked[op]:,} ({right[op] / max(1, asked[op]):.2%})')
    print('\n'.join(wrong[:show]))


if __name__ == '__main__':
    main()
