"""After SIGTERM a process exits cleanly once, through all blocks that ask for it."""

import signal
import subprocess
import sys
import threading

import pytest

from scellst_ray.core.signals import catch_sigterm, clean_exit_on_sigterm

NESTED = """
import os, signal
from scellst_ray.core.signals import catch_sigterm, clean_exit_on_sigterm

with clean_exit_on_sigterm():
    try:
        with clean_exit_on_sigterm():
            signal.signal(signal.SIGTERM, lambda *_: os._exit(9))  # as Ray does
            catch_sigterm()
            {inner}
        {between}
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # a second one
        print("cleaned up")
"""
SEND_SIGTERM = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(("inner", "between"), [(SEND_SIGTERM, "pass"), ("pass", SEND_SIGTERM)])
def test_what_encloses_is_cleaned_up_whichever_block_gets_the_signal(inner, between):
    code = NESTED.format(inner=inner, between=between)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert done.stdout == "cleaned up\n"
    assert done.returncode == 128 + signal.SIGTERM


def test_the_handler_before_is_set_again():
    before = signal.getsignal(signal.SIGTERM)
    with clean_exit_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not before
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_the_handler_alone():
    found = []

    def enter():
        with clean_exit_on_sigterm():
            catch_sigterm()
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
