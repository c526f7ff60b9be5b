"""tools/demo.py: pictures, folders, patterns and videos, without a display."""

import os
import signal

import cv2
import numpy as np
import pytest
from PIL import Image

from dn_detr.d2.inference.visualization import class_color
from dn_detr.detector import DetectedObjects

RED, BLUE = (200, 0, 0), (0, 0, 200)  # RGB


@pytest.fixture(scope="module")
def demo(tool):
    return tool("demo")


class FindsDots:
    """Finds the bright dots of an image, classes by their colour, whatever the channel order."""

    def __init__(self):
        self.seen = []

    def __call__(self, pixels, *, channel_order):
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
        return DetectedObjects(table[:, 1:], np.ones(len(table)), labels, names)


def picture(x: int, color=RED, size=(120, 90)) -> Image.Image:
    """A dot at x on black."""
    image = Image.new("RGB", size)
    image.paste(color, (x, 40, x + 12, 52))
    return image


def has_color(image: np.ndarray, color, tolerance=60) -> bool:
    wanted = np.array(color) * 255
    return bool((np.abs(image.astype(int) - wanted).max(-1) < tolerance).sum() > 20)


def test_a_folder_gives_a_folder_of_pictures_with_boxes(demo, tmp_path):
    (tmp_path / "in").mkdir()
    picture(20).save(tmp_path / "in/a.png")
    picture(70, BLUE).convert("L").save(tmp_path / "in/b.jpg")
    (tmp_path / "in/notes.txt").write_text("no picture")
    assert demo.run(FindsDots(), [str(tmp_path / "in")], tmp_path / "out") == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.jpg"]
    drawn = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert drawn.shape == (480, 640, 3)  # small pictures are enlarged, so that names can be read
    assert has_color(drawn, class_color(0)) and not has_color(drawn, class_color(1), 40)


def test_patterns_and_one_file_with_a_name(demo, tmp_path):
    for name in "abc":
        picture(20).save(tmp_path / f"{name}.png")
    assert demo.run(FindsDots(), [str(tmp_path / "[ab].png")], tmp_path / "out") == []
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert demo.run(FindsDots(), [str(tmp_path / "c.png")], tmp_path / "deep/found.jpg") == []
    assert Image.open(tmp_path / "deep/found.jpg").format == "JPEG"


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".mov"])
def test_a_video_becomes_a_video_whose_classes_keep_their_colours(demo, tmp_path, suffix):
    source, target = tmp_path / "in.avi", tmp_path / f"out{suffix}"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 10, (120, 90))
    for x in (10, 40, 70, 90, 60):
        frame = np.asarray(picture(x)).copy()
        frame[10:22, 100:112] = BLUE
        writer.write(frame[:, :, ::-1])
    writer.release()
    detector = FindsDots()
    assert demo.run(detector, [str(source)], target) == []
    assert detector.seen == [(90, 120, 3)] * 5
    capture, drawn = cv2.VideoCapture(str(target)), []
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    while (frame := capture.read()[1]) is not None:
        drawn.append(frame[:, :, ::-1])
    assert [frame.shape for frame in drawn] == [(90, 120, 3)] * 5
    for frame in drawn:
        assert has_color(frame, class_color(0), 90) and has_color(frame, class_color(1), 90)


def test_what_cannot_be_read_is_named_after_all_others_are_done(demo, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_text("no picture")
    (tmp_path / "in/b.mp4").write_text("no video")
    picture(20).save(tmp_path / "in/c.png")
    first, second = demo.run(FindsDots(), [str(tmp_path / "in")], tmp_path / "out")
    assert "a.png" in first and "cannot be read" in first
    assert "b.mp4" in second and "cannot be opened" in second
    assert (tmp_path / "out/c.png").is_file()


def test_mistakes_are_said_in_one_sentence(demo, tmp_path):
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
        ([here, there], "out", "several inputs would be written to"),
        (["webcam", here], "out.mp4", "a webcam must be the only input"),
        (["webcam:front"], "out.mp4", "a webcam is 'webcam' or 'webcam:1'"),
        (["webcam:77"], "out.mp4", "the webcam 77 cannot be opened"),
        (["webcam"], "out.gif", "videos are written as .mp4"),
    ]:
        with pytest.raises(demo.InputError, match=words) as caught:
            demo.run(FindsDots(), names, tmp_path / output)
        assert "\n" not in str(caught.value)


def test_the_command_line_draws_with_a_checkpoint_alone(demo, trained, tmp_path, capsys):
    picture(20).save(tmp_path / "a.png")
    weights = str(trained / "model_final.pth")
    files = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "b.png")]
    opts = ["--opts", "MODEL.WEIGHTS", weights, "TEST.DETECTIONS_PER_IMAGE", "2"]
    demo.main([*files, "--confidence-threshold", "0", *opts])
    assert "2 objects" in capsys.readouterr().out and (tmp_path / "b.png").is_file()
    for arguments, words in [
        (files, "name the checkpoint as MODEL.WEIGHTS"),
        ([*files, "--opts", "MODEL.WEIGHTS", "none.pth"], "there is no checkpoint 'none.pth'"),
    ]:
        with pytest.raises(SystemExit, match=f"demo.py: .*{words}"):
            demo.main(arguments)


def test_detections_are_drawn_beside_the_ground_truth(tool, trained, tmp_path, capsys):
    """In a file of the name that is printed, also where no format was given."""
    weights = ["MODEL.WEIGHTS", str(trained / "model_final.pth")]
    tool("draw_detections").main(["--output", str(tmp_path / "a"), "--num-images", "2", *weights])
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'a.png'}\n")
    assert Image.open(tmp_path / "a.png").width > 500


def test_fifos_are_named_and_the_others_go_on(demo, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.mp4"):
        os.mkfifo(tmp_path / "in" / name)
    picture(20).save(tmp_path / "in/c.png")
    signal.alarm(60)  # opening a FIFO would wait for ever
    faults = demo.run(FindsDots(), [str(tmp_path / "in")], tmp_path / "out")
    faults += demo.run(FindsDots(), [str(tmp_path / "in/a.png")], tmp_path / "out")
    signal.alarm(0)
    assert [fault.split()[-4:] for fault in faults] == [["not", "a", "regular", "file."]] * 3
    assert (tmp_path / "out/c.png").is_file()
