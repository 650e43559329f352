"""The files that a run reads and writes: data files and prediction files."""

import os
from pathlib import Path

from config import REPOSITORY, TASKS, UserError
from datasets import FETCH, TaskDataset, odd_labels, read_task_file
from runtime.files import OutputError
from runtime.script import say
from training.flags import SPLITS

NOT_FOUND = "no such file; name the folder of the run's data files with --data_dir"


def data_paths(flags):
    """Path of every file, `{task: {split: Path}}`.

    If neither a file nor --data_dir was named and none of the course's files is in data/, all are
    the sample's, and this says so.
    """
    folder = Path(flags.data_dir or "data")
    named = any(getattr(flags, f"{name}_{split}") for name in flags.tasks for split in SPLITS)
    files = [folder / task.file_name(split) for task in TASKS.values() for split in SPLITS]
    # A dangling link is broken, not missing.
    is_missing = not any(map(os.path.lexists, files)) and os.path.lexists(folder) == folder.exists()
    if is_missing and not flags.data_dir and not named:
        say(
            f"warning: none of the course's files is in {folder}/: using the small generated "
            f"sample in data/sample instead, good for a first run only; {FETCH} --out {folder}"
        )
        folder = REPOSITORY / "data" / "sample"
    return {
        name: {
            split: Path(getattr(flags, f"{name}_{split}") or folder / TASKS[name].file_name(split))
            for split in SPLITS
        }
        for name in flags.tasks
    }


def paths_of_run(description):
    """As `data_paths`, for the values of a run's `run.json`.

    If the run has no test file, the path is beside its dev file: one may have been added later.
    """
    paths = {}
    for name, files in description["data"].items():
        paths[name] = {split: Path(file["path"]) for split, file in files.items()}
        paths[name].setdefault("test", paths[name]["dev"].with_name(TASKS[name].file_name("test")))
    return paths


def find_data(command, earlier):
    """As `data_paths`, checked: predictions can be written, and replace no data.

    `earlier` are the values of `run.json` of a resumed run, else None: its own files are taken
    unless the command names others.
    """
    flags = command.flags
    if earlier is None or "data_dir" in command.given:
        paths = data_paths(flags)
    else:
        paths = paths_of_run(earlier)
        for name, split in ((name, split) for name in paths for split in SPLITS):
            if f"{name}_{split}" in command.given:
                paths[name][split] = Path(getattr(flags, f"{name}_{split}"))
        for path in (paths[name][split] for name in paths for split in earlier["data"][name]):
            if not os.path.lexists(path):
                raise UserError(f"{path}: {NOT_FOUND}")
        if uses_sample(earlier):
            say("warning: the data is the small generated sample, as when the run began")
    check_output_paths(flags, paths)
    return paths


def uses_sample(description):
    """Whether a run, by the values of its `run.json`, has a data file of the generated sample."""
    files = (file for files in description["data"].values() for file in files.values())
    return any(Path(file["path"]).parent.parts[-2:] == ("data", "sample") for file in files)


def output_path(flags, name, split):
    """Path of a prediction file."""
    path = getattr(flags, f"{name}_{split}_out")
    return Path(path or Path(flags.predictions_dir) / TASKS[name].output_name(split))


def check_output_paths(flags, data):
    """Check, before hours of training, that the prediction files can be written.

    `data` is what `data_paths` returned: predictions must not replace it. Raises `UserError`, or
    `OutputError` if only the permission is missing.
    """
    taken = {os.path.realpath(path): "data" for files in data.values() for path in files.values()}
    for name, split in ((name, split) for name in flags.tasks for split in ("dev", "test")):
        what, path = f"{name} {split}", output_path(flags, name, split)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or (path.exists() and not path.is_file()):
            raise UserError(f"{path}: not a file; predictions need a new file, or one to replace")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: for predictions; {folder} is not writable")
        other = taken.setdefault(os.path.realpath(path), what)
        if other == "data":
            raise UserError(f"{path}: a data file; the predictions ({what}) would replace it")
        if other != what:
            raise UserError(f"{path}: one file for several predictions ({other}, {what})")


def read_data(paths, flags):
    """Read every file: `{task: {split: TaskFile}}`; says what was skipped or is missing."""
    files = {}
    for name, of_task in paths.items():
        files[name] = {}
        for split, path in of_task.items():
            if split == "test" and not os.path.lexists(path):
                if flags.require_test:
                    raise UserError(f"{path}: no such file, and --require_test was given")
                if getattr(flags, f"{name}_test"):
                    raise UserError(f"--{name}_test {path}: no such file")
                say(f"warning: {path}: no such file; no test predictions for {name}")
                continue
            files[name][split] = read_task_file(path, TASKS[name], split)
            for warning in files[name][split].warnings:
                say(f"warning: {warning}")
        if problem := odd_labels(TASKS[name], files[name]["train"].examples):
            say(f"warning: {of_task['train']}: {problem}")
    return files


def of_split(data, split):
    """The files or datasets of one split by task, of those tasks that have it."""
    return {name: of_task[split] for name, of_task in data.items() if split in of_task}


def tokenize_data(files, model):
    """The files of `read_data` as `{task: {split: TaskDataset}}`, for a `MultitaskBERT`."""
    return {
        name: {
            split: TaskDataset(file.examples, TASKS[name], model.tokenizer, model.config.max_length)
            for split, file in of_task.items()
        }
        for name, of_task in files.items()
    }
