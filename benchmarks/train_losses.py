"""Measure training runs: whole commands, seed by seed, in turns with nanoGPT's; the same evaluation for both.

    python benchmarks/train_losses.py --name=cpu-recipe --dataset=shakespeare_char
        --ours="config/train_shakespeare_char.py
        --device=cpu" --vs=../nanoGPT --text=tinyshakespeare.txt --theirs="config/train_shakespeare_char.py ..."

The loss is that of the checkpoint which the program itself keeps, over the whole validation split, in float32, by our
evaluate.py. The time is that of the whole command. nanoGPT runs in a copy of its folder, on the data that its own
prepare script makes of the text, which must equal ours to the byte; of its files only the number of the seed is
changed. The dataset must be prepared before.
"""
import contextlib
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import add, inside, summary, table, watch
from configurator import REPO, UserError, configure, find_path

name = ''  # the entry in the JSON file; a same one is replaced
what = ''  # what the table calls it; '' the name
dataset = 'shakespeare_char'  # folder under data/ that is trained and evaluated on
ours = ''  # arguments of train.py, in one word; '' none
theirs = ''  # arguments of nanoGPT's train.py; '' none
vs = ''  # folder of a nanoGPT checkout
text = ''  # the file that the dataset was prepared from, for nanoGPT's prepare script
seeds = '1,2,3'  # with commas between
start = ''  # our last seed's model goes on from this, and the entry keeps what it wrote; '' none
reach = 0.0  # tell, too, when a printed validation loss was this low for the first time; 0 off
json = 'docs/training.json'  # file that the entry is added to

HOME = Path.cwd()  # where the user is; everything runs in a scratch folder


def check(s):
    """Return what is wrong with the Settings `s`, a line each."""
    found = [f'{one} is empty; say --{one}=...' for one in ('name', 'dataset', 'seeds') if not s[one]]
    if not s['ours'] and not s['theirs']:
        found.append('nothing to run; give --ours, --theirs or both')
    if s['theirs'] and not (Path(s['vs'], 'model.py').is_file() and Path(s['text']).is_file()):
        found.append(f'theirs needs vs, a nanoGPT checkout, and text, a file; got vs={s["vs"]!r}, text={s["text"]!r}')
    if not find_path(f'data/{s["dataset"]}/meta.json').exists():
        found.append(f'data/{s["dataset"]} is not prepared')
    return found


def copy_peer(data):
    """Copy nanoGPT to the folder `peer` and let it prepare the text; UserError where the tokens are not ours."""
    shutil.copytree(HOME / vs, 'peer', ignore=shutil.ignore_patterns('.git', '*.bin', 'out*', 'input.txt', 'assets'))
    folder = Path('peer/data', dataset)
    folder.mkdir(exist_ok=True)
    shutil.copy('peer/data/shakespeare_char/prepare.py', folder / 'prepare_characters.py')
    shutil.copy(HOME / text, folder / 'input.txt')
    watch([sys.executable, folder / 'prepare_characters.py'])
    for split in ('train.bin', 'val.bin'):
        if (folder / split).read_bytes() != (data / split).read_bytes():
            raise UserError(f"{split}: nanoGPT's tokens of {text} are not those of {data}; is it the same text?")


def train(side, seed):
    """Run a training command; returns (its quantities, [(second, validation loss) as printed], a sample)."""
    out = Path(f'{side}-{seed}').absolute()
    if side == 'ours':
        command, cwd = [sys.executable, REPO / 'train.py', *shlex.split(ours), f'--seed={seed}'], Path.cwd()
    else:
        script = (HOME / vs / 'train.py').read_text(encoding='utf-8')
        assert script.count('torch.manual_seed(1337') == 1, 'nanoGPT seeds itself in another way than at 3adf61e'
        Path('peer/train.py').write_text(script.replace('manual_seed(1337', f'manual_seed({seed}'), encoding='utf-8')
        command, cwd = [sys.executable, 'train.py', *shlex.split(theirs)], Path('peer')
    with contextlib.chdir(cwd):
        found, took, peak = watch([*command, f'--dataset={dataset}', f'--out_dir={out}'],
                                  r'^step \d+: train loss ([\d.]+), val loss ([\d.]+)')
    history = [(second, float(match[2])) for second, match in found]
    evaluated, _, _ = watch([sys.executable, REPO / 'evaluate.py', f'--out_dir={out}', f'--dataset={dataset}',
                             '--dtype=float32'], r': loss ([\d.]+), perplexity [\d.]+(?:, bpb ([\d.]+))?')
    loss, bpb = evaluated[-1][1].groups()
    quantities = {'val loss': float(loss), **({'val bits per byte': float(bpb)} if bpb else {}),
                  'best val loss printed': min(loss for _, loss in history),
                  'last train loss printed': float(found[-1][1][1]), 's, whole command': took, 'MiB at peak': peak}
    if reach:
        quantities[f's to val loss {reach:g}'] = next((s for s, loss in history if loss <= reach), float('inf'))
    sample = []
    if side == 'ours' and start and seed == int(seeds.split(',')[-1]):
        sample, _, _ = watch([sys.executable, REPO / 'sample.py', f'--out_dir={out}', f'--start={start}',
                              '--num_samples=1', '--max_new_tokens=150'], r'.*')
    shutil.rmtree(out)
    return quantities, history, '\n'.join(match[0].rstrip('\n') for _, match in sample)


def main():
    configure(globals(), check=check)
    data = find_path(f'data/{dataset}').absolute()
    runs = {side: [] for side, arguments in (('ours', ours), ('nanoGPT', theirs)) if arguments}
    with tempfile.TemporaryDirectory(prefix='measure-') as scratch, contextlib.chdir(scratch):
        Path('data').mkdir()
        (Path('data') / dataset).symlink_to(data)
        about = inside('machine')
        if theirs:
            copy_peer(data)
        for seed in seeds.split(','):
            for side in runs:
                runs[side].append(train(side, int(seed)))
                print(f'{name}, seed {seed}, {side}: {runs[side][-1][0]}', file=sys.stderr, flush=True)
    found = {name: {
        'what': what or name, 'machine': about,
        'command': shlex.join(['python', 'benchmarks/train_losses.py', *sys.argv[1:]]),
        'seeds': seeds, 'sides': {side: {unit: summary([quantities[unit] for quantities, _, _ in each])
                                         for unit in each[0][0]} for side, each in runs.items()},
        'histories': {side: [history for _, history, _ in each] for side, each in runs.items()},
        **({'sample': runs['ours'][-1][2]} if start and ours else {})}}
    add(HOME / json, found)
    print('\n'.join(table(found)))


if __name__ == '__main__':
    main()
