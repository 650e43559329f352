"""Command-line behaviour: messages, signals, exit codes.

Exit codes: 0 done; 1 output, memory, a lost process or a bug; 2 call, data, encoder or hub; 3 NaN
or infinite values; 128 + n signal n. Exceptions carry theirs as `exit_code`; all others end with 1.
"""

import atexit
import contextlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from pathlib import Path

from tqdm import tqdm

# What torch reads when it is imported, unless the user has set it. Batches of different lengths
# would leave gaps in a GPU's memory that are too small for the next ones.
# Not on WSL, where the first allocation may fail (pytorch#192330).
is_wsl = "microsoft" in platform.release().lower()
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and not is_wsl:  # the older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# A thread that waits for the others would spin so long that two runs on the same cores take four
# times as long, not twice.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` ignores it
    SIGNALS.append(signal.SIGHUP)  # the terminal was closed
RELAY_SECONDS = 5  # a signal that comes again within this time is torchrun's copy
LOCAL_FAULT_SECONDS = 5  # how long a process waits for the first one to report the same error


class NotFinite(Exception):
    """A loss, a gradient or an output of the model is NaN or infinite."""

    exit_code = 3
    is_on_all_processes = True


class Stopped(Exception):
    """A signal asked the run to end, and its state is saved: exit code 128 + the signal."""

    is_on_all_processes = True

    def __init__(self, number):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; continue with --resume")
        self.exit_code = 128 + number


# --------------------------------------------------------------------------------------- messages


def say(text, file=None):
    """Print a line on standard output, or on `file`, above the progress bar if there is one.

    If nobody reads the output (`| head`) or its disk is full, only this line is lost.
    """
    with contextlib.suppress(OSError):
        tqdm.write(str(text), file=file or sys.stdout)
        (file or sys.stdout).flush()


def bar_size():
    """tqdm's size arguments. In a terminal of size 0 (`docker exec -t`) it would draw nothing."""
    is_known = not sys.stderr.isatty() or all(os.get_terminal_size(sys.stderr.fileno()))
    return {} if is_known else {"ncols": 100, "nrows": 20}


def protect_streams():
    """Replace closed standard streams; escape characters that a stream cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


# ---------------------------------------------------------------------------------------- signals

received = {"number": None, "time": 0.0}  # the first signal after `catch_signals`


def catch_signals():
    """From now on the first of `SIGNALS` asks for an orderly end; the second ends at once.

    `distributed.check_stop` ends the run. Under torchrun a process may get the first signal twice:
    from outside, and passed on by torchrun.
    """
    received["number"] = None
    for number in SIGNALS:
        signal.signal(number, _receive)


def _receive(number, frame):
    if received["number"] is None:
        received.update(number=number, time=time.monotonic())
    elif not launched() or time.monotonic() > received["time"] + RELAY_SECONDS:
        os._exit(128 + number)


def _stop_at_once(number, frame):
    """Before `catch_signals` there is nothing to finish and nothing to save."""
    raise SystemExit(128 + number)


# --------------------------------------------------------------------------------- torchrun's view


def launched():
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_first():
    """Whether this process is the first of all, or the only one: the one that writes."""
    return not launched() or int(os.environ["RANK"]) == 0


def is_first_here():
    """Whether this is the first process on its machine, or the only one."""
    return not launched() or int(os.environ.get("LOCAL_RANK", 0)) == 0


def launch_command(script):
    """The words that start `script`, a file name, as this process was started: python, torchrun."""
    started = Path(sys.argv[0])
    if started.name == script and started.resolve().parent != Path.cwd().resolve():
        script = sys.argv[0]
    if not launched():
        return ["python", script]
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    nodes = f"--nnodes={machines}" if machines > 1 else "--standalone"
    return ["torchrun", nodes, f"--nproc_per_node={processes}", script]


# ------------------------------------------------------------------------------------------ errors


def run_script(main, argv=None):
    """Run a script's `main(argv)`; returns the exit code. An error becomes one line.

    `--debug` shows the traceback as well.
    """
    protect_streams()
    for number in SIGNALS:
        signal.signal(number, _stop_at_once)
    code = 0
    try:
        main(argv)
    except SystemExit as error:
        code = error.code
        if code in [128 + number for number in SIGNALS] and is_first_here():
            say(f"stopped by {signal.Signals(code - 128).name}", sys.stderr)
    except Exception as error:
        if "--debug" in (sys.argv if argv is None else argv):
            traceback.print_exc()
        code, text = getattr(error, "exit_code", 1), " ".join(str(error).split())
        if not hasattr(error, "exit_code"):  # not one of the program's own errors
            text = f"{type(error).__name__}: {text}"
        print_failure(text if isinstance(error, Stopped) else f"error: {text}", error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again at its end, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def end_process(code):
    """End the process with the exit code of `run_script`.

    Under torchrun without Python's shutdown: a thread of gloo that asks for the GIL during it
    aborts the process (pytorch/pytorch#190489), and these threads outlive their process group.
    """
    if launched():
        atexit._run_exitfuncs()  # among others, multiprocessing removes tqdm's semaphore
        os._exit(code)
    sys.exit(code)


def print_failure(line, error):
    """Print `line` on standard error, once if all processes fail alike.

    The first process prints at once; then torchrun ends the others, which wait for that. A rank
    that is still alive after `LOCAL_FAULT_SECONDS` failed alone and prints its own error. An
    error with `is_on_all_processes` ends every process by itself.
    """
    is_lost_connection = getattr(error, "is_lost_connection", False)
    if is_first_here():
        say(line, sys.stderr)
    if not launched() or getattr(error, "is_on_all_processes", False):
        return
    if not is_first_here() or is_lost_connection:  # torchrun should name the process that ended
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(LOCAL_FAULT_SECONDS)
    if not is_first_here():
        say(f"rank {os.environ['RANK']}: {line}", sys.stderr)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not is_lost_connection:  # torchrun would report a missing traceback
        extra = {"timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
