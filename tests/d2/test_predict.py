"""Detection in files: pictures, folders, patterns and videos, without a display."""

import csv
import json
import os
import shutil
import signal

import cv2
import numpy as np
import pytest
from PIL import Image

from dn_detr.cli.main import main
from dn_detr.d2.inference.predict import Selection, find_inputs, predict
from dn_detr.d2.inference.visualization import class_color, draw_found
from dn_detr.detector import DetectedObjects
from dn_detr.errors import InputError

RED, BLUE = (200, 0, 0), (0, 0, 200)  # RGB


class FindsDots:
    """Finds the bright dots of an image, classes by their colour, whatever the channel order."""

    class_names = ("red", "blue")
    threshold = 0.3

    def __init__(self):
        self.seen = []

    def __call__(self, images, *, channel_order, threshold):
        assert 0 <= threshold <= 1
        return [self.find(image, channel_order) for image in images]

    def find(self, pixels, channel_order):
        rgb = pixels if channel_order == "RGB" else pixels[:, :, ::-1]
        self.seen.append(rgb.shape)
        found = []
        for label, color in enumerate((RED, BLUE)):
            rows, columns = np.nonzero(np.abs(rgb.astype(int) - color).max(-1) < 60)
            if len(rows):
                found.append((label, columns.min(), rows.min(), columns.max(), rows.max()))
        table = np.array(found, np.float32).reshape(-1, 5)
        labels = table[:, 0].astype(int)
        names = [("red", "blue")[label] for label in labels]
        return DetectedObjects(
            table[:, 1:], np.ones(len(table)), labels, names, None, rgb.shape[:2]
        )


def picture(x: int, color=RED, size=(120, 90)) -> Image.Image:
    """A dot at x on black."""
    image = Image.new("RGB", size)
    image.paste(color, (x, 40, x + 12, 52))
    return image


def has_color(image: np.ndarray, color, tolerance=60) -> bool:
    wanted = np.array(color) * 255
    return bool((np.abs(image.astype(int) - wanted).max(-1) < tolerance).sum() > 20)


def test_a_folder_gives_a_folder_of_pictures_with_boxes(tmp_path):
    (tmp_path / "in").mkdir()
    picture(20).save(tmp_path / "in/a.png")
    picture(70, BLUE).convert("L").save(tmp_path / "in/b.jpg")
    (tmp_path / "in/notes.txt").write_text("no picture")
    assert predict(FindsDots(), [str(tmp_path / "in")], tmp_path / "out") == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.jpg"]
    drawn = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert drawn.shape == (480, 640, 3)  # small pictures are enlarged, so that names can be read
    assert has_color(drawn, class_color(0)) and not has_color(drawn, class_color(1), 40)


def test_patterns_and_one_file_with_a_name(tmp_path):
    for name in "abc":
        picture(20).save(tmp_path / f"{name}.png")
    assert predict(FindsDots(), [str(tmp_path / "[ab].png")], tmp_path / "out") == []
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert predict(FindsDots(), [str(tmp_path / "c.png")], tmp_path / "deep/found.jpg") == []
    assert Image.open(tmp_path / "deep/found.jpg").format == "JPEG"


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".mov"])
def test_a_video_becomes_a_video_whose_classes_keep_their_colours(tmp_path, suffix):
    source, target = tmp_path / "in.avi", tmp_path / f"out{suffix}"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 10, (120, 90))
    for x in (10, 40, 70, 90, 60):
        frame = np.asarray(picture(x)).copy()
        frame[10:22, 100:112] = BLUE
        writer.write(frame[:, :, ::-1])
    writer.release()
    detector = FindsDots()
    assert predict(detector, [str(source)], target) == []
    assert detector.seen == [(90, 120, 3)] * 5
    capture, drawn = cv2.VideoCapture(str(target)), []
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    while (frame := capture.read()[1]) is not None:
        drawn.append(frame[:, :, ::-1])
    assert [frame.shape for frame in drawn] == [(90, 120, 3)] * 5
    for frame in drawn:
        assert has_color(frame, class_color(0), 90) and has_color(frame, class_color(1), 90)


def test_what_cannot_be_read_is_named_after_all_others_are_done(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_text("no picture")
    (tmp_path / "in/b.mp4").write_text("no video")
    picture(20).save(tmp_path / "in/c.png")
    first, second = predict(FindsDots(), [str(tmp_path / "in")], tmp_path / "out")
    assert "a.png" in first and "cannot be read" in first
    assert "b.mp4" in second and "cannot be opened" in second
    assert (tmp_path / "out/c.png").is_file()


def test_mistakes_are_said_in_one_sentence(tmp_path):
    picture(20).save(tmp_path / "a.png")
    for folder in ("empty", "other"):
        (tmp_path / folder).mkdir()
    picture(20).save(tmp_path / "other/a.png")
    here, there = str(tmp_path / "a.png"), str(tmp_path / "other/a.png")
    for names, output, words in [
        (["none.png"], "out", "'none.png' does not exist"),
        ([str(tmp_path / "*.gif")], "out", "no file matches"),
        ([str(tmp_path / "empty")], "out", "no images and no videos"),
        ([here, there], "a.png", "must be a folder for 2 inputs"),
        (["webcam", here], "out.mp4", "a webcam must be the only input"),
        (["webcam:front"], "out.mp4", "a webcam is 'webcam' or 'webcam:1'"),
        (["webcam:77"], "out.mp4", "the webcam 77 cannot be opened"),
        (["webcam"], "out.gif", "videos are written as .mp4"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            predict(FindsDots(), names, tmp_path / output)
        assert "\n" not in str(caught.value)


def test_the_command_line_draws_with_a_checkpoint_alone(trained, tmp_path, capsys):
    picture(20).save(tmp_path / "a.png")
    weights = str(trained / "model_final.pth")
    files = [str(tmp_path / "a.png"), "--output", str(tmp_path / "b.png")]
    opts = ["--weights", weights, "TEST.DETECTIONS_PER_IMAGE=2"]
    main(["predict", *files, "--threshold", "0", *opts])
    assert "2 objects" in capsys.readouterr().out and (tmp_path / "b.png").is_file()
    with pytest.raises(SystemExit, match="dn-detr predict: there is no checkpoint 'none.pth'"):
        main(["predict", *files, "--weights", "none.pth"])


def test_detections_are_drawn_beside_the_ground_truth(trained, tmp_path, capsys):
    """In a file of the name that is printed, also where no format was given."""
    weights = ["--weights", str(trained / "model_final.pth"), "--num-images", "2"]
    main(["visualize", "detections", "--output", str(tmp_path / "a"), *weights])
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'a.png'}\n")
    assert Image.open(tmp_path / "a.png").width > 500


def test_fifos_are_named_and_the_others_go_on(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.mp4"):
        os.mkfifo(tmp_path / "in" / name)
    picture(20).save(tmp_path / "in/c.png")
    signal.alarm(60)  # opening a FIFO would wait for ever
    faults = predict(FindsDots(), [str(tmp_path / "in")], tmp_path / "out")
    faults += predict(FindsDots(), [str(tmp_path / "in/a.png")], tmp_path / "out")
    signal.alarm(0)
    assert [fault.split()[-4:] for fault in faults] == [["not", "a", "regular", "file."]] * 3
    assert (tmp_path / "out/c.png").is_file()


# ------------------------------------------------------------------------- what must not be lost


@pytest.fixture
def pictures(tmp_path):
    """A folder with sub-folders, and names that differ in the suffix alone."""
    folder = tmp_path / "in"
    for i, name in enumerate(("a.jpg", "a.png", "deep/a.png", "deep/er/b.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20 + 9 * i).save(folder / name)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_inputs_are_never_written_over(pictures, tmp_path):
    """The output folder was the input folder: all pictures of the user were replaced."""
    before = contents(pictures)
    (tmp_path / "link").symlink_to(pictures)
    for names, output in [
        ([pictures], pictures),
        ([pictures], tmp_path / "link"),
        ([pictures / "a.png"], pictures / "a.png"),
        ([pictures / "deep", pictures / "a.png"], pictures),
    ]:
        with pytest.raises(InputError, match="is an input and would be written over"):
            predict(FindsDots(), [str(name) for name in names], output, save=["csv"])
    assert contents(pictures) == before


def test_two_inputs_never_share_an_output(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "other")
    found = tmp_path / "found"
    names = [str(pictures), str(tmp_path / "other")]
    assert predict(FindsDots(), names, found, save=["yolo"]) == []
    assert len([name for name in contents(found) if not name.startswith("labels/")]) == 8
    assert len([name for name in contents(found) if name.startswith("labels/")]) == 8 + 1
    assert (found / "deep/er/b.png").is_file() and (found / "deep/er/b_2.png").is_file()


def test_an_output_folder_inside_the_input_folder_is_no_input(pictures):
    found = pictures / "found"
    for _ in range(2):
        assert predict(FindsDots(), [str(pictures)], found) == []
    assert len(contents(found)) == 4


def test_lists_and_patterns_with_sub_folders(pictures, tmp_path):
    (tmp_path / "list.txt").write_text(f"{pictures}/a.png\n\n{pictures}/deep\n")
    inputs = find_inputs([str(tmp_path / "list.txt"), f"{pictures}/**/b.*"])
    names = [str(source.relative_to(pictures)) for source, _ in inputs]
    assert names == ["a.png", "deep/a.png", "deep/er/b.png"]


# ------------------------------------------------------------------------------ what is written


def test_json_csv_and_yolo_hold_what_was_found(tmp_path):
    image = picture(20)
    image.paste(BLUE, (90, 40, 102, 52))
    image.save(tmp_path / "a.png")
    found = tmp_path / "found"
    predict(FindsDots(), [str(tmp_path / "a.png")], f"{found}/", save=["json", "csv", "yolo"])
    red, blue = json.loads((found / "predictions.json").read_text())
    assert (red["bbox"], red["category_id"], red["category"]) == ([20, 40, 11, 11], 1, "red")
    assert (blue["category_id"], blue["image_id"], blue["score"]) == (2, 1, 1)
    header, first, _ = csv.reader((found / "predictions.csv").read_text().splitlines())
    assert dict(zip(header, first, strict=True))["right"] == "31.00" and first[1] == "red"
    lines = (found / "labels/a.txt").read_text().splitlines()
    numbers = [float(x) for x in lines[0].split()]
    assert numbers == pytest.approx([0, 25.5 / 120, 45.5 / 90, 11 / 120, 11 / 90, 1], abs=1e-5)
    assert (found / "labels/classes.txt").read_text() == "red\nblue\n"


def test_classes_thresholds_and_the_most_objects_select():
    table = np.arange(16, dtype=np.float32).reshape(4, 4)
    names = ["red", "blue", "red", "blue"]
    scores = np.array([0.9, 0.6, 0.5, 0.2], np.float32)
    found = DetectedObjects(table, scores, np.array([0, 1, 0, 1]), names)
    chosen = Selection(0.3, {"blue": 0.1}, ["blue"]).of(found)
    assert chosen.scores.tolist() == scores[[1, 3]].tolist() and chosen.class_names == ["blue"] * 2
    assert len(Selection(0.55).of(found)) == 2 and len(Selection(0, top=3).of(found)) == 3
    with pytest.raises(InputError, match="there is no class 'green': the classes are red, blue"):
        Selection(classes=["green"]).check(["red", "blue"])


@pytest.mark.parametrize("size", [(4000, 3), (3, 4000)])
def test_long_and_narrow_images_give_pictures_of_a_sane_size(size):
    """480 pixels of the shorter side made 640,000 of the longer one."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    found = DetectedObjects(np.array([[0, 0, 3, 3.0]]), np.ones(1), np.zeros(1, int), ["red"])
    assert max(draw_found(image, found).shape) <= 4000


def test_lines_and_captions_grow_with_the_picture():
    """They were 6 pixels high in a picture of 640 x 480."""
    shares = []
    for side in (500, 3000):
        box = np.array([[0.2, 0.2, 0.8, 0.8]]) * side
        found = DetectedObjects(box, np.ones(1), np.zeros(1, int), ["red"])
        drawn = draw_found(np.zeros((side, side, 3), np.uint8), found).astype(int)
        shares.append((drawn.max(-1) > 60).mean())
    assert 0.008 < shares[1] < 0.03 and shares[0] == pytest.approx(shares[1], rel=0.5)
