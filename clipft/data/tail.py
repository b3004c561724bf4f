"""The zeros at the end of a tar: as its writer filled it up, or where the last samples of a shard were."""

import tarfile

BLOCK = tarfile.BLOCKSIZE
END_BLOCKS = 2  # of zeros that every tar ends with, filled up to a whole record
# Blocks of a record: tar, Python and webdataset write 20, others 1; tar -b writes what it is asked for.
USUAL_RECORDS, MOST_BLOCKS = (20, 1), 2048


def judge_zeros(num_zeros: int, size: int, zeroed: str | None, hopeless: bool) -> tuple[str, bool]:
    """What is to be said about the zeros at the end of a file, and whether they are damage; "" where all is well.

    A copy that was not finished, on a disk that sets the length first, leaves such an end. Where it begins inside of
    the data of a member, `zeroed` is its name; `hopeless` says that these cannot be zeros, or that there is no member.
    """
    usual = is_usual(num_zeros, size)
    if usual and zeroed is None:
        return "", False
    what = f"nothing but {num_zeros} zero bytes from here on"
    if zeroed is not None:
        what += f", and zeros at the end of {zeroed!r} before them"
    damage = hopeless or not is_possible(num_zeros, size) or (zeroed is not None and not usual)
    if damage:
        hint = "" if usual else "; if its writer filled it up so (tar -b), write it again without"
        return f"{what}, as an unfinished copy leaves them{hint}", True
    return f"{what}: if it is a copy, see whether its last samples are missing", False


def is_usual(num_zeros: int, size: int) -> bool:
    """Whether a tar of this size ends so as almost everything that writes tars ends it."""
    return num_zeros <= END_BLOCKS * BLOCK or any(fill_up(num_zeros, size, blocks) for blocks in USUAL_RECORDS)


def is_possible(num_zeros: int, size: int) -> bool:
    """The same for records of up to 1 MiB; where one record is the whole file, it is a power of two or half full."""
    sizes = (blocks for blocks in range(1, MOST_BLOCKS + 1) if fill_up(num_zeros, size, blocks))
    return any(2 * num_zeros <= size or blocks.bit_count() == 1 for blocks in sizes)


def fill_up(num_zeros: int, size: int, blocks: int) -> bool:
    """Whether so many zeros end a tar and fill it up to a whole record of so many blocks, and no further."""
    return size % (blocks * BLOCK) == 0 and num_zeros < (END_BLOCKS + blocks) * BLOCK
