"""Time for boards: judged by ntplib, a client of other people's, and by RFC 5905's own example of a timestamp."""

from __future__ import annotations

import socket
import struct
import time

import ntplib
import pytest

from ground_station import time_server


def test_timestamps_as_in_the_rfc():
    # RFC 5905 figure 4: first day UNIX is 2,208,988,800 s of era 0
    assert time_server.ntp_time(0.0) == 2_208_988_800 << 32
    assert time_server.ntp_time(0.5) == (2_208_988_800 << 32) + (1 << 31)
    # era 1 begins on 2036-02-07 06:28:16 UTC
    assert time_server.ntp_time(2_085_978_496.0) >> 32 == 0


def test_a_client_of_other_people_learns_the_time():
    with time_server.TimeServer("127.0.0.1", 0) as server:
        answer = ntplib.NTPClient().request("127.0.0.1", port=server.port, version=4)
        assert abs(answer.offset) < 0.05 and answer.mode == 4 and answer.leap == 0
        # what systemd-timesyncd asks of a server: 0 < stratum < 16, a root distance under 5 s
        assert answer.stratum == 10 and answer.root_delay / 2 + answer.root_dispersion < 5
        assert abs(answer.tx_time - time.time()) < 1.0
        assert server.answered == 1


def test_the_offset_is_seen_by_that_client(monkeypatch):
    """Negative control: a server whose clock is an hour ahead is found out."""

    class Ahead:
        time = staticmethod(lambda: time.time() + 3600.0)

    monkeypatch.setattr(time_server, "time", Ahead)
    with time_server.TimeServer("127.0.0.1", 0) as server:
        assert abs(ntplib.NTPClient().request("127.0.0.1", port=server.port).offset - 3600) < 1.0


@pytest.mark.parametrize(
    "question",
    [
        b"",
        b"\x23" * 47,
        bytes([4 << 3 | 4]) + bytes(47),
        bytes([4 << 3 | 6]) + bytes(47),
        bytes([7 << 3 | 3]) + bytes(47),
    ],
    ids=["empty", "short", "an answer", "a control query", "version 7"],
)
def test_what_is_no_question_gets_no_answer(question):
    assert time_server.answer(question, 0.0, 0.0) is None
    good = bytes([4 << 3 | 3]) + bytes(47)
    assert len(time_server.answer(good, 0.0, 0.0)) == len(good)


def test_the_answer_gives_the_clients_own_stamp_back():
    stamp = 0x0123_4567_89AB_CDEF
    answer = time_server.answer(bytes([3 << 3 | 3]) + bytes(39) + struct.pack(">Q", stamp), 1.0, 2.0)
    origin, received, sent = struct.unpack(">QQQ", answer[24:48])
    assert (origin, received, sent) == (stamp, time_server.ntp_time(1.0), time_server.ntp_time(2.0))
    assert answer[0] >> 3 & 7 == 3


def test_a_taken_port_is_named():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(time_server.TimeServerError, match="chrony"):
            time_server.TimeServer("127.0.0.1", taken.getsockname()[1])
