"""What the shell is told: 0, 1, 2 or 130, and a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from onestep_peft import cli
from onestep_peft.errors import PushError


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (ValueError("no such thing"), 2, "onestep: error: no such thing\n"),
        (PushError("the network is down"), 1, "onestep: error: the network is down\n"),
        (OSError(28, "No space left on device"), 1, "onestep: error: OSError: [Errno 28] No space left on device\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"), 1,
            "onestep: error: out of memory (CUDA out of memory.) Try smaller batches (`--help` names the option).\n",
        ),
        (KeyboardInterrupt(), 130, "onestep: interrupted; no result was saved\n"),
    ],
)  # fmt: skip
def test_each_end_has_its_status_and_its_line(
    error: BaseException | None, status: int, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def command(arguments: list[str]) -> None:
        if error is not None:
            raise error

    monkeypatch.setitem(cli.COMMANDS, "train", command)
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err == said


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(arguments: list[str]) -> None:
        raise TypeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "train", command)
    with pytest.raises(TypeError):
        cli.main(["train"])


def _started(*arguments: Any, cwd: Path, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "onestep_peft", *map(str, arguments)], cwd=cwd, stderr=subprocess.PIPE,
        # Where the tests run in the background, the shell has told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, **options,
    )  # fmt: skip


def test_ctrl_c_ends_a_real_run_with_one_line(tmp_path: Path) -> None:
    run = _started("predict", "out", "-", cwd=tmp_path, stdin=subprocess.PIPE)
    assert run.stdin is not None and run.stderr is not None
    run.stdin.write(b"a line\n" * 100_000)  # more than a pipe holds: once it is through, the command is reading
    run.stdin.flush()
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    assert run.stderr.read() == b"onestep: interrupted; no result was saved\n"
    run.stdin.close()


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    end, start = os.pipe()
    os.close(end)
    run = _started("--help", cwd=tmp_path, stdout=start)
    os.close(start)
    _, said = run.communicate(timeout=60)
    assert b"Traceback" not in said and run.returncode in (0, 1)
