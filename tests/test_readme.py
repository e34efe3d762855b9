"""Every command of README.md and README.zh.md runs, with tiny overrides, in a fresh copy of the repository."""
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

import train
from configurator import UserError, literals, resolve
from lib.training import sweep

TINY = {
    'train.py': '--max_iters=2 --eval_iters=1 --eval_interval=2 --log_interval=1 --n_layer=1 --n_head=2 --n_embd=16 '
                '--block_size=16 --batch_size=32 --gradient_accumulation_steps=1 --device=cpu --dtype=float32 '
                '--compile=False --warmup_iters=0 --lora_rank=0 --peak_tflops=1'.split(),
    'sample.py': '--num_samples=1 --max_new_tokens=5 --device=cpu --dtype=float32'.split(),
    'evaluate.py': '--device=cpu --dtype=float32'.split(),
}
# What a test cannot do: fetch from a hub, start other processes, install, or serve a page until Ctrl-C.
ELSEWHERE = re.compile(r'play\.py|sweep\.py|=gpt2-|init_from=gpt2|hub:|pytest|bench\.py|export\.py')
NEEDS_BPE = re.compile(r'data/shakespeare/|data/chinese/|finetune|--tokenizer=gpt2|out-shakespeare\b(?!-)')
DRIVER = '''
import json, os, runpy, sys
for script, *arguments in json.load(sys.stdin):
    print('+', script, *arguments, flush=True)
    sys.argv = [script, *arguments]
    sys.path[0] = os.getcwd()
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as end:
        if end.code not in (0, None):
            print(end.code, file=sys.stderr)
            raise
'''


def commands(readme, elsewhere=False):
    """Return the `python ...` commands in a README's bash fences, as lists of words; elsewhere: those not run here."""
    text = (REPO / readme).read_text(encoding='utf-8')
    lines = [line for fence in re.findall(r'```bash\n(.*?)```', text, re.S) for line in fence.splitlines()]
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split('&&')]
    return [words[1:] for words in parts
            if words[:1] == ['python'] and bool(ELSEWHERE.search(' '.join(words))) == elsewhere]


def has_bpe():
    """True where GPT-2's BPE files can be had."""
    from lib.text import tokenizer
    try:
        return bool(tokenizer.gpt2().encode('a'))
    except UserError:
        return False


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A copy of the files that git knows, with the texts that a reader would have."""
    clone = tmp_path_factory.mktemp('clone') / 'minuteGPT'
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=REPO, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (REPO / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, clone / name)
    english = 'ROMEO: To be, or not to be? That is the question.\n\nJULIET: Whether it is nobler?\n\n' * 40
    chinese = '人之初，性本善。性相近，习相远。苟不教，性乃迁。教之道，贵以专。\n话说天下大势。林冲道：\n' * 60
    for path, text in {'data/shakespeare_char/input.txt': english, 'data/shakespeare/input.txt': english,
                       'data/sanzijing_char/input.txt': chinese, 'data/shuixu_char/input.txt': chinese,
                       'book.txt': english + chinese, 'prompt.txt': 'ROMEO:'}.items():
        (clone / path).write_text(text, encoding='utf-8')
    git(clone, 'init'), git(clone, 'add', '.')
    return clone


def git(folder, *arguments):
    """Run git there; returns what it printed."""
    return subprocess.run(['git', *arguments], cwd=folder, check=True, capture_output=True, encoding='utf-8').stdout


@pytest.mark.parametrize('readme', ['README.md', 'README.zh.md'])
def test_the_commands_of(readme, clone):
    found = commands(readme)
    assert len(found) >= 5
    if not has_bpe():
        found = [words for words in found if not NEEDS_BPE.search(' '.join(words))]
    jobs = [[*words, *TINY.get(words[0], [])] for words in found]
    done = subprocess.run([sys.executable, '-c', DRIVER], input=json.dumps(jobs), cwd=clone, capture_output=True,
                          text=True, encoding='utf-8')
    assert done.returncode == 0, f'{done.stdout[-1500:]}\n{done.stderr[-1500:]}'
    assert git(clone, 'ls-files', '--others', '--modified', '--exclude-standard') == ''  # all results are ignored


@pytest.mark.parametrize('readme', ['README.md', 'README.zh.md'])
def test_the_settings_in_the_other_commands_of(readme):
    found = [words for words in commands(readme, elsewhere=True) if words[0].endswith('.py')]
    assert {'play.py', 'sweep.py'} <= {words[0] for words in found}
    for script, *words in found:
        own = literals(vars(importlib.import_module(script.removesuffix('.py'))))
        if script == 'sweep.py':
            words, _ = sweep.split_grid(words, literals(vars(train)).keys() - own.keys())
            own = {**literals(vars(train)), **own}
        assert resolve(own, words, early={'device': lambda: 'cpu'} if 'device' in own else {}).errors == [], words


def inline(readme):
    """Return the commands `python SCRIPT.py ...` within a README's lines of text, as lists of words."""
    text = re.sub(r'```.*?```', '', (REPO / readme).read_text(encoding='utf-8'), flags=re.S)
    return [shlex.split(command) for command in re.findall(r'`python (\S+\.py[^`]*)`', text)]


@pytest.mark.parametrize('readme', ['README.md', 'README.zh.md'])
def test_the_settings_in_the_commands_within_the_text_of(readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'swanlab_log.py').write_text('wandb_log = True\n', encoding='utf-8')
    found = inline(readme)
    assert ['train.py', '--help'] in found
    for script, *words in found:
        own = literals(vars(importlib.import_module(script.removesuffix('.py'))))
        words = [word for word in words if word != '--help']
        assert resolve(own, words, early={'device': lambda: 'cpu'} if 'device' in own else {}).errors == [], words


def test_the_three_lines_for_swanlab_are_a_config_that_starts_it(tmp_path, monkeypatch):
    text = (REPO / 'README.zh.md').read_text(encoding='utf-8')
    lines = [re.search(pattern, text)[1] for pattern in
             ('`(import swanlab)`', '`(swanlab[.]sync_wandb[^`]*)`', '`(wandb_log = True)`')]
    (tmp_path / 'swanlab_log.py').write_text('\n'.join(lines), encoding='utf-8')
    (tmp_path / 'swanlab.py').write_text('calls = []\ndef sync_wandb(**options): calls.append(options)\n',
                                         encoding='utf-8')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = resolve(literals(vars(train)), ['config/train_shakespeare_char.py', 'swanlab_log.py'],
                       early={'device': lambda: 'cpu'})
    assert settings.errors == [] and settings['wandb_log'] is True
    assert importlib.import_module('swanlab').calls == [{'wandb_run': False}]


def test_both_readmes_have_the_conda_line():
    line = 'conda create -n minutegpt python=3.12 && conda activate minutegpt'
    assert all(line in (REPO / name).read_text(encoding='utf-8') for name in ('README.md', 'README.zh.md'))


def test_the_chinese_readme_names_what_readers_in_china_need():
    text = (REPO / 'README.zh.md').read_text(encoding='utf-8')
    for name in ('-i https://pypi.tuna.tsinghua.edu.cn/simple', 'HF_ENDPOINT=https://hf-mirror.com',
                 'AI-ModelScope/gpt2 --local_dir gpt2-folder', '--init_from=gpt2-folder', 'swanlab.sync_wandb'):
        assert name in text


def test_the_errors_in_the_chinese_table_are_in_the_programs_words():
    text = (REPO / 'README.zh.md').read_text(encoding='utf-8').split('## 常见报错')[1].split('\n## ')[0]
    messages = [m for row in re.findall(r'^\| (`.*?) \| ', text, re.M) for m in re.findall(r'`([^`]+)`', row)
                if not m.endswith('.py')]
    code = ' '.join(path.read_text(encoding='utf-8') for path in [*REPO.glob('*.py'), *(REPO / 'lib').rglob('*.py')])
    code = re.sub(r"""['"]\s+f?['"]""", '', code)  # strings that continue on the next line
    assert len(messages) > 12
    for message in messages:
        words = re.findall(r"[A-Za-z][A-Za-z']*", re.sub(r'\S*[./]\S+', '', message))  # without names of files
        wanted = min(3, len(words))
        assert any(re.search(r'\W+'.join(map(re.escape, words[i:i + wanted])), code)
                   for i in range(len(words) - wanted + 1)), message


def test_the_quick_start_is_two_commands():
    text = (REPO / 'README.md').read_text(encoding='utf-8')
    section = text.split('## Quick start')[1].split('\n## ')[0]
    assert len(re.findall(r'```bash\n(.+)\n```', section)) == len(re.findall('```', section)) // 2 == 2


def test_the_readme_says_that_config_files_are_code():  # fault 59
    text = ' '.join((REPO / 'README.md').read_text(encoding='utf-8').lower().split())
    assert 'config files are python and are executed' in text
