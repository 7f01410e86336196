"""The environment in which Hugging Face clients know one Hub only."""

import os
from pathlib import Path

_FOREIGN = ("HF_", "HUGGINGFACE", "HUGGING_FACE", "TRANSFORMERS_", "XDG_CACHE")


def client_variables(endpoint: str, profile: str, home: Path, token: str = "") -> dict[str, str]:
    """The variables to set, before any import: the clients read them once."""
    variables = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "0" if profile == "xet" else "1",
        "HF_XET_XORB_COMPRESSION_POLICY": "none",  # or the server would have to unpack LZ4
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
    }
    return variables | ({"HF_TOKEN": token} if token else {})


def client_environment(variables: dict[str, str]) -> dict[str, str]:
    """A whole environment: this process's own without its Hugging Face settings, and no way out.

    The server stands in as the proxy for every other host; it refuses and logs such requests as `outside`.
    """
    own = {k: v for k, v in os.environ.items() if not k.upper().startswith(_FOREIGN) and "_PROXY" not in k.upper()}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), variables["HF_ENDPOINT"])
    proxies["NO_PROXY"] = "127.0.0.1,localhost"
    return own | variables | proxies | {name.lower(): value for name, value in proxies.items()}
