"""Put on PYTHONPATH, this keeps a Python process and its children off the network: loopback only, no name look-ups.

An audit hook sees every connection that Python code opens, however it is opened, and cannot be taken off again.
"""

import sys

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")
WATCHED = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")


def refuse(event, arguments):
    if event not in WATCHED:
        return
    target = arguments[0] if event.startswith("socket.get") else arguments[1]
    host = target[0] if isinstance(target, tuple) else target  # a plain string is the path of a local socket
    named = isinstance(target, tuple) or event.startswith("socket.get")
    if named and host and not str(host).startswith(LOOPBACK):
        raise PermissionError(f"offline: {event} to {host} is refused")


sys.addaudithook(refuse)
