"""Break the library on purpose, one mistake at a time, and expect a notebook to turn red for each.

Works on a copy: the repository is only read. Exit code 1 if a mistake survives.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from check_nbs import Cell, read_notebook

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    "A mistake: in the exported code of `notebook`, `new` stands where `old` stood; it or `also` must turn red"
    mistake: str
    notebook: str
    old: str
    new: str
    also: tuple[str, ...] = ()

    @property
    def module(self) -> str: return f"tpa_nb/{self.notebook.partition('_')[2]}.py"


MUTANTS = (
    Mutant('two heads swapped in the output projection', '00_arch',
           'self.o.keep_in(rows)', 'self.o.keep_in(rows.flip(0))', also=('04_prune',)),
    Mutant('heads shifted by one', '00_arch',
           'head_rows([self.heads.index(h) for h in kept]',
           'head_rows([(self.heads.index(h) + 1) % self.n_heads for h in kept]', also=('04_prune',)),
    Mutant('original ids taken for positions', '00_arch',
           'head_rows([self.heads.index(h) for h in kept]', 'head_rows([h for h in kept]'),
    Mutant('bias dropped', '00_arch',
           'layer.bias = _smaller(layer.bias, index, 0)', 'layer.bias = nn.Parameter(torch.zeros(len(index)))'),
    Mutant('old width remembered', '00_arch',
           "'width': len(kept) * self.head_dim", "'width': of * self.head_dim"),
    Mutant('scores of two heads swapped', '03_importance',
           'out[:, a.row, list(a.heads)] =', 'out[:, a.row, list(a.heads)[::-1]] ='),
    Mutant('absolute value of the sum, not sum of absolute values', '03_importance',
           'd.values.abs().sum(0)', 'd.values.sum(0).abs()'),
    Mutant('division by the number of tokens forgotten', '03_importance',
           '_absolute(derivatives, per) / derivatives.tokens.sum()', '_absolute(derivatives, per)'),
    Mutant('gates of another layer', '03_importance',
           'gates[..., attn.row, list(attn.heads)]', 'gates[..., attn.row - 1, list(attn.heads)]'),
    Mutant('best heads removed', '04_prune',
           'scores[there].sort(descending=True, stable=True)', 'scores[there].sort(stable=True)'),
    Mutant('biases left out of the importance of neurons forgotten', '03_importance',
           'x.detach() if bias is None else x.detach() - bias.detach()', 'x.detach()'),
    Mutant('neurons of up kept, other ones of down', '00_arch',
           'self.down.keep_in(index)', 'self.down.keep_in(index.flip(0))'),
    Mutant('removed and kept heads confused', '04_prune', 'if h not in set(heads)]', 'if h in set(heads)]'),
    Mutant('scale forgotten where the rank differs', '05_lora',
           'scale * v for k, v', 'lora_alpha for k, v'),
    Mutant('block 1 taken for block 10', '05_lora', "f'^{re.escape(name)}'",
           "'.*' + re.escape(name.split('.attention')[0]) + '.*'"),
    Mutant('adapter thrown away instead of merged', '05_lora', 'merge_and_unload(', 'unload('),
    Mutant('second product of the attention scores not counted', '07_profile',
           '2 * 2 * batch_size * seq_len ** 2', '2 * batch_size * seq_len ** 2'),
    Mutant('other heads cut when a checkpoint is rebuilt', '08_save',
           'attn.keep_heads(kept)', 'attn.keep_heads(list(range(len(kept))))'),
    Mutant('a token that passes no threshold runs nothing', '21_moe', 'best[..., :1], True)', 'best[..., :1], False)'),
    Mutant('a router that sees lengths as well as directions', '22_router',
           'F.normalize(x.to(_full(self.first.weight)), dim=-1)', 'x.to(_full(self.first.weight))'),
    Mutant('the last epoch of a router kept, not the best', '22_router',
           'best = state() if found[-1] >= max(found) else best', 'best = state()'),
    Mutant('a table of experts that no checkpoint holds', '22_router',
           "self.register_buffer('table', table if counts is None else _balanced(n_experts, counts))",
           'self.table = table if counts is None else _balanced(n_experts, counts)'),
    Mutant('scale forgotten when a LoRA expert is folded', '23_lora_expert',
           "'down': expert.scaling * expert.lora_down", "'down': expert.lora_down"),
    Mutant('padding counted among the tokens that are to be sparse', '29_sparsity',
           'active_share(h[_real_tokens(self.arch, ffn, batch, len(h))])', 'active_share(h)'),
    Mutant('a copy of the model takes part in the loss of the original', '29_sparsity', 'module is own() and ', ''),
    Mutant('what all tokens share forgotten where others take over', '32_compensate_routing',
           'y - moe.experts(x, chosen, moe.shared)', 'y - moe.experts(x, chosen)'),
)


def exported(root: Path, name: str) -> list[Cell]:
    "Exported cells of the notebook `name`"
    return read_notebook(root/'nbs'/f'{name}.ipynb', root).exported


def places(mutant: Mutant, root: Path) -> int:
    "How often the text that `mutant` changes stands in exported cells"
    return sum(c.source.count(mutant.old) for c in exported(root, mutant.notebook))


def json_text(text: str) -> str:
    "`text` as it stands inside a notebook file"
    return json.dumps(text, ensure_ascii=False)[1:-1]


def apply(mutant: Mutant, root: Path) -> None:
    "Make the mistake in the notebook and in its module"
    for path, write in ((root/'nbs'/f'{mutant.notebook}.ipynb', json_text), (root/mutant.module, str)):
        text = path.read_text(encoding='utf-8')
        path.write_text(text.replace(write(mutant.old), write(mutant.new)), encoding='utf-8')


def green(notebook: str, root: Path) -> tuple[bool, str]:
    "Run a notebook: is it green, and what does it complain of?"
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
    path = root/'nbs'/f'{notebook}.ipynb'
    done = subprocess.run([sys.executable, root/'tests'/'run_notebook.py', path, root/'report.json'], cwd=root, env=env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode == 0, complaint(done.stderr)


def complaint(traceback: str) -> str:
    "The message at the end of a traceback, on one line"
    found = re.findall(r'^[\w.]*(?:Error|Exception)\b.*', traceback, re.M)
    return ' '.join(traceback[traceback.rindex(found[-1]):].split()) if found else ''


def trial(mutant: Mutant, root: Path) -> tuple[bool, str]:
    "Make the mistake in a fresh copy of what the notebooks need: does it survive, and if not, who complains of what?"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)
        shutil.copy(root/'settings.ini', copy)
        for name in ('nbs', 'tpa_nb', 'tests'):
            shutil.copytree(root/name, copy/name, ignore=shutil.ignore_patterns('__pycache__'))
        apply(mutant, copy)
        for notebook in (mutant.notebook, *mutant.also):
            passed, why = green(notebook, copy)
            if not passed: return False, f'{notebook}: {why}'
        return True, ''


def main(argv: list[str] | None = None) -> int:
    "Try every mistake; 1 if one survives"
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default='', help='try the mistakes of this notebook, e.g. 04_prune')
    args = p.parse_args(argv)
    chosen = [m for m in MUTANTS if args.only in m.notebook]
    alive = 0
    for m in chosen:
        survived, why = trial(m, ROOT)
        alive += survived
        print(f"{'SURVIVED' if survived else 'caught'}: {m.mistake} in {m.notebook}  {why[:100]}", flush=True)
    print(f'{len(chosen) - alive} of {len(chosen)} mistakes caught')
    return 1 if alive else 0


if __name__ == '__main__':
    sys.exit(main())
