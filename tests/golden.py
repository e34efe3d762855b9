"""Golden traces: four short training runs in float32, whose losses, gradient norms and weights must not change.

    python tests/golden.py record     write tests/golden.json from the present code
    python tests/golden.py            compare with it; exit status 1 if anything differs

Run it before and after a refactoring, on the same machine: the last digits depend on the processor and on torch.
Each run makes 20 updates with one resume after the tenth.
"""
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_suffix('.json')

COMMON = ['--dataset=golden', '--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=2', '--n_head=2',
          '--n_embd=32', '--block_size=32', '--batch_size=4', '--eval_interval=10', '--eval_iters=2',
          '--log_interval=1', '--seed=7', '--lr_decay_iters=20', '--max_iters=20', '--warmup_iters=3']
MUON = ['--optimizer=muon', '--pos=rope', '--norm=rmsnorm', '--mlp=relu2', '--qk_norm=True', '--tie_weights=False',
        '--smear=True', '--lr_schedule=wsd', '--cooldown_frac=0.8', '--context_warmup=0.6', '--muon_lr=0.015',
        '--muon_momentum=0.9', '--learning_rate=0.015', '--min_lr=0.0', '--gradient_accumulation_steps=1']
RECIPES = {
    'classic': (1, ['--gradient_accumulation_steps=2', '--learning_rate=1e-3', '--dropout=0.1', '--bias=True']),
    'muon': (1, MUON),
    'lora': (1, ['--gradient_accumulation_steps=2', '--learning_rate=1e-2', '--lora_rank=4']),
    'two ranks': (2, ['--gradient_accumulation_steps=4', '--learning_rate=1e-3', '--dropout=0.1']),
}


def write_data(folder):
    """A folder in nanoGPT's layout: random words, so that there is something to learn."""
    rng, words = np.random.default_rng(0), np.array(['to', 'be', 'or', 'not', 'that', 'is', 'the', 'question'])
    text = ' '.join(rng.choice(words, 4000))
    chars = sorted(set(text))
    ids = np.array([chars.index(c) for c in text], dtype='<u2')
    folder.mkdir(parents=True)
    ids[:-2000].tofile(folder / 'train.bin')
    ids[-2000:].tofile(folder / 'val.bin')
    meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


def run(cwd, ranks, *args):
    env = {**os.environ, 'OMP_NUM_THREADS': '1' if ranks > 1 else '2', 'OMP_WAIT_POLICY': 'PASSIVE'}
    start = [sys.executable]
    if ranks > 1:
        start += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    done = subprocess.run([*start, *args], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{" ".join(map(str, args))}\n{done.stdout}{done.stderr}')


def trace(cwd, name):
    """Train one recipe with a resume in between; return its losses, gradient norms and a hash of its weights."""
    ranks, flags = RECIPES[name]
    out = f'out-{name.replace(" ", "-")}'
    args = [REPO / 'train.py', *COMMON, *flags, f'--out_dir={out}']
    if name == 'lora':
        run(cwd, 1, REPO / 'train.py', *COMMON, '--gradient_accumulation_steps=1', '--bias=True', '--out_dir=out-base',
            '--max_iters=2')
        run(cwd, 1, REPO / 'export.py', '--out_dir=out-base', '--to=base')
        args.append('--init_from=base')
    run(cwd, ranks, *args, '--max_iters=10')
    run(cwd, ranks, *[a for a in args if a != '--init_from=base'], '--init_from=resume')
    log = [json.loads(line) for line in (cwd / out / 'log.jsonl').read_text().splitlines()]
    updates = [[r['iter'], r['loss'], r['grad_norm']] for r in log if 'iter' in r]
    assert [u[0] for u in updates] == list(range(20)), updates
    digest = hashlib.sha256()
    for key, tensor in sorted(torch.load(cwd / out / 'last.pt', weights_only=True)['model'].items()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    evaluations = [[r['step'], r['train_loss'], r['val_loss']] for r in log if 'step' in r]
    return {'updates': updates, 'evaluations': evaluations,
            'weights': digest.hexdigest()}


def main():
    with tempfile.TemporaryDirectory() as cwd:
        write_data(Path(cwd) / 'data' / 'golden')
        found = {name: trace(Path(cwd), name) for name in RECIPES}
    if sys.argv[1:] == ['record']:
        RECORD.write_text(json.dumps(found, indent=0) + '\n')
        return
    want, wrong = json.loads(RECORD.read_text()), 0
    for name in RECIPES:
        equal = found[name] == want[name]
        wrong += not equal
        first = next((i for i, (a, b) in enumerate(zip(found[name]['updates'], want[name]['updates'])) if a != b), None)
        print(f'{name}: {"equal to the last digit" if equal else f"DIFFERS, first at update {first}"}')
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
