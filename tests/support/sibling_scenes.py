"""Scenes of several processes of one address, in a process of their own: `python -m … SCENE URL`.

A scene prints what it saw as one line of JSON.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cachetools import TTLCache

from broadcache.subscriber import InvalidationEndpoint, LocalCache, Subscriber
from broadcache.subscriber.endpoint.processes.listening import listeners
from broadcache.subscriber.endpoint.processes.own_socket import own_socket

BODY: Final = b'{"namespace":"products","keys":["key"],"id":"one"}'
PATIENCE_SECONDS: Final = 20.0


class Service:
    """A process of a service, with a listener, a cache and an endpoint. Its forked children have them too."""

    def __init__(self, *, has_listener: bool = True, reuse_port: bool = False) -> None:
        self.cache = LocalCache(TTLCache(maxsize=100, ttl=600), when_incoherent="serve")
        self.subscriber = Subscriber(sys.argv[2], caches={"products": self.cache}, echo_interval_seconds=0.2)
        self.endpoint = InvalidationEndpoint(self.subscriber)
        self.listener: socket.socket | None = None
        if has_listener:
            self.listen(reuse_port=reuse_port)

    def listen(self, *, reuse_port: bool = False) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), reuse_port=reuse_port)

    def read(self) -> Any:
        """Load the value until it is held; in a child, the first read starts the subscriber, which clears the cache."""
        wait_until(lambda: self.cache.get_or_load_sync("key", lambda: "old") and self.cache.is_coherent and self.held())
        assert own_socket.address, "its socket is bound before its cache stores anything"
        return self.held()

    def held(self) -> Any:
        return self.cache.get("key")

    def received(self) -> Any:
        return self.subscriber.stats().received.get("http", 0)

    def names(self) -> Any:
        return [str(each) for each in listeners(own_socket.descriptors)]

    def close_listener(self) -> None:
        assert self.listener is not None
        self.listener.close()

    def post(self) -> Any:
        status, document = self.endpoint.post(BODY)
        errors = {each["pid"]: each["error"] for each in document["processes"] if each["error"]}
        told = sorted(each["pid"] for each in document["processes"] if not each["error"])
        return {"status": status, "told": told, "errors": errors, "doubt": document["doubt"]}


class Child:
    """A forked child, which does what it is told."""

    def __init__(self, service: Service) -> None:
        theirs, ours = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            signal.alarm(60)
            with theirs, theirs.makefile("rw") as lines:
                for line in lines:
                    answer = getattr(service, line.strip())()
                    lines.write(json.dumps(answer) + "\n")
                    lines.flush()
            os._exit(0)
        theirs.close()
        self._lines = ours.makefile("rw")
        self._socket = ours

    def do(self, what: str) -> Any:
        self._lines.write(what + "\n")
        self._lines.flush()
        return json.loads(self._lines.readline())

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


def sockets() -> int:
    folder = Path(os.environ["XDG_RUNTIME_DIR"], f"broadcache-{os.geteuid()}")
    return len(list(folder.iterdir()))


# --- the scenes -------------------------------------------------------------------------------------------------------


def family() -> Any:
    """A parent and two children that share a listener."""
    service = Service()
    seen: dict[str, Any] = {}
    with service.subscriber:
        one, other = Child(service), Child(service)
        names = {os.getpid(): "parent", one.pid: "one", other.pid: "other"}

        def shown(answer: Any) -> Any:
            answer["told"] = [names[pid] for pid in answer["told"]]
            answer["errors"] = {names[int(pid)]: error for pid, error in answer["errors"].items()}
            return answer

        seen["before they read"] = shown(service.post())
        seen["read"] = [one.do("read"), other.do("read"), service.read()]
        seen["all"] = shown(service.post())
        seen["held"] = [one.do("held"), other.do("held"), service.held()]
        seen["received"] = [one.do("received"), other.do("received")]
        one.do("read")
        seen["by a child"] = shown(other.do("post"))
        seen["held then"] = one.do("held")
        one.do("close_listener")
        seen["one that ends"] = shown(service.post())
        seen["sockets"] = sockets()
        one.kill()
        seen["after one was killed"] = shown(service.post())
        seen["sockets then"] = sockets()
        other.do("read")
        other.freeze()
        seen["frozen"] = shown(service.post())
        other.thaw()
        wait_until(lambda: other.do("held") is None)  # it reads what it was sent meanwhile
    seen["the parent's subscriber has ended"] = shown(other.do("post"))
    seen["sockets of the parent"] = own_socket.address
    other.kill()
    return seen


def strangers() -> Any:
    """Another service of the same user, with an address of its own."""
    service = Service(has_listener=False)
    with service.subscriber:
        other = Child(service)
        service.listen()
        other.do("listen")
        other.do("read")
        service.read()
        told = service.post()
        other_held = other.do("held")
        other.freeze()
        frozen = service.post()
        other.kill()
        pid = os.getpid()
        return {"told": told["told"] == [pid], "other holds": other_held, "frozen": [frozen["status"], frozen["doubt"]]}


def starting() -> Any:
    """A process that listens nowhere yet, where the address may be bound more than once."""
    service = Service(has_listener=False)
    with service.subscriber:
        other = Child(service)
        other.do("read")
        service.listen(reuse_port=True)
        told = service.post()["told"]
        held = other.do("held")
        other.freeze()
        frozen = service.post()
        other.kill()
        names = sorted([os.getpid(), other.pid])
        return {"told": told == names, "held": held, "frozen": [frozen["status"], [*frozen["errors"]] == [other.pid]]}


def removed() -> Any:
    """The directory of the sockets is removed, as it is when a user's last session ends, or by a cleaner of /tmp."""
    service = Service()
    with service.subscriber:
        other = Child(service)
        service.read()
        other.do("read")
        shutil.rmtree(Path(os.environ["XDG_RUNTIME_DIR"], f"broadcache-{os.geteuid()}"))
        first = service.post()
        wait_until(lambda: service.post()["status"] == 200)  # the child finds it out by itself
        told, held = service.post()["told"], other.do("held")
        other.kill()
        return {
            "first": [first["status"], {str(pid == other.pid): error for pid, error in first["errors"].items()}],
            "told": told == sorted([os.getpid(), other.pid]),
            "held": held,
        }


def nowhere() -> Any:
    """A process that listens nowhere: it cannot know its siblings."""
    service = Service(has_listener=False)
    with service.subscriber:
        answer = service.post()
        return [answer["status"], answer["doubt"]]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(globals()[sys.argv[1]]()))
