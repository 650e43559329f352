"""Several gloo processes against one: the same losses, gradients, weights and files.

The jobs of `tests/distributed_worker.py` run one after another in as few processes as possible; the
tests compare their records. fp32, dropout off, one thread per process. Rows 44, 46 and 53 of the
table of faults are here too: a process dies, a signal comes, many launches in a row.
"""

import json
import os
import shutil
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

from config import UserError
from runtime import distributed, script
from runtime.device import Compute
from training.run_folder import RunFolder
from training.setup import encode_in_advance

WORKER = REPOSITORY / "tests" / "distributed_worker.py"
SCRIPT = REPOSITORY / "multitask_classifier.py"
STEPS = 10
TOLERANCE = 1e-6  # relative; for gradients and weights, to the norm of all of them together
# With token_type_embeddings, each row of which gets the fp32 sum over every token of a step: on one
# process it is no more exact.
SUM_TOLERANCE = 5e-6
SIMCSE = "--unsupervised_simcse --supervised_simcse"
LORA = "--fine-tune-mode LoRA --LoRA_r 4"
COMPARED = {"full": SIMCSE, "lora": f"{SIMCSE} {LORA}"}  # the same on one process and on two
COMPARED_SLOWLY = {
    "last": "--fine-tune-mode last-linear-layer",
    "supervised": "--supervised_simcse --tasks para sts",
    "surgery": f"{SIMCSE} --gradient_surgery",
    "surgery_lora": f"{SIMCSE} {LORA} --gradient_surgery mean",
    "surgery_main": f"{SIMCSE} --gradient_surgery main --main_tasks sst sts",
    "surgery_vaccine": f"{SIMCSE} --gradient_surgery vaccine",
    # 32 by 20 : 60, then by their fifth roots: 8 + 24 and 14 + 18, on two processes too
    "sampling": "--tasks sst para --sst_train data/few.csv --sampling annealed --epochs 2 "
    "--steps_per_epoch 5",
    "dora": f"{SIMCSE} {LORA} --LoRA_variant dora --LoRA_lr_ratio 4 --LoRA_layers 1",
    "joint": f"{SIMCSE} --pair_encoding joint",
    "pals": f"{SIMCSE} --pals --accumulate 2",
    "pals_surgery": f"{SIMCSE} --fine-tune-mode PAL --gradient_surgery",
    "both": f"{SIMCSE} --pair_encoding both --task_batch_sizes para=8",
    "mlm": f"{SIMCSE} {LORA} --mlm sst para --accumulate 2",
    "mlm_alone": "--mlm sst sts --tasks sst sts --loss_weights sst=0 sts=0",
}


def job(name, flags="", **settings):
    """A job of the worker."""
    return {"name": name, "flags": flags, **settings}


class Bench:
    """A folder with a tiny random encoder and a cut of the sample, in which processes start."""

    def __init__(self, folder, write_encoder):
        self.folder = folder
        write_encoder(folder / "encoder", seed=11711)
        (folder / "data").mkdir()
        for path in SAMPLE.glob("*.csv"):
            header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[:46]
            copies = [row.replace("\t", "\tcopy-", 1) for row in rows[:15]]  # with other ids
            text = "".join([header, *rows, *copies])
            (folder / "data" / path.name).write_text(text, encoding="utf-8")
            if path.name == "ids-sst-train.csv":
                few = "".join([header, *rows[:20]])
                (folder / "data" / "few.csv").write_text(few, encoding="utf-8")

    def argv(self, where, flags=""):
        """Arguments of the training script, with its output under the folder `where`."""
        words = "--pretrained encoder --data_dir data --precision fp32 --hidden_dropout_prob 0 "
        words += f"--epochs 1 --steps_per_epoch {STEPS} --batch_size 16 --max_length 10 "
        words += f"--log_every 1 --runs_dir {where}/runs --predictions_dir {where}/predictions"
        return f"{words} {flags}".split()

    def start(self, processes, program, *argv):
        """Start `program` under torchrun."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return subprocess.Popen(
            [*torchrun, f"--nproc_per_node={processes}", program, *argv],
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        )

    def run(self, processes, program, *argv, seconds=120):
        """As `start`, and wait for the end: (exit code, standard output, standard error)."""
        process = self.start(processes, program, *argv)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            raise
        return process.returncode, out, err

    def do_jobs(self, name, processes, together, alone=()):
        """Do the jobs; returns the folder of their records."""
        folder, jobs = self.folder / name, {"together": together, "alone": alone}
        for kind, of_kind in jobs.items():
            (folder / kind).mkdir(parents=True)
            jobs[kind] = [
                {**job, "argv": self.argv(f"{name}/{kind}/{job['name']}", job["flags"])}
                for job in of_kind
            ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        code, _, err = self.run(processes, WORKER, folder, seconds=300)
        assert code == 0, err
        (folder / "errors.txt").write_text(err)
        return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory, write_encoder):
    return Bench(tmp_path_factory.mktemp("bench"), write_encoder)


class Record:
    """What every rank recorded of a job, and the run of the job."""

    def __init__(self, folder, name):
        self.predictions = folder / name / "predictions"
        self.run = RunFolder(*(folder / name / "runs").iterdir())
        ranks = [load_file(path) for path in sorted(folder.glob(f"{name}.rank*"))]
        self.codes = [int(rank["code"]) for rank in ranks]
        self.weights = [rank["weights"] for rank in ranks]
        self.gradients, self.is_summed = ranks[0]["gradients"], ranks[0]["is_summed"].bool()

    def log(self, kind="train"):
        """Lines of the run's log."""
        return [line for line in self.run.metrics() if line["kind"] == kind]


def assert_same_losses(one, other):
    """Every loss of every step of two records is the same."""
    for a, b in zip(one.log(), other.log(), strict=True):
        assert b["losses"] == pytest.approx(a["losses"], rel=TOLERANCE, abs=0)


def difference(first, second, left_out=False):
    """Largest norm in any step of the difference, but for `left_out`, over the norm of `first`."""
    apart = (first - second).double().masked_fill(torch.as_tensor(left_out), 0.0)
    return float((apart.norm(dim=1) / first.double().norm(dim=1)).max())


def assert_same(one, several):
    """Losses, gradients and weights of each step are the same, and all ranks alike."""
    assert (one.codes, several.codes) == ([0], [0, 0])
    assert torch.equal(*several.weights)
    assert len(several.weights[0].unique(dim=0)) == STEPS, "the weights did not move"
    assert len(one.log()) == STEPS
    assert_same_losses(one, several)
    for pair in ((one.gradients, several.gradients), (one.weights[0], several.weights[0])):
        assert difference(*pair, left_out=one.is_summed) <= TOLERANCE
        assert difference(*pair) <= SUM_TOLERANCE


def assert_same_files(one, other, count):
    """Two folders have `count` files with the same names and contents."""
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    assert files[0] == files[1]
    assert len(files[0]) == count


# ------------------------------------------------------------------------------ one process and two


@pytest.fixture(scope="module")
def quick(bench):
    """Folders of records of one process and of two, with the jobs of the quick suite."""
    jobs = [job(*named) for named in COMPARED.items()]
    # With batches so small, each dev set has several.
    jobs += [job("untrained", "--epochs 0", batch_tokens=150)]
    jobs += [job("masked", f"{COMPARED_SLOWLY['mlm_alone']} --epochs 0", batch_tokens=150)]
    one_step = f"{SIMCSE} --steps_per_epoch 1"
    faults = [job(fault, one_step, fault=fault) for fault in ("wrapper", "gather", "copies")]
    folder = bench.do_jobs("quick", 2, jobs + faults, alone=jobs)
    return folder / "alone", folder / "together"


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_train_as_one(quick, name):
    """A share of wrong rows, a loss averaged twice or missing negatives would show here."""
    assert_same(*(Record(folder, name) for folder in quick))


def test_twin_without_the_wrapper_gradients_are_not_averaged(quick):
    """The weights drift apart, and the checks above see it."""
    one, several = Record(quick[0], "full"), Record(quick[1], "wrapper")
    assert not torch.equal(*several.weights)
    assert difference(one.gradients[:1], several.gradients) > 1000 * SUM_TOLERANCE


def test_row_49_twin_with_copies_as_negatives_is_another_loss(quick):
    """A quarter of the rows are copies: as negatives they would raise every such loss."""
    one, several = Record(quick[0], "full"), Record(quick[1], "copies")
    for name, loss in one.log()[0]["losses"].items():
        apart = (several.log()[0]["losses"][name] - loss) / loss
        assert (apart > 0.001) == name.startswith("simcse"), name


def test_twin_without_the_gathered_rows_simcse_is_another_loss(quick):
    """Negatives of one process alone make a smaller loss; the task losses stay."""
    one, several = Record(quick[0], "full"), Record(quick[1], "gather")
    for name, loss in one.log()[0]["losses"].items():
        apart = abs(loss - several.log()[0]["losses"][name]) / loss
        assert (apart > 0.05) == name.startswith("simcse"), name


def test_predictions_and_scores_are_the_same_files_and_written_once(quick):
    """In the input's order and byte for byte, though each process predicted half of the batches."""
    one, two = (Record(folder, "untrained") for folder in quick)
    assert_same_files(one.predictions, two.predictions, 6)
    assert_same_files(one.run.path / "predictions", two.run.path / "predictions", 12)
    assert [line["dev"] for line in one.log("eval")] == [line["dev"] for line in two.log("eval")]
    assert two.run.description()["processes"] == 2
    assert not list(two.run.path.rglob(".tmp-*"))


def test_the_masked_loss_on_dev_is_that_of_one_process(quick):
    """The same tokens are masked, whichever process has the batch."""
    one, two = (Record(folder, "masked").log("eval")[0]["overall"] for folder in quick)
    assert two == pytest.approx(one, rel=1e-5)


def test_fault_53_torch_warns_of_nothing(quick):
    assert not (quick[0].parent / "errors.txt").read_text()


@pytest.fixture(scope="module")
def slow(bench):
    """The folder of records of the other modes and flags, and of jobs that must fail."""
    jobs = [job(*named) for named in COMPARED_SLOWLY.items()] + [job("infinite", "--lr 1e30")]
    return bench.do_jobs("slow", 2, [*jobs, job("files", fault="files")], alone=jobs)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED_SLOWLY)
def test_two_processes_train_as_one_in_every_mode(slow, name):
    assert_same(*(Record(slow / kind, name) for kind in ("alone", "together")))


@pytest.mark.slow
def test_losses_that_are_not_finite_are_reported_once_with_the_ids_of_the_whole_batch(slow):
    """Each process knows only the ids of its own share."""
    assert Record(slow / "alone", "infinite").codes == [3]
    assert Record(slow / "together", "infinite").codes == [3, 3]
    errors = (slow / "errors.txt").read_text().splitlines()
    together, alone = [line for line in errors if "not finite" in line]
    assert together == alone


@pytest.mark.slow
def test_processes_with_different_files_do_not_train(slow):
    """Machines with different data would train on a mixture without a word."""
    assert Record(slow / "together", "files").codes == [2, 2]
    errors = (slow / "errors.txt").read_text()
    assert "error: torchrun: the processes do not have the same data" in errors


@pytest.mark.slow
def test_the_evaluation_script_shares_its_batches_too(quick, bench):
    """Under torchrun it writes the files of a single process, and prints each line once."""
    record, here = Record(quick[0], "lora"), bench.folder / "evaluated"
    argv = ["--checkpoint", record.run.path, "--predictions_dir", here]
    code, out, err = bench.run(2, REPOSITORY / "evaluation.py", *argv)
    assert code == 0, err
    assert out.count(f"best model of step {STEPS}") == 1
    assert_same_files(record.predictions, here, 6)


# ----------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def resumed(bench):
    """Folders of records by number of processes: whole runs, stopped in step 5, and resumed.

    A closed terminal (row 46) stops the runs of two processes, SIGTERM those of four.
    """
    still = f"{SIMCSE} {LORA}"  # dropout differs between numbers of processes
    flags = f"{still} --hidden_dropout_prob 0.1"

    def jobs(name, number):
        copy = f"{bench.folder}/{name}/together/stopped"
        stopped = job("stopped", flags, stop_at=5, signal=number)
        return [job("whole", flags), stopped, job("resumed", f"{flags} --resume", copy=copy)]

    copy = f"{bench.folder}/c2/together/still_stopped"
    again = job("still_resumed", f"{still} --resume", copy=copy)
    of_two = [job("still", still), job("still_stopped", still, stop_at=5)]
    two = bench.do_jobs("c2", 2, jobs("c2", signal.SIGHUP) + of_two, alone=[again])
    four = bench.do_jobs("c4", 4, [*jobs("c4", signal.SIGTERM), again])
    return {1: two / "alone", 2: two / "together", 4: four / "together"}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "number"), [(2, signal.SIGHUP), (4, signal.SIGTERM)])
def test_fault_46_a_signal_to_one_process_stops_all_and_resuming_is_bitwise(resumed, count, number):
    """A process could train on alone, or DDP add in another order than before the stop."""
    names = ("whole", "stopped", "resumed")
    whole, stopped, again = (Record(resumed[count], name) for name in names)
    assert stopped.codes == [128 + number] * count
    assert (len(stopped.log()), again.codes) == (5, [0] * count)
    for rank in range(count):
        assert torch.equal(stopped.weights[rank], whole.weights[rank][:5])
        assert torch.equal(again.weights[rank], whole.weights[rank][5:])
    assert_same_files(whole.run.path / "predictions", again.run.path / "predictions", 12)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_a_run_of_two_processes_resumes_on_another_number(resumed, count):
    """A checkpoint may not depend on the number of processes."""
    whole, again = Record(resumed[2], "still"), Record(resumed[count], "still_resumed")
    assert again.codes == [0] * count
    assert_same_losses(whole, again)
    assert difference(whole.weights[0][5:], again.weights[0]) <= TOLERANCE


# ----------------------------------------------------------------------------------------- failures


def test_a_batch_that_cannot_be_shared_is_one_error_line(bench):
    """Printed once, not by each process, and before the run's folder is made."""
    code, _, err = bench.run(2, SCRIPT, *bench.argv("odd", "--batch_size 7"))
    assert [line for line in err.splitlines() if line.startswith("error:")] == [
        "error: --batch_size 7 of sst: the batch of a step over all processes; expected a "
        "multiple of their number, 2"
    ]
    assert code != 0
    assert "exitcode  : 2" in err, err
    assert not (bench.folder / "odd").exists()


def process_of(torchrun, rank):
    """Id of the process with this rank, among those that a running torchrun has started."""
    for child in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


LONG = f"--steps_per_epoch 400 --save_every 10 --log_every 100 {LORA} {SIMCSE}"


@pytest.fixture
def long_run(bench, request):
    """A long run of two processes that has saved a checkpoint: (torchrun, argv, run folder)."""
    where = request.node.name
    argv = bench.argv(where, LONG)
    torchrun, end = bench.start(2, SCRIPT, *argv), time.monotonic() + 60
    run = bench.folder / where / "runs" / "LoRA"
    while not list(run.glob("state/step-*")):
        assert torchrun.poll() is None, torchrun.communicate()[1]
        assert time.monotonic() < end, "no checkpoint was saved"
        time.sleep(0.05)
    return torchrun, argv, run


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_fault_44_a_killed_process_ends_all_within_a_minute(bench, long_run, rank):
    """A survivor would wait half an hour; the report must name the rank, and the run resumes."""
    torchrun, argv, run = long_run
    os.kill(process_of(torchrun, rank), signal.SIGKILL)
    _, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    root = err.split("Root Cause")[1]
    assert f"rank      : {rank} " in root and "SIGKILL" in root, err
    if rank == 1:
        assert err.count("error: rank 0 lost the connection") == 1, err
    code, out, err = bench.run(2, SCRIPT, *argv, "--resume")
    assert code == 0, err
    assert "resuming at step" in out
    assert len(list((run.parents[1] / "predictions").iterdir())) == 6


@pytest.fixture(scope="module")
def whole_run(bench):
    """The predictions of the long run without a stop."""
    code, _, err = bench.run(2, SCRIPT, *bench.argv("whole", LONG), seconds=300)
    assert code == 0, err
    return bench.folder / "whole" / "predictions"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, []), (signal.SIGHUP, [0, 1])])
def test_fault_46_a_signal_to_torchrun_saves_a_checkpoint(
    bench, whole_run, long_run, number, ranks
):
    """Torchrun passes the signal on; the run must end in order and say so once."""
    torchrun, argv, run = long_run
    for process in [*(process_of(torchrun, rank) for rank in ranks), torchrun.pid]:
        os.kill(process, number)
    _, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    assert err.count(f"stopped by {number.name}; continue with --resume") == 1, err
    step = int(max(run.glob("state/step-*")).name.split("-")[1])
    code, out, err = bench.run(2, SCRIPT, *argv, "--resume")
    assert code == 0, err
    assert f"resuming at step {step}\n" in out
    assert_same_files(whole_run, run.parents[1] / "predictions", 6)


@pytest.mark.slow
def test_fault_53_launches_in_a_row_end_well_and_without_warnings(bench):
    """A rank may abort after its work is done. Half of the launches resume a run."""
    half = bench.do_jobs("half", 2, [job("stopped", stop_at=5)]) / "together" / "stopped"
    for number in range(10):
        where, resume = f"launch{number}", "--resume" * (number % 2)
        if resume:
            shutil.copytree(half, bench.folder / where, symlinks=True)
        code, out, err = bench.run(2, SCRIPT, *bench.argv(where, resume))
        assert (code, err) == (0, "")
        assert ("resuming at step 5\n" in out) == bool(resume)


# ------------------------------------------------------------------------- without a second process


@pytest.fixture
def launch(monkeypatch):
    """Sets the variables of torchrun for the first of `count` processes."""

    def set_variables(count):
        for name, value in {"RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


def test_a_relayed_signal_is_not_a_second_one(launch, monkeypatch):
    """A signal to the whole group comes twice, the second time from torchrun: it must not kill."""
    handlers, ended, now = {}, [], time.monotonic()
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(script, "received", dict(script.received))
    launch(2)
    script.catch_signals()
    for seconds in (0, 1, 60):
        monkeypatch.setattr(time, "monotonic", lambda later=now + seconds: later)
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        assert ended == ([143] if seconds == 60 else [])


def test_a_process_with_fewer_batches_to_encode_checks_for_signals_as_often(monkeypatch):
    """All processes exchange a check for signals: one too few, and they wait forever."""
    checks, encoded = [], []
    dataset = SimpleNamespace(batches_of=lambda tokens, rows: ((rows, row) for row in rows))
    batches = SimpleNamespace(datasets={"sst": dataset}, rows_until=lambda name, steps: [5, 6])
    model = SimpleNamespace(vectors_to_keep=lambda: 1)
    model.head_vectors = lambda name, row: encoded.append((name, row))
    monkeypatch.setattr(distributed, "largest", lambda number: number + 3)
    monkeypatch.setattr(distributed, "check_stop", lambda: checks.append(1))
    plan = SimpleNamespace(total_steps=1, flags=SimpleNamespace(accumulate=1))
    encode_in_advance(model, batches, plan, Compute("cpu", "fp32"))
    assert (len(checks), encoded) == (5, [("sst", 5), ("sst", 6)])


@pytest.mark.parametrize(("count", "printed"), [(1, "exit shutdown "), (2, "exit ")])
def test_fault_53_processes_of_torchrun_end_without_pythons_shutdown(launch, count, printed):
    """In it, a thread of gloo that asks for the GIL would abort the process."""
    launch(count)
    program = """if True:
        import atexit
        from runtime.script import end_process
        class Last:
            def __del__(self):
                print("shutdown", end=" ", flush=True)
        last = Last()
        atexit.register(print, "exit", end=" ", flush=True)
        end_process(3)
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, printed, "")


@pytest.mark.parametrize(
    ("processes", "device", "backends"),
    [
        (1, "mps", []),  # under torchrun or not
        (2, "cpu", ["gloo"]),  # a Mac has one GPU, which NCCL does not support
    ],
)
def test_where_the_processes_meet(launch, monkeypatch, processes, device, backends):
    launch(processes)
    joined = []
    monkeypatch.setattr(distributed.dist, "init_process_group", joined.append)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    with distributed.joined_processes(torch.device("mps")) as found:
        assert (found.type, joined) == (device, backends)


def test_more_processes_than_gpus_are_refused(launch, monkeypatch):
    """NCCL would fail on a GPU that does not exist, in one process, while the others wait."""
    launch(64)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes = distributed.joined_processes(torch.device("cuda"))
    with pytest.raises(UserError, match="nproc_per_node 64: this machine has 2 GPUs"), processes:
        pass
