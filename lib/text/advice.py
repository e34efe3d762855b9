"""What prepare tells a reader about a text besides the counts: its characters, its tokens, and what to do next."""
from lib.machine.console import counted

FEW_CHARACTERS = 200  # vocabularies below this size are printed
FEW_TOKENS = 2_000_000  # too few to train 50,257 embeddings of GPT-2's vocabulary from scratch


def unique_characters(chars):
    """Return the line with all characters of a vocabulary, as nanoGPT prints it; '' for a vocabulary that is large."""
    if len(chars) >= FEW_CHARACTERS:
        return ''
    shown = ''.join(char if char == '\n' or char.isprintable() else repr(char)[1:-1] for char in chars)
    return f'all the unique characters: {shown}'


def notes(tokenizer, asked, n_chars, n_tokens):
    """Return remarks on how the tokenizer fits the text, each one line.

    asked: the vocabulary size that the user asked for. n_chars, n_tokens: of the whole text.
    """
    found, kind = [], tokenizer.kind
    if kind == 'bpe' and tokenizer.vocab_size < asked:
        found.append(f'vocab size is {tokenizer.vocab_size:,} instead of {asked:,}: the text has no more '
                     'pairs of tokens that occur often enough to merge')
    if kind in ('gpt2', 'bpe') and n_tokens > n_chars:
        better = {'gpt2': 'unless you fine-tune GPT-2, use --tokenizer=bpe or char',
                  'bpe': 'raise --vocab_size, or use --tokenizer=char'}[kind]
        found.append(f'{n_tokens:,} tokens for {n_chars:,} characters: this tokenizer does not fit the text; {better}')
    if kind == 'gpt2' and n_tokens < FEW_TOKENS:
        found.append(f'{n_tokens:,} tokens are too few to learn the {tokenizer.vocab_size:,} tokens of GPT-2 from '
                     'scratch: fine-tune GPT-2, or prepare with --tokenizer=char or bpe')
    if kind == 'char' and '\r' in tokenizer.chars:
        found.append(r"the text has carriage returns (Windows line ends); \r has become a character of the vocabulary. "
                     """To copy it without them: python -c "open('NEW', 'wb').write(open('FILE', 'rb').read()"""
                     r""".replace(b'\r', b''))"; then prepare NEW""")
    return found


def train_command(name, configs, tokenizer, counts):
    """Return the command to type after prepare.

    configs: names of the config files made for this dataset, the best one first. counts: {split: number of tokens}.
    Of few tokens GPT-2's vocabulary is not learned from scratch: then one that fine-tunes comes first.
    """
    few = tokenizer.kind == 'gpt2' and sum(counts.values()) < FEW_TOKENS
    if configs:
        best = next((name for name in configs if few and name.startswith('finetune')), configs[0])
        return f'python train.py config/{best}'
    config, context = ('finetune_shakespeare.py', 128) if few else ('train_shakespeare_char.py', 256)
    command = f'python train.py config/{config} --dataset={name} --out_dir=out-{name}'
    longest = min(counts.values()) - 1
    if longest < context:  # the largest power of two that both splits can fill
        command += f' --block_size={1 << max(0, longest.bit_length() - 1)}'
        if longest < 4:  # short contexts are quarters of it
            command += ' --context_warmup=0'
    return command


def show_tokens(text, tokenizer):
    """Return lines that show how `text` is split into tokens: one line per token with its id and its text.

    A token that is only part of a character is shown as its bytes.
    """
    ids = tokenizer.encode(text)
    counts = ((len(text), 'character'), (len(text.encode()), 'byte'), (len(ids), 'token'))
    lines = [f'{tokenizer.kind}: {", ".join(counted(n, noun) for n, noun in counts)}']
    for i in ids:
        data = tokenizer.decode_bytes([i])
        try:
            shown = repr(data.decode('utf-8'))
        except UnicodeDecodeError:
            shown = f'part of a character, bytes {data.hex(" ")}'
        lines.append(f'{i:>8}  {shown}')
    return [*lines, f'decoded again: {tokenizer.decode(ids)}']
