import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from pre_kernels.diagnostics.run.geometry import find_packing, token_grid, token_objects

WIDE, TALL = (300, 200), (200, 300)  # width, height


def scene(size, left=0.13, top=0.22):
    """Four quarters, numbered 1 to 4 in reading order, a rectangle 5 that is off the centre and
    covers parts of them, and a frame without objects."""
    width, height = size
    objects = np.zeros((height, width), np.uint8)
    middle, centre = height // 2, width // 2
    for number, (rows, columns) in enumerate(
        (r, c)
        for r in ((3, middle), (middle, height - 3))
        for c in ((3, centre), (centre, width - 3))
    ):
        objects[slice(*rows), slice(*columns)] = number + 1
    x, y = int(left * width), int(top * height)
    objects[y : y + int(0.37 * height), x : x + int(0.61 * width)] = 5
    return objects


def shares(objects, box, grid, points=24):
    """How much of each token each object covers, (objects, tokens), if the grid covers `box` of the
    picture."""
    left, top, right, bottom = box
    rows, columns = grid
    y = top + (bottom - top) * (np.arange(rows * points) + 0.5) / (rows * points)
    x = left + (right - left) * (np.arange(columns * points) + 0.5) / (columns * points)
    inside = ((y >= 0) & (y < objects.shape[0]))[:, None] & ((x >= 0) & (x < objects.shape[1]))
    y, x = y.astype(int).clip(0, objects.shape[0] - 1), x.astype(int).clip(0, objects.shape[1] - 1)
    seen = np.where(inside, objects[np.ix_(y, x)], 0)
    seen = seen.reshape(rows, points, columns, points).swapaxes(1, 2).reshape(rows * columns, -1)
    return torch.tensor(np.stack([(seen == n).mean(1) for n in range(1, objects.max() + 1)]))


def whole(size):
    return (0, 0, *size)


def processor(name, **options):
    """A processor as a function that always passes `options`, as for the image."""
    made = getattr(hf, name)()
    return lambda image, **more: made(image, **options, **more)


def patched(name, patch, size, box, grid):
    return pytest.param(
        processor(name, **patch), size, [box], grid, id=f"{name}-{size[0]}x{size[1]}"
    )


CASES = [
    # The shorter side becomes 224, and the middle of the longer side is kept.
    patched("CLIPImageProcessor", {}, WIDE, (50, 0, 250, 200), (16, 16)),
    patched("CLIPImageProcessor", {}, TALL, (0, 50, 200, 250), (16, 16)),
    patched("SiglipImageProcessor", {}, WIDE, whole(WIDE), (16, 16)),
    # 27 patches of 14 pixels leave 6 of 384 pixels unused, at the right and at the bottom.
    patched(
        "SiglipImageProcessor",
        {"size": {"height": 384, "width": 384}},
        TALL,
        (0, 0, 196.9, 295.3),
        (27, 27),
    ),
    patched(
        "Gemma3ImageProcessor", {"size": {"height": 896, "width": 896}}, TALL, whole(TALL), (16, 16)
    ),
    # The image is padded to a square with a mean colour.
    patched("LlavaImageProcessor", {"do_pad": True}, WIDE, (0, -50, 300, 250), (16, 16)),
    patched("JanusImageProcessor", {}, TALL, (-50, 0, 250, 300), (24, 24)),
    # The sides are rounded to multiples of a patch.
    patched("PixtralImageProcessor", {}, WIDE, whole(WIDE), (13, 19)),
    patched("PixtralImageProcessor", {}, TALL, whole(TALL), (19, 13)),
    patched("Qwen2VLImageProcessor", {}, WIDE, whole(WIDE), (7, 11)),
    patched("Qwen2VLImageProcessor", {}, TALL, whole(TALL), (11, 7)),
    patched("Glm4vImageProcessor", {}, WIDE, whole(WIDE), (7, 11)),
    # InternVL makes tiles, and then a thumbnail of the whole image.
    pytest.param(
        processor("GotOcr2ImageProcessor", crop_to_patches=True, min_patches=2, max_patches=6),
        WIDE,
        [*((x, y, x + 100, y + 100) for y in (0, 100) for x in (0, 100, 200)), whole(WIDE)],
        (12, 12),
        id="GotOcr2ImageProcessor",
    ),
    pytest.param(
        processor("Idefics3ImageProcessor", size={"longest_edge": 728}),
        TALL,
        [*((x, y, x + 100, y + 150) for y in (0, 150) for x in (0, 100)), whole(TALL)],
        (13, 13),
        id="Idefics3ImageProcessor",
    ),
]


@pytest.mark.parametrize(("process", "size", "boxes", "grid"), CASES)
def test_tokens_of_objects_lie_where_the_image_processor_puts_them(process, size, boxes, grid):
    objects = scene(size)
    inputs = process(Image.new("RGB", size), return_tensors="pt")
    tokens = len(boxes) * grid[0] * grid[1]
    assert token_grid(inputs, tokens, "") == (grid if len(boxes) == 1 else None)
    masks = token_objects(process, objects, inputs, tokens, "")
    assert masks.shape == (5, tokens)
    assert masks.dtype == torch.bool
    covered = torch.cat([shares(objects, box, grid) for box in boxes], dim=1)
    clear = (covered - 0.5).abs() > 0.1  # at the border of an object a pixel more or less decides
    assert clear.double().mean() > 0.9
    assert torch.equal(masks[clear], (covered >= 0.5)[clear])
    assert masks.any(1).all()
    assert masks.sum(0).max() == 1


PINPOINTS = [[224, 448], [448, 224], [448, 448]]


@pytest.mark.parametrize(
    ("name", "more", "grid"),
    [
        ("LlavaNext", {}, (8, 12)),
        ("LlavaOnevision", {"vision_feature_select_strategy": "full"}, (8, 12)),
        (
            "LlavaOnevision",
            {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_1"},
            (6, 9),
        ),
    ],
)
def test_tiles_whose_tokens_are_packed(name, more, grid):
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    config = getattr(hf, f"{name}Config")(
        vision_config=hf.CLIPVisionConfig(image_size=224, patch_size=28, **sizes),
        text_config=hf.Qwen2Config(vocab_size=9, num_key_value_heads=1, **sizes),
        image_grid_pinpoints=PINPOINTS,
        **more,
    )
    packing = find_packing(getattr(hf, f"{name}ForConditionalGeneration")(config))
    process = processor(
        f"{name}ImageProcessor",
        image_grid_pinpoints=PINPOINTS,
        size={"height": 224, "width": 224} if name == "LlavaOnevision" else {"shortest_edge": 224},
    )
    inputs = process(Image.new("RGB", WIDE), return_tensors="pt")
    rows, columns = grid
    tokens = 64 + rows * (columns + 1)
    objects = scene(WIDE)
    masks = token_objects(process, objects, inputs, tokens, config.model_type, packing=packing)
    lines = masks[:, 64:].unflatten(1, (rows, columns + 1))
    assert not lines[:, :, -1].any()  # the end of each line
    masks = torch.cat([masks[:, :64], lines[:, :, :-1].flatten(1)], dim=1)
    covered = torch.cat([shares(objects, whole(WIDE), g) for g in ((8, 8), grid)], dim=1)
    clear = (covered - 0.5).abs() > 0.25  # few tokens, and in one case interpolated
    assert clear.double().mean() > 0.8
    assert torch.equal(masks[clear], (covered >= 0.5)[clear])
    assert masks.any(1).all()
    assert token_objects(
        process, 0 * objects, inputs, tokens, config.model_type, packing=packing
    ).shape == (0, tokens)
    with pytest.raises(ValueError, match=f"tokens: got 99, want {tokens}, which the model makes"):
        token_objects(process, objects, inputs, 99, config.model_type, packing=packing)
    del inputs["image_sizes"]
    with pytest.raises(ValueError, match=r"pixel_inputs: got pixel_values.*, want image_sizes too"):
        token_objects(process, objects, inputs, tokens, config.model_type, packing=packing)


def same(image, **options):
    """A processor that does not change the image."""
    return {"pixel_values": torch.from_numpy(np.array(image)).movedim(-1, 0)[None]}


def found_in(objects, tokens, coverage=0.5, process=same):
    objects = np.array(objects, np.uint8)
    return token_objects(
        process, objects, process(Image.fromarray(objects).convert("RGB")), tokens, "", coverage
    ).int()


def test_coverage():
    objects = [[1, 1, 2, 0], [1, 3, 0, 0]]
    assert found_in(objects, 2).tolist() == [[1, 0], [0, 0], [0, 0]]
    assert found_in(objects, 2, 0.75).tolist() == [[1, 0], [0, 0], [0, 0]]
    assert found_in(objects, 2, 0.76).tolist() == [[0, 0], [0, 0], [0, 0]]
    assert found_in(objects, 2, 0.25).tolist() == [[1, 0], [0, 1], [0, 0]]
    # If two objects cover the same share, the first one counts.
    assert found_in([[2, 2], [1, 1]], 1).tolist() == [[1], [0]]
    assert found_in([[0, 0], [0, 0]], 1).shape == (0, 1)


def test_every_number():
    objects = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert torch.equal(found_in(objects, 256)[:, 1:], torch.eye(255, dtype=torch.int))


def test_a_mixture_of_two_objects_is_the_larger_part():
    def mixed(image, **options):
        pixels = same(image)["pixel_values"].float()
        return {
            "pixel_values": torch.cat(
                [0.6 * pixels[..., :1] + 0.4 * pixels[..., 1:], pixels[..., 1:]], dim=-1
            )
        }

    for pair in ([5, 10], [10, 5], [0, 7], [7, 0], [1, 255]):
        found = found_in([pair], 2, process=mixed)
        assert found.T.nonzero()[:, 1].add(1).tolist() == [n for n in pair if n]


@pytest.mark.parametrize(
    ("name", "pad"), [("LlavaImageProcessor", (122, 116, 104)), ("JanusImageProcessor", (127,) * 3)]
)
@pytest.mark.parametrize("colour", [None, (0, 0, 0), (255, 255, 255)])
def test_padding_belongs_to_no_object(name, pad, colour):
    process = processor(name, do_pad=True) if colour is None else padded(colour)
    objects = np.full((200, 400), 3, np.uint8)
    for column, number in enumerate((*pad, 255)):
        objects[:, 100 * column : 100 * column + 100] = number
    inputs = process(Image.new("RGB", (400, 200)), return_tensors="pt")
    found = token_objects(process, objects, inputs, 256, "", coverage=0.001).any(0).view(16, 16)
    assert found.tolist() == [[False] * 16] * 4 + [[True] * 16] * 8 + [[False] * 16] * 4


def padded(colour):
    def process(image, **options):
        whole = Image.new("RGB", (400, 400), colour)
        whole.paste(image, (0, 100))
        return same(whole)

    return process


def test_an_object_that_is_cropped_away_keeps_its_row():
    process = processor("CLIPImageProcessor")
    objects = np.zeros((200, 300), np.uint8)
    objects[:, :40], objects[:, 100:200] = 1, 2
    found = token_objects(
        process, objects, process(Image.new("RGB", WIDE), return_tensors="pt"), 256, ""
    )
    assert found.sum(1).tolist() == [0, 128]


def test_by_way_of_the_whole_processor():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<image>": 0, "[UNK]": 1}, unk_token="[UNK]")
    )
    words.add_special_tokens(["<image>"])
    whole = hf.LlavaProcessor(
        hf.CLIPImageProcessor(),
        hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )

    def process(image, **options):
        return whole(images=image, text="<image>", **options)

    inputs = process(Image.new("RGB", WIDE), return_tensors="pt")
    tokens = int((inputs["input_ids"] == 0).sum())
    masks = token_objects(process, scene(WIDE), inputs, tokens, "llava")
    alone = processor("CLIPImageProcessor")
    pixels = alone(Image.new("RGB", WIDE), return_tensors="pt")
    assert torch.equal(masks, token_objects(alone, scene(WIDE), pixels, tokens, "llava"))


def test_a_processor_that_changes_all_pixels():
    def rescaled(image, **options):
        return {"pixel_values": same(image)["pixel_values"] / 255}

    with pytest.raises(ValueError, match="process: left no pixel's blue at 200, want a processor"):
        found_in([[1, 2]], 2, process=rescaled)


def test_objects_that_are_not_of_the_image():
    process = processor("PixtralImageProcessor")
    inputs = process(Image.new("RGB", WIDE), return_tensors="pt")
    with pytest.raises(
        ValueError,
        match=r"process: made pixels of shape \(1, 3, 304, 208\) from the objects and \(1, 3",
    ):
        token_objects(process, scene(TALL), inputs, 13 * 19, "pixtral")
    process = processor("Qwen2VLImageProcessor")
    inputs = process(Image.new("RGB", WIDE), return_tensors="pt")
    with pytest.raises(ValueError, match=r"process: made pixels of shape .* want the same"):
        token_objects(process, scene(TALL), inputs, 77, "qwen2_vl")


PATCHES = {"pixel_values": torch.zeros(308, 1176), "image_grid_thw": torch.tensor([[1, 14, 22]])}


@pytest.mark.parametrize(
    ("inputs", "tokens", "model_type", "message"),
    [
        (
            {"pixel_values": torch.zeros(1, 3, 8, 8)},
            5,
            "llava",
            r"tokens: got 5 for pixels of shape \(1, 3, 8, 8\), want",
        ),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, 0, "llava", "tokens: got 0 for pixels"),
        (
            {"pixel_values": torch.zeros(2, 3, 8, 8)},
            5,
            "internvl",
            "tokens: got 5 .*, want 2 grids of squares",
        ),
        (
            {"pixel_values": torch.zeros(2, 2, 3, 8, 8)},
            16,
            "idefics3",
            "tokens: .*want tiles that all have the same",
        ),
        (
            {"pixel_values": torch.zeros(1, 16, 12)},
            4,
            "lfm2_vl",
            "tokens: .*want tiles that all have the same",
        ),
        (
            {"pixel_values": torch.zeros(1, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]])},
            8,
            "llava_next",
            "tokens: .*want tiles that all have the same tokens: masks cannot be used with this "
            "model",
        ),
        (
            {"pixel_values": torch.zeros(1, 1, 3, 8, 8)},
            64,
            "idefics2",
            "model_type: got 'idefics2', and a resampler",
        ),
        (
            {"input_ids": torch.zeros(1, 1)},
            4,
            "llava",
            "pixel_inputs: got input_ids, want pixel_values",
        ),
        (
            PATCHES,
            76,
            "qwen2_vl",
            r"tokens: got 76 .*image_grid_thw \[\[1, 14, 22\]\], want the tokens of one image",
        ),
        (PATCHES, 0, "qwen2_vl", "tokens: got 0 "),
        (
            {**PATCHES, "image_grid_thw": torch.tensor([[2, 14, 11]])},
            77,
            "qwen2_vl",
            "tokens: got 77 .*, want the tokens of one image",
        ),
        (
            {**PATCHES, "image_grid_thw": torch.tensor([[1, 7, 22]] * 2)},
            77,
            "qwen2_vl",
            "tokens: got 77 .*, want the tokens of one image",
        ),
    ],
)
def test_layouts_that_are_not_understood(inputs, tokens, model_type, message):
    assert token_grid(inputs, tokens, model_type) is None
    with pytest.raises(ValueError, match=f"^{message}"):
        token_objects(same, np.ones((8, 8), np.uint8), inputs, tokens, model_type)


@pytest.mark.parametrize(
    ("objects", "coverage", "message"),
    [
        ([[1]], 0.5, "objects: got list, want an array of uint8"),
        (np.ones((8, 8)), 0.5, r"objects: got float64 \(8, 8\), want an array of uint8"),
        (np.ones((8, 8, 3), np.uint8), 0.5, "objects: got uint8"),
        (np.ones((0, 8), np.uint8), 0.5, "objects: got uint8"),
        (np.ones((8, 8), np.uint8), 0, "coverage: got 0, want a number above 0"),
        (np.ones((8, 8), np.uint8), 1.5, "coverage: got 1.5"),
    ],
)
def test_bad_input_names_the_argument(objects, coverage, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        token_objects(
            same, objects, {"pixel_values": torch.zeros(1, 3, 8, 8)}, 4, "llava", coverage
        )
