"""Short dialogues in English and Chinese, made by rule: six kinds of questions whose answers follow from what was said.

    python data/dialogue/prepare.py

Nothing is downloaded, and the rows are the same on every machine. Each question asks about a combination: a greeting
and a name, a person and a place, a thing and its colour, a pet and what it is called, two numbers, the letters of a
word. A tenth of the combinations is held out: they occur in validation dialogues and never in training, not even in
a sentence that is not asked about. There are hundreds of names, or a model would memorise who was never where
instead of reading the sentence. So a right answer to a validation question cannot have been memorised. A fact names
first what its question names: a small model finds in minutes what follows a word, and not what comes before it.
"""
import json
import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.text.prepare import prepare

N_TRAIN, N_VAL = 50_000, 1_200  # dialogues
LONGEST = 250  # characters of a dialogue with its marks; config/train_dialogue.py has a context of 256

ONES = 'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen ' \
       'seventeen eighteen nineteen'.split()
TENS = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()
WORDS = {
    'en': {
        'greetings': 'hello|hi|hey|good morning|good evening|good day|good night|greetings'.split('|'),
        'names': [a + b for a in 'An Be Cla Da Em Fri Gra Hen Is Ja Ka Le Ma Ni Ol Pa Ro Sa Ti Vi'.split()
                  for b in 'na la ra ric do mi sa ton bert vin lis ko ren das mar nel po rik tha va'.split()],
        'places': 'garden kitchen library park school office station market museum hotel forest harbour cellar tower '
                  'theatre bakery'.split(),
        'things': 'ball cup hat car door chair book bag lamp coat boat box table pen plate spoon scarf shirt bottle '
                  'bench kite bell brush clock'.split(),
        'colours': 'red blue green yellow black white brown grey pink orange'.split(),
        'pets': 'cat dog horse bird fish rabbit'.split(),
        'called': 'Milo Luna Max Bella Rocky Coco Felix Daisy Oscar Ruby Simba Nala Toby Lily Jasper Honey'.split(),
        'parts': [c + v for c in 'bdfgklmnprst' for v in 'aeiou'],  # of made-up words
        'greet': ('{0}, I am {1}', '{0}! my name is {1}.'), 'greeted': '{0}, {1}!',
        'where_fact': '{0} is in the {1}.', 'where': ('where is {0}?', 'where can I find {0}?'),
        'at': '{0} is in the {1}.', 'who_fact': 'in the {1} is {0}.', 'who': ('who is in the {1}?',),
        'has_colour': 'the {0} is {1}.', 'colour': ('what colour is the {0}?', 'what is the colour of the {0}?'),
        'sum': ('what is {0} plus {1}?', '{0} plus {1}'), 'reverse': ('reverse the word {0}', 'write {0} backwards'),
        'count': ('how many letters are in {0}?', 'count the letters of {0}'), 'counted': '{0}',
        'tell': ('my {0} is called {1}', 'I have a {0}, its name is {1}.'), 'told': 'I will remember that.',
        'recall': ('what is my {0} called?', 'what is the name of my {0}?'), 'space': ' ',
    },
    'zh': {
        'greetings': '你好 您好 早上好 上午好 下午好 晚上好 晚安 嗨'.split(),
        'names': [a + b for a in '李王张刘陈杨赵曹周吴徐孙胡朱高邓何郭唐罗'
                  for b in '伟芳敏洋静帆磊杰霞涛艳'],
        'places': '花园 厨房 图书馆 公园 学校 办公室 车站 市场 博物馆 饭店 森林 海边 银行 医院 教室 剧院'.split(),
        'things': '球 杯子 帽子 汽车 门 椅子 铅笔 书包 灯 大衣 船 盒子 桌子 盘子 勺子 围巾 衬衫 '
                  '瓶子 长凳 风筝 铃铛 刷子 闹钟 雨伞'.split(),
        'colours': '红色 蓝色 绿色 黄色 黑色 白色 棕色 灰色 粉色 橙色'.split(),
        'pets': '猫 狗 马 鸟 鱼 兔子'.split(),
        'called': '咪咪 豆豆 旺财 小白 小黑 毛毛 乐乐 球球 花花 点点 贝贝 阿福 团团 圆圆 来福 雪儿'.split(),
        'parts': list('山水火风云雨花草树木日月星河海天地春夏秋冬东西南北'),
        'greet': ('{0}，我是{1}', '{0}！我叫{1}。'), 'greeted': '{0}，{1}！',
        'where_fact': '{0}在{1}。', 'where': ('{0}在哪里？', '{0}在什么地方？'), 'at': '{0}在{1}。',
        'who_fact': '{1}里有{0}。', 'who': ('{1}里有谁？', '谁在{1}里？'),
        'has_colour': '{0}是{1}的。', 'colour': ('{0}是什么颜色？', '{0}是什么颜色的？'),
        'sum': ('{0}加{1}等于多少？', '{0}加{1}'), 'reverse': ('把{0}倒过来写', '反过来念{0}'),
        'count': ('{0}有几个字？', '数一数{0}的字数'), 'counted': '{0}个',
        'tell': ('我的{0}叫{1}', '我养的{0}，名字叫{1}。'), 'told': '我记住了。',
        'recall': ('我的{0}叫什么？', '我的{0}叫什么名字？'), 'space': '',
    },
}
# how often each kind of question is asked; the kinds that a model learns last are asked most
TASKS = {'greet': 1, 'where': 3, 'who': 3, 'colour': 2, 'sum': 6, 'reverse': 1, 'count': 1, 'remember': 1}


def held_out(*combination):
    """True for the tenth of all combinations that only validation dialogues hold."""
    return zlib.crc32('|'.join(map(str, combination)).encode()) % 10 == 0


def number(n, language):
    """Return n, 0 to 99, in words."""
    if language == 'zh':
        digits = '零一二三四五六七八九'
        tens = ('' if n < 10 else '十' if n < 20 else digits[n // 10] + '十')
        return tens + (digits[n % 10] if n % 10 or n == 0 else '')
    return ONES[n] if n < 20 else TENS[n // 10 - 2] + (f' {ONES[n % 10]}' if n % 10 else '')


def draw(rng, held, *lists):
    """Draw one of each list, until the combination is a held-out one, or is not, as `held` says."""
    while True:
        found = tuple(rng.choice(words) for words in lists)
        if held_out(*found) == held:
            return found


def facts(rng, held, first, second):
    """Return two or three pairs that share no word, in any order, and the one to ask about."""
    while True:
        pairs = [draw(rng, held, first, second)] + [draw(rng, False, first, second) for _ in range(rng.choice((1, 2)))]
        if len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs):
            return rng.sample(pairs, len(pairs)), pairs[0]


def word(rng, held, words):
    """Return a made-up word of two to four parts."""
    while True:
        parts = [rng.choice(words['parts']) for _ in range(rng.choice((2, 3, 4)))]
        made = ''.join(parts) + (rng.choice(['', 'n', 's', 'r']) if words['space'] else '')
        if held_out(made) == held:
            return made


def exchange(rng, task, language, held):
    """Return (question, answer) of a task that takes one."""
    w = WORDS[language]
    if task == 'greet':
        pair = draw(rng, held, w['greetings'], w['names'])
        return rng.choice(w['greet']).format(*pair), w['greeted'].format(*pair)
    if task in ('where', 'who'):
        pairs, asked = facts(rng, held, w['names'], w['places'])
        answer = w['at'].format(*asked) if task == 'where' else asked[0]
        fact = w[f'{task}_fact']
        return w['space'].join([*(fact.format(*p) for p in pairs), rng.choice(w[task]).format(*asked)]), answer
    if task == 'colour':
        pairs, asked = facts(rng, held, w['things'], w['colours'])
        return w['space'].join([*(w['has_colour'].format(*p) for p in pairs),
                                rng.choice(w['colour']).format(*asked)]), asked[1]
    if task == 'sum':
        while True:
            numbers = rng.sample((rng.randint(1, 90), rng.randint(1, 9)), 2)
            if held_out(*sorted(numbers)) == held:  # 47 + 8 and 8 + 47 are held out together
                asked = (number(n, language) for n in numbers)
                return rng.choice(w['sum']).format(*asked), number(sum(numbers), language)
    made = word(rng, held, w)
    count = '两' if (language, len(made)) == ('zh', 2) else number(len(made), language)
    answer = made[::-1] if task == 'reverse' else w['counted'].format(count)
    return rng.choice(w[task]).format(made), answer


def draw_task(rng, tasks):
    """Draw one of the tasks as often as TASKS says."""
    return rng.choices(tasks, [TASKS[task] for task in tasks])[0]


def exchanges(rng, task, language, held):
    """Return [(task, question, answer), ...]: one, or three where something is remembered over another question.

    The task is '' where the answer is always the same, so that it is not scored.
    """
    if task != 'remember':
        return [(task, *exchange(rng, task, language, held))]
    w, between = WORDS[language], draw_task(rng, [t for t in TASKS if t != 'remember'])
    pair = draw(rng, held, w['pets'], w['called'])
    return [('', rng.choice(w['tell']).format(*pair), w['told']), (between, *exchange(rng, between, language, held)),
            ('remember', rng.choice(w['recall']).format(*pair), pair[1])]


def dialogue(rng, held):
    """Return a row: {'language', 'tasks', 'messages'}, as long as its drawn limit allows."""
    language = 'en' if rng.random() < 0.7 else 'zh'  # Chinese is shorter, so its dialogues have more questions
    limit = LONGEST if rng.random() < 0.7 else rng.randint(60, LONGEST)
    said, size, misses = [], 1, 0
    while misses < 4 or not said:
        new = exchanges(rng, draw_task(rng, list(TASKS)), language, held)
        added = sum(len(question) + len(answer) + 10 for _, question, answer in new)  # 10 characters of marks
        if size + added <= (limit if said else LONGEST):
            said, size = said + new, size + added
        else:
            misses += 1
    return {'language': language, 'tasks': [task for task, _, _ in said],
            'messages': [{'role': role, 'content': text} for _, *both in said
                         for role, text in zip(('user', 'assistant'), both, strict=True)]}


def write_rows(folder):
    """Write both files and return [the training one]."""
    folder.mkdir(exist_ok=True)
    print(f'writing {N_TRAIN + N_VAL:,} dialogues', file=sys.stderr)  # it takes some seconds
    for name, count, held in (('input-train.jsonl', N_TRAIN, False), ('input-val.jsonl', N_VAL, True)):
        rng = random.Random(f'dialogue {held}')
        rows = (json.dumps(dialogue(rng, held), ensure_ascii=False) for _ in range(count))
        (folder / name).write_text('\n'.join([*rows, '']), encoding='utf-8', newline='')
    return [str(folder / 'input-train.jsonl')]


if __name__ == '__main__':
    prepare(__file__, source=write_rows, val_source=str(Path(__file__).resolve().with_name('input-val.jsonl')),
            tokenizer='char')
