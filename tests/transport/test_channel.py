"""One conformance suite for both kinds of channel; what only one of them has comes after it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from legion_shm.clock import monotonic_s
from legion_shm.errors import ProtocolError, StartupError
from legion_shm.transport import channel
from legion_shm.transport.channel import ChannelKind, ClientChannel, Endpoint, ServerChannel, channel_kinds
from tests import needs

MAX_BYTES = 1 << 20
SLACK = 4096
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(reason), reason=reason))
    for kind, reason in channel_kinds().items()
]
A, B = b"w1.job.secret", b"w2.job.secret"
_REFUSED = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_DISCONNECTED,
}


class Rig:
    """A server, its clients, and waiting with an end to it."""

    def __init__(self, kind: ChannelKind, directory: Path) -> None:
        self.server = ServerChannel(kind, directory=directory, max_bytes=MAX_BYTES)
        self.clients: list[ClientChannel] = []

    def client(self, identity: bytes, endpoint: Endpoint | None = None) -> ClientChannel:
        endpoint = endpoint or self.server.admit([identity])
        client = ClientChannel(endpoint, identity, max_bytes=MAX_BYTES)
        self.clients.append(client)
        return client

    def connected(self, identity: bytes) -> ClientChannel:
        """A client whose first frame has come."""
        client = self.client(identity)
        client.send(b"hello")
        assert self.receive() == (identity, b"hello")
        return client

    def receive(self) -> tuple[bytes, bytes]:
        """The next frame."""
        found: list[tuple[bytes, bytes]] = []

        def arrived() -> bool:
            got = self.server.receive()
            if got is not None:
                found.append(got)
            return bool(found)

        self.pump(arrived)
        return found[0]

    def pump(self, until: Callable[[], bool]) -> None:
        """Run the server's loop until something is so."""
        end_s = monotonic_s() + 10
        while not until():
            assert monotonic_s() < end_s, "it did not come true"
            self.server.wait(0.005)

    def close(self) -> None:
        for client in self.clients:
            cast("Any", client)._socket.setsockopt(zmq.LINGER, 0)
            client.close()
        self.server.close()
        ClientChannel.terminate()


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(request.param, tmp_path)
    yield rig
    rig.close()


def rig_of(kind: ChannelKind) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rig", [kind], indirect=True)


# --- for both kinds -----------------------------------------------------------------------------------


def test_frames_go_both_ways(rig: Rig) -> None:
    one, other = rig.connected(A), rig.connected(B)
    assert rig.server.send(A, b"for a")
    assert rig.server.send(B, b"for b")
    assert one.receive(10) == b"for a"
    assert other.receive(10) == b"for b"
    assert one.receive(0) is None
    assert rig.server.receive() is None
    assert rig.server.dropped == 0


def test_on_a_busy_processor_nothing_is_given_up_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now, turns = [100.0], [0]

    def give_up(takes_s: float) -> None:
        turns[0] += 1
        now[0] += takes_s

    monkeypatch.setattr(channel, "monotonic_s", lambda: now[0])
    quick = channel._Yield(lambda: give_up(0.00001))
    slow = channel._Yield(lambda: give_up(0.004))
    for _ in range(3):
        quick()
    assert turns == [3]
    for _ in range(3):
        slow()
    assert turns == [4]
    now[0] += channel._Yield.REST_S
    slow()
    assert turns == [5]


def test_who_has_sent_a_frame_lets_zeromqs_thread_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    client = rig.connected(A)
    turns: list[str] = []
    monkeypatch.setattr(channel, "_yield", lambda: turns.append("a turn"))
    client.send(b"one")
    assert turns == ["a turn"]
    assert rig.server.send(A, b"two")
    assert turns == ["a turn"] * 2
    assert (rig.receive(), client.receive(10)) == ((A, b"one"), b"two")


def test_a_sender_can_wait_for_what_it_sent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    client = rig.connected(A)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for leaves_s in (0.0, 0.0001):
        monkeypatch.setattr(channel, "_LEAVES_S", leaves_s)
        client.let_leave()
    assert slept == [0.0001]


@pytest.mark.parametrize("nbytes", [0, 1, 65535, 65536, MAX_BYTES])
def test_frames_of_any_allowed_size_arrive_whole(rig: Rig, nbytes: int) -> None:
    client = rig.connected(A)
    frame = os.urandom(nbytes)
    client.send(frame)
    assert rig.receive() == (A, frame)
    assert rig.server.send(A, frame)
    assert client.receive(10) == frame


def test_frames_of_one_sender_stay_in_order(rig: Rig) -> None:
    client = rig.connected(A)
    frames = [str(number).encode() for number in range(500)]
    for frame in frames:
        client.send(frame)
    assert [rig.receive()[1] for _ in frames] == frames
    for frame in frames:
        assert rig.server.send(A, frame)
    assert [client.receive(10) for _ in frames] == frames


def test_frames_of_an_unknown_identity_are_dropped_and_counted(rig: Rig) -> None:
    endpoint = rig.server.admit([A])
    rig.client(b"w9.job.guessed", endpoint).send(b"let me in")
    rig.pump(lambda: rig.server.receive() is None and rig.server.dropped == 1)
    rig.client(A, endpoint).send(b"hello")
    assert rig.receive() == (A, b"hello")
    assert rig.server.dropped == 1


def test_an_ill_formed_message_is_dropped_and_counted(rig: Rig) -> None:
    client = rig.connected(A)
    cast("Any", client)._socket.send_multipart([b"two", b"parts"])
    client.send(b"whole")
    assert rig.receive() == (A, b"whole")
    assert rig.server.dropped == 1


def test_an_oversize_frame_does_not_arrive_and_the_server_lives_on(rig: Rig) -> None:
    bystander, client = rig.connected(B), rig.connected(A)
    client.send(bytes(MAX_BYTES + SLACK + 1))
    client.send(b"after it")
    bystander.send(b"still here")
    seen: set[tuple[bytes, bytes]] = set()

    def both_are_heard() -> bool:
        client.send(b"again")  # it connects again by itself; what was on its way by then may be gone
        while got := rig.server.receive():
            seen.add(got)
        return {(B, b"still here"), (A, b"again")} <= seen

    rig.pump(both_are_heard)
    assert all(len(frame) < 100 for _, frame in seen)
    assert rig.server.send(B, b"and so am I")
    assert bystander.receive(10) == b"and so am I"
    assert rig.server.dropped == 0


def test_whoever_was_dismissed_is_not_heard_any_more(rig: Rig) -> None:
    endpoint = rig.server.admit([A])
    client = rig.client(A, endpoint)
    client.send(b"hello")
    assert rig.receive() == (A, b"hello")
    rig.server.dismiss([A], endpoint)
    client.send(b"late")
    rig.pump(lambda: rig.server.receive() is None and rig.server.dropped == 1)


def test_nobody_takes_a_living_clients_name(rig: Rig) -> None:
    endpoint = rig.server.admit([A])
    client = rig.client(A, endpoint)
    client.send(b"hello")
    assert rig.receive() == (A, b"hello")
    impostor = rig.client(A, endpoint)
    impostor.send(b"I am w1")
    client.send(b"still me")
    assert rig.receive() == (A, b"still me")
    assert rig.server.send(A, b"to whom?")
    assert client.receive(10) == b"to whom?"
    assert impostor.receive(0) is None


def test_sending_to_nobody_says_so(rig: Rig) -> None:
    assert rig.server.send(A, b"x") is False
    rig.server.admit([A])
    assert rig.server.send(A, b"x") is False


def test_sending_to_a_peer_that_is_gone_says_so(rig: Rig) -> None:
    client = rig.connected(A)
    client.close()
    rig.clients.remove(client)
    rig.pump(lambda: not rig.server.send(A, b"are you there"))


def test_waiting_tells_frames_from_descriptors(rig: Rig) -> None:
    client = rig.connected(A)
    assert rig.server.wait(0) == (False, [])
    reader, writer = socket.socketpair()  # Windows polls sockets alone
    with reader, writer:
        r = reader.fileno()
        rig.server.watch(r)
        assert rig.server.wait(0) == (False, [])
        writer.send(b"x")
        assert rig.server.wait(10) == (False, [r])
        client.send(b"frame")
        rig.pump(lambda: rig.server.wait(0) == (True, [r]))
        reader.recv(1)
        rig.server.unwatch(r)
        writer.send(b"x")
        assert rig.receive() == (A, b"frame")
        assert rig.server.wait(0) == (False, [])


def test_waiting_ends_with_its_time(rig: Rig) -> None:
    started_s = monotonic_s()
    assert rig.server.wait(0.02) == (False, [])
    assert rig.client(A).receive(0.02) is None
    assert monotonic_s() - started_s >= 0.04


@pytest.mark.parametrize("watches", [False, True])
def test_a_client_may_be_told_to_wait_for_longer_than_zeromq_can(rig: Rig, watches: bool) -> None:
    client = rig.connected(A)
    reader, writer = socket.socketpair()
    with reader, writer:
        if watches:
            client.watch(reader.fileno())
        assert rig.server.send(A, b"frame")
        assert client.receive(1e9) == b"frame"


def test_a_client_that_waits_is_woken_by_a_descriptor(rig: Rig) -> None:
    client = rig.connected(A)
    reader, writer = socket.socketpair()
    with reader, writer:
        client.watch(reader.fileno())
        writer.send(b"x")
        assert client.receive(None) is None
        assert rig.server.send(A, b"frame")
        rig.pump(lambda: client.receive(0) == b"frame")


def test_last_words_leave_before_the_clients_end(rig: Rig) -> None:
    endpoint = rig.server.admit([A])

    def speak() -> None:
        client = ClientChannel(endpoint, A, max_bytes=MAX_BYTES)
        client.send(b"last words")
        client.close()
        ClientChannel.terminate()

    thread = threading.Thread(target=speak)
    thread.start()
    assert rig.receive() == (A, b"last words")
    thread.join(10)
    assert not thread.is_alive()


def os_threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


@needs.linux
@pytest.mark.parametrize("kind", KINDS)
def test_closing_leaves_no_descriptor_thread_or_socket_file(kind: ChannelKind, tmp_path: Path) -> None:
    def life() -> None:
        rig = Rig(kind, tmp_path)
        client = rig.connected(A)
        client.send(bytes(1 << 19))
        rig.receive()
        assert rig.server.send(A, bytes(1 << 19))
        assert client.receive(10) is not None
        rig.close()

    life()  # what a first use leaves to the process
    fds, threads = set(os.listdir("/proc/self/fd")), os_threads()
    life()
    assert set(os.listdir("/proc/self/fd")) == fds
    assert os_threads() <= threads
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_cannot_be_made_leaves_nothing(
    kind: ChannelKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise zmq.ZMQError(zmq.EADDRINUSE)

    monkeypatch.setattr(zmq.Socket, "bind", refuse)
    with pytest.raises(StartupError, match="in use"):
        ServerChannel(kind, directory=tmp_path, max_bytes=MAX_BYTES)


def test_an_endpoint_does_not_show_its_secret(rig: Rig) -> None:
    endpoint = rig.server.admit([A])
    assert repr(endpoint) == f"Endpoint({rig.server.address!r})"
    assert not endpoint.client_secret or endpoint.client_secret.decode() not in repr(endpoint)


def turned_away(rig: Rig, endpoint: Endpoint) -> None:
    """Connect as A, and come back once the connection was refused."""
    client = rig.client(A, endpoint)
    socket = cast("Any", client)._socket
    seen: set[int] = set()
    with socket.get_monitor_socket() as monitor:
        with contextlib.suppress(ProtocolError):  # where the refusal was quicker
            client.send(b"let me in")

        def refused() -> bool:
            assert rig.server.receive() is None
            while monitor.poll(0):
                seen.add(int(recv_monitor_message(monitor)["event"]))
            return bool(seen & _REFUSED)

        rig.pump(refused)
        socket.disable_monitor()
    assert zmq.EVENT_HANDSHAKE_SUCCEEDED not in seen


# --- tcp: the key decides -----------------------------------------------------------------------------


def test_each_endpoint_has_a_key_pair_of_its_own(tmp_path: Path) -> None:
    rig = Rig("tcp", tmp_path)
    try:
        one, other = rig.server.admit([A]), rig.server.admit([B])
        assert one.server_key == other.server_key != b""
        assert len({one.client_key, one.client_secret, other.client_key, other.client_secret}) == 4
        assert rig.server.address.startswith("tcp://127.0.0.1:")
    finally:
        rig.close()


def strange(rig: Rig, how: str) -> Endpoint:
    endpoint = rig.server.admit([A])
    public, secret = zmq.curve_keypair()
    if how == "unknown key":
        return Endpoint(endpoint.address, endpoint.server_key, public, secret)
    if how == "another server's key":
        return Endpoint(endpoint.address, public, endpoint.client_key, endpoint.client_secret)
    if how == "another's public key":
        return Endpoint(endpoint.address, endpoint.server_key, endpoint.client_key, secret)
    if how == "no key":
        return Endpoint(endpoint.address)
    rig.server.dismiss([], endpoint)
    return endpoint


@rig_of("tcp")
@pytest.mark.parametrize(
    "how", ["unknown key", "another server's key", "another's public key", "no key", "a dismissed key"]
)
def test_without_the_right_keys_nothing_gets_through(rig: Rig, how: str) -> None:
    turned_away(rig, strange(rig, how))
    rig.connected(B)
    assert rig.server.dropped == 0, "it did not even come so far"


# --- ipc: the folder decides --------------------------------------------------------------------------


@needs.linux
@rig_of("ipc")
def test_the_socket_lies_in_the_given_folder(rig: Rig, tmp_path: Path) -> None:
    assert rig.server.address == f"ipc://{tmp_path / 'control'}"
    assert (tmp_path / "control").is_socket()


@pytest.mark.skipif(bool(channel_kinds()["ipc"]), reason="no ipc here")
def test_another_users_process_is_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = os.getuid() + 1
    with monkeypatch.context() as patched:
        patched.setattr(os, "getuid", lambda: stranger)
        rig = Rig("ipc", tmp_path)
    try:
        turned_away(rig, rig.server.admit([A]))
    finally:
        rig.close()
