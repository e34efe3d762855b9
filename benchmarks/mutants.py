"""Mutation testing: change one line of the program and see whether a test fails.

    python -m benchmarks.mutants                                  all mutants of all modules
    python -m benchmarks.mutants --per_module=20                  a sample, the same one for the same --seed
    python -m benchmarks.mutants --modules=model.py,kernels.py

A mutant that no test notices is printed with its line. docs/testing.md says how to read the result.

Why not mutmut or cosmic-ray: mutmut 3 finds the function to mutate by its module's name, which is __main__ in the
scripts that our tests run with runpy, and it changes no code outside functions; cosmic-ray starts a new process per
mutant, in which importing torch and transformers takes longer than most tests. Here each mutant is a fork of a process
that has imported them, in a copy of the repository.
"""
import ast
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import REPO, UserError, configure

per_module = 0  # mutants per module, drawn at random; 0 = all
modules = ''  # comma-separated paths such as model.py,lib/generate.py; '' = all
workers = 2  # processes at the same time
seed = 0  # of the sample
out = 'mutants.json'  # file for the results

TESTS = {  # the test files that should notice, the fastest first
    'model.py': ('model', 'generate', 'load_model'),
    'kernels.py': ('kernels', 'model'),
    'configurator.py': ('configurator', 'preflight'),
    'train.py': ('train', 'guard', 'curves', 'log', 'evaluate', 'preflight', 'distributed'),
    'lib/generate.py': ('generate', 'sampling_rules', 'sample'),
    'lib/tasks.py': ('tasks', 'evaluate'),
    'lib/text/dataset.py': ('dataset', 'masks', 'train'),
    'lib/text/tokenizer.py': ('tokenizer', 'data_folder'),
    'lib/training/optim.py': ('optim', 'train'),
    'lib/weights/checkpoint.py': ('checkpoint', 'train'),
}
SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub,
           ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
           ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
           ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}


@dataclass
class Mutant:
    """One change of one line."""
    kind: str
    line: int
    before: str  # the original line
    after: str  # the line that replaces it


def variants(node):
    """Yield (kind, changed copy) for each way to change one node of a syntax tree."""
    def changed(**attributes):
        new = copy.copy(node)
        for name, value in attributes.items():
            setattr(new, name, value)
        return new
    match node:
        case ast.Compare() if len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
            yield 'comparison', changed(ops=[SWAPPED[type(node.ops[0])]()])
        case ast.Compare():
            for i, op in enumerate(node.ops):
                ops = [*node.ops[:i], SWAPPED[type(op)](), *node.ops[i + 1:]]
                yield 'comparison', changed(ops=ops)
        case ast.BinOp() if type(node.op) in SWAPPED and not isinstance(node.left, (ast.JoinedStr, ast.List)):
            yield 'arithmetic', changed(op=SWAPPED[type(node.op)]())
        case ast.AugAssign():
            yield 'arithmetic', changed(op=SWAPPED[type(node.op)]())
            yield 'removed statement', ast.Pass()
        case ast.BoolOp():
            yield 'boolean', changed(op=SWAPPED[type(node.op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield 'boolean', node.operand
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield 'sign', node.operand
        case ast.Constant(value=bool()):
            yield 'constant', changed(value=not node.value)
        case ast.Constant(value=int()):
            yield 'constant', changed(value=node.value + 1)
        case ast.Constant(value=float()):
            yield 'constant', changed(value=2 * node.value or 1.0)
        case ast.IfExp():
            yield 'branches', changed(body=node.orelse, orelse=node.body)
        case ast.Call(func=ast.Name(id='isinstance' | 'getattr' | 'hasattr' | 'setattr')):
            return
        case ast.Call() if len(node.args) > 1 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            yield 'swapped arguments', changed(args=[node.args[1], node.args[0], *node.args[2:]])
        case ast.Expr(value=ast.Call()) | ast.Break() | ast.Continue():
            yield 'removed statement', ast.Pass()
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield 'return value', changed(value=ast.Constant(None))


def mutants_of(path):
    """Return the Mutants of a source file, in the order of its lines.

    Left alone: strings and what is inside an f-string, annotations, decorators, raised messages, statements of several
    lines, and in train.py everything outside functions, which are settings.
    """
    source = path.read_text(encoding='utf-8')
    lines, found = source.splitlines(), []

    def visit(node):
        if isinstance(node, (ast.JoinedStr, ast.Raise, ast.arg, ast.AnnAssign)):
            return
        for name, value in ast.iter_fields(node):
            if name in ('decorator_list', 'annotation', 'returns', 'ctx'):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)
        if getattr(node, 'lineno', 0) != getattr(node, 'end_lineno', None):
            return
        row = lines[node.lineno - 1].encode()
        for kind, new in variants(node):
            text = ast.unparse(ast.fix_missing_locations(new))
            text = f'({text})' if isinstance(new, ast.expr) else text
            after = (row[:node.col_offset] + text.encode() + row[node.end_col_offset:]).decode()
            found.append(Mutant(kind, node.lineno, lines[node.lineno - 1], after))
    tree = ast.parse(source)
    only_functions = path.name == 'train.py'
    for node in tree.body:
        if not only_functions or isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            visit(node)
    return sorted((m for m in found if compiles(source, m)), key=lambda m: m.line)


def mutated(source, mutant):
    """Return the source with the mutant's line in place."""
    lines = source.splitlines(keepends=True)
    lines[mutant.line - 1] = mutant.after + '\n'
    return ''.join(lines)


def compiles(source, mutant):
    """Return whether the mutant is Python and not the same program."""
    try:
        return ast.dump(ast.parse(mutated(source, mutant))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def start(tree, tests):
    """Fork a process that runs the tests in a copy of the repository until one fails; return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        os.setsid()
        log = os.open(tree.parent / f'{tree.name}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(tree)
        sys.path[:] = [str(tree)] + [p for p in sys.path if p not in ('', str(REPO))]
        for name in [n for n in sys.modules if n.split('.')[0] in ('configurator', 'benchmarks', 'lib')]:
            del sys.modules[name]
        import pytest
        status = pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', *tests])
    finally:
        os._exit(int(status))


def run_all(jobs, trees, report):
    """Run jobs [(path, source or None, tests, seconds, tag), ...], one per tree at a time.

    report(tag, status, seconds) is called at the end of each: pytest's exit status, or -1 after a timeout.
    """
    free, running, jobs = list(trees), {}, list(jobs)
    while jobs or running:
        while jobs and free:
            path, source, tests, limit, tag = jobs.pop(0)
            tree = free.pop()
            original = (tree / path).read_text(encoding='utf-8')
            (tree / path).write_text(original if source is None else source, encoding='utf-8')
            running[start(tree, tests)] = tree, path, original, time.monotonic(), limit, tag
        time.sleep(0.02)
        for pid, (tree, path, original, began, limit, tag) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - began
            if not ended and seconds < limit:
                continue
            if not ended:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            (tree / path).write_text(original, encoding='utf-8')
            del running[pid]
            free.append(tree)
            report(tag, os.waitstatus_to_exitcode(status) if ended else -1, seconds)


def copy_tree(target):
    """Copy what the tests need of the repository."""
    ignored = shutil.ignore_patterns('.git', '__pycache__', 'out*', '*.bin', '.ruff_cache', '.pytest_cache', 'mutants*')
    shutil.copytree(REPO, target, ignore=ignored)
    shutil.copy(REPO / 'benchmarks/mutants.py', target / 'benchmarks')
    return target


def main():
    configure(globals())
    chosen = [name for name in modules.split(',') if name] or list(TESTS)
    if unknown := [name for name in chosen if name not in TESTS]:
        raise UserError(f'modules={unknown[0]}: expected some of {", ".join(TESTS)}')
    os.environ.update(PYTHONDONTWRITEBYTECODE='1', OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    sys.dont_write_bytecode = True
    import pytest  # noqa: F401  imported here, so that each fork has them
    import torch
    import torch.utils.checkpoint  # noqa: F401
    import transformers  # noqa: F401
    torch.set_num_threads(1)  # no thread may run when a process forks
    tests = {name: [f'tests/test_{room}.py' for room in TESTS[name]] for name in chosen}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        trees = [copy_tree(Path(folder) / f'tree{i}') for i in range(workers)]
        baseline = {}
        run_all([(name, None, tests[name], 3600, name) for name in chosen], trees,
                lambda name, status, seconds: baseline.update({name: (status, seconds)}))
        if failed := [name for name in chosen if baseline[name][0] != 0]:
            logs = ''.join(log.read_text(encoding='utf-8', errors='replace')[-2000:]
                           for log in Path(folder).glob('*.log'))
            raise UserError(f'the tests of {", ".join(failed)} fail without any change\n{logs}')
        for name in chosen:
            found, source = mutants_of(REPO / name), (REPO / name).read_text(encoding='utf-8')
            if 0 < per_module < len(found):
                found = sorted(random.Random(f'{seed} {name}').sample(found, per_module), key=lambda m: m.line)
            survivors, began = [], time.monotonic()

            def report(mutant, status, seconds, survivors=survivors, name=name):
                if status == 0:
                    survivors.append(mutant)
                    print(f'{name}:{mutant.line}: {mutant.kind}: {mutant.after.strip()}', flush=True)
            run_all([(name, mutated(source, m), tests[name], 30 + 3 * baseline[name][1], m) for m in found], trees,
                    report)
            results[name] = {'mutants': len(found), 'caught': len(found) - len(survivors),
                             'tests_s': baseline[name][1], 'minutes': (time.monotonic() - began) / 60,
                             'survivors': [asdict(m) for m in sorted(survivors, key=lambda m: m.line)]}
            Path(out).write_text(json.dumps(results, indent=1), encoding='utf-8')
    print_table(results)


def print_table(results):
    """Print mutants, caught mutants and minutes per module."""
    print(f'{"module":<28}{"mutants":>8}{"caught":>8}{"":>7}{"minutes":>9}')
    rows = [(name, r['mutants'], r['caught'], r['minutes']) for name, r in results.items()]
    for name, n, caught, minutes in [*rows, ('all', *map(sum, list(zip(*rows))[1:]))]:
        print(f'{name:<28}{n:>8}{caught:>8}{caught / max(1, n):>7.1%}{minutes:>9.1f}')


if __name__ == '__main__':
    main()
