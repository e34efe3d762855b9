"""notebooks/colab.ipynb: shipped clean, and executed from top to bottom with tiny overrides."""
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

nbformat = pytest.importorskip('nbformat')
NOTEBOOK = REPO / 'notebooks' / 'colab.ipynb'
TINY = '--device=cpu --max_iters=4 --eval_interval=2 --eval_iters=1 --block_size=32 --batch_size=2 --warmup_iters=0'


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def cells_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def printed(cell):
    return ''.join(output.get('text', '') for output in cell.outputs)


def test_the_address_of_the_repository_is_written_only_in_the_notebook():
    address, = re.findall(r"^REPOSITORY = '(.*?)'", '\n'.join(cell.source for cell in cells_of(read())), re.M)
    assert address == '' or address.startswith('https://')
    listed = subprocess.run(['git', 'grep', '-lE', r'(github|gitee|gitlab)\.com/[A-Za-z0-9_-]+/minuteGPT'], cwd=REPO,
                            capture_output=True, encoding='utf-8').stdout
    assert set(listed.split()) <= {'notebooks/colab.ipynb', 'tests/test_notebook.py'}


def test_it_is_shipped_without_outputs():
    assert not [cell for cell in cells_of(read()) if cell.outputs or cell.execution_count]


def test_it_asks_for_the_torch_that_requirements_ask_for():
    wanted = re.search(r'^torch>=([\d.]+)', (REPO / 'requirements.txt').read_text(encoding='utf-8'), re.M).group(1)
    source = '\n'.join(cell.source for cell in cells_of(read()))
    assert re.search(r'OLDEST_TORCH = \((\d+), (\d+)\)', source).groups() == tuple(wanted.split('.'))


def test_installing_its_packages_leaves_torch_alone():
    cell = next(cell for cell in cells_of(read()) if 'packages =' in cell.source)
    scope = {}
    cwd = os.getcwd()
    os.chdir(REPO)
    try:
        exec(cell.source.split('%pip')[0], scope)
    finally:
        os.chdir(cwd)
    assert 'numpy' in scope['packages'] and 'torch' not in scope['packages']


def test_an_old_torch_is_refused_with_the_way_out():
    source = next(cell.source for cell in cells_of(read()) if 'OLDEST_TORCH' in cell.source)
    with pytest.raises(AssertionError, match='2.9.1 is too old; run  %pip install'):
        exec(source.replace('torch.__version__', '"2.9.1"'), {})


def tiny_gpt2(folder):
    """Write a GPT-2 of random weights in Hugging Face's layout."""
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def has_gpt2_bpe():
    from lib.text.tokenizer import gpt2
    try:
        gpt2().encode('a')
    except SystemExit:
        return False
    return True


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A copy of the files that git knows, with small texts in the place of downloads, and this Python on the path."""
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=REPO, capture_output=True,
                           encoding='utf-8', check=True).stdout
    for name in files.split('\0'):
        if (REPO / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, tmp_path / name)
    for name in ('shakespeare_char', 'shakespeare'):
        (tmp_path / 'data' / name / 'input.txt').write_text('ROMEO:\nWhat light is this?\n' * 200, encoding='utf-8')
    novel = '宋江武松道：“不要问，只管用瓢舀来吃酒。贩枣的客人那里。”\n' * 60
    (tmp_path / 'data' / 'shuixu_char' / 'input.txt').write_text(novel, encoding='utf-8')
    monkeypatch.setenv('PATH', os.path.dirname(sys.executable), prepend=os.pathsep)
    monkeypatch.setenv('PIP_DISABLE_PIP_VERSION_CHECK', '1')
    return tmp_path


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(clone):
    nbclient = pytest.importorskip('nbclient')
    notebook = read()
    if has_gpt2_bpe():
        tiny_gpt2(clone / 'tiny-gpt2')
    else:  # offline, and GPT-2's BPE not in the cache: the rest still has to run
        notebook.cells = [cell for cell in notebook.cells if 'gpt2' not in cell.metadata.get('tags', [])]
    for cell in cells_of(notebook):
        cell.source = cell.source.replace("FLAGS = ''", f"FLAGS = '{TINY}'").replace("MODEL = 'gpt2'",
                                                                                    "MODEL = 'tiny-gpt2'")
    nbclient.NotebookClient(notebook, timeout=600, resources={'metadata': {'path': str(clone / 'notebooks')}}).execute()
    if keep := os.environ.get('KEEP_NOTEBOOK'):
        nbformat.write(notebook, keep)
    wrong = [printed(cell) for cell in cells_of(notebook) if re.search(r'error:|Traceback', printed(cell))]
    assert not wrong, wrong
    assert all((clone / f'out-{name}' / 'ckpt.pt').exists() for name in ('shakespeare-char', 'shuixu-char', 'mytext'))
    pictures = [o for cell in cells_of(notebook) for o in cell.outputs if 'image/png' in o.get('data', {})]
    assert len(pictures) == 3
    texts = [printed(cell) for cell in cells_of(notebook) if 'sample.py' in cell.source]
    assert all('-' * 15 in text for text in texts)


@pytest.mark.slow
def test_the_bar_in_a_kernel_is_drawn_among_the_lines(tmp_path):
    nbclient = pytest.importorskip('nbclient')
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f'''
import sys
sys.path.insert(0, {str(REPO)!r})
from lib.training import log
bar = log.progress_bar(100)
log.advance(bar, 0.5, 1.0, 1.0, 5000, 2.0)
bar.refresh()
log.say('iter 0: loss 1.0')
bar.close()
''')])
    nbclient.NotebookClient(notebook, timeout=60).execute()
    outputs = notebook.cells[0].outputs
    assert {output.name for output in outputs} == {'stdout'}  # one stream, so that the bar is overwritten in place
    text = ''.join(output.text for output in outputs)
    assert ' 50%|' in text and '2m00s left' in text and '\riter 0: loss 1.0\n' in text
