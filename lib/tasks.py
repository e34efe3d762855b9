"""Public benchmarks of language models: their files, the requests they make of a model, and how results are scored.

HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings follows a context. LAMBADA (Paperno et al.
2016, arXiv:1606.06031): the last word of a text that needs all of it. A request is (context ids, continuation ids). Its
result is (the continuation's summed loss in nats, its number of tokens, whether greedy decoding would give it).
"""
import math
import re

from configurator import REPO, UserError
from lib.text.download import download
from lib.text.schema import parse_json
from lib.text.tokenizer import encoded

URL = {'hellaswag': 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl',
       'lambada': 'https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl'}
KEYS = {'hellaswag': ('ctx', 'endings', 'label'), 'lambada': ('text',)}
RULE = {'hellaswag': 'context and ending as released; acc_norm: lowest mean loss per token, acc: lowest summed loss',
        'lambada': 'detokenised; acc: greedy decoding gives the last word, perplexity: of the whole word'}


def read(task, path, limit=0):
    """Return the items of a task, the first `limit` or all (0), from JSON lines at `path`; None downloads them first.

    UserError names a line that is not an item.
    """
    if path is None:
        path = REPO / 'data' / task / 'input.jsonl'
        if not path.exists():
            try:
                download(URL[task], path)
            except UserError as error:
                reason = error.message.split(';')[0]
                raise UserError(f'{reason}; put it at {path}, or name a copy with --input=PATH') from None
    items = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                item = parse_json(line)
            except ValueError as error:
                raise UserError(f'{path}:{number}: not JSON ({error}); expected one object per line') from None
            if not isinstance(item, dict) or not all(key in item for key in KEYS[task]):
                raise UserError(f'{path}:{number}: expected an object with {", ".join(KEYS[task])}')
            if problem := _item_problem(task, item):
                raise UserError(f'{path}:{number}: {problem}')
            items.append(item)
        if len(items) == limit > 0:
            break
    if not items:
        raise UserError(f'{path} holds no items')
    return items


def _item_problem(task, item):
    """Return what is wrong with the values of an item; '' if its task can be asked."""
    texts = {'text': item['text']} if task == 'lambada' else {}
    if task == 'hellaswag':
        endings = item['endings']
        if type(item['ctx']) is not str:
            return f'ctx is a {type(item["ctx"]).__name__}, expected a text'
        if type(endings) is not list or not endings:
            return f'endings is {str(endings)[:40]!r}, expected a list of texts'
        label = str(item['label'])
        if not label.isdecimal() or len(label) > 9 or int(label) >= len(endings):
            return f'label is {label[:40]!r}, expected 0 to {len(endings) - 1}'
        texts.update({f'ending {i}': ending for i, ending in enumerate(endings)})
    for key, text in texts.items():
        if type(text) is not str or not text.strip():
            return f'{key} is {str(text)[:40]!r}, expected a text'
    try:
        encoded(''.join([*texts.values(), item.get('ctx', '')]))
    except UserError as error:
        return error.message
    return ''


def requests(task, items, tok):
    """Return the requests of a task: one per ending for HellaSwag, one per text for LAMBADA."""
    if task == 'hellaswag':
        return [(tok.encode(item['ctx']) or tok.start_ids, tok.encode(' ' + ending))
                for item in items for ending in item['endings']]
    texts = [detokenize(item['text']).rstrip() for item in items]
    cuts = [max(text.rfind(' '), text.rfind('\n'), 0) for text in texts]  # the last word keeps the space before it
    return [(tok.encode(text[:cut]) or tok.start_ids, tok.encode(text[cut:])) for text, cut in zip(texts, cuts)]


def scores(task, items, results):
    """Return {name: value} by the task's RULE from the results of its requests; of equal endings the first counts."""
    if task == 'lambada':
        return {'acc': sum(is_greedy for _, _, is_greedy in results) / len(items),
                'perplexity': math.exp(min(700, sum(nats for nats, _, _ in results) / len(items)))}
    normed, summed, results = 0, 0, iter(results)
    for item in items:
        four = [next(results) for _ in item['endings']]
        means, sums = [nats / n_tokens for nats, n_tokens, _ in four], [nats for nats, _, _ in four]
        normed += means.index(min(means)) == int(item['label'])
        summed += sums.index(min(sums)) == int(item['label'])
    return {'acc_norm': normed / len(items), 'acc': summed / len(items)}


def detokenize(words):
    """Return a text that was split into words and punctuation marks in its usual form; other texts are unchanged."""
    if not re.search(r"``| n't\b| ,| \.(?!\.)", words):
        return words
    words = re.sub(r"`` ?| ?''", '"', words)
    words = re.sub(r" (n't|'(?:s|m|d|ll|re|ve)\b|[.,;:!?%)\]])", r'\1', words)
    return re.sub(r'([(\[$]) ', r'\1', words)
