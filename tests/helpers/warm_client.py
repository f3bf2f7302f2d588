"""What stands for a warm Python's process (warm.py): hands over its arguments, environment, folder and streams, passes
signals on, and ends as the fork ends. It imports little, because every rank of every test starts one."""

import contextlib
import json
import os
import select
import signal
import socket
import sys

PASSED_ON = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]

address, namespace, *arguments = sys.argv[1:]
if os.readlink("/proc/self/ns/net") != namespace:  # a fork of the server would not be in it
    os.execv(sys.executable, [sys.executable, *arguments])

noted, wake = socket.socketpair()
wake.setblocking(False)
signal.set_wakeup_fd(wake.fileno())
for number in PASSED_ON:
    signal.signal(number, lambda *_: None)
signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

server = socket.socket(socket.AF_UNIX)
server.connect(address)
request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
data = json.dumps(request).encode()
socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
server.sendall(data)

parent, status = os.getppid(), b""
while len(status) < 4:
    ready, _, _ = select.select([server, noted], [], [], 1.0)
    if os.getppid() != parent and "MEGATRON_LOWBIT_PARENT" in os.environ:  # a rank ends with its command
        sys.exit(1)
    if noted in ready:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            server.sendall(noted.recv(64))
    if server in ready:
        more = server.recv(4 - len(status))
        if not more:
            sys.exit("the warm Python has ended")
        status += more
ended = int.from_bytes(status, "big")
if os.WIFSIGNALED(ended):
    signal.signal(os.WTERMSIG(ended), signal.SIG_DFL) if os.WTERMSIG(ended) != signal.SIGKILL else None
    os.kill(os.getpid(), os.WTERMSIG(ended))
os._exit(os.WEXITSTATUS(ended))
