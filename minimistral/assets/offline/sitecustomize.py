"""Refuses every connection that leaves this machine.

The tests (conftest.py) and `minimistral doctor --offline` put this folder on PYTHONPATH, and Python imports
a module of this name when it starts: so the rule holds there, in the notebooks' kernels, and in all that
they start in Python. An audit hook sees every socket of the interpreter and cannot be taken away again.
"""

import ipaddress
import socket
import sys

CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


class OfflineError(ConnectionRefusedError):
    """A connection to another machine was refused."""


def is_here(host):
    """Whether a host, as socket functions take it, is this machine."""
    host = host.decode() if isinstance(host, bytes) else host
    if not host or host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse(event, arguments):
    if event in CONNECTIONS:
        connection, address = arguments
        family = getattr(connection, "family", None)
        internet = family in (socket.AF_INET, socket.AF_INET6) and address
        host, allowed = (address[0], is_here(address[0])) if internet else (None, True)
    elif event in LOOKUPS:
        host = arguments[0]
        allowed = is_here(host) or host == socket.gethostname()
    else:
        return
    if not allowed:
        raise OfflineError(f"offline here: {event} to {host!r} was refused")


if not hasattr(sys, "minimistral_is_offline"):
    sys.minimistral_is_offline = True
    sys.addaudithook(refuse)
