"""`python -m tests.hub_server [--port P] [--root DIR] [--profile lfs|xet]`: a Hub to try things on."""

import argparse
import signal
from pathlib import Path

from .environment import client_variables
from .server import HubServer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="of the Hub (default: a free one)")
    parser.add_argument("--root", type=Path, help="folder that keeps everything (default: a temporary one)")
    parser.add_argument("--profile", choices=("lfs", "xet"), default="lfs", help="how large files travel")
    options = parser.parse_args()
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # for all threads: they wait for `sigwait`
    with HubServer(options.root, options.profile, options.port) as hub:
        for name, value in client_variables(hub.endpoint, hub.profile, hub.root / "homes" / "shell").items():
            print(f"export {name}={value}")
        for token, account in hub.tokens.items():
            names = ", ".join(f"{name}/*" for name in (account.name, *account.orgs))
            print(f"# export HF_TOKEN={token}   to {account.role} {names}")
        print("# Ctrl-C stops it.", flush=True)
        signal.sigwait(stops)


if __name__ == "__main__":
    main()
