# SPDX-License-Identifier: Apache-2.0
"""What a user may do at any moment: Ctrl-C, closing, forking, filling a disk."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAD = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell's job began it
import torch
import sida
from switch_models import make_batch, make_batches, make_encoder, run
model, batch = make_encoder(), make_batch()
expected = run(model, batch)
"""


def child(code: str, *, interrupt: bool = False) -> None:
    """Run `code`, and send Ctrl-C once it prints "ready"; fails, rather than hangs."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if interrupt:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "terminate" not in errors


NEVER = """
entered = threading.Event()
def batches():
    yield batch
    entered.set()
    threading.Event().wait()
"""


def test_a_source_of_batches_that_never_returns_does_not_keep_ctrl_c_waiting() -> None:
    child(
        NEVER
        + """
off = sida.offload(model, memory=0.3)
results = off.map(batches())
next(results)
entered.wait()
print("ready", flush=True)
try:
    next(results)
    sys.exit("no KeyboardInterrupt")
except KeyboardInterrupt:
    pass
torch.testing.assert_close(run(off.model, batch), expected, rtol=1e-4, atol=1e-5)
off.close()
assert torch.equal(run(model, batch), expected)
""",
        interrupt=True,
    )


def test_nor_closing() -> None:
    child(
        NEVER
        + """
off = sida.offload(model, memory=0.3)
results = off.map(batches())
next(results)
entered.wait()
off.close()
assert torch.equal(run(model, batch), expected)
try:
    next(results)
    sys.exit("no RuntimeError")
except RuntimeError:
    pass
with sida.offload(model, memory=0.3) as again:
    (output,) = again.map([batch])
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-5)
"""
    )


def test_ctrl_c_ends_a_wait_for_the_next_batch_of_a_scheduler() -> None:
    child(
        """
from test_core_threads import store_of
scheduler = sida.OffloadScheduler(sida.ExpertCache(store_of(), "1 expert"))
scheduler.start(threading.Event().wait)
print("ready", flush=True)
try:
    scheduler.next_batch()
    sys.exit("no KeyboardInterrupt")
except KeyboardInterrupt:
    pass
""",
        interrupt=True,
    )


def test_a_full_disk_gives_everything_back(tmp_path: Path) -> None:
    child(
        f"""
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # amid the experts' 196,608
try:
    sida.offload(model, memory=0.3, offload_dir={str(tmp_path)!r})
    sys.exit("no OSError")
except OSError as error:
    assert "too large" in str(error) or "space" in str(error), error
assert os.listdir({str(tmp_path)!r}) == []
assert torch.equal(run(model, batch), expected)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
with sida.offload(model, memory=0.3, offload_dir={str(tmp_path)!r}) as off:
    torch.testing.assert_close(run(off.model, batch), expected, rtol=1e-4, atol=1e-5)
"""
    )


def test_a_forked_child_ends_and_its_parent_works_on() -> None:
    child(
        """
torch.set_num_threads(1)
expected = run(model, batch)  # threads may change bits of torch's own layers
off = sida.offload(model, memory=0.3)
results = off.map(make_batches(20), ahead=2)
next(results)
pid = os.fork()
if pid == 0:
    os._exit(0)  # what multiprocessing does at a child's end
assert os.waitpid(pid, 0)[1] == 0
assert len(list(results)) == 19
off.close()
assert torch.equal(run(model, batch), expected)
"""
    )


def test_a_forked_child_that_uses_the_handle_is_told_so() -> None:
    child(
        """
torch.set_num_threads(1)
expected = run(model, batch)
off = sida.offload(model, memory=0.3)
from test_core_threads import case, store_of
scheduler = sida.OffloadScheduler(sida.ExpertCache(store_of(), "2 experts"))
layer = sida.LayerExperts(scheduler, 0)
layer(*case())
results = off.map(make_batches(20), ahead=2)
next(results)
uses = {
    "a call": lambda: run(model, batch),
    "the next result": lambda: next(results),
    "stats": off.stats,
    "resize": lambda: off.resize(0.5),
    "close": off.close,
    "a layer": lambda: layer(*case()),
    "next_batch": scheduler.next_batch,
}
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    for name, use in uses.items():
        try:
            use()
            print(name, "came back", file=sys.stderr)
            os._exit(1)
        except RuntimeError as error:
            if "forked" not in str(error):
                print(name, repr(error), file=sys.stderr)
                os._exit(1)
    with sida.offload(make_encoder(), memory=0.3) as own:
        assert torch.equal(run(own.model, batch), run(own.model, batch))
    scheduler.close()
    sys.exit(0)  # destroys what the parent goes on with
assert os.waitpid(pid, 0)[1] == 0
assert len(list(results)) == 19
with open(off._source._moved.path, "rb"):
    pass
off.close()
assert torch.equal(run(model, batch), expected)
"""
    )


@pytest.mark.slow
def test_ten_thousand_handles_of_the_core_leave_nothing_behind() -> None:
    child(
        """
from test_core_threads import case, store_of, table
from sida._core import OffloadedExperts
store, arguments = store_of(), case()

def cycles(count):
    for i in range(count):
        scheduler = sida.OffloadScheduler(sida.ExpertCache(store, "2 experts"))
        layer = OffloadedExperts(scheduler, i % 2, threads=1)
        scheduler.start(table, ahead=2)
        scheduler.next_batch()
        layer.forward(*arguments)
        if i % 3:
            scheduler.close()

def held():
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), pages * 4096

cycles(1000)
before = held()
cycles(10_000)
after = held()
assert after[:2] == before[:2], (before, after)
assert after[2] - before[2] < 4 << 20, (before, after)
"""
    )
