"""The short way through headers written as most are finds what the long way finds."""

import io
import random
import tarfile

import pytest

from training.data import tar
from training.data.tar import Damage, members, members_in, memory


def pax_tar(names=12, mtime=1764286969.25):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(names):
            for suffix in ("jpg", "json", "txt"):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                # Times with fewer and more digits: pax records of several lengths.
                info.size, info.mtime = number * 137 % 900, mtime + number / 3
                archive.addfile(info, io.BytesIO(b"\7" * info.size))
    return stream.getvalue()


def walked(content, part):
    """Return the members and, where it could not be read on, why."""
    found = []
    view = memoryview(content)
    walk = members_in(memory(view), len(view), view) if part else members(memory(view), len(view))
    try:
        for member in walk:
            found.append(member)
    except Damage as damage:
        return found, (str(damage), damage.offset, damage.cut)
    return found, None


def both_ways(content, part, monkeypatch):
    short = walked(content, part)
    with monkeypatch.context() as patch:
        patch.setattr(tar._Walk, "usual", lambda self, end: None)
        return short, walked(content, part)


def end_of(content):
    return walked(content, False)[0][-1].end


@pytest.mark.parametrize("part", [False, True])
def test_most_members_of_a_pax_tar_go_the_short_way(part, monkeypatch):
    content = pax_tar()
    content = content[: end_of(content)] if part else content
    long, plain = [], tar._Walk.next
    monkeypatch.setattr(tar._Walk, "next", lambda s, end: long.append(1) or plain(s, end))
    found, damage = walked(content, part)
    assert damage is None
    assert len(found) == 36
    assert all(type(member) is tar.Member for member in found)
    assert len(long) <= 6  # the first of each length of record, and the archive's end


@pytest.mark.parametrize("part", [False, True])
def test_both_ways_agree_on_damaged_tars(part, monkeypatch):
    whole = pax_tar(names=4)
    whole = whole[: end_of(whole)] if part else whole
    draw = random.Random(0)
    ends = set()
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            # Bytes of headers and pax records, where they say something.
            place = draw.randrange(len(content) // 512) * 512
            content[place + draw.choice((0, 9, 28, 60, 99, 124, 130, 135, 150, 156, 345, 511))] = (
                draw.choice((0, 32, 45, 48, 49, 55, 61, 103, 120, 200))
            )
        if draw.random() < 0.2:
            del content[draw.randrange(len(content)) :]
        short, long = both_ways(bytes(content), part, monkeypatch)
        assert short == long
        ends.add(short[1] and short[1][0].split(" at byte")[0])
    assert None in ends
    assert len(ends) > 3


@pytest.mark.parametrize(
    "change",
    [
        {"name": "folder/" + "n" * 120 + ".jpg"}, {"name": "ü.jpg"}, {"size": 0},
        {"pax_headers": {"path": "other.jpg"}}, {"pax_headers": {"comment": "path=x"}},
        {"type": tarfile.DIRTYPE, "size": 0},
        {"type": tarfile.SYMTYPE, "linkname": "a", "size": 0},
        {"name": "n" * 100}, {"pax_headers": {"comment": "c" * 900}},
    ],
)  # fmt: skip
def test_both_ways_agree_on_what_is_not_usual(change, monkeypatch):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size, info.mtime = 600, 1764286969.25
            if number:
                for key, value in change.items():
                    setattr(info, key, value)
            archive.addfile(info, io.BytesIO(b"\7" * info.size))
    short, long = both_ways(stream.getvalue(), False, monkeypatch)
    assert short == long
    assert short[1] is None
