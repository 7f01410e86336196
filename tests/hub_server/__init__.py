"""A small Hugging Face Hub on the loopback interface, for the real clients to talk to. See `HubServer`."""

from .faults import Fault
from .server import HubServer

__all__ = ["Fault", "HubServer"]
