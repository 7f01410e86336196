"""A client in a process of its own that stays for many calls: HF_ENDPOINT is read on import, and imports take long."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.hub_server import HubServer

ROOT = str(Path(__file__).parents[2])
# Each line on standard input is a script; what it leaves in `answer` goes back. Waits are a thousandth as long.
LOOP = """
import contextlib, io, json, os, sys, time, traceback, warnings
warnings.filterwarnings("ignore")
answers, sys.stdout, sleep = sys.stdout, sys.stderr, time.sleep
time.sleep = lambda seconds: sleep(seconds / 1000)

import torch
torch.set_num_threads(1)
from huggingface_hub import HfApi
from onestep_peft import load
from onestep_peft.cli import main
from onestep_peft.hub import push as pushing
from onestep_peft.hub.push import push
import tests.conftest

# That takes the tests themselves off the network; processes that this one starts have a Hub to talk to.
del os.environ["HF_HUB_OFFLINE"]
real_check = pushing.check_in_fresh_process

def attempt(*args, check=False, **kwargs):
    pushing.check_in_fresh_process = real_check if check else lambda *args, **kwargs: 0.0
    try:
        result = push(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "", "message": " ".join(result.notes), **vars(result)}

def shell(*words, check=False):
    pushing.check_in_fresh_process = real_check if check else lambda *args, **kwargs: 0.0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(list(words))
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}

for line in sys.stdin:
    scope = dict(globals())
    try:
        exec(json.loads(line), scope)
        said = {"answer": scope["answer"]}
    except BaseException:
        said = {"failed": traceback.format_exc()}
    print(json.dumps(said), file=answers, flush=True)
"""


class Client:
    """Runs scripts in one long-lived process whose working directory is `folder`, and whose log is `log`."""

    def __init__(self, hub: HubServer, folder: Path, token: str = "hf_write", **variables: str) -> None:
        quick = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": ROOT, **quick, **variables}
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder.with_suffix(".log")
        self._process = subprocess.Popen(
            [sys.executable, "-c", LOOP], env=hub.environment(token) | own, cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"),
        )  # fmt: skip

    def run(self, script: str) -> Any:
        """What the script leaves in `answer`."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(textwrap.dedent(script)), file=self._process.stdin, flush=True)
        said = json.loads(self._process.stdout.readline() or '{"failed": "the client has ended"}')
        assert "failed" not in said, said["failed"] + self.log.read_text()[-2000:]
        return said["answer"]

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.kill()  # it does nothing by now, and its imports take seconds to take down
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)
