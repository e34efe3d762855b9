"""Measure training runs as whole commands, one per seed, alternating with nanoGPT's; both are evaluated alike.

    python benchmarks/train_losses.py --name=cpu-recipe --dataset=shakespeare_char
        --ours="config/train_shakespeare_char.py --device=cpu"
        --vs=../nanoGPT --text=tinyshakespeare.txt --theirs="config/train_shakespeare_char.py ..."

The loss is that of the checkpoint that the program itself keeps, over the whole validation split, in float32, by our
evaluate.py. The time is that of the whole command. nanoGPT runs in a copy of its folder, on the data that its own
prepare script makes from the text, which must be equal to ours; only its seed is changed. Prepare the dataset first.
"""
import contextlib
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import add, commit, run_and_parse, run_in_subprocess, summary, table
from configurator import REPO, UserError, configure, find_path

name = ''  # the entry in the JSON file; an entry of the same name is replaced
what = ''  # its description in the table; '' = the name
dataset = 'shakespeare_char'  # folder under data/ to train and evaluate on
ours = ''  # arguments of train.py, in one word; '' = none
theirs = ''  # arguments of nanoGPT's train.py; '' = none
vs = ''  # folder of a nanoGPT checkout
text = ''  # the file that the dataset was prepared from, for nanoGPT's prepare script
seeds = '1,2,3'  # separated by commas
start = ''  # prompt for a sample by our last seed's model, kept in the entry; '' = none
reach = 0.0  # also report when the printed validation loss first reached this; 0 = off
json = 'docs/training.json'  # file that the entry is added to

HOME = Path.cwd()  # where the user is; everything else happens in a temporary folder


def check(s):
    """Return a list of error messages for the Settings `s`."""
    found = [f'{one} is empty; give --{one}=...' for one in ('name', 'dataset', 'seeds') if not s[one]]
    if not s['ours'] and not s['theirs']:
        found.append('nothing to run; give --ours, --theirs or both')
    if s['theirs'] and not (Path(s['vs'], 'model.py').is_file() and Path(s['text']).is_file()):
        found.append(f'theirs needs vs, a nanoGPT checkout, and text, a file; got vs={s["vs"]!r}, text={s["text"]!r}')
    if not find_path(f'data/{s["dataset"]}/meta.json').exists():
        found.append(f'data/{s["dataset"]} is not prepared')
    return found


def copy_peer(data):
    """Copy nanoGPT to the folder `peer` and let it prepare the text; UserError if its tokens differ from ours."""
    shutil.copytree(HOME / vs, 'peer', ignore=shutil.ignore_patterns('.git', '*.bin', 'out*', 'input.txt', 'assets'))
    folder = Path('peer/data', dataset)
    folder.mkdir(exist_ok=True)
    shutil.copy('peer/data/shakespeare_char/prepare.py', folder / 'prepare_characters.py')
    shutil.copy(HOME / text, folder / 'input.txt')
    run_and_parse([sys.executable, folder / 'prepare_characters.py'])
    for split in ('train.bin', 'val.bin'):
        if (folder / split).read_bytes() != (data / split).read_bytes():
            raise UserError(f"{split}: nanoGPT's tokens of {text} are not those of {data}; is it the same text?")


def train(program, seed):
    """Run a training command; returns (its quantities, [(second, printed validation loss)], a sample)."""
    out = Path(f'{program}-{seed}').absolute()
    if program == 'ours':
        command, cwd = [sys.executable, REPO / 'train.py', *shlex.split(ours), f'--seed={seed}'], Path.cwd()
    else:
        script = (HOME / vs / 'train.py').read_text(encoding='utf-8')
        assert script.count('torch.manual_seed(1337') == 1, 'nanoGPT sets its seed in another way than at 3adf61e'
        Path('peer/train.py').write_text(script.replace('manual_seed(1337', f'manual_seed({seed}'), encoding='utf-8')
        command, cwd = [sys.executable, 'train.py', *shlex.split(theirs)], Path('peer')
    with contextlib.chdir(cwd):
        found, elapsed, peak = run_and_parse([*command, f'--dataset={dataset}', f'--out_dir={out}'],
                                             r'^step \d+: train loss ([\d.]+), val loss ([\d.]+)')
    history = [(second, float(match[2])) for second, match in found]
    evaluate = [sys.executable, REPO / 'evaluate.py', f'--out_dir={out}', f'--dataset={dataset}', '--dtype=float32']
    evaluated, _, _ = run_and_parse(evaluate, r': loss ([\d.]+), perplexity [\d.]+(?:, bpb ([\d.]+))?')
    loss, bpb = evaluated[-1][1].groups()
    quantities = {'val loss': float(loss), **({'val bits per byte': float(bpb)} if bpb else {}),
                  'best val loss printed': min(loss for _, loss in history),
                  'last train loss printed': float(found[-1][1][1]), 's, whole command': elapsed, 'MiB at peak': peak}
    if reach:
        quantities[f's to val loss {reach:g}'] = next((s for s, loss in history if loss <= reach), float('inf'))
    sample = []
    if program == 'ours' and start and seed == int(seeds.split(',')[-1]):
        command = [sys.executable, REPO / 'sample.py', f'--out_dir={out}', f'--start={start}']
        sample, _, _ = run_and_parse([*command, '--num_samples=1', '--max_new_tokens=150'], r'.*')
    shutil.rmtree(out)
    return quantities, history, '\n'.join(match[0].rstrip('\n') for _, match in sample)


def main():
    configure(globals(), check=check)
    data = find_path(f'data/{dataset}').absolute()
    runs = {program: [] for program, arguments in (('ours', ours), ('nanoGPT', theirs)) if arguments}
    with tempfile.TemporaryDirectory(prefix='measure-') as scratch, contextlib.chdir(scratch):
        Path('data').mkdir()
        (Path('data') / dataset).symlink_to(data)
        machine = run_in_subprocess('workloads.machine')
        if theirs:
            copy_peer(data)
        for seed in seeds.split(','):
            for program in runs:
                runs[program].append(train(program, int(seed)))
                print(f'{name}, seed {seed}, {program}: {runs[program][-1][0]}', file=sys.stderr, flush=True)
    found = {name: {
        'what': what or name, 'machine': machine, 'commit': commit(),
        'command': shlex.join(['python', 'benchmarks/train_losses.py', *sys.argv[1:]]),
        'seeds': seeds, 'sides': {program: {quantity: summary([numbers[quantity] for numbers, _, _ in each])
                                            for quantity in each[0][0]} for program, each in runs.items()},
        'histories': {program: [history for _, history, _ in each] for program, each in runs.items()},
        **({'sample': runs['ours'][-1][2]} if start and ours else {})}}
    add(HOME / json, found)
    print('\n'.join(table(found)))


if __name__ == '__main__':
    main()
