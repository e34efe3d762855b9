"""What the tests of lib/text/ share: texts, a prepared dataset to look into, and how a user's mistake ends."""
import json

import numpy as np
import pytest

from lib.text import tokenizer

LINES = [f'line {i}: the quick brown fox, number {i * i}, jumps over the lazy dog.\n' for i in range(200)]
TEXT = ''.join(LINES)


def have_gpt2():
    """True if GPT-2's BPE file is cached or can be downloaded."""
    try:
        tokenizer.gpt2().encode('')
    except SystemExit:
        return False
    return True


def skip_without_gpt2():
    if not have_gpt2():
        pytest.skip("GPT-2's BPE file is not on this machine")


class Prepared:
    """What prepare wrote to a folder."""

    def __init__(self, folder):
        self.folder, self.meta = folder, json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        self.tokenizer = tokenizer.from_spec(self.meta['tokenizer'])
        self.ids = {split: np.fromfile(folder / f'{split}.bin', self.meta['dtype']) for split in ('train', 'val')}

    def text(self, split):
        return self.tokenizer.decode(self.ids[split])

    @property
    def whole_text(self):
        return self.text('train') + self.text('val')


def put(path, content):
    """Write str or bytes to `path` and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))
    return path


def json_lines(texts, key='text'):
    return ''.join(json.dumps({key: text}, ensure_ascii=False) + '\n' for text in texts)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fails(capfd, call):
    """Run `call`, check that it ends as a user's mistake does, and return its one line on stderr."""
    with pytest.raises(SystemExit) as end:
        call()
    message = end.value.code if isinstance(end.value.code, str) else capfd.readouterr().err.strip()
    assert isinstance(end.value.code, str) or end.value.code in (1, 2)
    assert '\n' not in message
    return message
