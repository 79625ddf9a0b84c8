"""The small tar parser against `tarfile`, on what four writers make and on damage."""

import io
import os
import shutil
import subprocess
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.tar import Damage, Member, members, members_in, memory

LONG = "folder/" + "n" * 120 + "/" + "x" * 90 + ".jpg"
FILES = {
    "000000001.jpg": b"\xff\xd8" + bytes(1500),
    "000000001.txt": b"a caption",
    "deep/folder/000000002.jpg": bytes(range(256)) * 2,
    "deep/folder/000000002.txt": b"",
    LONG: b"long",
    "größe.seg.png": b"x" * 511,
    "over.jpg": b"y" * 513,
}


def python_tar(form: int, files=None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, content in (FILES if files is None else files).items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1234.5 if form == tarfile.PAX_FORMAT else 7
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def webdataset_tar(samples) -> bytes:
    stream = io.BytesIO()
    writer = webdataset.TarWriter(stream)
    for sample in samples:
        writer.write(sample)
    writer.close()
    return stream.getvalue()


def ours(content: bytes, window: int = 2048) -> tuple[list[Member], Damage | None]:
    found = []
    try:
        for member in members(memory(content), len(content), window=window):
            found.append(member)
    except Damage as damage:
        return found, damage
    return found, None


def theirs(content: bytes) -> tuple[list[tuple], bool]:
    """Return what tarfile lists (name, start, data, size, regular) and whether it ended well."""
    found, at = [], 0
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for info in tar:
                at = tar.offset
                data = tar.fileobj
                data.seek(info.offset_data)
                if info.isfile() and len(data.read(info.size)) < info.size:
                    return found, False
                size = info.size if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
                found.append(
                    (info.name.rstrip("/"), info.offset, info.offset_data, size, info.isfile())
                )
    except Exception:  # whatever it raises on damage
        return found, False
    return found, content[at : at + 512] == bytes(512)


def plain(member: Member) -> tuple:
    return (member.name.rstrip("/"), *member[1:])  # tarfile takes the slash off a folder's name


def assert_same(content: bytes) -> None:
    found, damage = ours(content)
    expected, well = theirs(content)
    assert damage is None
    assert well
    assert [plain(member) for member in found] == expected


def assert_same_or_damage(content: bytes) -> None:
    """Both list the same, or one that calls the tar damaged stops earlier on the same list."""
    found, damage = ours(content)
    listed = [plain(member) for member in found]
    expected, well = theirs(content)
    if damage is None and well:
        assert listed == expected
    shorter = min(len(listed), len(expected))
    assert listed[:shorter] == expected[:shorter]
    if len(listed) < len(expected):
        assert damage is not None
    if len(listed) > len(expected):
        assert not well


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_formats_python_writes_are_listed_as_tarfile_lists_them(form):
    files = {k: v for k, v in FILES.items() if form != tarfile.USTAR_FORMAT or k != LONG}
    files["a" * 90 + "/" + "b" * 60 + ".jpg"] = b"needs the prefix field in ustar"
    content = python_tar(form, files)
    assert_same(content)
    for member in ours(content)[0]:
        assert content[member.data : member.data + member.size] == files[member.name]


def test_webdatasets_tars_have_a_pax_header_before_each_member_which_belongs_to_it():
    content = webdataset_tar(
        {"__key__": f"{i:09d}", "jpg": bytes(700), "json": b"{}", "txt": b"a"} for i in range(5)
    )
    assert_same(content)
    found, _ = ours(content)
    assert found[0].start == 0
    assert found[0].data == 3 * 512
    assert [b.start for b in found[1:]] == [a.end for a in found[:-1]]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "posix", "ustar", "v7"])
def test_tars_of_the_tar_command_are_listed_as_tarfile_lists_them(tmp_path, form):
    folder = tmp_path / "in"
    for name, content in FILES.items():
        if name == LONG and form in ("ustar", "v7"):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.link(folder / "over.jpg", folder / "linked.jpg")
    (folder / "soft.jpg").symlink_to("over.jpg")
    made = tmp_path / "made.tar"
    subprocess.run(
        ["tar", f"--format={form}", "-cf", str(made), "-C", str(folder), "."],
        check=True, capture_output=True,
    )  # fmt: skip
    content = made.read_bytes()
    found, damage = ours(content)
    expected, _ = theirs(content)
    assert damage is None
    assert [plain(member) for member in found] == expected
    assert sum(member.regular for member in found) >= 6


def test_a_name_that_comes_again_is_listed_again():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for _ in range(2):
            for name in ("7.jpg", "7.txt"):
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert_same(stream.getvalue())
    assert [member.name for member in ours(stream.getvalue())[0]] == ["7.jpg", "7.txt"] * 2


def header(kind: bytes = b"0", size: int = 0, name: bytes = b"1.jpg", **fields: bytes) -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:136] = b"0000644\0" * 3 + b"%011o\0" % size
    block[136:148], block[156:157] = b"%011o\0" % 7, kind
    block[257:265] = b"ustar\00000"
    for place, content in fields.items():
        at = int(place[1:])
        block[at : at + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


END = bytes(1024)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def about_next(kind: bytes, content: bytes) -> bytes:
    return header(kind, len(content), b"about") + padded(content)


@pytest.mark.parametrize(
    "content",
    [
        header(size=3, _124=b"\x80" + (3).to_bytes(11, "big")) + padded(b"abc"),
        about_next(b"x", record("size", "3")) + header(size=0) + padded(b"abc"),
        about_next(b"x", record("path", "long/2.jpg")) + header(size=3) + padded(b"abc"),
        about_next(b"g", record("comment", "no matter")) + header(size=3) + padded(b"abc"),
        about_next(b"L", b"gnu/3.jpg\0") + header(size=3) + padded(b"abc"),
        about_next(b"K", b"target\0") + header(b"2", _157=b"short"),
        about_next(b"x", record("path", "pax.jpg")) + about_next(b"L", b"gnu.jpg\0") + header(),
        about_next(b"L", b"gnu.jpg\0") + about_next(b"x", record("path", "pax.jpg")) + header(),
        header(b"7", 3) + padded(b"abc"),
        header(b"\0", 3) + padded(b"abc"),
        header(b"\0", 0, b"folder/") + header(),
        header(b"5", 512, b"folder") + header(),
        header(b"1", 100, b"link.jpg") + header(),
        header(b"Z", 3, b"unknown") + padded(b"abc") + header(),
        header(_345=b"front"),
        header(size=3, _148=b"") + padded(b"abc"),
    ],
)  # fmt: skip
def test_rare_headers_are_read_as_tarfile_reads_them(content):
    found, damage = ours(content + END)
    expected, well = theirs(content + END)
    assert damage is None
    assert well
    assert [plain(member) for member in found] == expected


def test_a_sum_of_signed_bytes_counts_too():
    block = bytearray(header(name=b"\xfc.jpg"))
    signed = 256 + sum(b - 256 if b > 127 else b for b in block[:148] + block[156:])
    block[148:156] = b"%06o\0 " % signed
    assert_same(bytes(block) + END)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no end-of-archive mark"),
        (header(), "no end-of-archive mark"),
        (header()[:300], "a cut header"),
        (header(size=600) + bytes(512), "1.jpg ends early"),
        (bytes(100) + header()[100:], "a damaged header"),
        (header(_124=b"00000zz") + END, "no number"),
        (header(_124=b"\xff" * 12) + END, "no number"),
        (about_next(b"x", record("path", "a.jpg")) + END, "mark too early"),
        (about_next(b"x", b"99 path=a\n") + header() + END, "damaged pax"),
        (about_next(b"x", record("size", "-5")) + header() + END, "damaged pax"),
        (about_next(b"x", record("size", "9" * 30)) + header() + END, "ends early"),
        (about_next(b"g", record("path", "a.jpg")) + header() + END, "global pax header"),
        (about_next(b"x", record("GNU.sparse.major", "1")) + header() + END, "sparse"),
        (header(b"S") + END, "sparse"),
        (header(b"x", 1 << 30) + END, "a header of 1073741824 bytes"),
    ],
)
def test_what_cannot_be_read_raises_and_says_where(content, reason):
    found, damage = ours(content)
    assert damage is not None
    assert reason in str(damage)
    assert "at byte" in str(damage)
    assert len(found) <= 1


def test_only_a_tar_that_just_ends_early_is_called_cut():
    content = python_tar(tarfile.USTAR_FORMAT, {"1.jpg": bytes(2000), "1.txt": b"a"})
    for length in (0, 511, 512, 1000, 2560, 3000, 3584):
        damage = ours(content[:length])[1]
        assert damage is not None
        assert damage.cut, length
    broken = bytearray(content)
    broken[2570] ^= 1
    assert ours(bytes(broken))[1].cut is False


def test_a_part_of_a_tar_is_read_as_the_whole_is_from_any_member_to_any_other():
    content = webdataset_tar(
        {"__key__": f"{i}", "jpg": bytes(300 * i), "txt": b"a" * i} for i in range(1, 5)
    )
    whole, _ = ours(content)
    for first in range(len(whole)):
        for last in range(first, len(whole)):
            base, end = whole[first].start, whole[last].end
            part = content[base:end]
            for held in map(memoryview, (part, b"", part[:700])):
                found = list(members_in(memory(part), len(part), held))
                moved = [m._replace(start=m.start + base, data=m.data + base) for m in found]
                assert moved == whole[first : last + 1]


def test_a_part_that_ends_within_a_member_raises():
    content = python_tar(tarfile.PAX_FORMAT, {"1.jpg": bytes(2000)})
    end = ours(content)[0][0].end
    for length in (end - 512, 1024, 600):
        with pytest.raises(Damage):
            list(members_in(memory(content), length))
    with pytest.raises(Damage, match="too early"):
        list(members_in(memory(content), end + 512))


SEEDS = [
    python_tar(tarfile.USTAR_FORMAT, {"1.jpg": bytes(700), "1.txt": b"a", "2.jpg": b"b"}),
    python_tar(tarfile.PAX_FORMAT, {"1.jpg": bytes(700), LONG: b"a", "ü.txt": b"b"}),
    python_tar(tarfile.GNU_FORMAT, {"1.jpg": bytes(700), LONG: b"a", "2.txt": b"b"}),
    webdataset_tar({"__key__": str(i), "jpg": bytes(600), "txt": b"a"} for i in range(2)),
    about_next(b"L", b"gnu.jpg\0") + about_next(b"x", record("size", "3")) + header() + b"abc"
    + bytes(509) + header(b"1") + header(b"5", 0, b"d/") + header(size=3) + padded(b"abc") + END,
]  # fmt: skip


def mended(content: bytearray, at: int) -> None:
    """Give the block at `at` a right sum, so that what was changed reaches the parser."""
    if at + 512 <= len(content):
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])


CHANGE = st.tuples(
    st.sampled_from(["byte", "field", "cut", "double", "drop", "kind"]),
    st.integers(0, 1 << 14),
    st.integers(0, 255),
    st.booleans(),
)


def mutate(content: bytes, changes: list[tuple[str, int, int, bool]]) -> bytes:
    changed = bytearray(content)
    for what, at, value, mend in changes:
        if not changed:
            break
        at %= len(changed)
        block = at // 512 * 512
        if what == "byte":
            changed[at] = value
        elif what == "field":  # the numbers of a header
            changed[block + 124 + at % 12 : block + 125 + at % 12] = bytes([value])
        elif what == "kind":
            changed[block + 156 : block + 157] = b"0\x001257xgLKSXZ"[value % 13 : value % 13 + 1]
        elif what == "cut":
            del changed[at:]
        elif what == "double":
            changed[block:block] = changed[block : block + 512]
        else:
            del changed[block : block + 512]
        if mend and what in ("byte", "field", "kind"):
            mended(changed, block)
    return bytes(changed)


def fuzz(examples: int):
    @settings(max_examples=examples)
    @given(st.integers(0, len(SEEDS) - 1), st.lists(CHANGE, min_size=1, max_size=4))
    def run(number, changes):
        assert_same_or_damage(mutate(SEEDS[number], changes))

    run()


def test_mutated_tars_are_listed_as_by_tarfile_or_called_damaged():
    fuzz(300)


@pytest.mark.slow
def test_ten_thousand_mutated_tars_are_listed_as_by_tarfile_or_called_damaged():
    fuzz(int(os.environ.get("LAZYCLIP_FUZZ", "10000")))
