"""SIGTERM, SIGHUP, and a standard output that takes no more, in a process of its own."""

import os
import signal
import subprocess
import sys

import pytest

from difftune.signals import ENDING, handling

LOADS = """
import sys, time
from difftune.cli import program
from difftune.files.claim import fresh

@program.cli.command()
def loads():
    with fresh(sys.argv[-1]) as claim:
        claim.write("half.png", b"")
        print("loading", file=sys.stderr, flush=True)
        time.sleep(60)

sys.argv = ["difftune", "loads"] + sys.argv[1:]
program.cli.commands["loads"].params = []
program.cli.commands["loads"].context_settings = {"ignore_unknown_options": True, "allow_extra_args": True}
program.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_while_loading_ends_in_order(tmp_path, number, code):
    run = subprocess.Popen(
        [sys.executable, "-c", LOADS, str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert run.stderr.readline() == "loading\n"
    run.send_signal(number)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == code
    assert said.strip() == ("difftune: interrupted" if code == 130 else f"difftune: stopped by {number.name}")
    assert not (tmp_path / "out").exists()


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling(lambda number, frame: None, *ENDING):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("words", [["--help"], ["doctor", "--json"]])
def test_a_full_standard_output_is_one_sentence(words):
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-m", "difftune", *words], stdout=full, stderr=subprocess.PIPE, text=True)
    said = "difftune: cannot write to the standard output: No space left on device\n"
    assert (run.returncode, run.stderr) == (1, said)


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_command_in_silence():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        run = subprocess.run([sys.executable, "-m", "difftune", "methods"], stdout=pipe, stderr=subprocess.PIPE)
    assert (run.returncode, run.stderr) == (1, b"")
