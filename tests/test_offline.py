"""Nothing leaves this machine: not from the tests, not from what they start, not from notebooks."""

import queue
import socket
import subprocess
import sys
import threading

import pytest
from jupyter_client.manager import start_new_kernel

FAR = "192.0.2.1"  # reserved for documentation: no machine has it
TRY = f"""
import socket
for what in (lambda: socket.create_connection(({FAR!r}, 9), timeout=1),
             lambda: socket.getaddrinfo("example.org", 80),
             lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ({FAR!r}, 9))):
    try:
        what()
        print("LEFT")
    except OSError as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: socket.create_connection((FAR, 9), timeout=1),
        lambda: socket.socket().connect_ex((FAR, 9)),
        lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", (FAR, 9)),
        lambda: socket.getaddrinfo("example.org", 80),
        lambda: socket.gethostbyname("example.org"),
    ],
    ids=["connect", "connect_ex", "datagram", "look-up", "old look-up"],
)
def test_other_machines_are_refused(attempt):
    with pytest.raises(ConnectionRefusedError, match="offline here"):
        attempt()


def test_this_machine_is_allowed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = threading.Thread(target=lambda: server.accept()[0].sendall(b"here"))
        answer.start()
        with socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client:
            assert client.recv(4) == b"here"
        answer.join()


def test_a_started_python_is_offline():
    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["OfflineError"] * 3, done.stdout + done.stderr


def test_a_notebook_kernel_is_offline():
    manager, client = start_new_kernel()
    try:
        client.execute(TRY)
        printed = ""
        while printed.count("\n") < 3:
            message = client.get_iopub_msg(timeout=60)
            printed += message["content"].get("text", "")
    except queue.Empty:
        pytest.fail(f"the kernel printed only {printed!r}")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert printed.split() == ["OfflineError"] * 3
