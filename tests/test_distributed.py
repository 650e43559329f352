"""Several gloo processes against one: the same losses, gradients, weights and files.

The jobs of `tests/distributed_worker.py` run one after the other in as few processes as possible;
the tests compare what they wrote down. fp32, dropout off, one thread a process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, SAMPLE
from safetensors.torch import load_file

import distributed
from bert import BertModel
from preparation import encode_in_advance
from script import StopSignals
from tokenizer import BertTokenizer

WORKER = REPOSITORY / "tests" / "distributed_worker.py"
SCRIPT = REPOSITORY / "multitask_classifier.py"
STEPS = 10
TOLERANCE = 1e-6  # relative; for gradients and weights of the norm of all of them together
# A row of this table gets the fp32 sum over every token of a step, one after the other, which one
# process too knows no better.
SUMMED_OVER_TOKENS, SUM_TOLERANCE = "token_type_embeddings", 5e-6
BOTH = ["--unsupervised_simcse", "--supervised_simcse"]
LORA = ["--fine-tune-mode", "LoRA", "--LoRA_r", "4"]
COMPARED = {  # what is the same on one process and on two
    "full": BOTH,
    "lora": [*BOTH, *LORA],
}
COMPARED_SLOWLY = {
    "last": ["--fine-tune-mode", "last-linear-layer"],
    "unsupervised": ["--unsupervised_simcse"],
    "supervised": ["--supervised_simcse", "--tasks", "para", "sts"],
    "surgery": [*BOTH, "--gradient_surgery"],
    "surgery_lora": [*BOTH, *LORA, "--gradient_surgery", "mean"],
    "accumulate": [*BOTH, "--accumulate", "2"],
    "joint": [*BOTH, "--pair_encoding", "joint"],
    "both": [*BOTH, "--pair_encoding", "both", "--task_batch_sizes", "para=8"],
}


@pytest.fixture(scope="module")
def encoder_folder(toy_vocab, tiny_config, tmp_path_factory):
    """A tiny random encoder with its vocabulary."""
    torch.manual_seed(11711)
    folder = tmp_path_factory.mktemp("encoder")
    BertModel(tiny_config).save_pretrained(folder, BertTokenizer(toy_vocab, model_max_length=40))
    return folder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A cut of the sample: 60 rows of each file."""
    folder = tmp_path_factory.mktemp("data")
    for path in SAMPLE.glob("*.csv"):
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / path.name).write_text("".join(rows[:61]), encoding="utf-8")
    return folder


class Bench:
    """Starts processes in a folder of its own."""

    def __init__(self, folder, encoder, data):
        self.folder, self.encoder, self.data = folder, encoder, data

    def args(self, where, *more):
        """The training script's arguments, its output under the folder `where`."""
        flags = {
            "--pretrained": self.encoder, "--data_dir": self.data, "--precision": "fp32",
            "--hidden_dropout_prob": 0, "--epochs": 1, "--steps_per_epoch": STEPS,
            "--batch_size": 16, "--max_length": 10, "--log_every": 5,
            "--runs_dir": self.folder / where / "runs",
            "--predictions_dir": self.folder / where / "predictions",
        }  # fmt: skip
        return [str(word) for flag in flags.items() for word in flag] + list(more)

    def start(self, processes, script, *args):
        """`script` under torchrun, or by itself where `processes` is 1."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher = [] if processes == 1 else [*torchrun, str(processes)]
        return subprocess.Popen(
            [sys.executable, *launcher, str(script), *map(str, args)], cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, processes, script, *args, seconds=120):
        """As `start`, to the end: (exit code, standard output, standard error)."""
        process = self.start(processes, script, *args)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            raise
        return process.returncode, out, err

    def do_jobs(self, name, processes, jobs):
        """Run jobs of the worker; returns the folder of its records."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "jobs.json").write_text(json.dumps(jobs))
        code, _, err = self.run(processes, WORKER, folder, seconds=60 + 20 * len(jobs))
        assert code == 0, err
        (folder / "errors.txt").write_text(err)
        return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory, encoder_folder, data_folder):
    return Bench(tmp_path_factory.mktemp("bench"), encoder_folder, data_folder)


def record(folder, name):
    """What the worker's rank 0 wrote of a job: (exit code, losses by step, tensors)."""
    values = json.loads((folder / f"{name}.json").read_text())
    losses = [step["values"] for step in values["steps"]]
    return values["code"], losses, load_file(folder / f"{name}.safetensors")


def hashes(folder, name, rank):
    """Hash of the weights after each step on one process."""
    return json.loads((folder / f"{name}.rank{rank}.json").read_text())


def loss_difference(first, second):
    """Largest relative difference of any loss in any step; the log's cosines are none."""
    assert len(first) == len(second) > 0
    return max(
        abs(a[name] - b[name]) / max(abs(a[name]), 1e-30)
        for a, b in zip(first, second, strict=True)
        for name in a
        if not name.startswith(("cosine", "conflicts"))
    )


def of_kind(tensors, prefix):
    """Those tensors whose names begin so."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def tensor_difference(first, second, which=lambda name: True):
    """Norm of the difference of those tensors, over the norm of all of the first."""
    assert first.keys() == second.keys()
    apart = torch.cat([(t - second[n]).double().flatten() for n, t in first.items() if which(n)])
    return float(apart.norm() / torch.cat([t.double().flatten() for t in first.values()]).norm())


def assert_same(one, several, name):
    """Losses and gradients of each step and the weights at the end, and all ranks alike."""
    code, losses, tensors = record(one, name)
    code_2, losses_2, tensors_2 = record(several, name)
    assert code == code_2 == 0
    assert len(losses) == STEPS
    assert hashes(several, name, 0) == hashes(several, name, 1)
    assert len(set(hashes(several, name, 0))) == STEPS, "the weights did not move"
    assert loss_difference(losses, losses_2) <= TOLERANCE
    for kind in [*(f"gradient {step} " for step in range(STEPS)), "weight "]:
        pair = of_kind(tensors, kind), of_kind(tensors_2, kind)
        assert tensor_difference(*pair, lambda n: SUMMED_OVER_TOKENS not in n) <= TOLERANCE, kind
        assert tensor_difference(*pair) <= SUM_TOLERANCE, kind


def same_bytes(one, other):
    """Names of the files of two folders, which have to be the same in name and content."""
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert files == {path.name: path.read_bytes() for path in other.iterdir()}
    return sorted(files)


# ------------------------------------------------------------------------- two processes and one


@pytest.fixture(scope="module")
def both(bench):
    """Records of one process and of two, of the jobs of the quick suite."""
    folders = []
    for processes in (1, 2):
        where = f"quick{processes}"
        jobs = [{"name": name, "args": bench.args(f"{where}/{name}", *flags)}
                for name, flags in COMPARED.items()]  # fmt: skip
        jobs.append({"name": "untrained", "args": bench.args(f"{where}/untrained", "--epochs=0")})
        if processes == 2:
            jobs += [
                {"name": name, "break": name, "args": bench.args(f"{where}/{name}", *BOTH)}
                for name in ("wrapper", "gather")
            ]
        folders.append(bench.do_jobs(where, processes, jobs))
    return folders


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_train_as_one(both, name):
    """A share of the wrong rows, a loss averaged twice or negatives left out would show here."""
    assert_same(*both, name)


def test_the_unwrapped_models_methods_leave_gradients_unsynchronised(both):
    """The twin: without the wrapper the weights drift apart, and the checks above see it."""
    one, several = both
    assert hashes(several, "wrapper", 0) != hashes(several, "wrapper", 1)
    (_, _, tensors), (_, _, tensors_2) = record(one, "full"), record(several, "wrapper")
    pair = of_kind(tensors, "gradient 0 "), of_kind(tensors_2, "gradient 0 ")
    assert tensor_difference(*pair) > 1000 * SUM_TOLERANCE


def test_simcse_without_the_gather_is_another_loss(both):
    """The twin: negatives of one process alone make a smaller loss; the task losses stay."""
    one, several = both
    (_, losses, _), (_, losses_2, _) = record(one, "full"), record(several, "gather")
    for name in losses[0]:
        difference = abs(losses[0][name] - losses_2[0][name]) / losses[0][name]
        assert (difference > 0.05) == name.startswith("simcse"), name


def test_predictions_and_scores_are_the_same_files(both):
    """In the input's order and byte for byte, though each process predicted half of the batches."""
    one, two = (folder / "untrained" for folder in both)
    assert len(same_bytes(one / "predictions", two / "predictions")) == 6
    runs = [folder / "runs" / "full-model" for folder in (one, two)]
    assert len(same_bytes(*(run / "predictions" for run in runs))) == 12
    evaluations = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs
    ]
    assert evaluations[0]["dev"] == evaluations[1]["dev"]


def test_only_the_first_process_writes(both):
    """Each line of the log stands there once, and nothing is left of a second writer."""
    run = both[1] / "full" / "runs" / "full-model"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 5), ("train", 10), ("eval", 10)
    ]  # fmt: skip
    assert not list(run.rglob(".tmp-*"))
    assert json.loads((run / "run.json").read_text())["processes"] == 2


@pytest.fixture(scope="module")
def both_slowly(bench):
    """As `both`, of the other modes and flags, and of what must fail."""
    folders = []
    for processes in (1, 2):
        where = f"slow{processes}"
        flags_of = COMPARED_SLOWLY | {"infinite": ["--lr", "1e30"]}
        jobs = [{"name": name, "args": bench.args(f"{where}/{name}", *flags)}
                for name, flags in flags_of.items()]  # fmt: skip
        if processes == 2:
            jobs.append({"name": "files", "args": bench.args(f"{where}/files"), "break": "files"})
        folders.append(bench.do_jobs(where, processes, jobs))
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED_SLOWLY)
def test_two_processes_train_as_one_in_every_mode(both_slowly, name):
    assert_same(*both_slowly, name)


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_said_once_with_the_ids_of_the_whole_batch(both_slowly):
    """One process knows the ids of its own share alone."""
    said = [
        [line for line in (folder / "errors.txt").read_text().splitlines() if "not finite" in line]
        for folder in both_slowly
    ]
    assert [record(folder, "infinite")[0] for folder in both_slowly] == [3, 3]
    assert len(said[1]) == 1
    assert said[0] == said[1]


@pytest.mark.slow
def test_processes_with_other_files_do_not_train(both_slowly):
    """Machines whose data differ would train on a mixture without a word."""
    assert json.loads((both_slowly[1] / "files.json").read_text())["code"] == 2
    errors = (both_slowly[1] / "errors.txt").read_text()
    assert "error: torchrun: the processes do not have the same data" in errors


@pytest.mark.slow
def test_the_evaluation_script_is_shared_out_too(both, bench):
    """Under torchrun it writes the files of a single process, and says each thing once."""
    run, there = both[0] / "lora" / "runs" / "LoRA", both[0] / "lora" / "predictions"
    here = bench.folder / "evaluated"
    script = REPOSITORY / "evaluation.py"
    code, out, err = bench.run(2, script, "--checkpoint", run, "--predictions_dir", here)
    assert code == 0, err
    assert out.count("best model of step 10") == 1
    assert len(same_bytes(there, here)) == 6


# ----------------------------------------------------------------------------------- continuing


@pytest.fixture(scope="module")
def continued(bench):
    """Runs of 2 and of 4 processes, whole and stopped in step 5, and what continued them."""
    flags = [*BOTH, *LORA, "--hidden_dropout_prob", "0.1"]
    still = [*BOTH, *LORA]  # dropout differs between numbers of processes

    def args(where, flags):
        return bench.args(where, *flags)

    def resume(name, origin, flags):
        source, target = bench.folder / origin, bench.folder / name
        return {"name": Path(name).name, "from": str(source), "to": str(target),
                "args": args(name, [*flags, "--resume"])}  # fmt: skip

    folders = {}
    for count in (2, 4):
        jobs = [
            {"name": "whole", "args": args(f"c{count}/whole", flags)},
            {"name": "stopped", "args": args(f"c{count}/stopped", flags), "stop_at": 5},
            resume(f"c{count}/resumed", f"c{count}/stopped", flags),
        ]
        if count == 2:
            jobs += [
                {"name": "still", "args": args("c2/still", still)},
                {"name": "still_stopped", "args": args("c2/still_stopped", still), "stop_at": 5},
            ]
        else:
            jobs.append(resume("c4/still_resumed", "c2/still_stopped", still))
        folders[count] = bench.do_jobs(f"c{count}", count, jobs)
    folders[1] = bench.do_jobs("c1", 1, [resume("c1/still_resumed", "c2/still_stopped", still)])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_signal_to_one_process_stops_all_and_continuing_is_bitwise(continued, count):
    """Each process would go on by itself, or DDP sum in another order than before the stop."""
    folder = continued[count]
    code, losses, _ = record(folder, "stopped")
    assert (code, len(losses)) == (128 + signal.SIGTERM, 5)
    assert record(folder, "resumed")[0] == 0
    for rank in range(count):
        assert hashes(folder, "stopped", rank) == hashes(folder, "whole", rank)[:5]
        assert hashes(folder, "resumed", rank) == hashes(folder, "whole", rank)[5:]
    runs = [folder / name / "runs" / "LoRA" for name in ("whole", "resumed")]
    assert len(same_bytes(*(run / "predictions" for run in runs))) == 12


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_a_run_of_two_processes_continues_on_another_number(continued, count):
    """A state that depended on the number of processes would not fit, or train otherwise."""
    _, losses, tensors = record(continued[2], "still")
    code, losses_2, tensors_2 = record(continued[count], "still_resumed")
    assert code == 0
    assert loss_difference(losses[5:], losses_2) <= TOLERANCE
    weights = of_kind(tensors, "weight"), of_kind(tensors_2, "weight")
    assert tensor_difference(*weights) <= TOLERANCE


# ------------------------------------------------------------------------------------- failures


def test_a_batch_that_cannot_be_shared_is_one_error_line(bench):
    """Said once, not by each process, and before the run's folder is made."""
    args = bench.args("odd", "--batch_size", "7")
    code, _, err = bench.run(2, SCRIPT, *args)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert lines == [
        "error: --batch_size 7 of sst: the batch of a step over all processes; expected a "
        "multiple of their number, 2"
    ]
    assert code != 0
    assert "exitcode  : 2" in err, err
    assert not (bench.folder / "odd").exists()


def processes_of(torchrun):
    """Rank -> process id of the processes that a running torchrun has started."""
    found = {}
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(e[5:]): int(child) for e in environment if e.startswith(b"RANK=")}
    return found


def wait_for_state(run, process, seconds=60):
    """Wait until a run has saved a state."""
    end = time.monotonic() + seconds
    while not list(run.glob("state/step-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "no state was saved"
        time.sleep(0.05)


LONG = ["--steps_per_epoch", "400", "--save_every", "10", "--log_every", "100", *LORA]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_within_a_minute_and_the_run_continues(bench, rank):
    """A survivor would wait for the dead one for half an hour; the report has to name its rank."""
    where = f"killed{rank}"
    args = bench.args(where, *LONG, *BOTH)
    torchrun = bench.start(2, SCRIPT, *args)
    run = bench.folder / where / "runs" / "LoRA"
    wait_for_state(run, torchrun)
    os.kill(processes_of(torchrun)[rank], signal.SIGKILL)
    began = time.monotonic()
    _, err = torchrun.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert torchrun.returncode != 0
    root = err.split("Root Cause")[1]
    assert f"rank      : {rank} " in root and "SIGKILL" in root, err
    if rank == 1:
        assert err.count("error: rank 0 lost the connection") == 1, err
    code, out, err = bench.run(2, SCRIPT, *args, "--resume")
    assert code == 0, err
    assert "continuing at step" in out
    assert len(list((bench.folder / where / "predictions").iterdir())) == 6


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_the_state(bench):
    """Torchrun passes the signal on; the run has to end in order, saying so once."""
    args = bench.args("terminated", *LONG)
    torchrun = bench.start(2, SCRIPT, *args)
    run = bench.folder / "terminated" / "runs" / "LoRA"
    wait_for_state(run, torchrun)
    torchrun.send_signal(signal.SIGTERM)
    _, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    assert err.count("stopped by SIGTERM; continue with --resume") == 1, err
    last = sorted(run.glob("state/step-*"))[-1]
    step = int(last.stem.split("-")[1])
    code, out, err = bench.run(2, SCRIPT, *args, "--resume")
    assert code == 0, err
    assert f"continuing at step {step}\n" in out


# ------------------------------------------------------------------- without a second process


def test_a_relayed_signal_is_no_second_one(monkeypatch):
    """A signal to the whole group comes twice, the second time from torchrun: it must not kill."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    signals = StopSignals()
    signals._receive(signal.SIGTERM, None)
    signals._receive(signal.SIGTERM, None)
    assert ended == [143], "by itself a second signal ends at once"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    signals = StopSignals()
    signals._receive(signal.SIGTERM, None)
    signals._receive(signal.SIGTERM, None)
    assert ended == [143]
    signals.came -= 60
    signals._receive(signal.SIGTERM, None)
    assert ended == [143, 143]


def test_a_process_with_fewer_batches_to_encode_checks_as_often_as_the_others(monkeypatch):
    """A check for signals is a word among all processes: one too few, and they wait for ever."""
    checks, encoded = [], []
    dataset = SimpleNamespace(batches_of=lambda tokens, rows: ((rows, row) for row in rows))
    batches = SimpleNamespace(datasets={"sst": dataset}, rows_until=lambda name, steps: [5, 6])
    model = SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]), vectors_to_keep=lambda: 1,
        task_inputs=lambda name, row: row, encode_groups=encoded.append,
    )  # fmt: skip
    monkeypatch.setattr(distributed, "largest", lambda number: number + 3)
    args = SimpleNamespace(total_steps=1, accumulate=1)
    encode_in_advance(model, batches, args, "fp32", lambda: checks.append(1))
    assert (len(checks), encoded) == (5, [5, 6])


def test_with_one_process_nothing_is_shared(monkeypatch):
    """Torchrun with a single process, and no torchrun, take the same path: no group at all."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.start(torch.device("cpu")) == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    rows = torch.ones(3, 2)
    assert distributed.gather_rows(rows)[0] is rows
    assert distributed.share(7, "sst") == slice(0, 7)


def test_several_processes_without_cuda_take_the_cpu(monkeypatch):
    """On a Mac there is one GPU, and NCCL does not know it."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    joined = []
    monkeypatch.setattr(distributed.dist, "init_process_group", joined.append)
    assert distributed.start(torch.device("mps")) == torch.device("cpu")
    assert joined == ["gloo"]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """NCCL would fail on a GPU that is not there, on one process, while the others wait."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(distributed.UserError, match="nproc_per_node 64: this machine has 2 GPUs"):
        distributed.start(torch.device("cuda"))
