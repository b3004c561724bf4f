"""Each way in which a server can fail, against a server of this machine that fails so."""

import socket
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from flaky import Fail, Site, site

from clipft.data.remote.fetch import Fetch, NotFetched

CONTENT = bytes(range(256)) * 40  # 10,240 bytes, every part of which differs from the one before


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "x.tar").write_bytes(CONTENT)
    with site(tmp_path) as here:
        yield here


def fetch(web: Site, size: int | None = None, path: str = "/x.tar", **changed) -> bytes:
    """The file as it comes; whole is what equals CONTENT."""
    into = BytesIO()
    wrong = changed.pop("wrong", lambda: "" if into.getvalue() == CONTENT else "it is not whole")
    Fetch(web.url + path, into, size, web.patience(**changed), lambda: None).run(wrong)
    return into.getvalue()


def ranges(web: Site) -> list[str | None]:
    return [asked for _, asked in web.asked]


def test_a_file_comes_in_one_request(web: Site):
    assert fetch(web) == fetch(web, size=len(CONTENT)) == CONTENT
    assert ranges(web) == [None, None] and web.sleeps == []


@pytest.mark.parametrize("status", [404, 410])
def test_a_file_that_is_not_there_ends_at_once_and_says_so(web: Site, status: int):
    web.always["/x.tar"] = Fail(status=status)
    with pytest.raises(
        NotFetched, match=rf"^{web.url}/x\.tar cannot be read: HTTP {status} .*Check the address"
    ) as error:
        fetch(web)
    assert error.value.absent and len(web.asked) == 1 and web.sleeps == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_file_that_is_not_for_us_ends_at_once_with_what_gives_access(web: Site, status: int):
    web.always["/x.tar"] = Fail(status=status)
    with pytest.raises(NotFetched, match=rf"HTTP {status} .*netrc"):
        fetch(web)
    assert len(web.asked) == 1


def test_too_many_requests_wait_as_long_as_the_server_says(web: Site):
    web.fails["/x.tar"] = [Fail(status=429, headers={"Retry-After": "7"})]
    assert fetch(web) == CONTENT
    assert sum(web.sleeps) == 7


def test_a_server_that_asks_to_come_back_next_week_is_not_waited_for(web: Site):
    web.always["/x.tar"] = Fail(status=429, headers={"Retry-After": "604800"})
    with pytest.raises(NotFetched, match=r"HTTP 429 .*, and the server asks to come back in 604,800 s"):
        fetch(web)
    assert len(web.asked) == 1 and web.sleeps == []


def test_a_date_to_come_back_at_is_understood(web: Site):
    from email.utils import formatdate

    web.fails["/x.tar"] = [Fail(status=503, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)})]
    assert fetch(web) == CONTENT
    assert 25 < sum(web.sleeps) <= 30


def test_503_twice_is_waited_out_longer_each_time(web: Site):
    web.fails["/x.tar"] = [Fail(status=503), Fail(status=503)]
    assert fetch(web) == CONTENT
    assert web.sleeps == [1.0, 2.0] and len(web.asked) == 3


def test_503_for_ever_ends_after_the_tries_with_what_came(web: Site):
    web.always["/x.tar"] = Fail(status=503)
    with pytest.raises(NotFetched, match=r"HTTP 503 .* after 4 attempts.*start the same command again") as error:
        fetch(web)
    assert not error.value.absent and len(web.asked) == 4


def test_a_body_cut_before_its_length_goes_on_where_it_broke_off(web: Site):
    web.fails["/x.tar"] = [Fail(cut=3000), Fail(cut=1000)]
    assert fetch(web) == CONTENT
    assert ranges(web) == [None, "bytes=3000-", "bytes=4000-"]


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_body_without_length_that_is_cut_is_noticed_and_goes_on(web: Site, size: int | None):
    web.fails["/x.tar"] = [Fail(cut=3000, length=False)]
    assert fetch(web, size) == CONTENT
    assert ranges(web) == [None, "bytes=3000-"]


def test_a_body_without_length_that_is_always_cut_is_never_taken_for_whole(web: Site):
    web.ranges, web.always["/x.tar"] = False, Fail(cut=3000, length=False)
    with pytest.raises(NotFetched, match="it is not whole after 4 attempts"):
        fetch(web)
    with pytest.raises(
        NotFetched, match=r"3,000 bytes came, 10,240 are expected after 4 attempts\. 3,000 of 10,240 bytes"
    ):
        fetch(web, size=len(CONTENT))


def test_a_whole_body_without_length_is_taken(web: Site):
    web.always["/x.tar"] = Fail(length=False)
    assert fetch(web) == CONTENT and len(web.asked) == 1


def test_a_reset_in_the_middle_goes_on_where_it_broke_off(web: Site):
    web.fails["/x.tar"] = [Fail(cut=5000, reset=True)]
    assert fetch(web) == CONTENT
    assert len(web.asked) == 2  # how much came before the reset is the kernel's choice


@pytest.mark.parametrize("slow_s", [0.1, 2.0])  # bytes that trickle, and none in time
def test_a_slow_server_is_left_in_bounded_time(web: Site, slow_s: float):
    web.fails["/x.tar"] = [Fail(slow_s=slow_s)]
    began = time.monotonic()
    assert fetch(web, timeout_s=0.4) == CONTENT
    assert time.monotonic() - began < 2 and len(web.asked) == 2


def test_a_slow_server_is_named_when_it_stays_slow(web: Site):
    web.always["/x.tar"] = Fail(slow_s=0.1)
    with pytest.raises(NotFetched, match=r"less than 1024 bytes a second came for 0\.3 s after 2 attempts"):
        fetch(web, timeout_s=0.3, tries=2)


def test_nobody_at_the_address_is_an_error_with_the_reason(web: Site, tmp_path: Path):
    with site(tmp_path) as gone:
        pass
    with pytest.raises(NotFetched, match=rf"{gone.url}/x\.tar cannot be read: Connection refused after 4 attempts"):
        fetch(gone)


def test_a_host_that_nobody_knows_ends_at_once(web: Site):
    address = "http://no-such-host.invalid/x.tar"
    try:
        socket.getaddrinfo("no-such-host.invalid", 80)
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            pytest.skip("this machine has no name server")
    with pytest.raises(NotFetched, match=r"invalid/x\.tar cannot be read: its host is not known\. Check the address"):
        Fetch(address, BytesIO(), None, web.patience(), lambda: None).run(lambda: "")
    assert web.sleeps == []


def test_a_long_wait_is_said(web: Site, capsys: pytest.CaptureFixture):
    web.fails["/x.tar"] = [Fail(status=503, headers={"Retry-After": "30"})]
    assert fetch(web) == CONTENT
    assert (
        capsys.readouterr().err == f"warning: {web.url}/x.tar: HTTP 503 Service Unavailable; again in 30 s (1 of 4)\n"
    )


def test_a_server_without_ranges_begins_again(web: Site):
    web.ranges, web.fails["/x.tar"] = False, [Fail(cut=3000), Fail(cut=9000)]
    assert fetch(web) == CONTENT
    assert ranges(web) == [None, "bytes=3000-", "bytes=9000-"]


def test_a_file_that_changes_between_two_parts_is_read_anew(web: Site):
    old = b"o" * len(CONTENT)
    web.fails["/x.tar"] = [Fail(cut=3000, body=old)]
    assert fetch(web) == CONTENT
    assert ranges(web) == [None, "bytes=3000-", None]


def test_a_file_that_is_shorter_when_it_goes_on_is_read_anew(web: Site):
    web.fails["/x.tar"] = [Fail(cut=20000, body=b"o" * 30000)]
    assert fetch(web) == CONTENT
    assert ranges(web) == [None, "bytes=20000-", None]


def test_another_length_than_the_expected_one_ends_at_once(web: Site):
    with pytest.raises(NotFetched, match=r"it has 10,240 bytes, 10,241 are expected\..*clipft data index"):
        fetch(web, size=len(CONTENT) + 1)
    assert len(web.asked) == 1


def test_wrong_bytes_of_the_right_length_are_tried_once_more(web: Site):
    web.fails["/x.tar"] = [Fail(body=b"x" * len(CONTENT))]
    assert fetch(web) == CONTENT and ranges(web) == [None, None]
    web.always["/x.tar"] = Fail(body=b"x" * len(CONTENT))
    with pytest.raises(NotFetched, match=r"it is not whole\."):
        fetch(web)
    assert len(web.asked) == 4


def test_a_body_that_comes_compressed_is_refused(web: Site):
    web.always["/x.tar"] = Fail(headers={"Content-Encoding": "gzip"})
    with pytest.raises(NotFetched, match=r"compressed \(gzip\)"):
        fetch(web)


def test_redirects_are_followed_on_the_host_that_was_named_and_parts_are_asked_for_there_too(web: Site):
    web.always["/old.tar"] = Fail(status=302, headers={"Location": "/x.tar"})
    web.fails["/x.tar"] = [Fail(cut=4000)]
    assert fetch(web, path="/old.tar") == CONTENT
    assert web.asked == [("/old.tar", None), ("/x.tar", None), ("/old.tar", "bytes=4000-"), ("/x.tar", "bytes=4000-")]


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("http://169.254.169.254/latest/meta-data/", r"private address 169\.254\.169\.254"),
        ("http://10.0.0.1/x.tar", r"private address 10\.0\.0\.1"),
        ("http://[::1]/x.tar", r"private address ::1"),
        ("http://[::ffff:10.0.0.1]/x.tar", "private address ::ffff:"),
        ("http://2130706434/x.tar", r"private address 127\.0\.0\.2"),
        ("file:///etc/passwd", "a redirect to file:"),
        ("ftp://example.org/x.tar", "a redirect to ftp:"),
    ],
)
def test_a_redirect_to_where_only_this_machine_can_reach_is_not_followed(web: Site, to: str, says: str):
    """The server that was named is at a private address itself, which makes no other one good."""
    web.always["/x.tar"] = Fail(status=302, headers={"Location": to})
    with pytest.raises(NotFetched, match=rf"{web.url}/x\.tar cannot be read: .*{says}.*not followed"):
        fetch(web)
    assert len(web.asked) == 1 and web.sleeps == []


def test_redirects_in_a_circle_end(web: Site):
    web.always["/x.tar"] = Fail(status=301, headers={"Location": "/x.tar"})
    with pytest.raises(NotFetched, match="more than 5 redirects"):
        fetch(web)
    assert len(web.asked) == 6


def test_what_is_secret_in_an_address_is_in_no_error(web: Site):
    address = web.url.replace("http://", "http://user:hidden@") + "/gone.tar?sig=hidden"
    with pytest.raises(NotFetched) as error:
        Fetch(address, BytesIO(), None, web.patience(), lambda: None).run(lambda: "")
    chain, said = error.value, ""
    while chain is not None:
        said, chain = said + str(chain), chain.__cause__
    assert "gone.tar?..." in said and "hidden" not in said
