from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from legion_shm.errors import ProtocolError
from legion_shm.transport.fdpass import SegmentReceiver, send_segment_fd
from tests import needs

pytestmark = needs.posix

HEADER = struct.Struct("<4sHHQIIQ")
GOOD = HEADER.pack(b"LSEG", 1, 0, 7, 3, 0, 4096)

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture(params=[socket.SOCK_SEQPACKET, socket.SOCK_STREAM], ids=["seqpacket", "stream"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    left, right = socket.socketpair(socket.AF_UNIX, request.param)
    before = open_fds()
    with left, right:
        yield left, right
        assert open_fds() <= before


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def send_raw(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])


def test_descriptors_arrive_with_what_they_belong_to(ends: Ends) -> None:
    left, right = ends
    receiver = SegmentReceiver(right)
    assert receiver.receive_pending() == []
    assert not receiver.wait(0.0)
    files = [os.memfd_create(f"file{n}") for n in range(3)]
    for n, fd in enumerate(files):
        os.write(fd, b"%d" % n)
        send_segment_fd(left, 2**64 - 1 - n, 2**32 - 1 - n, 2**40 + n, fd)
        os.close(fd)
    assert receiver.wait(5.0)
    received = receiver.receive_pending()
    assert [item[:3] for item in received] == [(2**64 - 1 - n, 2**32 - 1 - n, 2**40 + n) for n in range(3)]
    for n, (*_, fd) in enumerate(received):
        assert os.pread(fd, 10, 0) == b"%d" % n
        assert not os.get_inheritable(fd)
        os.close(fd)
    assert receiver.receive_pending() == []
    assert not receiver.ended


def test_the_end_of_the_peer_is_seen_after_what_it_sent(ends: Ends) -> None:
    left, right = ends
    receiver = SegmentReceiver(right)
    with open(os.devnull) as file:
        send_segment_fd(left, 1, 2, 4096, file.fileno())
    left.close()
    received = receiver.receive_pending()
    assert [item[:3] for item in received] == [(1, 2, 4096)]
    assert receiver.ended
    assert receiver.receive_pending() == []
    os.close(received[0][3])


MALFORMED: dict[str, tuple[bytes, int]] = {
    "wrong magic": (HEADER.pack(b"LSEX", 1, 0, 7, 3, 0, 4096), 1),
    "wrong version": (HEADER.pack(b"LSEG", 2, 0, 7, 3, 0, 4096), 1),
    "reserved bits": (HEADER.pack(b"LSEG", 1, 1, 7, 3, 0, 4096), 1),
    "no size": (HEADER.pack(b"LSEG", 1, 0, 7, 3, 0, 0), 1),
    "no descriptor": (GOOD, 0),
    "two descriptors": (GOOD, 2),
    "too many descriptors": (GOOD, 20),
    "garbage": (os.urandom(32), 1),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_message_is_a_protocol_error_and_leaks_nothing(ends: Ends, case: str) -> None:
    left, right = ends
    data, fds = MALFORMED[case]
    receiver = SegmentReceiver(right)
    with open(os.devnull) as file:
        send_segment_fd(left, 1, 2, 4096, file.fileno())
        send_raw(left, data, [file.fileno()] * fds)
    before = open_fds()
    with pytest.raises(ProtocolError):
        receiver.receive_pending()
    assert open_fds() == before


def test_a_message_in_pieces_is_put_together_on_a_stream_only(ends: Ends) -> None:
    left, right = ends
    receiver = SegmentReceiver(right)
    with open(os.devnull) as file:
        send_raw(left, GOOD[:10], [file.fileno()])
    assert receiver.receive_pending() == []
    send_raw(left, GOOD[10:], [])
    ((*what, fd),) = receiver.receive_pending()
    assert what == [7, 3, 4096]
    os.close(fd)


def test_a_message_cut_off_by_the_peers_end_is_a_protocol_error(ends: Ends) -> None:
    left, right = ends
    receiver = SegmentReceiver(right)
    with open(os.devnull) as file:
        send_raw(left, GOOD[:10], [file.fileno()])
    left.close()
    with pytest.raises(ProtocolError, match="middle"):
        receiver.receive_pending()


def test_closing_the_receiver_closes_what_came_in_part(ends: Ends) -> None:
    left, right = ends
    receiver = SegmentReceiver(right)
    with open(os.devnull) as file:
        send_raw(left, GOOD[:10], [file.fileno()])
    before = open_fds()
    assert receiver.receive_pending() == []
    assert open_fds() == before + 1
    receiver.close()
    assert open_fds() == before


def test_a_peer_that_reads_nothing_is_a_timeout_and_a_dead_one_an_error(ends: Ends) -> None:
    left, right = ends
    with open(os.devnull) as file:

        def send_until_full() -> None:
            for _ in range(100_000):
                send_segment_fd(left, 1, 2, 4096, file.fileno(), timeout_s=0.01)

        with pytest.raises(TimeoutError, match="took no descriptor"):
            send_until_full()
        right.close()
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            send_segment_fd(left, 1, 2, 4096, file.fileno())


def test_a_descriptor_over_the_limit_of_open_files_says_so(ends: Ends) -> None:
    left, right = ends
    receiver = SegmentReceiver(right)
    with open(os.devnull) as file:
        send_segment_fd(left, 1, 2, 4096, file.fileno())
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 1, hard))
        try:
            with pytest.raises(ProtocolError, match="limit of open files"):
                receiver.receive_pending()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
