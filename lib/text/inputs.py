"""From what a user names (files, folders, globs, addresses, hub datasets) to files, with what is left out named."""
import glob
import os
import re
import sys
from pathlib import Path

from configurator import UserError, find_path
from lib.text import containers
from lib.text.download import download, own_file


def find(flag, words, folder, reuse=False):
    """Return the files that `words` name, in order: folders with everything in them, globs expanded, URLs downloaded.

    words: the values of the setting `flag`. Each download goes to another file in `folder`; reuse: one that is there
    already is used. UserError if a word names nothing.
    """
    paths = []
    for word in words:
        if word.startswith('hub:'):
            paths.append(word)
        elif '://' in word:
            path = own_file(folder, word)
            paths.append(path if reuse and path.exists() else download(word, path))
        else:
            paths += _find_files(flag, word)
    return paths


def _find_files(flag, word):
    path, left_out = find_path(word), []
    if path.is_dir():
        found = []
        for file in _everything_in(path, left_out):
            if what := containers.not_text(file):
                left_out.append((str(file), what))
            else:
                found.append(file)
    elif path.exists():
        if not path.is_file():
            raise UserError(f'--{flag}={word} is a pipe or device, which can be read only once, and prepare reads '
                            'twice; save the text to a file')
        found = [path]
    else:
        matches = [Path(name) for name in glob.glob(str(path), recursive=True)]
        found = sorted((p for p in matches if not p.is_dir()), key=lambda p: p.as_posix())
        if '**' not in word:
            left_out += [(str(p), 'a folder; ** reads those, too') for p in matches if p.is_dir()]
    if left_out:
        named = ', '.join(f'{name} ({why})' for name, why in left_out[:3]) + (' ...' if len(left_out) > 3 else '')
        containers.note(f'--{flag}={word}: left out {len(left_out):,} files or folders: {named}')
    if not found:
        reason = 'no such file or folder'
        if path.is_dir():
            reason = 'no text in it'
        elif glob.has_magic(str(path)):
            reason = 'the pattern matches no file'
        raise UserError(f'--{flag}={word}: {reason}{_in_quotes(word)}')
    return found


def _in_quotes(word):
    """Return advice if `word` follows another flag: --name=my book gives the name "my" and the file "book"."""
    before = next((one for one, other in zip(sys.argv, sys.argv[1:]) if other == word), '')
    if not re.fullmatch('--(?!(val_)?input)[a-z_]+=.+', before):
        return ''
    return f'; if it belongs to {before}, a value with spaces needs quotes: "{before} {word}"'


def _everything_in(folder, left_out):
    """Return the files in a folder and all folders in it, in order; hidden ones go to left_out as (name, 'hidden').

    Links to folders are followed, once each. UserError for a folder that cannot be read.
    """
    def refuse(error):
        raise UserError(f'{error.filename} cannot be read: {error.strerror}')

    found, seen = [], set()
    for where, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(where))
        hidden = [name for name in (*folders, *files) if name.startswith('.')]
        left_out += [(str(Path(where, name)), 'hidden') for name in hidden]
        folders[:] = [name for name in folders if name not in hidden
                      and os.path.realpath(os.path.join(where, name)) not in seen]
        found += [Path(where, name) for name in files if name not in hidden and Path(where, name).is_file()]
    return sorted(found, key=lambda p: p.as_posix())


def find_text(settings, folder, source, val_source, where):
    """Return (paths, val_paths) of the text: from --input, else data/NAME/input.txt, else the script's source."""
    words, val_words = settings['input'].splitlines(), settings['val_input'].splitlines()
    by_hand = folder / 'input.txt'
    if not words and by_hand.exists():
        words = [str(by_hand)]
    elif not words and source:
        words = source(folder) if callable(source) else [source]
        if val_source and not val_words:
            is_file = '://' not in val_source and not val_source.startswith('hub:')
            val_words = [str(folder / Path(val_source).name) if is_file else val_source]
    elif not words:
        hint = f'. {where}' if where else ''
        raise UserError(f'no text to read; pass it with --input=PATH, or put it at {by_hand}{hint}')
    reuse = not settings['input']  # the text of the script, which does not change
    return find('input', words, folder, reuse), find('val_input', val_words, folder, reuse)
