"""Train on data/dialogue with and without the loss mask, from nothing and from text, and score what was held out.

    python benchmarks/dialogue.py                      three seeds of each; two hours
    python benchmarks/dialogue.py --variants=mask --seeds=1338 --updates=400

    mask            config/train_dialogue.py
    no-mask         the same windows, but every token is a target, questions and marks too
    text            half of the updates on text, then half on dialogues with the mask, from that model
    text-no-mask    the second half without the mask

Runs are counted in updates, so that the speed of the machine does not change them. The text is the source of Python's
standard library, without the characters that the dialogues do not have, so that one tokenizer serves both. Everything
is written to data/dialogue_* and --out_dir; a run that is there is not repeated. Prints a table in Markdown: accuracy
on held-out combinations by task and language, mean and range of the seeds.
"""
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import REPO, configure
from lib.text import data_folder, tokenizer

VARIANTS = ('mask', 'no-mask', 'text', 'text-no-mask')

variants = ','.join(VARIANTS)  # with commas between
seeds = '1337,1338,1339'  # with commas between
updates = 1800  # per run; config/train_dialogue.py makes twice as many in ten minutes of two fast cores
out_dir = 'out-dialogue-benchmark'  # folder for the runs
flags = ''  # more flags for train.py, separated by spaces


def check(s):
    """Return a list of errors in the Settings `s`."""
    unknown = set(s['variants'].split(',')) - set(VARIANTS)
    return [f'variants={s["variants"]}: expected some of {", ".join(VARIANTS)}'] if unknown else []


def python(*args):
    """Run a script of the repository and return what it printed; its errors go to the terminal."""
    print('$ python', *args, flush=True)
    return subprocess.run([sys.executable, REPO / args[0], *args[1:]], check=True, stdout=subprocess.PIPE,
                          encoding='utf-8').stdout


def without_mask(source, target):
    """Copy a dataset of dialogues to folder `target` with every token as a target, but for those between dialogues."""
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns('*.py', 'input*'))
    meta = json.loads((source / 'meta.json').read_text(encoding='utf-8'))
    for split, facts in meta['splits'].items():
        ids, mask = np.fromfile(source / f'{split}.bin', meta['dtype']), np.fromfile(source / f'{split}.mask', np.uint8)
        newline = tokenizer.from_spec(meta['tokenizer']).encode('\n')[0]
        between = np.append(False, (mask[1:] == 0) & (mask[:-1] == 1)) & (ids == newline)
        mask = (~between).astype(np.uint8)
        mask.tofile(target / f'{split}.mask')
        facts.update(mask_sha256=hashlib.sha256(mask.tobytes()).hexdigest(), answer_bytes=facts['n_bytes'])
    del meta['sha256']
    meta['sha256'] = data_folder.digest(meta)
    (target / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')


def prepare():
    """Prepare the datasets that the variants need."""
    dialogue = REPO / 'data' / 'dialogue'
    if not (dialogue / 'meta.json').exists():
        python('data/dialogue/prepare.py')
    without_mask(dialogue, REPO / 'data' / 'dialogue_no_mask')
    if 'text' in variants and not (REPO / 'data' / 'dialogue_text' / 'meta.json').exists():
        library = REPO / 'data' / 'python_char'
        if not (library / 'meta.json').exists():
            python('data/python_char/prepare.py')
        chars = data_folder.tokenizer_spec(dialogue)['chars']
        coder = tokenizer.from_spec(data_folder.tokenizer_spec(library))
        text = coder.decode(np.fromfile(library / 'train.bin', coder.dtype))
        text = re.sub(f'[^{re.escape(chars)}]', '', text)
        Path(out_dir).mkdir(exist_ok=True)
        (Path(out_dir) / 'dialogue_text.txt').write_text(text, encoding='utf-8')
        python('data/text/prepare.py', f'--input={out_dir}/dialogue_text.txt', '--name=dialogue_text',
               '--tokenizer=data/dialogue')


def run(out, dataset, seed, count, *more):
    """Train a run of `count` updates unless it is there."""
    if not Path(out, 'done').exists():
        python('train.py', 'config/train_dialogue.py', '--device=cpu', f'--seed={seed}', f'--dataset={dataset}',
               f'--max_iters={count}', f'--out_dir={out}', *more, *flags.split())
        Path(out, 'done').touch()


def train(variant, seed):
    """Train one run unless it is there; return {kind of question: accuracy}."""
    out = f'{out_dir}/{variant}-{seed}'
    dataset = 'dialogue_no_mask' if variant.endswith('no-mask') else 'dialogue'
    if variant.startswith('text'):
        before = f'{out_dir}/before-{seed}'
        run(before, 'dialogue_text', seed, updates // 2)
        run(out, dataset, seed, updates // 2, f'--init_from={before}')
    else:
        run(out, dataset, seed, updates)
    lines = python('data/dialogue/score.py', f'--out_dir={out}', '--device=cpu', '--show=0').splitlines()
    found = [re.fullmatch(r'(.+?)  ([\d,]+) of ([\d,]+) \(.*', line) for line in lines]
    return {m[1]: int(m[2].replace(',', '')) / int(m[3].replace(',', '')) for m in found if m}


def main(argv=None):
    configure(globals(), argv, check=check)
    prepare()
    names = variants.split(',')
    scores = {name: [train(name, seed) for seed in seeds.split(',')] for name in names}
    print(f'\n| question | {" | ".join(names)} |\n|---|{"---|" * len(names)}')
    for kind in scores[names[0]][0]:
        values = [[score[kind] for score in scores[name]] for name in names]
        cells = (f'{np.mean(v):.1%} ({min(v):.1%} to {max(v):.1%})' for v in values)
        print(f'| {kind} | {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
