"""How does a script speak, stop and end?

Exit codes: 0 done; 1 input, output or memory; 2 the user's mistake; 3 numbers that are not finite;
128 + n ended by signal n. Exceptions carry theirs as `exit_code`; others end with 1.
"""

import contextlib
import io
import os
import signal
import sys
import time
import traceback

from tqdm import tqdm

import distributed
from device import peak_memory_mib

RELAY_SECONDS = 5  # within these a signal that comes again is torchrun's copy of the first


class NotFinite(Exception):
    """A loss, a gradient or an output of the model is NaN or infinite."""

    exit_code = 3
    on_all_processes = True


class OutOfMemory(Exception):
    """The memory of the device, or of the machine, did not suffice."""

    exit_code = 1


class Stopped(Exception):
    """A signal asked the run to end, and it ended in good order: exit code 128 + the signal."""

    on_all_processes = True

    def __init__(self, number):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; continue with --resume")
        self.exit_code = 128 + number


def say(text):
    """A line for people, also while the progress bar is up."""
    tqdm.write(str(text), file=sys.stdout)
    sys.stdout.flush()


def bar_size():
    """tqdm's arguments for the size of standard error's terminal: none where that is known.

    One that does not know its size (`docker exec -t`, `script`) says 0, and tqdm draws nothing.
    """
    known = not sys.stderr.isatty() or all(os.get_terminal_size(sys.stderr.fileno()))
    return {} if known else {"ncols": 100, "nrows": 20}


@contextlib.contextmanager
def memory_errors(device, load, remedy="end what else uses its memory, or take another device"):
    """Turn an exhausted memory into an `OutOfMemory` that says for what, and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's CPU allocator: a plain RuntimeError
        signs = ("out of memory", "allocate memory", "not enough memory", "unable to mmap")
        if not isinstance(error, MemoryError) and not any(s in str(error).lower() for s in signs):
            raise
        raise OutOfMemory(
            f"out of memory on {device} with {load}; peak {peak_memory_mib(device):,} MiB; {remedy}"
        ) from error


class StopSignals:
    """SIGINT and SIGTERM: the first asks for an orderly end, the second ends at once.

    Of several processes each may get the first one twice, from outside and passed on by torchrun.
    """

    def __init__(self):
        self.number, self.came = None, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if self.number is None:
            self.number, self.came = number, time.monotonic()
        elif not distributed.launched() or time.monotonic() > self.came + RELAY_SECONDS:
            os._exit(128 + number)

    def check(self):
        """Raise `Stopped` where an end was asked for; all processes call it, and stop, together."""
        if number := distributed.largest(self.number or 0):
            raise Stopped(number)


def _stop_at_once(number, frame):
    """During set-up there is nothing to finish and nothing to save."""
    raise SystemExit(128 + number)


class UnbreakableStream:
    """Standard output or error that goes on when nobody reads it (`| head`) or its disk is full."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        """Write, or drop the text."""
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self):
        """Flush, or switch to the null device."""
        try:
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name):
        """Everything else is the stream's own."""
        return getattr(self._stream, name)


def protect_streams():
    """Make the loss of standard output or error harmless."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (closed from the start)
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # it is closed
                stream.reconfigure(errors="backslashreplace")  # of a name that it cannot encode
        setattr(sys, name, UnbreakableStream(stream))


def run_script(main, argv=None):
    """Run a script's `main(argv)`, turn its failures into one line and an exit code, as above.

    `--debug` shows the traceback.
    """
    protect_streams()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_at_once)
    try:
        main(argv)
        code = 0
    except SystemExit as error:
        code = error.code
        stopped = code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        if stopped and distributed.is_first_here():
            print(f"stopped by {signal.Signals(code - 128).name}", file=sys.stderr)
    except Exception as error:
        if "--debug" in (sys.argv if argv is None else argv):
            traceback.print_exc()
        error = distributed.explained(error)
        code = getattr(error, "exit_code", 1)
        prefix = "" if isinstance(error, Stopped) else "error: "
        distributed.print_failure(f"{prefix}{_one_line(error)}", error)
    sys.stdout.flush()
    return code


def _one_line(error):
    """An error's text without line breaks; its class where it is none of the program's own."""
    text = " ".join(str(error).split())
    return text if hasattr(error, "exit_code") else f"{type(error).__name__}: {text}"
