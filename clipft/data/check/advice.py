"""Figures -> what they mean for a run, in sentences with the setting to change."""

from collections.abc import Iterator
from dataclasses import dataclass

from clipft.config import DataConfig, TrainConfig
from clipft.data.caption import MOST_CHARS
from clipft.data.check.figures import Figures
from clipft.data.check.items import Contents
from clipft.data.check.reader import Reader
from clipft.data.fingerprint import REASONS
from clipft.data.sample import printable
from clipft.data.split import SPLITS, VAL_FRAC, counted, nothing_of, too_many_bad

BATCH = TrainConfig().batch_size
ENOUGH = 0.1  # false negatives of a batch, and shares in percent, below which nothing is advised
MULTILINGUAL = "model=xlm-roberta-base-ViT-B-32 model.pretrained=laion5b_s13b_b90k (clipft models siglip2 lists others)"
ODD = ("dark", "flat", "blurred", "tiny")  # flags of pictures to look at
REPACK = (
    "split.val=0.05 at packing, in place of the splits of the source (columns.split=none where a column names them), "
    "keeps such images on one side"
)


@dataclass(frozen=True)
class Case:
    """What the sentences are about."""

    contents: Contents
    figures: Figures
    reader: Reader
    data: DataConfig
    trouble: list[str]
    """Why the set cannot be used."""


def advice_of(case: Case) -> list[str]:
    """The sentences, the gravest first; one where there is nothing to say."""
    parts = (about_use, about_leaks, about_dropped, about_captions, about_negatives, about_images, about_splits)
    found = [sentence for part in parts for sentence in part(case)]
    return found or ["Nothing here asks for another setting than the defaults."]


def trouble_of(contents: Contents, figures: Figures, max_bad_frac: float) -> list[str]:
    """Why nothing, or no training, can be made of the set; rows that packing leaves out do no harm."""
    found = [
        printable(f"{tar.path}: {'; '.join(tar.problems)}. Copy or pack it again, or leave it out.")
        for tar, _ in figures.tars
        if tar.problems
    ]
    for split, each in figures.splits.items():
        if split not in SPLITS:
            continue  # nobody reads it
        reasons = {r: [i for i in rows if contents.items[i].split == split] for r, rows in figures.dropped.items()}
        left_out = sum(
            len(rows) for r, rows in reasons.items() if not contents.packed and by_packing(r, contents, rows)
        )
        bad, total = each.indexed - each.usable - left_out, each.indexed - left_out
        if not each.usable:
            found.append(nothing_of(split, each.indexed))
        elif (sentence := too_many_bad(split, bad, total, max_bad_frac)) is not None:
            found.append(sentence)
    return found if figures.splits else [*found, "There is no sample in it."]


def by_packing(reason: str, contents: Contents, rows: list[int]) -> bool:
    """Whether packing leaves such rows out: those without an image, and those whose header tells."""
    return bool(rows) and (contents.items[rows[0]].reason == reason or reason in set(REASONS) - {"too_large"})


def share(part: int, whole: int) -> str:
    """A share in percent; few are never shown as none, and all but few never as all."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "less than 0.1%"
    return f"{percent:.1f}%" if percent < 99.95 or part == whole else "more than 99.9%"


def about_use(case: Case) -> Iterator[str]:
    yield from (f"Unusable as it is. {reason}" for reason in case.trouble)
    split = case.figures.splits.get(case.figures.trained)
    if split and split.usable and not split.captions:
        yield (
            "It has labels and no captions: it can be measured (clipft evaluate), not trained on. To train, pack it "
            "with captions_from_labels=true, and train with loss.positives=group loss.group=label."
        )
    number = case.figures.negatives.number
    if case.figures.trained == "train" and 0 < number < BATCH:
        yield f"train.batch_size={BATCH}, the default, is more than the {number:,} that an epoch has: make it smaller."


def about_leaks(case: Case) -> Iterator[str]:
    images, captions = [], []
    for sides, found in case.figures.shared.items():
        first, second = sides.split("/")
        total, both = case.figures.splits[second], found.images + found.alike
        if both:
            images.append(
                f"{both:,} of {total.usable:,} {second} images ({share(both, total.usable)}) are also in {first}: "
                f"{found.images:,} with the same bytes, {found.alike:,} that look the same"
            )
        if 100 * found.captions > ENOUGH * total.captions and sides in ("train/val", "train/test"):
            captions.append(f"{found.captions:,} of {total.captions:,} {second} captions")
    if images:
        yield f"{'; '.join(images)}. What is measured there is better than the model; {REPACK}."
    if captions:
        yield (
            f"{' and '.join(captions)} are also in train. Where that should not count, split.by=caption at packing "
            "keeps equal captions on one side."
        )


def about_dropped(case: Case) -> Iterator[str]:
    total = sum(each.indexed for each in case.figures.splits.values())
    dropped = {reason: len(rows) for reason, rows in case.figures.dropped.items()}
    if dropped:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items())
        lost = sum(dropped.values())
        yield (
            f"{lost:,} of {total:,} ({share(lost, total)}) cannot be used and are left out: {reasons}. Up to "
            f"data.max_bad_frac={case.data.max_bad_frac} of the samples of a split are accepted."
        )
    if "bad_utf8" in dropped:
        yield "data.text_errors=replace keeps captions that are not UTF-8, with U+FFFD in the bad places."
    if "too_large" in dropped:
        yield f"data.max_pixels={case.data.max_pixels} keeps images out that have more; raise it where memory allows."


def about_captions(case: Case) -> Iterator[str]:
    lengths, reader = case.figures.lengths, case.reader
    if lengths is None:
        return
    if lengths.cut:
        keep = -(-lengths.ninety_nine // 8) * 8
        yield (
            f"{lengths.cut:,} of {lengths.number:,} captions ({share(lengths.cut, lengths.number)}) have more than the "
            f"{reader.context_length} tokens of {reader.name}: it never sees their ends. Put what matters first, make "
            "them shorter, or "
            + (
                f"stretch the text tower: model.context_length={keep} holds 99 of 100."
                if keep > reader.context_length
                else "leave it: 99 of 100 are whole."
            )
            + f" (Only the first {MOST_CHARS} characters of a caption are ever read.)"
        )
    foreign = {name: each for name, each in case.figures.scripts.items() if name not in ("Latin", "no letters")}
    number = sum(each.captions for each in foreign.values())
    if reader.english and 100 * number > ENOUGH * lengths.number:
        cut = sum(each.cut for each in foreign.values())
        yield (
            f"{number:,} captions ({share(number, lengths.number)}) are not in Latin letters ({', '.join(foreign)}). "
            f"The tokenizer of {reader.name} has English words and spells others in bytes ({cut:,} of these are cut), "
            f"and its weights saw few of them. A multilingual model: {MULTILINGUAL}."
        )
    if (bare := case.figures.scripts.get("no letters")) and 100 * bare.captions > ENOUGH * lengths.number:
        yield f"{counted(bare.captions, 'caption')} without a letter, such as numbers or emoji: see if they are meant."
    split = case.figures.splits[case.figures.trained]
    with_captions = case.figures.negatives.number
    if case.data.captions == "one" and with_captions and split.captions > 1.5 * with_captions:
        yield (
            f"There are {split.captions / with_captions:.1f} captions per image: by default an epoch has each image "
            "once, with one of its captions drawn anew; data.captions=all makes every pair a sample."
        )


def about_negatives(case: Case) -> Iterator[str]:
    found = case.figures.negatives
    batch = min(BATCH, found.number)
    expected = {kind: found.expected(kind, batch) for kind in found.pairs} if batch > 1 else {}
    texts, images = expected.get("equal caption", 0), expected.get("same image", 0)
    if texts > ENOUGH:
        yield (
            f"In a batch of {batch} about {texts:.1f} pairs of samples have equal captions. By default these are "
            "positives of each other (loss.positives=caption); loss.duplicates=mask leaves them out instead. Fewer "
            "meet in a smaller train.batch_size."
        )
    if (more := expected.get("equal but for punctuation", 0) - texts) > ENOUGH:
        yield (
            f"About {more:.1f} more pairs of a batch of {batch} differ in punctuation alone and count as negatives: "
            "write their captions alike before packing."
        )
    if images > ENOUGH:
        also = " (the captions of an image among them, under data.captions=all)" if case.data.captions == "all" else ""
        yield (
            f"In a batch of {batch} about {images:.1f} pairs show the same image{also} and are negatives where their "
            "captions differ: loss.positives=image makes them positives."
        )
    if (more := expected.get("same or similar image", 0) - images) > ENOUGH:
        yield (
            f"About {more:.1f} more pairs of a batch of {batch} look the same without being the same file. They are in "
            "findings.parquet under group; drop repeats from the source, or name groups with loss.positives=group."
        )
    if (classes := expected.get("same class", 0)) > ENOUGH and case.contents.classnames:
        yield (
            f"About {classes:.1f} pairs of a batch of {batch} are of one class: where captions say little more than "
            "the class, train with loss.positives=group loss.group=label."
        )


def about_images(case: Case) -> Iterator[str]:
    figures, size = case.figures, case.reader.image_size
    total = sum(each.usable for each in figures.splits.values())
    number = {name: int(flag.sum()) for name, flag in figures.flags.items()}
    if total and 100 * figures.smaller > 10 * total:
        yield (
            f"{share(figures.smaller, total)} of the images have a shorter side below the {size} pixels that "
            f"{case.reader.name} sees (median {figures.median_side}): they are scaled up and stay coarse"
            + ("; a smaller model.image_size saves time." if figures.median_side <= size / 2 else ".")
        )
    if figures.median_side > 2 * size:
        yield (
            f"Half of the images have a shorter side of more than {figures.median_side} pixels, {case.reader.name} "
            f"sees {size}: image.max_size={2 * size} at packing makes loading faster and the shards smaller."
        )
    if number["odd_aspect"]:
        yield (
            f"{counted(number['odd_aspect'], 'image')} more than three times as long as wide: evaluation cuts a square "
            "from the middle, training one from anywhere near it. Cut them to what their captions describe."
        )
    odd = [f"{number[name]:,} {name}" for name in ODD if number[name]]
    if odd:
        yield (
            f"Look at these, whether their captions can be seen in them: {', '.join(odd)} (pictures in report.html, "
            "keys in findings.parquet). To leave some out, take them out of the source and pack again."
        )


def about_splits(case: Case) -> Iterator[str]:
    splits = case.figures.splits
    if case.contents.held_out:
        frac = VAL_FRAC if case.data.val_frac is None else case.data.val_frac
        yield (
            f"Without a val split training holds out data.val_frac={frac} of train by a hash of the keys, which does "
            "not keep equal images together; split.val=0.05 at packing does."
        )
    elif not case.contents.packed and "val" not in splits and "train" in splits:
        yield "There is no val split yet: split.val=0.05 at packing draws one, equal and similar images on one side."
    small = splits.get("val")
    if small and not case.contents.held_out and 0 < small.usable < 100:
        yield f"val has {counted(small.usable, 'image')}: differences of some percent between runs mean nothing."
