"""From any text to data/NAME/: train.bin, val.bin and meta.json, in bounded memory.

Each data/NAME/prepare.py calls `prepare` with what is special about its text. The text is read as a stream of pieces
(text, is_last), see lib/text/read_text.py, and goes from there to train and val, to chunks, to token ids, to files.
"""
import ast
import os
import re
import sys
from itertools import chain
from pathlib import Path

import numpy as np

from configurator import REPO, UserError, configure, find_path
from lib.machine.console import reason
from lib.machine.cpus import usable_cpus
from lib.text import advice, chunks, data_folder, dialogue, encodings, inputs, read_text
from lib.text import tokenizer as tokenizers
from lib.text.schema import KINDS, read_json

# --- settings of every data/NAME/prepare.py -------------------------------------------------------------------------
# Text
input = ''  # files, folders, globs, https://... or hub:NAME#SPLIT; repeat the flag or list several
val_input = ''  # a separate validation text, given in the same way; '' = split the input
val_fraction = 0.1  # fraction of the input that becomes the validation split
text_key = 'text'  # key of the text in JSON lines and parquet; several are joined: title,content
prompt_key = ''  # key of the question, for rows of questions and answers; several are joined: title,desc
answer_key = ''  # key of the answer, the only part that is learned
encoding = 'utf-8'  # of text files, for example gb18030
# Result
name = ''  # write to data/NAME/ of the repository; '' = the script's folder, or data/text: named after the input
tokenizer = 'char'  # char | byte | gpt2 | bpe (trained on this text) | a run's or dataset's folder, to reuse its own
vocab_size = 4096  # number of ids of a trained bpe
num_proc = 0  # processes that tokenize with a BPE; 0 = one per core; the result is the same for any number
show = ''  # print how this text is split into tokens, and nothing else; '' = off
# --------------------------------------------------------------------------------------------------------------------

_TINY = 5_000  # characters; a warning is printed for a shorter text


def _check(settings):
    """Return a list of error messages about the settings of a prepare script; empty if they are valid."""
    problems = []
    if settings['tokenizer'] not in KINDS and not find_path(settings['tokenizer']).is_dir():
        problems.append(f"tokenizer={settings['tokenizer']}: expected one of {', '.join(KINDS)}, or the folder of a "
                        'run or a dataset')
    if not 0 < settings['val_fraction'] < 1:
        problems.append(f"val_fraction={settings['val_fraction']}: expected more than 0 and less than 1")
    if settings['vocab_size'] < 257:
        problems.append(f"vocab_size={settings['vocab_size']}: a BPE has at least 257 ids, 256 bytes and end-of-text")
    elif settings.was_set('vocab_size') and settings['tokenizer'] != 'bpe':
        problems.append('vocab_size is for --tokenizer=bpe; the size of the other vocabularies is fixed')
    if bool(settings['prompt_key']) != bool(settings['answer_key']):
        problems.append('prompt_key and answer_key belong together: give both, or none')
    if settings['num_proc'] < 0:
        problems.append(f"num_proc={settings['num_proc']}: expected 0 (one per core) or more")
    if settings['name'] and not re.fullmatch(r'\w[\w.-]*', settings['name']):
        problems.append(f"name={settings['name']}: expected a plain folder name of letters, digits, _ - and .")
    return problems + encodings.problems(settings['encoding'])


def _tokenizer(settings, chars, sample, append_separator):
    """Return the tokenizer that the settings ask for, trained on the text if necessary."""
    if settings['tokenizer'] == 'char':
        if append_separator:
            chars += '\n'
        return tokenizers.CharTokenizer(''.join(sorted(set(chars))))
    if settings['tokenizer'] == 'bpe':
        return tokenizers.train_bpe(sample, settings['vocab_size'])
    if settings['tokenizer'] in KINDS:
        spec = {'kind': settings['tokenizer']}
    else:
        spec = _spec_in(find_path(settings['tokenizer']))
    tokenizer = tokenizers.from_spec(spec)
    # load its files now: errors come early, and forked workers need not load them again
    tokenizer.encode(''.join(chars) if tokenizer.kind == 'char' else '')
    return tokenizer


def _spec_in(folder):
    """Return the tokenizer spec of the run, exported model or dataset in `folder`; UserError if there is none."""
    if (folder / 'ckpt.pt').exists():
        from lib.weights import checkpoint  # needs torch, which nothing else here does
        state = checkpoint.load(folder / 'ckpt.pt', mmap=True)
        if 'tokenizer' in state:
            return state['tokenizer']
        raise UserError(f'tokenizer={folder}: its ckpt.pt has no tokenizer, as nanoGPT writes it; name the folder of '
                        'the dataset that it was trained on')
    elif (folder / 'tokenizer_spec.json').exists():
        try:
            return tokenizers.from_spec(read_json(folder / 'tokenizer_spec.json')).spec
        except ValueError as error:
            raise UserError(f'{folder / "tokenizer_spec.json"} is damaged ({reason(error)})') from None
    elif (folder / 'train.bin').exists():
        return data_folder.tokenizer_spec(folder)
    raise UserError(f'tokenizer={folder}: no ckpt.pt, tokenizer_spec.json or prepared dataset with a tokenizer in it')


def _destination(settings, script, source_text):
    """Return (the folder to write to, whether it is named after the input).

    data/text writes to a folder named after the input, any other script to its own; --name overrides both. UserError
    if the folder has another prepare.py, or if a folder named after the input holds another text: only an explicit
    --name replaces that.
    """
    folder, name, words = script.parent, settings['name'], settings['input'].splitlines()
    name_from_file = bool(words) and folder.name == 'text' and not name
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):  # a shared installation, Kaggle
        folder = Path('data').absolute() / folder.name  # where train.py looks first
    if name_from_file:
        name = re.sub(r'[^\w.-]', '_', Path(words[0].split('#')[0]).name.split('.')[0]) or '_'
    if name:
        folder = folder.parent / name
        if (folder / 'prepare.py').exists() and (name_from_file or folder != script.parent):
            raise UserError(f'data/{name} has its own prepare.py; choose another name with --name=...')
    meta, existing = data_folder.describe_existing(folder)
    if name_from_file and existing and meta.get('source') != source_text:
        raise UserError(f'data/{name} holds {existing}; choose another name with --name=..., or replace it with '
                        f'--name={name}')
    return folder, name_from_file


def _keys(setting):
    """Return the keys in a setting that lists them with commas."""
    return [key.strip() for key in setting.split(',') if key.strip()]


def _has_dialogues(path, settings):
    """True if the first record of a source is a dialogue, unless --text_key, or a text under it, makes it text."""
    if settings['prompt_key']:
        return True
    if settings.was_set('text_key'):
        return False
    first, _ = next(read_text.read(path, settings['encoding'], (), extract=lambda record, place: [(record, True)]),
                    ('', True))
    return isinstance(first, dict) and not set(_keys(settings['text_key'])) & set(first) and dialogue.is_row(first)


def _dialogues(paths, settings, n_left_out):
    """Yield (dialogue, True) of all rows; counts those without an answer in n_left_out[0]."""
    prompt_keys, answer_keys = _keys(settings['prompt_key']), _keys(settings['answer_key'])

    def extract(record, place):
        found = dialogue.read_row(record, place, prompt_keys, answer_keys)
        n_left_out[0] += found is None
        return [] if found is None else [(found, True)]

    for path in paths:
        columns = [*prompt_keys, *answer_keys]
        for found, is_last in read_text.read(path, settings['encoding'], columns, extract=extract):
            if isinstance(found, str):
                raise UserError(f'{path} is a text, and {paths[0]} has questions and answers: prepare them separately')
            yield found, is_last


def _prepare(settings, script, source, val_source, where, delimiter, rewrite, expect):
    words = settings['input'].splitlines()
    source_text = ' '.join(word if word.startswith('hub:') or '://' in word else str(find_path(word).resolve())
                           for word in words)
    folder, name_from_file = _destination(settings, script, source_text)
    old_meta, existing = data_folder.describe_existing(folder)
    by_source = not words and not (folder / 'input.txt').exists()
    paths, val_paths = inputs.find_text(settings, folder, source, val_source, where)
    if name_from_file and not folder.name.strip('_.'):
        raise UserError(f'--input={words[0]} gives the dataset no name; choose one with --name=...')
    keys, kind = [key.strip() for key in settings['text_key'].split(',')], settings['tokenizer']
    if kind not in KINDS:
        kind = _spec_in(find_path(kind))['kind']
    dialogues, n_left_out = not rewrite and _has_dialogues(paths[0], settings), [0]

    def pieces(paths):
        if dialogues:
            return _dialogues(paths, settings, n_left_out)
        found = chain.from_iterable(read_text.read(path, settings['encoding'], keys, delimiter) for path in paths)
        if rewrite:
            return read_text.document(rewrite(''.join(text for text, _ in found)))
        return read_text.heed_marks(found, kind)

    # first pass: the size of the text, and its tokenizer
    enough = 3 if val_paths else int(np.ceil(2 / settings['val_fraction']))  # at least two documents for validation
    max_documents = np.inf if settings['tokenizer'] in ('char', 'bpe') else enough
    both = chain(pieces(paths), pieces(val_paths))
    n_chars, n_documents, chars, sample = chunks.scan(dialogue.as_text(both) if dialogues else both, max_documents)
    if not n_chars:
        others = f' (and {len(paths) - 1} more)' if len(paths) > 1 else ''
        raise UserError(f'{paths[0]} {"has no answers" if n_left_out[0] else "is empty"}{others}')
    append_separator = n_documents > (2 if val_paths else 1)  # a single text has none
    tokenizer = _tokenizer(settings, chars, sample, append_separator)
    marks, n_left_out[0] = dialogue.choose_marks(tokenizer) if dialogues else None, 0

    # second pass: text -> train and val -> chunks -> ids -> files
    if val_paths:
        stream = chain((('train', *piece) for piece in pieces(paths)), (('val', *piece) for piece in pieces(val_paths)))
    elif n_documents >= enough:
        stream = chunks.split_by_document(pieces(paths), settings['val_fraction'])
    elif dialogues:
        raise UserError(f'{paths[0]} has {n_documents} dialogues with an answer; at val_fraction='
                        f'{settings["val_fraction"]} at least {enough} are needed, or a separate --val_input')
    else:
        stream = chunks.split_by_position(pieces(paths), int(n_chars * (1 - settings['val_fraction'])))
    if dialogues:
        gathered = chunks.gather_dialogues(stream)
    else:
        gathered = chunks.gather(stream, tokenizer.safe_split, append_separator)
    tokenized = chunks.tokenize(gathered, tokenizer, settings['num_proc'] or usable_cpus(), marks)
    meta, n_chars = data_folder.write(folder, tokenizer, _with_bar(tokenized), source_text, marks)

    if existing and any(old_meta.get(key) != meta[key] for key in ('tokenizer', 'splits')):
        print(f'data/{folder.name} held {existing}, which this replaced', file=sys.stderr)
    if n_left_out[0]:
        print(f'{n_left_out[0]:,} rows without an answer were left out', file=sys.stderr)
    _report(folder, tokenizer, meta, n_chars, settings['vocab_size'])
    if expect and by_source and not settings.was_set('tokenizer') and not settings.was_set('val_fraction'):
        found = tuple(facts['n_tokens'] for facts in meta['splits'].values())
        if found != tuple(expect):
            print(f'warning: expected {expect[0]:,} and {expect[1]:,} tokens: has the text changed at its source?',
                  file=sys.stderr)


def _with_bar(results):
    """Pass results on, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        yield from results
        return
    from tqdm import tqdm
    with tqdm(desc='tokenizing', unit='B', unit_scale=True) as bar:
        for result in results:
            yield result
            bar.update(result[3])


def _report(folder, tokenizer, meta, n_chars, vocab_size):
    """Print the counts, a preview that was encoded and decoded again, and the command to train with."""
    counts = {split: facts['n_tokens'] for split, facts in meta['splits'].items()}
    print(f'length of dataset in characters: {n_chars:,}')
    if tokenizer.kind == 'char' and (line := advice.unique_characters(tokenizer.chars)):
        print(line)
    print(f'vocab size: {tokenizer.vocab_size:,}')
    for split, n_tokens in counts.items():
        print(f'{split} has {n_tokens:,} tokens')
    if 'chat' in meta:
        answers, text = (sum(facts[key] for facts in meta['splits'].values()) for key in ('answer_bytes', 'n_bytes'))
        print(f'dialogues, marked by {", ".join(map(repr, meta["chat"].values()))}: {answers / text:.0%} of the text '
              'is answers, which is what will be learned')
    print(f'characters per token: {n_chars / sum(counts.values()):.2f}\npreview, encoded and decoded again:')
    start = tokenizer.decode(np.fromfile(folder / 'train.bin', tokenizer.dtype, count=1000))
    for line in [line for line in start.replace(tokenizers.EOT, '\n').splitlines() if line.strip()][:3]:
        ids = tokenizer.encode(line[:30])
        more = ' ...' if len(ids) > 8 else ''
        print(f'  {ids[:8]}{more} -> {tokenizer.decode(ids)}')
    smallest = min(counts, key=counts.get)
    if n_chars < _TINY:
        print(f'warning: {n_chars:,} characters are few: a model will memorise them, and block_size must be below the '
              f'{counts[smallest]:,} tokens of the {smallest} split', file=sys.stderr)
    # configs for this dataset: train_* before the others, and the plain name before train_NAME_record
    paths = sorted((REPO / 'config').glob('*.py'), key=lambda path: (not path.name.startswith('train_'), path.name))
    configs = [path.name for path in paths
               if re.search(rf"^dataset = '{folder.name}'", path.read_text(encoding='utf-8'), re.M)]
    for note in advice.notes(tokenizer, vocab_size, n_chars, sum(counts.values())):
        print(f'note: {note}', file=sys.stderr)
    print(f'train with: {advice.train_command(folder.name, configs, tokenizer, counts)}')


def _show(settings, script):
    """Print how the text of `show` is split into tokens, by the dataset's tokenizer if --tokenizer is not given."""
    folder = script.parent.parent / (settings['name'] or script.parent.name)
    if (folder / 'meta.json').exists() and not settings.was_set('tokenizer'):
        tokenizer = tokenizers.from_spec(data_folder.tokenizer_spec(folder))
    elif settings['tokenizer'] == 'bpe':
        raise UserError('a bpe is trained on a text: prepare a dataset with it, then --show=... --name=ITS_NAME')
    else:
        tokenizer = _tokenizer(settings, settings['show'], [], append_separator=False)
    print('\n'.join(advice.show_tokens(settings['show'], tokenizer)))


def prepare(script_file, source='', val_source='', where='', delimiter='', rewrite=None, expect=(), **defaults):
    """Do the whole work of data/NAME/prepare.py; a user's mistake ends the program with one line.

    source: the text to use without --input and data/NAME/input.txt: a URL, hub:NAME, or a function from the folder to
    a list of paths. val_source: its validation text, if it has a separate one. where: a sentence that says where to
    find a text that cannot be downloaded. delimiter: the string between the documents of a text file. rewrite: a
    function from the whole text to the text to use. expect: the known (train, val) numbers of tokens of `source`.
    defaults: this dataset's values of the settings above.
    """
    script = Path(script_file).resolve()
    namespace = {**globals(), **defaults}
    if {'--help', '-h'} & set(sys.argv[1:]):
        namespace['__doc__'] = ast.get_docstring(ast.parse(script.read_text(encoding='utf-8')), clean=False)
    settings = configure(namespace, check=_check, words='input')
    try:
        if settings['show']:
            return _show(settings, script)
        _prepare(settings, script, source, val_source, where, delimiter, rewrite, expect)
    except OSError as error:
        name = error.filename or script.parent
        raise UserError(f'{name}: {error.strerror or error}; fix that and try again') from None
    except KeyboardInterrupt:
        print('interrupted; run it again', file=sys.stderr)
        raise SystemExit(130) from None
