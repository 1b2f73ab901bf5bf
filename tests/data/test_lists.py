"""VTAB-1k and FGVC on small copies in the forms that people have, and what is said of copies that are not whole."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mosa_kernels.cli.main import app
from mosa_kernels.data import open_data
from mosa_kernels.data.lists import find_folder
from mosa_kernels.data.loaders import make_loaders
from mosa_kernels.data.published import FGVC, GICD, PUBLISHED, VTAB, differences, find_published, names_of

VISION = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (value, 40, 200)).save(path)


def write_vtab(root: Path, classes: int = 3, train: int = 6, validation: int = 3, test: int = 6) -> Path:
    """The four lists and their images; an image's red value is its number."""
    lists: dict[str, list[str]] = {}
    value = 0
    for name, folder, count in (("train800", "train", train), ("val200", "train", validation), ("test", "test", test)):
        lines = []
        for number in range(count):
            path = f"images/{folder}/{value:06d}.jpg"
            picture(root / path, value)
            lines.append(f"{path} {number % classes}")
            value += 1
        lists[name] = lines
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


LAYOUTS = {
    "CUB_200_2011": ("images", "001.Black_footed_Albatross/{}.jpg"),
    "nabirds": ("images", "0295/{}.jpg"),
    "OxfordFlowers": (".", "jpg/image_{}.jpg"),
    "Stanford-dogs": ("Images", "n02085620-Chihuahua/n02085620_{}.jpg"),
    "Stanford-cars": (".", "cars_train/{}.jpg"),
}


def write_fgvc(root: Path, images: str, pattern: str, labels: tuple[int, ...] = (295, 7, 1010)) -> Path:
    value = 0
    for split, count in (("train", 6), ("val", 3), ("test", 6)):
        record = {}
        for number in range(count):
            path = pattern.format(f"{value:05d}")
            picture(root / images / path, value)
            record[path] = labels[number % len(labels)]
            value += 1
        (root / f"{split}.json").write_text(json.dumps(record))
    return root


def test_vtab_trains_on_800_to_choose_and_on_1000_at_the_end(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "cifar")
    tuning, final = open_data(f"vtab:{root}"), open_data(f"vtab1000:{root}")
    assert [len(part) for part in (tuning.train, tuning.validation, tuning.test)] == [6, 3, 6]
    assert [len(part) for part in (final.train, final.validation, final.test)] == [9, 3, 6]
    assert tuning.name == final.name == "VTAB-1k:cifar"
    assert tuning.fingerprint != final.fingerprint
    assert final.validation_in_train
    assert not tuning.validation_in_train
    image, label = tuning.test[4]
    assert label == 1
    assert abs(int(np.asarray(image)[0, 0, 0]) - 13) < 6  # JPEG
    assert "15 .jpg" in tuning.note
    assert "take the last epoch" in final.note
    assert tuning.differs == (
        "3 classes instead of 100",
        "6 training images instead of 800",
        "3 validation images instead of 200",
        "6 test images instead of 10,000",
    )
    assert "9 training and validation images instead of 1,000" in final.differs


def test_a_vtab_copy_of_the_right_size_is_the_papers(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "kitti", classes=4, train=800, validation=200, test=711)
    assert open_data(f"vtab:{root}").differs == ()
    assert open_data(f"vtab1000:{root}").differs == ()
    result = CliRunner().invoke(app, ["check-data", f"vtab:{root}"])
    assert result.exit_code == 0, result.output
    assert "those of the paper's Table 11" in result.output


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("cifar-100", "cifar"),
        ("CIFAR100", "cifar"),
        ("flowers102", "oxford_flowers102"),
        ("pets", "oxford_iiit_pet"),
        ("pcam", "patch_camelyon"),
        ("retinopathy", "diabetic_retinopathy"),
        ('vtab-clevr(task="count_all")', "clevr_count"),
        ("VTAB_dsprites_label_x_position", "dsprites_loc"),
        ("smallnorb_azimuth", "smallnorb_azi"),
        ("sun397", "sun397"),
    ],
)
def test_every_name_in_use_finds_its_data_set(given: str, name: str) -> None:
    found = find_published(VTAB, given)
    assert found is not None
    assert found.name == name


def test_the_table_has_19_5_and_3_data_sets_whose_names_do_not_collide() -> None:
    assert [len(names_of(benchmark)) for benchmark in (VTAB, FGVC, GICD)] == [19, 5, 3]
    for row in PUBLISHED:
        for name in (row.name, row.title, *row.aliases):
            assert find_published(row.benchmark, name) is row
    groups = [row.group for row in PUBLISHED if row.benchmark == VTAB]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert find_published(VTAB, "imagenet") is None


def test_a_folder_may_have_any_name_when_the_data_set_is_named(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "somewhere")
    assert open_data(f"vtab:dtd={root}").name == "VTAB-1k:dtd"
    with pytest.raises(
        ValueError, match=r"'somewhere' is no data set of VTAB-1k; expected one of cifar, .*vtab:<name>"
    ):
        open_data(f"vtab:{root}")


def test_the_folder_of_a_data_set_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    assert find_folder(tmp_path, "VTAB-1k", "cifar") == tmp_path / "cifar"  # none there: the usual one, to be named
    (tmp_path / "cifar100").mkdir()
    (tmp_path / "clevr_count").mkdir()
    assert find_folder(tmp_path, "VTAB-1k", "cifar") == tmp_path / "cifar100"
    (tmp_path / "vtab-cifar").mkdir()
    with pytest.raises(ValueError, match=r"one folder of CIFAR-100, got cifar100, vtab-cifar; call .* cifar"):
        find_folder(tmp_path, "VTAB-1k", "cifar")
    (tmp_path / "cifar").mkdir()
    assert find_folder(tmp_path, "VTAB-1k", "cifar") == tmp_path / "cifar"


def test_a_relative_folder_is_below_the_root(tmp_path: Path) -> None:
    write_vtab(tmp_path / "dtd")
    assert open_data("vtab:dtd", root=tmp_path).fingerprint == open_data(f"vtab:{tmp_path / 'dtd'}").fingerprint
    assert open_data("vtab:dsprites_loc=dtd", root=tmp_path).name == "VTAB-1k:dsprites_loc"
    write_fgvc(tmp_path / "nabirds", *LAYOUTS["nabirds"])
    assert open_data("fgvc:nabirds", root=tmp_path).name == "FGVC:nabirds"


def test_lists_may_have_tabs_spaces_in_names_and_absolute_paths(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "svhn")
    picture(tmp_path / "elsewhere" / "an image.png", 3)
    text = (root / "train800.txt").read_text().replace(" 0\n", "\t0\r\n")
    (root / "train800.txt").write_text(text + f"{tmp_path / 'elsewhere' / 'an image.png'} 1\n")
    splits = open_data(f"vtab:{root}")
    assert len(splits.train) == 7
    assert splits.train[6][1] == 1


def test_what_is_missing_from_vtab_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"DTD \(VTAB-1k\) was looked for in .*dtd, which does not exist"):
        open_data(f"vtab:{tmp_path / 'dtd'}")
    root = write_vtab(tmp_path / "svhn")
    (root / "images/test/000010.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"test\.txt: 1 of 6 images .* missing: .*000010\.jpg\. VTAB-1k .* NOAH"
    ):
        open_data(f"vtab:{root}")
    (root / "images/test/000010.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test\.txt: empty image files: .*000010\.jpg"):
        open_data(f"vtab:{root}")
    (root / "images/test/000010.jpg").write_bytes(b"no picture")
    open_data(f"vtab:{root}")
    with pytest.raises(ValueError, match=r"1 unreadable images: .*000010\.jpg"):
        open_data(f"vtab:{root}", verify=True)
    (root / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"svhn: val200\.txt not found there\. VTAB-1k .* usually obtained"):
        open_data(f"vtab:{root}")


def test_lists_that_are_wrong_are_refused(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "svhn")
    whole = (root / "train800.txt").read_text()
    (root / "train800.txt").write_text(whole + "images/train/000001.jpg\n")
    with pytest.raises(ValueError, match=r"train800\.txt, line 7: expected 'path label', got 'images"):
        open_data(f"vtab:{root}")
    for label in ("²", "--1"):  # digits that are no number
        (root / "train800.txt").write_text(f"{whole}images/train/000001.jpg {label}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=rf"train800\.txt, line 7: expected 'path label', got 'images.* {label}'"):
            open_data(f"vtab:{root}")
    (root / "train800.txt").write_text(whole + "images/test/000009.jpg 0\n")
    with pytest.raises(ValueError, match=r"1 images are in both the train and the test set: .*000009"):
        open_data(f"vtab:{root}")
    (root / "train800.txt").write_text(whole + "images/train/000000.jpg 0\n")
    with pytest.raises(ValueError, match=r"the train list names images twice: .*000000"):
        open_data(f"vtab:{root}")
    (root / "train800.txt").write_text(whole.replace(".jpg 2", ".jpg 4"))
    with pytest.raises(ValueError, match=r"labels from 0 to 4 without gaps, got none of 3"):
        open_data(f"vtab:{root}")
    (root / "train800.txt").write_text(whole + "images/train/\0.jpg 0\n")
    with pytest.raises(
        ValueError, match=r"train800\.txt, line 7: expected 'path label', got 'images/train/.x00\.jpg 0'"
    ):
        open_data(f"vtab:{root}")
    (root / "train800.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"expected lines of 'path label', found none"):
        open_data(f"vtab:{root}")


def test_a_label_out_of_all_proportion_costs_no_memory(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "svhn")
    whole = (root / "train800.txt").read_text()
    for label in ("1700000000", "9" * 18):  # a time in seconds in the last column
        (root / "train800.txt").write_text(whole.replace(".jpg 2", f".jpg {label}"))
        tracemalloc.start()
        with pytest.raises(
            ValueError, match=rf"0 to {label} without gaps, got none of 3, 4, .* 12 and {int(label) - 13} more$"
        ):
            open_data(f"vtab:{root}")
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
    (root / "train800.txt").write_text(whole.replace(".jpg 2", f".jpg {'9' * 5000}"))
    with pytest.raises(ValueError, match=r"train800\.txt, line 3: expected 'path label', got 'images"):
        open_data(f"vtab:{root}")


def test_one_class_is_none(tmp_path: Path) -> None:
    vtab = write_vtab(tmp_path / "svhn", classes=1)
    fgvc = write_fgvc(tmp_path / "nabirds", *LAYOUTS["nabirds"], labels=(7,))
    for address, label in ((f"vtab:{vtab}", 0), (f"vtab1000:{vtab}", 0), (f"fgvc:{fgvc}", 7)):
        with pytest.raises(ValueError, match=rf"(svhn|nabirds): expected at least 2 classes, got {label} alone$"):
            open_data(address)


def test_an_image_in_two_lists_is_found_however_it_is_spelled(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "svhn")
    whole = (root / "train800.txt").read_text()
    (root / "images" / "linked").symlink_to(root / "images" / "test")
    (root / "images" / "train" / "alias.jpg").symlink_to(root / "images" / "test" / "000009.jpg")
    (root / "images" / "train" / "hard.jpg").hardlink_to(root / "images" / "test" / "000009.jpg")
    for spelled in (
        "./images/test/../test/000009.jpg",
        "images/linked/000009.jpg",
        "images/train/alias.jpg",
        "images/train/hard.jpg",
    ):
        (root / "train800.txt").write_text(f"{whole}{spelled} 0\n")
        with pytest.raises(ValueError, match=rf"1 images are in both the train and the test set: .*{spelled[-9:]}"):
            open_data(f"vtab:{root}")
    (root / "train800.txt").write_text(whole + "images/test/../train/000000.jpg 0\n")
    with pytest.raises(ValueError, match=r"the train list names images twice: .*000000"):
        open_data(f"vtab:{root}")


def test_the_1000_of_vtab_are_the_800_and_the_200(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "svhn")
    whole = (root / "train800val200.txt").read_text()
    (root / "train800val200.txt").write_text(whole.replace("images/train/000001.jpg 1", "./images/train/000001.jpg 2"))
    expected = r"train800val200\.txt: expected the images and labels of train800\.txt and val200\.txt, got "
    with pytest.raises(ValueError, match=expected + r"label of .*000001\.jpg: 2 instead of 1$"):
        open_data(f"vtab1000:{root}")
    (root / "train800val200.txt").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=expected + r"label of .*000008\.jpg: none instead of 2$"):
        open_data(f"vtab1000:{root}")
    (root / "train800.txt").unlink()
    with pytest.raises(ValueError, match=r"labels of val200\.txt, got label of .*000008\.jpg: none instead of 2$"):
        open_data(f"vtab1000:{root}")
    (root / "train800val200.txt").write_text(whole)
    assert len(open_data(f"vtab1000:{root}").train) == 9


def test_the_1000_of_vtab_may_be_copies_as_noahs_script_writes_them(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "svhn")
    lines = []
    for number, line in enumerate((root / "train800val200.txt").read_text().splitlines()):
        path, label = line.split()
        copy = root / "images" / "train800val200" / f"{number:06d}.jpg"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((root / path).read_bytes())
        lines.append(f"images/train800val200/{copy.name} {label}")
    (root / "train800val200.txt").write_text("\n".join(reversed(lines)))
    assert len(open_data(f"vtab1000:{root}").train) == 9
    (root / "train800val200.txt").write_text("\n".join(lines).replace("000001.jpg 1", "000001.jpg 2"))
    with pytest.raises(ValueError, match=r"got images of class 1: 2 instead of 3, images of class 2: 4 instead of 3"):
        open_data(f"vtab1000:{root}")
    (root / "train800.txt").unlink()  # nothing to compare with
    assert len(open_data(f"vtab1000:{root}").train) == 9


def test_a_class_that_vtab_does_not_train_is_refused_unless_the_classes_are_the_papers(tmp_path: Path) -> None:
    for name in ("eurosat", "kitti"):  # the paper counts 10 and 4 classes
        root = write_vtab(tmp_path / name)
        (root / "test.txt").write_text((root / "test.txt").read_text().replace(".jpg 2", ".jpg 3"))
    with pytest.raises(ValueError, match=r"train800\.txt: no training image of the classes 3"):
        open_data(f"vtab:{tmp_path / 'eurosat'}")
    assert open_data(f"vtab:{tmp_path / 'kitti'}").num_classes == 4


def test_lists_are_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    vtab, fgvc = write_vtab(tmp_path / "svhn"), write_fgvc(tmp_path / "nabirds", *LAYOUTS["nabirds"])
    without = open_data(f"vtab:{vtab}").fingerprint, open_data(f"fgvc:{fgvc}").fingerprint
    for path in (*vtab.glob("*.txt"), *fgvc.glob("*.json")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert (open_data(f"vtab:{vtab}").fingerprint, open_data(f"fgvc:{fgvc}").fingerprint) == without
    (vtab / "val200.txt").write_bytes("images/val/é.jpg 0\n".encode("latin-1"))
    (fgvc / "val.json").write_bytes('{"é.jpg": 0}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"val200\.txt: expected UTF-8, got the byte 0xe9 at position 11"):
        open_data(f"vtab:{vtab}")
    with pytest.raises(ValueError, match=r"val\.json: expected UTF-8, got the byte 0xe9 at position 2"):
        open_data(f"fgvc:{fgvc}")


def test_the_official_recipe_leaves_vtab_images_whole(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "clevr_count")
    splits = open_data(f"vtab:{root}")
    assert "crop and flip change some of these labels" in splits.note

    def batch(augment: str) -> np.ndarray:
        loaders = make_loaders(splits, VISION, 6, augment=augment)  # type: ignore[arg-type]
        images, labels = next(iter(loaders.train))
        return images[labels.argsort(stable=True)].numpy()

    assert np.array_equal(batch("official"), batch("none"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_fgvc_in_each_layout(tmp_path: Path, name: str) -> None:
    root = write_fgvc(tmp_path / name, *LAYOUTS[name])
    splits = open_data(f"fgvc:{root}")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [6, 3, 6]
    assert splits.classes == ("7", "295", "1010")  # by number, not by spelling
    assert [splits.train[i][1] for i in range(3)] == [1, 0, 2]
    assert splits.name == f"FGVC:{name}"
    assert splits.benchmark == FGVC
    assert "6 test images instead of" in splits.differs[-1]


def test_fgvc_labels_may_be_names_and_images_lie_elsewhere(tmp_path: Path) -> None:
    root = write_fgvc(tmp_path / "birds", ".", "a/{}.png", labels=("tit", "auk"))  # type: ignore[arg-type]
    splits = open_data(f"fgvc:cub={root}")
    assert splits.classes == ("auk", "tit")
    assert "images in its folder" in splits.note
    write_fgvc(root, ".", "a/{}.png", labels=("m²", "²", "--3", -3, "10"))  # type: ignore[arg-type]
    assert open_data(f"fgvc:cub={root}").classes == ("-3", "10", "--3", "m²", "²")


def test_a_number_is_spelled_in_one_way(tmp_path: Path) -> None:
    root = write_fgvc(tmp_path / "nabirds", *LAYOUTS["nabirds"], labels=("01", 1, 2))  # type: ignore[arg-type]
    expected = r"nabirds: expected one spelling of each label in train\.json, val\.json, test\.json, got '01' and '1'"
    with pytest.raises(ValueError, match=expected):
        open_data(f"fgvc:{root}")


def test_what_is_no_path_is_named(tmp_path: Path) -> None:
    root = write_fgvc(tmp_path / "nabirds", *LAYOUTS["nabirds"])
    record = json.loads((root / "val.json").read_text())
    for wrong, shown in (("a\0.jpg", r"'a.x00\.jpg'"), ("\ud800.jpg", r"'.ud800\.jpg'")):
        (root / "val.json").write_text(json.dumps({**record, wrong: 7}))
        with pytest.raises(ValueError, match=rf"val\.json: expected paths of images, got {shown}"):
            open_data(f"fgvc:{root}")


def test_what_is_missing_from_fgvc_is_named(tmp_path: Path) -> None:
    root = write_fgvc(tmp_path / "Stanford-dogs", *LAYOUTS["Stanford-dogs"])
    (root / "Images").rename(root / "pictures")
    with pytest.raises(FileNotFoundError, match=r"first image of train\.json was looked for as .*Images.*jpg.*VPT"):
        open_data(f"fgvc:{root}")
    (root / "pictures").rename(root / "Images")
    record = json.loads((root / "test.json").read_text())
    (root / "test.json").write_text(json.dumps({**record, "gone.jpg": 7}))
    with pytest.raises(FileNotFoundError, match=r"test\.json: 1 of 7 images that it lists are missing: .*gone\.jpg"):
        open_data(f"fgvc:{root}")
    (root / "test.json").write_text(json.dumps({**record, next(iter(record)): 8}))
    with pytest.raises(ValueError, match=r"train\.json: no training image of the classes 8"):
        open_data(f"fgvc:{root}")
    (root / "test.json").write_text("[]")
    with pytest.raises(ValueError, match=r"test\.json: expected a JSON object of labels by image path, got list"):
        open_data(f"fgvc:{root}")
    (root / "test.json").write_text("{}")
    with pytest.raises(ValueError, match=r"test\.json: expected labels by image path, got an empty JSON object"):
        open_data(f"fgvc:{root}")
    repeated = json.dumps(record)[:-1] + f', "{next(iter(record))}": 8}}'
    (root / "test.json").write_text(repeated)
    with pytest.raises(ValueError, match=rf"test\.json: names images twice: {next(iter(record))}"):
        open_data(f"fgvc:{root}")
    (root / "val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"Stanford-dogs: val\.json not found there\. .*README of VPT"):
        open_data(f"fgvc:{root}")


def test_differences_are_named_one_by_one() -> None:
    cub, food = find_published(FGVC, "cub"), find_published(GICD, "food101")
    assert cub is not None
    assert food is not None
    assert differences(cub, 200, 5394, 600, 5794) == ()
    assert differences(cub, 200, 5994, 0, 5794) == ()
    assert differences(cub, 201, 5394, 600, 5794) == ("201 classes instead of 200",)
    assert differences(food, 101, 75750, 0, 25250) == ()  # trained on all
    assert differences(food, 101, 75749, 0, 25250) == ("75,749 training and validation images instead of 75,750",)
    held = (
        "68,175 training images instead of 75,750",
        "7,575 validation images (torchvision-all:Food101 trains on them, too) instead of 0",
    )
    assert differences(food, 101, 68175, 7575, 25250) == held


def test_check_data_exits_with_1_and_says_why(tmp_path: Path) -> None:
    root = write_vtab(tmp_path / "eurosat")
    result = CliRunner().invoke(app, ["check-data", f"vtab:{root}"])
    assert result.exit_code == 1
    assert "NOT the data set of the paper's Table 11: 3 classes instead of 10" in result.output
    result = CliRunner().invoke(app, ["check-data", f"vtab:{root}", "--json"])
    assert json.loads(result.output)["differs_from_table_11"][0] == "3 classes instead of 10"
    (root / "test.txt").unlink()
    result = CliRunner().invoke(app, ["check-data", f"vtab:{root}"])
    assert result.exit_code == 1
    assert "test.txt not found there" in result.output


def test_check_data_refuses_what_would_change_nothing() -> None:
    for words in (("offline:digits", "--decode"), ("offline:digits", "--data-root", "x"), ("/x", "--data-root", "x")):
        result = CliRunner().invoke(app, ["check-data", *words])
        assert result.exit_code == 1
        assert f"error: {words[1][2:].replace('-', '_')}: has no effect here: " in result.stderr
