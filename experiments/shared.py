"What the experiments share: settings in words, a slice to tune on, models that cells share, answers"
from dataclasses import replace

from filelock import FileLock

from tpa_nb.save import load_model, save_model
from tpa_nb.train import predict

SLICE = 0.2  # share of the training rows that learning rates are chosen on


def setting(**choices):
    "'keep=36,r=8'"
    return ','.join(f'{k}={v:.0e}' if isinstance(v, float) else f'{k}={v}' for k, v in choices.items())


def choices(text):
    "The dict that `setting` wrote"
    pairs = [part.split('=') for part in text.split(',') if part]
    return {k: v if v.isalpha() else float(v) if 'e' in v else int(v) for k, v in pairs}


def need(script, option, value, what, options):
    "Leave unless `value` was given, which a dry run does without"
    if not value and not options.get('dry_run'):
        raise SystemExit(f'{script}.py: give --{option}, {what}')


def need_data(script, data_dir, options):
    "Leave unless there is a folder with data"
    need(script, 'data_dir', data_dir, 'a folder with <task>/train.parquet and validation.parquet', options)


def known_words(script, option, words, known):
    "The words that an option was given; leave unless all of them are known"
    unknown = [word for word in words if word not in known]
    if unknown:
        raise SystemExit(f"{script}.py: --{option} knows {', '.join(known)}; got {', '.join(map(repr, unknown))}")
    return words


def listed(script, option, text, known):
    "The words of `text`, which commas divide; leave unless all of them are known"
    return known_words(script, option, text.split(','), known)


def cells_of(script, stage, grids):
    "The cells of a stage: `grids` has a function for each"
    known_words(script, 'stage', [stage], grids)
    return grids[stage]()


def at_most(task, rows, seed=0):
    "The task with `rows` of its training rows, which makes it a partial one"
    if len(task.train) <= rows:
        return task
    name = task.name.removesuffix('_partial') + '_partial'
    return replace(task, name=name, train=task.calibration(rows, seed).rows, partial=True)


def slice_of(task, share=SLICE):
    "The task with a slice of its training rows in place of the validation rows"
    train, held = task.split(share, seed=0)
    return replace(task, train=train.rows, validation=held.rows)


def kept(folder, make):
    "The model that `make` makes, from a folder where it was made before; who comes second waits for the first"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{folder}.lock'):
        if not (folder / 'tpa.json').exists():
            save_model(make(), folder, overwrite=True)
    return load_model(folder)


def answers(arch, task):
    "Labels and answers of the validation rows, a digit each, and the scores; of a regression, lists of numbers"
    logits = predict(arch, task)
    labels = task.validation['label'][:]
    found = {'metric': task.main_metric, **task.compute_metrics((logits.numpy(), labels)), 'majority': task.majority}
    if task.is_regression:
        return {**found, 'labels': list(labels), 'answers': [round(x, 4) for x in logits.flatten().tolist()]}
    return {**found, 'labels': ''.join(map(str, labels)), 'answers': ''.join(map(str, logits.argmax(-1).tolist()))}


def steps_of(arch):
    "Steps that a model has been trained for"
    return sum(h.get('steps', 0) for h in arch.history)


def zeros_of(arch):
    "Share of zeros among the weights of attentions and feed-forward layers"
    parts = [p for a in arch.attns for p in (a.q, a.k, a.v, a.o)] + [p for f in arch.ffns for p in (f.up, f.down)]
    weights = {p.name: p.linear.weight for p in parts}.values()  # GPT-2's q, k and v are one matrix
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
