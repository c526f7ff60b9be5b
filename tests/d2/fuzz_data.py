#!/usr/bin/env python
"""Send broken annotations through everything that reads them; see `main` for what is a fault.

    python tests/d2/fuzz_data.py --inputs 30000 --processes 2
    python tests/d2/fuzz_data.py --first 1234 --inputs 1      # repeats the input 1234

An input follows from its number. It is a sound COCO file (with boxes or masks), result file,
teacher file, YOLO or VOC folder in which a few places are changed: values of other types, extreme
numbers, cut or doubled entries, damaged bytes. It must be refused by an InputError with one bounded
line, or be read so that every object is finite, inside its image, and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
from coco_files import forget
from detectron2.data import transforms as T
from PIL import Image

from dn_detr.d2.data.catalog import register_coco_format
from dn_detr.d2.data.dataset_dicts import load, load_annotations
from dn_detr.d2.data.ground_truth import read_results
from dn_detr.d2.data.mapper import DetrMapper
from dn_detr.d2.data.summary import report_on
from dn_detr.d2.data.teacher_boxes import load_teacher_boxes
from dn_detr.d2.evaluation.coco_evaluator import evaluate
from dn_detr.datasets.voc import from_voc
from dn_detr.datasets.yolo import from_yolo, read_class_names
from dn_detr.errors import InputError

WIDTH, HEIGHT, NUM_IMAGES = 24, 16, 3
LONGEST_MESSAGE = 400
SLOWEST = 20.0  # seconds from which an input hangs

NUMBERS = [
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e308", "1e30", "1e-320", "-0.0", "0"),
    *("1", "-1", "0.5", "9007199254740993", "18446744073709551616", "9" * 400, "9" * 5000, "2"),
]
VALUES = [
    *NUMBERS,
    *("null", "true", "false", '"1"', '""', '"a\\u0000b"', '"\\ud800"', '"x\\ny\\u202e"', "[]"),
    *("{}", "[[]]", "[[1]]", '[["a"]]', "[null]", '{"a": 1}', "[" * 3000 + "]" * 3000),
    *("[" * 200000, f'"{"long" * 500}"', '"..\\\\a.png"', "[1, 2, 3, 4]", "[NaN, 1, 2, 3]"),
    *('{"size": [16, 24], "counts": [384]}', '{"size": [16, 24], "counts": "abc"}'),
    *('{"size": [9, 9], "counts": [81]}', '{"size": [16, 24], "counts": [-1, 385]}'),
    *('{"size": [16, 24], "counts": "ooooooooooooooooooooooo"}', '{"size": 3, "counts": []}'),
    *("[[1, 1, 2, 2]]", "[[1, 1, 1e9, 2, 3, 3]]", "[[1, 1, NaN, 2, 3, 3]]", "[1, 1, 5, 1, 5, 5]"),
]
"""Texts in place of a value of a JSON file."""


class Hole:
    """Stands for a text of VALUES until the file is written."""

    def __init__(self, text: str):
        self.text = text


def dumps(value) -> str:
    """Write JSON with the texts of holes as they are."""
    if isinstance(value, Hole):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def sound_coco(rng: random.Random, *, with_masks: bool) -> dict:
    """A sound COCO file over the images that exist."""
    kinds = [lambda i: i + 1, lambda i: -i, lambda i: f"é{i}", lambda i: 2**53 + i, lambda i: 0 - i]
    image_id = rng.choice(kinds)
    annotations = []
    for number in range(rng.randint(1, 6)):
        x, y = rng.uniform(0, WIDTH - 6), rng.uniform(0, HEIGHT - 6)
        w, h = rng.uniform(1, WIDTH - x), rng.uniform(1, HEIGHT - y)
        annotation = {
            "id": number + rng.choice([0, 1]) * 2**53,
            "image_id": image_id(rng.randrange(NUM_IMAGES)),
            "category_id": rng.choice([3, 7]),
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": int(rng.random() < 0.15),
        }
        if with_masks:
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
            if rng.random() < 0.3:
                counts = [5, 100, WIDTH * HEIGHT - 105]
                annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
        annotations.append(annotation)
    return {
        "info": {},
        "images": [
            {"id": image_id(i), "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
            for i in range(NUM_IMAGES)
        ],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def places(value, found=None) -> list:
    """All (container, key) of a nested value."""
    found = [] if found is None else found
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def spoil(rng: random.Random, content) -> bytes:
    """Change a few places of a JSON value; returns the bytes of the file."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        container, key = rng.choice(places(content))
        what = rng.random()
        if what < 0.55:
            container[key] = Hole(rng.choice(VALUES))
        elif what < 0.7 and isinstance(container, dict):
            del container[key]
        elif what < 0.8 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif type(container[key]) in (int, float):
            change = rng.choice([lambda v: -v, lambda v: v * 1000, lambda v: v / 1e6, float, str])
            container[key] = change(container[key])
    data = dumps(content).encode()
    what = rng.random()
    if what < 0.06:
        data = data[: rng.randrange(len(data))]
    elif what < 0.12:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    elif what < 0.15:
        data = b"\xef\xbb\xbf" + data.replace(b", ", b",\r\n")
    elif what < 0.16:
        data = data.decode(errors="ignore").encode("utf-16")
    return data


class Fault(Exception):
    """What an input did that it must not."""


def check(condition, text: str) -> None:
    if not condition:
        raise Fault(text)


# ------------------------------------------------------------------------------------- the families


def read_everything(name: str, *, with_masks: bool, number: int) -> None:
    """Load a registered dataset as check, training and evaluation do; raises Fault."""
    loaded = load(name, with_masks=with_masks)
    truth = loaded.truth
    report = report_on(
        loaded, is_for_training=True, filters_empty=False, num_queries=9, num_groups=0, max_noised=9
    )
    check(str(report).isprintable() or "\n" in str(report), "report with control characters")
    dropped = sum(finding.count for finding in report.findings[:2])
    given = given_boxes(truth.source)
    check(
        given == report.num_boxes + report.num_crowd + dropped,
        f"{given} boxes given, {report.num_boxes} + {report.num_crowd} + {dropped} counted",
    )
    mapper = DetrMapper(
        augmentations=[T.NoOpTransform()],
        image_format="RGB",
        with_instances=True,
        with_masks=with_masks,
    )
    num_trained = 0
    for record in loaded.records:
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            check(0 <= x0 < x1 <= WIDTH and 0 <= y0 < y1 <= HEIGHT, f"box {annotation['bbox']}")
        instances = mapper(record)["instances"]
        check(bool(np.isfinite(instances.gt_boxes.tensor.numpy()).all()), "boxes not finite")
        num_trained += len(instances)
    if not with_masks:  # a mask may cover no pixel centre
        check(num_trained == report.num_boxes, f"{num_trained} of {report.num_boxes} trained")
    if number % 8 == 0:
        coco = truth.to_coco(with_masks=with_masks)
        check(len(coco.anns) == report.num_boxes + report.num_crowd, "objects lost in evaluation")
        found = [
            {k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation") if k in a}
            | {"score": 0.5}
            for a in coco.dataset["annotations"]
            if not a["iscrowd"]
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluated = evaluate(coco, found, "segm" if with_masks else "bbox")
        if evaluated is not None:
            check(np.isfinite(evaluated.stats).all(), "AP not finite")
            check(with_masks or evaluated.stats[0] > 0.99, f"AP {evaluated.stats[0]} of the truth")


def given_boxes(json_file: str) -> int:
    """Count the annotations of a file, by Python's own parser."""
    with contextlib.suppress(RecursionError):
        text = Path(json_file).read_text(encoding="utf-8-sig", errors="replace")
        content = json.loads(text)
        return len(content.get("annotations") or [])
    return -1


def coco(rng, folder: Path, number: int, *, with_masks: bool) -> None:
    path = folder / f"{number}.json"
    path.write_bytes(spoil(rng, sound_coco(rng, with_masks=with_masks)))
    register_coco_format([str(number), str(path), str(folder / "images")])
    read_everything(str(number), with_masks=with_masks, number=number)


def some_results(rng, content: dict) -> list[dict]:
    return [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": rng.random()}
        for a in content["annotations"]
    ]


def of_sound_dataset(rng, folder: Path, number: int):
    """Register a sound dataset; returns it and spoiled results for it."""
    content = sound_coco(rng, with_masks=False)
    path = folder / f"{number}.json"
    path.write_text(json.dumps(content))
    register_coco_format([str(number), str(path), str(folder / "images")])
    results = folder / f"{number}_results.json"
    results.write_bytes(spoil(rng, some_results(rng, content)))
    return load_annotations(str(number)), str(results)


def results(rng, folder: Path, number: int) -> None:
    loaded, file = of_sound_dataset(rng, folder, number)
    found = read_results(file, loaded.truth)
    check(np.isfinite(found.boxes).all() and np.isfinite(found.scores).all(), "not finite")
    check((found.images >= 0).sum() + (found.images < 0).sum() == len(found.labels), "lost results")
    if number % 4 == 0 and not found.unknown_ids and (found.boxes[:, 2:] >= 0).all():
        with contextlib.redirect_stdout(io.StringIO()):
            evaluated = evaluate(loaded.truth.to_coco(), found.to_coco(), "bbox")
        check(np.isfinite(evaluated.stats).all(), "AP not finite")


def teacher(rng, folder: Path, number: int) -> None:
    loaded, file = of_sound_dataset(rng, folder, number)
    taught = load_teacher_boxes(loaded, file)
    boxes = taught.boxes.boxes
    check(np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all(), "boxes without size")
    check((boxes >= 0).all() and (boxes <= [WIDTH, HEIGHT] * 2).all(), "boxes outside")
    left_out = taught.num_unknown + taught.num_unscored + sum(f.count for f in taught.findings[:2])
    check(taught.num_read == len(boxes) + left_out, "boxes lost")


TOKENS = ["nan", "inf", "-1", "1e400", "2", "0.5", "", "a", "-0.0", "1e-30", "0", "9" * 400, "\x00"]


def spoil_text(rng, text: str) -> bytes:
    """Change words of a text file, and sometimes its bytes."""
    lines = [line.split(" ") for line in text.split("\n")]
    for _ in range(rng.choice([0, 1, 1, 2])):
        line = rng.choice(lines)
        what = rng.random()
        if what < 0.6 and line:
            line[rng.randrange(len(line))] = rng.choice(TOKENS)
        elif what < 0.8 and line:
            del line[rng.randrange(len(line))]
        else:
            line.append(rng.choice(TOKENS))
    data = "\n".join(map(" ".join, lines)).encode()
    what = rng.random()
    if what < 0.1:
        data = b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")
    elif what < 0.2 and data:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data


def converted(content: dict, folder: Path, number: int) -> None:
    """Read what was converted as a user would after dn-detr convert."""
    path = folder / f"{number}.json"
    path.write_text(json.dumps(content))
    register_coco_format([str(number), str(path), str(folder / "images")])
    read_everything(str(number), with_masks=False, number=number)


def yolo(rng, folder: Path, number: int) -> None:
    labels = folder / f"labels{number}"
    labels.mkdir()
    spoiled = rng.randrange(NUM_IMAGES + 1)
    for i in range(NUM_IMAGES):
        lines = [
            f"{rng.randrange(2)} 0.5 0.5 {rng.uniform(0.1, 1):.4f} {rng.uniform(0.1, 1):.4f}"
            for _ in range(rng.randint(0, 3))
        ]
        if rng.random() < 0.3:
            lines.append("1 0.1 0.1 0.9 0.1 0.9 0.9")
        text = "\n".join(lines)
        data = spoil_text(rng, text) if i == spoiled else text.encode()
        (labels / f"{i}.txt").write_bytes(data)
    names = folder / f"{number}.yaml"
    text = rng.choice(["names: [a, b]", "names: {0: a, 1: b}"])
    names.write_bytes(spoil_text(rng, text) if spoiled == NUM_IMAGES else text.encode())
    converted(from_yolo(folder / "images", read_class_names(names), labels), folder, number)


def voc(rng, folder: Path, number: int) -> None:
    root = folder / f"voc{number}"
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").symlink_to(folder / "images", target_is_directory=True)
    spoiled = rng.randrange(NUM_IMAGES)
    for i in range(NUM_IMAGES):
        objects = "".join(
            f"<object>\n<name> {rng.choice('ab')} </name>\n<difficult> 0 </difficult>\n<bndbox>"
            f"<xmin> {rng.randint(1, 9)} </xmin>\n<ymin> {rng.randint(1, 7)} </ymin>\n"
            f"<xmax> {rng.randint(11, WIDTH)} </xmax>\n<ymax> {rng.randint(9, HEIGHT)} </ymax>\n"
            "</bndbox>\n</object>\n"
            for _ in range(rng.randint(0, 3))
        )
        size = f"<size>\n<width> {WIDTH} </width>\n<height> {HEIGHT} </height>\n</size>\n"
        text = f"<annotation>\n<filename> {i}.png </filename>\n{size}{objects}</annotation>"
        data = spoil_text(rng, text) if i == spoiled else text.encode()
        (root / f"Annotations/{i}.xml").write_bytes(data)
    converted(from_voc(root), folder, number)


FAMILIES = {
    "boxes": lambda *a: coco(*a, with_masks=False),
    "masks": lambda *a: coco(*a, with_masks=True),
    "results": results,
    "teacher": teacher,
    "yolo": yolo,
    "voc": voc,
}


# --------------------------------------------------------------------------------------- the runner


def run_one(number: int, folder: Path, families: list[str]) -> tuple[str, str]:
    """Return the family of an input and its fault, "refused" or "read"."""
    rng = random.Random(number)
    family = families[number % len(families)]
    start = time.monotonic()
    try:
        FAMILIES[family](rng, folder, number)
        outcome = "read"
    except InputError as error:
        message = str(error)
        outcome = "refused"
        if len(message) > LONGEST_MESSAGE or not message.isprintable() or len(message) < 10:
            outcome = f"fault: message {message[:200]!r}"
    except Fault as fault:
        outcome = f"fault: {fault}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        outcome = f"fault: {type(error).__name__} at {where}: {str(error)[:100]!r}"
    if time.monotonic() - start > SLOWEST:
        outcome = f"fault: took {time.monotonic() - start:.0f} s"
    forget(str(number))
    return family, outcome


def worker(numbers: range, families: list[str], last, queue) -> None:
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(0)  # for the count of the boxes by Python's own parser
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="fuzz", dir=memory))
    os.environ["DN_DETR_CACHE"] = str(folder / "cache")
    make_images(folder)
    counts, faults = Counter(), []
    for number in numbers:
        last.value = number
        family, outcome = run_one(number, folder, families)
        if outcome.startswith("fault"):
            faults.append((number, family, outcome))
            outcome = "fault"
        counts[family, outcome] += 1
        if number % 50 == numbers.start % 50:
            clean(folder)
    shutil.rmtree(folder)
    queue.put((counts, faults))


def make_images(folder: Path) -> None:
    (folder / "images").mkdir(exist_ok=True)
    for i in range(NUM_IMAGES):
        Image.new("RGB", (WIDTH, HEIGHT), (i, 2, 3)).save(folder / "images" / f"{i}.png")


def clean(folder: Path) -> None:
    """Remove all files of past inputs."""
    for path in folder.iterdir():
        if path.name != "images":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def fuzz(first: int, inputs: int, processes: int, families: list[str]):
    """Run inputs in processes that may crash or hang; returns counts and faults."""
    context = multiprocessing.get_context("spawn")
    counts, faults, running = Counter(), [], []
    todo = [range(first + i, first + inputs, processes) for i in range(processes)]
    while todo or running:
        while todo:
            last, queue = context.Value("q", -1), context.SimpleQueue()
            numbers = todo.pop()
            process = context.Process(target=worker, args=(numbers, families, last, queue))
            process.start()
            running.append([process, numbers, last, queue, -1, time.monotonic()])
        time.sleep(0.2)
        for entry in list(running):
            process, numbers, last, queue, seen, since = entry
            if last.value != seen:
                entry[4:] = last.value, time.monotonic()
            hangs = entry[4] >= 0 and time.monotonic() - entry[5] > 3 * SLOWEST
            if process.is_alive() and not hangs:
                continue
            running.remove(entry)
            if not queue.empty():
                found, bad = queue.get()
                counts += found
                faults += bad
                process.join()
                continue
            process.kill()
            process.join()
            at = last.value
            faults.append((at, "?", "fault: hangs" if hangs else f"crash: {process.exitcode}"))
            rest = [n for n in numbers if n > at]
            if at >= 0 and rest:
                todo.append(range(rest[0], numbers.stop, numbers.step))
    return counts, faults


def main(arguments: list[str] | None = None) -> int:
    """A fault: an exception other than InputError, a message out of bounds, a crash, a hang, a box
    that is not finite or outside its image, an object that is neither trained on nor counted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=30_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    args = parser.parse_args(arguments)
    start = time.monotonic()
    counts, faults = fuzz(args.first, args.inputs, args.processes, args.families)
    kinds: dict = {}
    for number, family, outcome in faults:
        kinds.setdefault((family, outcome.split("'")[0]), []).append((number, outcome))
    for (family, _), examples in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(examples)} x {family}: {examples[0][1]} (input {examples[0][0]})")
    for family in args.families:
        by = {outcome: counts[family, outcome] for outcome in ("read", "refused", "fault")}
        print(f"{family}: {', '.join(f'{n} {outcome}' for outcome, n in by.items())}")
    print(f"{sum(counts.values())} inputs, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
