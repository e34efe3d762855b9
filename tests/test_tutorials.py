"""The command lines of four nanoGPT tutorials, as their readers type them, on small texts of the same kind.

The numbers are those of the rows in docs/tutorials.md. WHY42 is the Chinese tutorial that trains Shakespeare, the
Three Character Classic, a sutra and Water Margin; MODERN adds BPE, RoPE and TinyStories; DIARY trains GPT-2 on one RTX
3090; FROM_SCRATCH lists Chinese corpora and trains from scratch.

All lines run one after the other in one process, in a copy of the repository: later lines need what earlier ones wrote.
Nothing is downloaded: the addresses are answered by the process itself, and GPT-2 is a small random model.
"""
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import REPO

from configurator import UserError
from lib.text import tokenizer

CPU = '--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 ' \
      '--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0'
WU_SONG = '武松道:“不要问,只管用瓢舀来吃酒。贩枣的客人那里,买三五斤枣 来,一发算钱。”竟抢先要下'
SUTRA = '如是我闻:一时,佛在舍卫国祇树给孤独园,与'
FEW = '--max_iters=2 --lr_decay_iters=2 --warmup_iters=1 --eval_iters=1 --log_interval=1 --dtype=float32 ' \
      '--peak_tflops=1 --compile=False --batch_size=4'
TINY = '--n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --batch_size=2 --gradient_accumulation_steps=1'
SHORT = '--num_samples=1 --max_new_tokens=20 --dtype=float32'
TRAINED = (r'^number of parameters: \d+\.\d\dM$', r'^iter 0: loss \d', r'^step 2: train loss \d+\.\d{4}, val loss \d')
PREPARED = (r'^length of dataset in characters: [\d,]+$', r'^vocab size: [\d,]+$', r'^train has [\d,]+ tokens$',
            r'^val has [\d,]+ tokens$')


@dataclass
class Line:
    """A line of a tutorial. row: its row in docs/tutorials.md. add: what the test adds to the command. prints: regular
    expressions that stdout matches; with `error`, the program ends with a line on stderr that matches it.
    """
    row: int
    command: str
    add: str = ''
    prints: tuple = ()
    error: str = ''
    gpt2: bool = False  # needs GPT-2's BPE file


LINES = [
    # WHY42
    Line(5, 'python data/shakespeare_char/prepare.py', '',
         (*PREPARED, r"^all the unique characters: $\n^ !\$&',-\.3:;\?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmno")),
    Line(6, 'python train.py config/train_shakespeare_char.py', f'--device=cpu {FEW} {TINY}', TRAINED),
    Line(7, f'python train.py config/train_shakespeare_char.py {CPU}', FEW, TRAINED),
    Line(7, f'python train.py config/train_shakespeare_char.py config/gpt2_classic.py {CPU}', FEW,
         (*TRAINED, '^number of parameters: 0.80M$')),
    Line(8, 'python sample.py --out_dir=out-shakespeare-char --device=cpu', '--max_new_tokens=20',
         (r'(?s)(.*^-{15}$){10}',)),
    Line(10, 'python data/sanzijing_char/prepare.py', '', (*PREPARED, '^length of dataset in characters: 1,519$',
                                                         '^train has 1,367 tokens$', '^val has 152 tokens$')),
    Line(11, f'python train.py config/train_sanzijing_char.py {CPU}', FEW, TRAINED),
    Line(11, 'python sample.py --out_dir=out-sanzijing-char --device=cpu', SHORT, ('^-{15}$',)),
    Line(12, 'python sample.py --out_dir=out-sanzijing-char --device=cpu --start="养不"', SHORT, ('^养不',)),
    Line(12, 'python sample.py --out_dir=out-sanzijing-char --device=cpu --start="养要"', SHORT, ('^养要',)),
    Line(13, 'python data/boluojing_char/prepare.py', '', PREPARED),
    Line(13, f'python train.py config/train_boluojing_char.py {CPU}', FEW, TRAINED),
    Line(13, 'python sample.py --out_dir=out-boluojing-char --device=cpu', SHORT, ('^-{15}$',)),
    Line(14, f'python sample.py --out_dir=out-boluojing-char --device=cpu --start="{SUTRA}"', SHORT,
         ('^如是我闻：一时，佛在舍卫国祇树给孤独园，与',)),
    Line(15, 'python data/shuixu_char/prepare.py', '', PREPARED),
    Line(15, f'python train.py config/train_shuixu_char.py {CPU}', FEW, TRAINED),
    Line(16, f'python train.py config/train_shuixu_char.py {CPU}'.replace('=cpu', '=mps').replace('2000', '20000'), '',
         error='mps'),
    Line(16, f'python train.py config/train_shuixu_char.py {CPU}'.replace('=cpu', '=mps').replace('2000', '20000'),
         f'--device=cpu {FEW}', TRAINED),
    Line(17, f'python sample.py --out_dir=out-shuixu-char --device=cpu --start="{WU_SONG}"', SHORT,
         ('^武松道：“不要问，只管用瓢舀来吃酒。贩枣的客人那里，买三五斤枣',)),
    Line(17, f'python sample.py --out_dir=out-shuixu-char --device=cpu --start="{WU_SONG}"', f'{SHORT} --fold=False',
         error=r"'：' \(U\+FF1A\)"),
    Line(18, 'python plot.py out-shuixu-char', '', ('loss.png',)),
    Line(20, 'python train.py config/train_shuixu_char.py', f'--device=cpu {FEW}', TRAINED),
    Line(20, f'python sample.py --out_dir=out-shuixu-char --start="{WU_SONG}"', f'--device=cpu {SHORT}',
         ('^武松道：“不要问，',)),
    Line(21, 'python data/shuixu_full/prepare.py', '', PREPARED, gpt2=True),
    Line(21, 'python train.py config/train_shuixu_full.py --batch_size=64 --block_size=256 --n_layer=6 --n_head=6 '
         '--n_embd=384', f'--device=cpu {FEW} {TINY}', TRAINED, gpt2=True),
    Line(22, 'python train.py config/train_shuixu_full.py', f'--device=cpu {FEW} {TINY}', TRAINED, gpt2=True),
    Line(22, f'python sample.py --out_dir=out-shuixu-full --start="{WU_SONG}"', f'--device=cpu {SHORT}',
         ('^武松道:“不要问,只管用瓢舀来吃酒。',), gpt2=True),  # every character is in GPT-2's vocabulary
    Line(23, 'python data/chucknorris/prepare.py', '', PREPARED, gpt2=True),
    Line(23, 'python train.py config/finetune_chuck_norris.py', f'--device=cpu {FEW} --block_size=16', TRAINED,
         gpt2=True),
    Line(23, 'python train.py config/finetune_chuck_norris_better.py', f'--device=cpu {FEW} --block_size=16', TRAINED,
         gpt2=True),
    Line(24, 'python sample.py --out_dir=out-chuck-norris --start="Chuck Norris tried PHP and"',
         f'--device=cpu {SHORT}', ('^Chuck Norris tried PHP and',), gpt2=True),
    Line(26, 'python evaluate.py --out_dir=out-sanzijing-char --samples=2', '--device=cpu --dtype=float32',
         (r'^ +sequences of  5 tokens +\d+\.\d% +\d+\.\d%$', r'^ +longest span, in tokens')),
    Line(28, 'python data/text/prepare.py --input=data/shuixu_char/input.tutorial.txt --name=words --tokenizer=bpe '
         '--vocab_size=600', '', (*PREPARED, r'^characters per token: [1-9]')),
    Line(29, 'python data/text/prepare.py --input=data/shuixu_char/input.tutorial.txt '
         '--input=data/sanzijing_char/input.tutorial.txt --name=books', '', PREPARED),
    # MODERN
    Line(30, 'python data/text/prepare.py --show="Hello World!" --tokenizer=gpt2', '',
         (r"^ +15496  'Hello'$", r'^decoded again: Hello World!$'), gpt2=True),
    Line(31, 'python data/shakespeare/prepare.py', '', (*PREPARED, '^vocab size: 50,257$'), gpt2=True),
    Line(32, 'python train.py config/train_shakespeare_char.py --dataset=shakespeare --out_dir=out-bpe --patience=5 '
         '--optimizer=adamw --learning_rate=0 --min_lr=0', f'--device=cpu {FEW} {TINY} --max_iters=3 --eval_interval=1',
         (r'^step 2: train loss .*no better for 2 of 5 evaluations$',), gpt2=True),
    Line(33, 'python data/tinystories/prepare.py --input=TinyStories-train.txt --val_input=TinyStories-valid.txt '
         '--num_proc=2', '', PREPARED, gpt2=True),
    Line(35, 'python train.py config/train_tinystories.py', f'--device=cpu {FEW} {TINY}', TRAINED, gpt2=True),
    Line(36, 'python sample.py --out_dir=out-tinystories --temperature=0.7 --top_k=50', f'--device=cpu {SHORT}',
         ('^-{15}$',), gpt2=True),
    # DIARY
    Line(39, 'python data/openwebtext/prepare.py', '--val_fraction=0.05', PREPARED, gpt2=True),
    Line(40, 'python train.py', f'--device=cpu {FEW} {TINY}', TRAINED, gpt2=True),
    Line(42, 'python sample.py', f'--start="You are my sunshine." --device=cpu {SHORT}', ('^You are my sunshine.',),
         gpt2=True),
    Line(43, 'python sample.py --init_from=gpt2-xl', f'--start="You are my sunshine." --device=cpu {SHORT}',
         ('^You are my sunshine.',), gpt2=True),
    Line(44, 'python sample.py --init_from=gpt2-xl --repetition_penalty=1.2 --no_repeat_ngram=4 --min_p=0.05',
         f'--device=cpu {SHORT}', ('^-{15}$',), gpt2=True),
    Line(45, 'python data/arithmetic/prepare.py', '', PREPARED),
    Line(45, 'python train.py config/train_arithmetic.py', f'--device=cpu {FEW} --n_layer=1 --n_head=2 --n_embd=16',
         TRAINED),
    Line(45, r"python sample.py --out_dir=out-arithmetic --start='\n12+34=' --stop='\n' --temperature=0 "
         '--num_samples=1', f'--device=cpu {SHORT}', (r'^12\+34=',)),
    # FROM_SCRATCH
    Line(48, 'python data/text/prepare.py --name=baike2018qa --input=baike.json --text_key=title,desc,answer', '',
         PREPARED),
    Line(50, 'python train.py config/train_gpt2.py', f'--device=cpu {FEW} {TINY}', TRAINED, gpt2=True),
    Line(51, 'python train.py config/eval_gpt2.py', '--device=cpu --dtype=float32',
         (r'^step 0: train loss \d+\.\d{4}, val loss \d',), gpt2=True),
    Line(52, 'python train.py config/continue_gpt2.py', f'--device=cpu {FEW} --block_size=16 --batch_size=2', TRAINED,
         gpt2=True),
    Line(53, 'python data/text/prepare.py --show="你好 Hello World!" --tokenizer=gpt2', '',
         (r'^ +\d+  part of a character, bytes', '^decoded again: 你好 Hello World!$'), gpt2=True),
    Line(54, 'python data/chinese/prepare.py', '', PREPARED, gpt2=True),
    Line(54, 'python train.py config/train_chinese.py', f'--device=cpu {FEW} {TINY}', TRAINED, gpt2=True),
    Line(54, 'python train.py config/finetune_chinese.py', f'--device=cpu {FEW} --block_size=16', TRAINED, gpt2=True),
    Line(54, 'python sample.py --out_dir=out-chinese --start="中国"', f'--device=cpu {SHORT}', ('^中国',), gpt2=True),
    # what a reader meets without a network
    Line(34, 'python sample.py --init_from=gpt2-large', '--device=cpu', error='HF_ENDPOINT'),
]

# Answers for the downloads, and a small GPT-2 in the place of OpenAI's; {folder} holds the files
PROCESS = r'''
import contextlib, io, json, os, runpy, sys, time, traceback, urllib.error, urllib.request
folder = sys.argv[1]
sys.path.insert(0, os.getcwd())
answers = json.load(open(folder + '/answers.json', encoding='utf-8'))


class Reply(io.BytesIO):
    headers = {}


def urlopen(request, timeout=None):
    address = getattr(request, 'full_url', request)
    if address not in answers:
        raise urllib.error.HTTPError(address, 404, 'Not Found', {}, None)
    return Reply(answers[address].encode('utf-8'))


class Rows(list):
    def iter(self, batch_size):
        yield {'text': list(self)}


def load_dataset(name, split='train', streaming=True, **others):
    return Rows(answers['hub:' + name])


urllib.request.urlopen = urlopen
import datasets
datasets.load_dataset = load_dataset
import huggingface_hub
huggingface_hub.try_to_load_from_cache = lambda *names: None


def hf_hub_download(repository, name):
    if repository.endswith('gpt2-large'):
        raise ConnectionError('no route to huggingface.co')
    return folder + '/' + name


huggingface_hub.hf_hub_download = hf_hub_download
from lib.text import sources
for text in (sources.BOLUOJING, sources.SHUIXU, sources.SHUIXU_FULL):
    text.least = 1000  # the stand-ins are short
from lib.training import curves
curves.draw_loss = lambda out_dir: None  # a picture takes longer than these runs; plot.py draws one
os.fsync = os.fstat  # as in conftest.py
from lib.weights import gpt2
gpt2.check_connection = lambda *address: None
gpt2.SIZES = dict.fromkeys(gpt2.SIZES, dict(n_layer=1, n_head=2, n_embd=16))
results, began = [], time.time()
for script, *arguments in json.load(sys.stdin):
    sys.argv, out, err, status = [script, *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            status = -1
            traceback.print_exc()
    results.append([status, out.getvalue(), err.getvalue()])
    print(round(time.time() - began, 1), script, *arguments[:1], file=sys.stderr)
json.dump(results, open(folder + '/results.json', 'w', encoding='utf-8'))
'''


def has_bpe():
    """True if GPT-2's BPE file is in the cache or can be downloaded."""
    try:
        return bool(tokenizer.gpt2().encode('a'))
    except UserError:
        return False


def texts():
    """Return {address: stand-in text} with the characters that the tutorials' prompts have."""
    raw = 'https://raw.githubusercontent.com/'
    why42 = raw + 'drriguz/nanoGPT/master/data/{}/input.txt'
    letters = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    plays = letters + 'First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n' * 60
    classic = ['人之初', '性本善', '养不教', '父之过', '记其事', '要其终'] * 64
    sutra = '如是我闻：一时，佛在舍卫国祇树给孤独园，与大苾刍众千二百五十人俱。般若波罗蜜多。\n'
    novel = '宋江武松道：“不要问，只管用瓢舀来吃酒。贩枣的客人那里，买三五斤枣来，一发算钱。”竟抢先要下山去, 且说。\n'
    pages = [f'Once upon a time there was a cat named Tom{i}.' for i in range(100)]
    pages[99] *= 90  # every twentieth validates: together longer than GPT-2's context
    return {
        raw + 'karpathy/char-rnn/master/data/tinyshakespeare/input.txt': plays,
        why42.format('sanzijing_char'): '\n'.join(classic[:380]), why42.format('boluojing_char'): sutra * 60,
        why42.format('shuixu_char'): novel * 60, why42.format('shuixu_full'): novel * 25,
        'https://api.chucknorris.io/jokes/search?query=chuck': json.dumps(
            {'result': [{'value': f'Chuck Norris counted to infinity {i} times.'} for i in range(200)]}),
        'hub:Skylion007/openwebtext': pages,
    }


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """What each of LINES printed: [(status, stdout, stderr)], None for those that need GPT-2's BPE where it is not."""
    folder, clone = tmp_path_factory.mktemp('answers'), tmp_path_factory.mktemp('clone') / 'minuteGPT'
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=REPO, capture_output=True,
                            encoding='utf-8', check=True)
    for name in filter(None, listed.stdout.split('\0')):
        if (REPO / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, clone / name)
    stories = '\n<|endoftext|>\n'.join(f'Once upon a time there was a cat named Tom{i}.' for i in range(150))
    rows = [{'title': f'问题{i}', 'desc': '', 'answer': f'回答{i}'} for i in range(300)]
    for name, text in {'TinyStories-train.txt': stories, 'TinyStories-valid.txt': stories[:2000],
                       'data/chinese/input.txt': '中国人说中国话。今天天气真好。\n' * 60,
                       'baike.json': '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)}.items():
        (clone / name).write_text(text, encoding='utf-8')
    (folder / 'answers.json').write_text(json.dumps(texts()), encoding='utf-8')
    save_small_gpt2(folder)
    (folder / 'process.py').write_text(PROCESS, encoding='utf-8')
    chosen = [line for line in LINES if has_bpe() or not line.gpt2]
    jobs = [shlex.split(f'{line.command} {line.add}')[1:] for line in chosen]
    done = subprocess.run([sys.executable, folder / 'process.py', folder], input=json.dumps(jobs), cwd=clone,
                          capture_output=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
    results = dict(zip(map(id, chosen), found))
    return [results.get(id(line)) for line in LINES]


def save_small_gpt2(folder):
    """Write model.safetensors of a random GPT-2 with one layer and the whole vocabulary."""
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


NAMES = [f'{line.row}-{sum(other.row == line.row for other in LINES[:i + 1])}' for i, line in enumerate(LINES)]


@pytest.mark.parametrize('number', range(len(LINES)), ids=NAMES)
def test_a_line_of_the_tutorials(results, number):
    line = LINES[number]
    if results[number] is None:
        pytest.skip("needs GPT-2's BPE file; go online once, or set TIKTOKEN_CACHE_DIR")
    status, out, err = results[number]
    assert 'Traceback' not in err, err[-2000:]
    if line.error:
        assert status != 0 and re.search(line.error, err.strip().splitlines()[-1]), err[-2000:]
        return
    assert status == 0, err[-2000:]
    for pattern in line.prints:
        assert re.search(pattern, out, re.M), f'{pattern!r} is not in\n{out[-2000:]}\n{err[-2000:]}'


# docs/tutorials.md

def rows():
    """Return {row: (answer, where it is tested)} of the first table in docs/tutorials.md."""
    text = (REPO / 'docs' / 'tutorials.md').read_text(encoding='utf-8').split('\n## ')[0]
    found = re.findall(r'^\| (\d+) \| .* \| (\w[\w ]*) \| (.*) \|$', text, re.M)
    return {int(row): (answer, where) for row, answer, where in found}


def test_every_row_of_the_table_is_answered():
    assert sorted(rows()) == list(range(1, 56))
    assert {answer for answer, _ in rows().values()} <= {'yes', 'better', 'differs', 'no', 'not run', 'not checked'}


def test_every_yes_names_a_test():
    for row, (answer, where) in rows().items():
        named = re.findall(r'\b(\d+-\d+)\b', where)
        assert all(name in NAMES and int(name.split('-')[0]) == row for name in named), where
        assert named or '::test_' in where or answer not in ('yes', 'better'), row


def test_every_test_that_the_document_names_exists():
    text = (REPO / 'docs' / 'tutorials.md').read_text(encoding='utf-8')
    named = set(re.findall(r'`(tests/\w+\.py)(?:::(\w+))?`', text))
    assert len(named) > 20
    for file, function in named:
        assert f'\ndef {function}(' in (REPO / file).read_text(encoding='utf-8'), f'{file}::{function}'


def test_every_line_is_named_in_the_table():
    named = {name for _, where in rows().values() for name in re.findall(r'\b(\d+-\d+)\b', where)}
    assert named == set(NAMES)
