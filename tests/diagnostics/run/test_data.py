import json
import sys

import numpy as np
import pytest
from PIL import Image

from pre_kernels.diagnostics.run.data import (
    CLASS_COLUMNS,
    EXTENSIONS,
    IMAGE_COLUMNS,
    Item,
    find_images,
    open_image,
    open_masks,
)

ITEM = Item(None, "rooms/a b.jpg", None)


def picture(path, size=(6, 4), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three classes of 5, 3 and 2 images, and files that are not images."""
    for name, count in (("cat", 5), ("dog", 3), ("Ärger ü", 2)):
        for i in range(count):
            picture(tmp_path / "in" / name / f"{i} é.png")
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("")
    (tmp_path / "in" / "cat" / "notes.txt").write_text("")
    picture(tmp_path / "in" / "cat" / "._0.png")
    picture(tmp_path / "in" / ".thumbnails" / "0.png")
    return tmp_path / "in"


def table(folder, text, encoding="utf-8"):
    path = folder.parent / "labels.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_a_subfolder_is_a_class(folder):
    images = find_images(folder)
    assert images.folder == folder
    assert images.classes == ("cat", "dog", "Ärger ü")
    assert sorted(item.name for item in images.items) == sorted(
        [f"cat/{i} é.png" for i in range(5)]
        + [f"dog/{i} é.png" for i in range(3)]
        + [f"Ärger ü/{i} é.png" for i in (0, 1)]
    )
    for item in images.items:
        assert item.path == folder / item.name
        assert item.path.is_file()
        assert images.classes[item.label] == item.name.split("/")[0]


def test_classes_take_turns(folder):
    found = find_images(folder, seed=3)
    assert [item.label for item in found.items] == [0, 1, 2, 0, 1, 2, 0, 1, 0, 0]
    assert found == find_images(folder, seed=3)
    orders = {
        tuple(item.name for item in find_images(folder, seed=seed).items) for seed in range(5)
    }
    assert len(orders) == 5


def test_a_limit_is_the_beginning_of_the_same_order(folder):
    every = find_images(folder, seed=1).items
    for limit in (3, 4, 9, 99):
        assert find_images(folder, limit=limit, seed=1).items == every[:limit]
    with pytest.raises(ValueError, match="limit: got 2 for 3 classes"):
        find_images(folder, limit=2)
    for limit in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="limit: got"):
            find_images(folder, limit=limit)


def test_a_flat_folder_has_no_classes(tmp_path):
    for ending in EXTENSIONS:
        picture(tmp_path / f"a{ending.upper()}")
    (tmp_path / "masks").mkdir()
    found = find_images(tmp_path)
    assert found.classes == ()
    assert {item.label for item in found.items} == {None}
    assert sorted(item.name for item in found.items) == sorted(
        f"a{ending.upper()}" for ending in EXTENSIONS
    )


def test_one_class_is_no_error(tmp_path):
    picture(tmp_path / "cat" / "1.png")
    found = find_images(tmp_path)
    assert found.classes == ("cat",)
    assert found.items[0].label == 0


def test_folders_that_hold_no_images(tmp_path):
    with pytest.raises(ValueError, match=r"images: .*nowhere is not there, want a folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"images: .*a\.png is not a folder"):
        find_images(picture(tmp_path / "one" / "a.png"))
    (tmp_path / "none").mkdir()
    with pytest.raises(
        ValueError, match=r"images: .*none has no images.* want files that end in .bmp"
    ):
        find_images(tmp_path / "none")
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"has 1 images beside 1 subfolders with images \('one'\)"):
        find_images(tmp_path)


@pytest.mark.parametrize("image", IMAGE_COLUMNS)
@pytest.mark.parametrize("label", CLASS_COLUMNS)
def test_a_table_of_classes(folder, image, label):
    rows = '"cat/0 é.png",1,"b, c"\n ./dog/1 é.png ,2,a\nÄrger ü/0 é.png,3,a\n'
    path = table(folder, f"{image.title()},note, {label}\n{rows}", "utf-8-sig")
    found = find_images(folder, path)
    assert found.classes == ("a", "b, c")
    assert {item.name: item.label for item in found.items} == {
        "cat/0 é.png": 1,
        "dog/1 é.png": 0,
        "Ärger ü/0 é.png": 0,
    }
    assert [item.label for item in found.items] == [0, 1, 0]
    assert all(item.path.is_file() for item in found.items)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"has columns \(none\), want a header with exactly one of image, file, filename, "
            "file_name",
        ),
        ("image,label\n", "has no rows, want images of at least two classes"),
        (
            "image,label\ncat/0 é.png,a\ncat/1 é.png,a\n",
            "has 'a', want images of at least two classes",
        ),
        ("cat/0 é.png,a\n", "has columns 'cat/0 é.png', 'a', want a header"),
        (
            "image,kind\ncat/0 é.png,a\n",
            "has columns 'image', 'kind', want a header with exactly one of label, class",
        ),
        ("image,label,class\ncat/0 é.png,a,b\n", "exactly one of label, class"),
        (
            "image,label\ncat/9.png,a\n",
            r"line 2 of .*labels.csv names 'cat/9.png', want the path of an image in",
        ),
        ("image,label\n../labels.csv,a\n", "line 2 .* want the path of an image in"),
        (
            "image,label\ncat/0 é.png,a\n\n./cat/0 é.png,b\n",
            r"line 4 .* names './cat/0 é.png' again, after line 2",
        ),
        (
            "image,label\ncat/0 é.png,\n",
            "line 2 .* has image 'cat/0 é.png' and class '', want both",
        ),
        ("image,label\ncat/0 é.png\n", "line 2 .* and class '', want both"),
        ('image,label\n"cat/0 é.png,a\n', "cannot read .*labels.csv, want a CSV file in UTF-8"),
    ],
)
def test_bad_tables(folder, text, message):
    with pytest.raises(ValueError, match=f"^labels: .*{message}"):
        find_images(folder, table(folder, text))


def test_unreadable_tables(folder):
    with pytest.raises(ValueError, match=r"labels: cannot read .*want a CSV file in UTF-8"):
        find_images(folder, table(folder, "image,label\ncat/0 é.png,ä\n", "latin-1"))
    with pytest.raises(ValueError, match=r"labels: cannot read .*nowhere"):
        find_images(folder, folder / "nowhere.csv")
    with pytest.raises(ValueError, match=r"labels: line 2 .* want the path of an image"):
        find_images(folder, table(folder, f"image,label\n{folder / 'cat' / '0 é.png'},a\n"))


def test_an_image_comes_upright_and_in_colour(tmp_path):
    pixels = np.zeros((4, 6), np.uint8)
    pixels[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is the scene's right side
    Image.fromarray(pixels).save(tmp_path / "turned é.png", exif=exif)
    image = open_image(tmp_path / "turned é.png")
    assert image.mode == "RGB"
    assert image.size == (4, 6)
    assert np.array_equal(np.asarray(image)[..., 0], np.rot90(pixels, -1))
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        assert open_image(picture(tmp_path / "mode.tiff", mode=mode)).mode == "RGB"


def test_images_that_cannot_be_read(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    for name, content in (
        ("cut.jpg", whole.read_bytes()[:900]),
        ("none.jpg", b""),
        ("text.jpg", b"text" * 99),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"images: cannot read .*{name} as an image"):
            open_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"images: cannot read .*nowhere\.jpg"):
        open_image(tmp_path / "nowhere.jpg")
    # A conversion would clip everything above 255 to white.
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png .*want 8 bits for each channel"):
        open_image(tmp_path / "deep.png")


VALUES = np.array([[0, 7, 7, 255], [3, 3, 0, 200]])
OBJECTS = [[0, 2, 2, 0], [1, 1, 0, 3]]


def mask_image(values, kind):
    if kind == "16 bits":
        return Image.fromarray(np.where(values == 200, 60_000, values).astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8))
    if kind == "palette":
        image.putpalette(list(np.random.default_rng(0).permutation(768) % 256))
    return image


@pytest.mark.parametrize("kind", ["grey", "palette", "16 bits"])
def test_a_folder_of_masks(tmp_path, kind):
    (tmp_path / "rooms").mkdir()
    mask_image(VALUES, kind).save(tmp_path / "rooms" / "a b.png")
    objects = open_masks(tmp_path).objects(ITEM, (4, 2))
    assert objects.dtype == np.uint8
    assert objects.tolist() == OBJECTS
    assert open_masks(tmp_path, background=(255,)).objects(ITEM, (4, 2)).tolist() == [
        [1, 3, 3, 0],
        [2, 2, 1, 4],
    ]
    assert open_masks(tmp_path).objects(Item(None, "a b.jpg", None), (4, 2)) is None
    with pytest.raises(
        ValueError, match=r"a b\.png is 4 x 2 pixels .*want those of its image upright, 2 x 4"
    ):
        open_masks(tmp_path).objects(ITEM, (2, 4))


def test_masks_of_one_object_and_of_none(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "a.png")
    item = Item(None, "a.webp", None)
    assert open_masks(tmp_path).objects(item, (2, 1)).tolist() == [[0, 0]]
    assert open_masks(tmp_path, background=(0,)).objects(item, (2, 1)).tolist() == [[0, 1]]
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "a.png")
    assert open_masks(tmp_path).objects(item, (2, 1)).tolist() == [[0, 1]]


def test_as_many_objects_as_can_be_numbered(tmp_path):
    item = Item(None, "a.png", None)
    Image.fromarray(np.arange(256, dtype=np.uint16)[None]).save(tmp_path / "a.png")
    assert open_masks(tmp_path, background=(0,)).objects(item, (256, 1)).tolist() == [
        list(range(256))
    ]
    with pytest.raises(ValueError, match=r"masks: .*a\.png has 256 objects, want at most 255"):
        open_masks(tmp_path, background=()).objects(item, (256, 1))


def test_masks_that_cannot_be_read(tmp_path):
    item = Item(None, "a.jpg", None)
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"masks: .*a\.png has 3 channels, want one, or a palette"):
        open_masks(tmp_path).objects(item, (6, 4))
    noise = np.random.default_rng(0).integers(0, 9, (4, 6), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"masks: cannot read .*a\.png as an image"):
        open_masks(tmp_path).objects(item, (6, 4))
    with pytest.raises(
        ValueError, match=r"masks: .*nowhere is not there, want a folder of PNG files or a COCO"
    ):
        open_masks(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"masks: .*a\.png is a file of another kind"):
        open_masks(tmp_path / "a.png")


def rectangle(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotations(path, *segmentations, **more):
    content = {
        "images": [
            {"id": 5, "file_name": ITEM.name, "width": 8, "height": 6},
            {"id": 6, "file_name": "bare.jpg", "width": 3, "height": 2},
        ],
        "annotations": [
            {"id": i, "image_id": 5, "category_id": 1, "iscrowd": 0, "segmentation": s}
            for i, s in enumerate(segmentations, 1)
        ],
        "categories": [{"id": 1, "name": "thing"}],
        **more,
    }
    path.write_text(json.dumps(content))
    return path


def test_coco_annotations(tmp_path, capsys):
    # Runs of 0 and 1 in column-major order. These cover column 7.
    runs = {"size": [6, 8], "counts": [42, 6]}
    path = annotations(tmp_path / "a.json", rectangle(1, 1, 3, 3), rectangle(0, 0, 6, 4), runs)
    objects = open_masks(path).objects(ITEM, (8, 6))
    assert capsys.readouterr().out == ""
    want = np.zeros((6, 8), int)
    want[0:4, 0:6] = 2
    want[1:3, 1:3] = 1  # the smaller one is in front
    want[:, 7] = 3
    assert objects.dtype == np.uint8
    assert objects.tolist() == want.tolist()
    assert open_masks(path).objects(Item(None, "bare.jpg", None), (3, 2)).tolist() == [[0] * 3] * 2
    assert open_masks(path).objects(Item(None, "a b.jpg", None), (8, 6)) is None
    with pytest.raises(
        ValueError, match=r"'rooms/a b\.jpg' in .*a\.json is 8 x 6 pixels .*want .* 6 x 8"
    ):
        open_masks(path).objects(ITEM, (6, 8))


def test_crowds_and_hidden_objects_are_left_out(tmp_path):
    crowd = {"id": 9, "image_id": 5, "category_id": 1, "iscrowd": 1}
    crowd["segmentation"] = {"size": [6, 8], "counts": [0, 48]}
    path = annotations(
        tmp_path / "a.json", rectangle(0, 0, 2, 2), rectangle(0, 0, 2, 2), rectangle(4, 0, 6, 2)
    )
    content = json.loads(path.read_text())
    content["annotations"].append(crowd)
    path.write_text(json.dumps(content))
    found = open_masks(path).objects(ITEM, (8, 6))
    assert found[0].tolist() == [1, 1, 0, 0, 2, 2, 0, 0]
    assert found[2:].max() == 0


@pytest.mark.parametrize("segmentation", [[], [[1, 2]], {}, {"size": [6, 8]}, None, "mask"])
def test_annotations_without_an_outline(tmp_path, segmentation):
    path = annotations(tmp_path / "a.json", rectangle(0, 0, 2, 2), segmentation)
    with pytest.raises(
        ValueError, match=r"masks: annotation 2 in .*a\.json has no segmentation that can be read"
    ):
        open_masks(path).objects(ITEM, (8, 6))


def test_an_annotation_of_another_size(tmp_path):
    path = annotations(tmp_path / "a.json", {"size": [6, 9], "counts": [42, 12]})
    with pytest.raises(
        ValueError, match=r"masks: annotation 1 in .*a\.json is 9 x 6 pixels .*, 8 x 6"
    ):
        open_masks(path).objects(ITEM, (8, 6))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}']
)
def test_files_that_are_no_annotations(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"masks: cannot read .*a\.json as COCO annotations"):
        open_masks(tmp_path / "a.json")


def test_an_image_named_twice(tmp_path):
    images = [{"id": i, "file_name": "a.jpg", "width": 8, "height": 6} for i in (1, 2)]
    with pytest.raises(ValueError, match=r"masks: .*a\.json names some image twice"):
        open_masks(annotations(tmp_path / "a.json", images=images))


@pytest.mark.parametrize("module", ["PIL.Image", "pycocotools.coco"])
def test_a_missing_package_names_the_extra(folder, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    use = {
        "PIL.Image": lambda: open_image(folder / "cat" / "0 é.png"),
        "pycocotools.coco": lambda: open_masks(annotations(folder.parent / "a.json")),
    }
    with pytest.raises(ImportError, match=r"pip install 'pre-kernels\[diagnose\]'"):
        use[module]()
