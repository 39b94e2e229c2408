from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from legion_shm.errors import InvalidWorkflow, JobFailed
from legion_shm.supervisor.graph_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, directories
from tests import needs
from tests.engine.graph_harness import Harness, engine_with, node

interpolate = torch.nn.functional.interpolate


@pytest.fixture(autouse=True)
def directories_as_before() -> Iterator[None]:
    yield
    directories.configure()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


@pytest.fixture
def harness(folders: tuple[Path, Path]) -> Iterator[Harness]:
    with engine_with({}, input_directory=folders[0], output_directory=folders[1]) as made:
        yield made


def call(class_type: str, **inputs: Any) -> Any:
    """The node's outputs, called as the engine calls it."""
    made = NODE_CLASS_MAPPINGS[class_type]
    return getattr(made(), made.FUNCTION)(**inputs)  # type: ignore[attr-defined]


def image(batch: int = 1, height: int = 12, width: int = 20, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + height * 100 + width * 10 + channels)
    return torch.rand(batch, height, width, channels, generator=generator)


def planes(value: torch.Tensor) -> torch.Tensor:
    return value.permute(0, 3, 1, 2)


def channels_last(value: torch.Tensor) -> torch.Tensor:
    return value.permute(0, 2, 3, 1)


def close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=0, atol=2e-6)


def test_every_node_has_a_display_name_and_declares_its_inputs() -> None:
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for made in NODE_CLASS_MAPPINGS.values():
        assert "required" in made.INPUT_TYPES()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(7, 5), (40, 30), (20, 12)])
def test_scaling_is_torchs_interpolation(method: str, width: int, height: int) -> None:
    value = image(2)
    (scaled,) = call(
        "ImageScale", image=value, upscale_method=method, width=width, height=height, crop="disabled"
    )
    close(scaled, channels_last(interpolate(planes(value), size=(height, width), mode=method)))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lanczos_is_pillows_on_8_bits(channels: int) -> None:
    value = image(2, channels=channels)
    (scaled,) = call("ImageScale", image=value, upscale_method="lanczos", width=9, height=7, crop="disabled")
    for frame, given in zip(value, scaled, strict=True):
        pixels = (frame.numpy() * np.float32(255.0)).astype(np.uint8)
        picture = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
        wanted = np.asarray(picture.resize((9, 7), Image.Resampling.LANCZOS)).reshape(7, 9, channels)
        close(given, torch.tensor(wanted / np.float32(255.0)))


def test_centre_crop_cuts_the_longer_side_alike_on_both_ends() -> None:
    wide = image(1, 12, 20)
    (square,) = call("ImageScale", image=wide, upscale_method="area", width=6, height=6, crop="center")
    close(square, channels_last(interpolate(planes(wide[:, :, 4:16]), size=(6, 6), mode="area")))
    (flat,) = call("ImageScale", image=wide, upscale_method="area", width=20, height=4, crop="center")
    close(flat, channels_last(interpolate(planes(wide[:, 4:8]), size=(4, 20), mode="area")))


@pytest.mark.parametrize(("width", "height", "wanted"), [(0, 6, (6, 10)), (10, 0, (6, 10)), (0, 0, (12, 20))])
def test_a_side_of_zero_follows_from_the_other(width: int, height: int, wanted: tuple[int, int]) -> None:
    (scaled,) = call(
        "ImageScale", image=image(), upscale_method="bilinear", width=width, height=height, crop="disabled"
    )
    assert tuple(scaled.shape[1:3]) == wanted


@pytest.mark.parametrize(("factor", "wanted"), [(0.5, (6, 10)), (1.5, (18, 30)), (0.01, (1, 1))])
def test_scaling_by_a_factor_rounds_the_sides(factor: float, wanted: tuple[int, int]) -> None:
    value = image()
    (scaled,) = call("ImageScaleBy", image=value, upscale_method="bilinear", scale_by=factor)
    close(scaled, channels_last(interpolate(planes(value), size=wanted, mode="bilinear")))


def test_cropping_takes_a_window_and_stays_inside() -> None:
    value = image()
    assert torch.equal(call("ImageCrop", image=value, width=5, height=4, x=2, y=3)[0], value[:, 3:7, 2:7])
    assert torch.equal(call("ImageCrop", image=value, width=50, height=40, x=2, y=3)[0], value[:, 3:, 2:])
    assert torch.equal(call("ImageCrop", image=value, width=5, height=4, x=90, y=90)[0], value[:, -1:, -1:])


def test_inverting_is_one_minus_the_value() -> None:
    value = image()
    assert torch.equal(call("ImageInvert", image=value)[0], 1.0 - value)


BLENDS: dict[str, Any] = {
    "normal": lambda a, b: b,
    "multiply": lambda a, b: a * b,
    "screen": lambda a, b: a + b - a * b,
    "overlay": lambda a, b: 2 * a * b if a <= 0.5 else 1 - 2 * (1 - a) * (1 - b),
    "soft_light": lambda a, b: (
        a - (1 - 2 * b) * a * (1 - a)
        if b <= 0.5
        else a + (2 * b - 1) * ((((16 * a - 12) * a + 4) * a if a <= 0.25 else a**0.5) - a)
    ),
    "difference": lambda a, b: a - b,
}


@pytest.mark.parametrize("mode", sorted(BLENDS))
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_blending_is_the_modes_formula_per_value(mode: str, factor: float) -> None:
    first, second = image(1, 6, 7), image(1, 6, 7).flip(1)
    (mixed,) = call("ImageBlend", image1=first, image2=second, blend_factor=factor, blend_mode=mode)
    wanted = [
        min(1.0, max(0.0, a * (1 - factor) + BLENDS[mode](a, b) * factor))
        for a, b in zip(first.double().flatten().tolist(), second.double().flatten().tolist(), strict=True)
    ]
    close(mixed.flatten(), torch.tensor(wanted))


def test_blending_fits_the_second_image_to_the_first() -> None:
    first, second = image(1, 8, 8), image(2, 16, 16, 4)
    (mixed,) = call("ImageBlend", image1=first, image2=second, blend_factor=1.0, blend_mode="normal")
    wanted = channels_last(interpolate(planes(second[..., :3]), size=(8, 8), mode="bicubic")).clamp(0, 1)
    close(mixed, wanted)
    (mixed,) = call(
        "ImageBlend", image1=image(1, 8, 8, 4), image2=first, blend_factor=1.0, blend_mode="normal"
    )
    close(mixed, torch.cat((first, torch.ones(1, 8, 8, 1)), dim=-1))


@pytest.mark.parametrize(("radius", "sigma"), [(1, 1.0), (3, 0.5), (7, 10.0)])
def test_blurring_is_the_square_gaussian_with_mirrored_edges(radius: int, sigma: float) -> None:
    value = image(2)
    (blurred,) = call("ImageBlur", image=value, blur_radius=radius, sigma=sigma)
    line = torch.linspace(-1, 1, 2 * radius + 1, dtype=torch.float64)
    kernel = torch.exp(-(line[:, None] ** 2 + line[None, :] ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1, -1)
    padded = torch.nn.functional.pad(planes(value).double(), (radius,) * 4, mode="reflect")
    close(blurred, channels_last(torch.nn.functional.conv2d(padded, kernel, groups=3)).float())


def test_blurring_beyond_the_image_is_refused_clearly() -> None:
    with pytest.raises(ValueError, match="blur_radius 12 needs an image larger"):
        call("ImageBlur", image=image(), blur_radius=12, sigma=1.0)


def test_an_empty_image_has_one_colour() -> None:
    (empty,) = call("EmptyImage", width=5, height=4, batch_size=2, color=0xFF8001)
    assert empty.shape == (2, 4, 5, 3)
    assert empty.dtype is torch.float32
    assert torch.equal(empty, (torch.tensor([255, 128, 1]) / 255).expand(2, 4, 5, 3))
    empty[0, 0, 0, 0] = 0.25
    assert empty[1, 0, 0, 0] == 1.0, "pixels share memory"


def test_an_empty_latent_is_zeros_of_an_eighth_of_the_size() -> None:
    (latent,) = call("EmptyLatentImage", width=64, height=33, batch_size=2)
    assert torch.equal(latent["samples"], torch.zeros(2, 4, 4, 8))


def test_an_image_goes_to_a_latent_and_back_value_for_value() -> None:
    value = image(2, 16, 24)
    (latent,) = call("ImageToLatent", image=value)
    assert latent["samples"].shape == (2, 192, 2, 3)
    assert torch.equal(latent["samples"][1, 64 : 2 * 64, 1, 2], value[1, 8:16, 16:24, 1].flatten())
    assert torch.equal(call("LatentToImage", samples=latent)[0], value)


def test_a_latent_is_made_of_the_middle_where_the_size_is_no_multiple_of_8() -> None:
    value = image(1, 21, 26)
    assert torch.equal(
        call("LatentToImage", samples=call("ImageToLatent", image=value)[0])[0], value[:, 2:18, 1:25]
    )


def test_what_is_no_latent_of_ours_is_refused_clearly() -> None:
    with pytest.raises(ValueError, match="decode a model's latents with its VAE"):
        call("LatentToImage", samples={"samples": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(ValueError, match="too small"):
        call("ImageToLatent", image=torch.zeros(1, 7, 8, 3))


def test_batches_join_and_the_second_takes_the_firsts_size() -> None:
    first, second, other = image(1), image(2), image(1, 24, 40)
    assert torch.equal(call("ImageBatch", image1=first, image2=second)[0], torch.cat((first, second)))
    (joined,) = call("ImageBatch", image1=first, image2=other)
    close(joined[1:], channels_last(interpolate(planes(other), size=(12, 20), mode="bilinear")))
    (joined,) = call("ImageBatch", image1=first, image2=image(1, channels=4))
    assert torch.equal(joined[0], torch.cat((first[0], torch.ones(12, 20, 1)), dim=-1))


def test_batches_repeat_and_are_taken_apart() -> None:
    value = image(3)
    (repeated,) = call("RepeatImageBatch", image=value, amount=2)
    assert torch.equal(repeated, torch.cat((value, value)))
    assert torch.equal(call("ImageFromBatch", image=value, batch_index=1, length=9)[0], value[1:])
    assert torch.equal(call("ImageFromBatch", image=value, batch_index=-1, length=1)[0], value[2:])
    assert torch.equal(call("ImageFromBatch", image=value, batch_index=9, length=1)[0], value[2:])
    assert call("GetImageSize", image=value) == (20, 12, 3)


def test_primitives_give_their_value_converted(harness: Harness) -> None:
    outcome = harness.run(
        {
            "1": node("PrimitiveInt", value="7"),
            "2": node("PrimitiveFloat", value=2),
            "3": node("PrimitiveString", value=5),
            "4": node("PrimitiveStringMultiline", value="a\nb"),
            "5": node("PrimitiveBoolean", value=1),
            "6": node("LegionExporter", **{f"input_{n}": [str(n), 0] for n in range(1, 6)}),
        }
    )
    assert list(outcome.outputs.values()) == [7, 2.0, "5", "a\nb", True]


def test_an_image_is_saved_and_loaded_again(harness: Harness, folders: tuple[Path, Path]) -> None:
    pixels = (np.arange(4 * 256 * 3) % 256).reshape(4, 256, 3).astype(np.uint8)
    value = torch.tensor(pixels / np.float32(255.0))[None]
    prompt = {
        "in": node("LegionImporter"),
        "save": node("SaveImage", images=["in", 0], filename_prefix="sub/x"),
    }
    outcome = harness.run(prompt, {"input_1": value})
    assert outcome.ui == {
        "save": {"images": [{"filename": "x_00001_.png", "subfolder": "sub", "type": "output"}]}
    }
    with Image.open(folders[1] / "sub" / "x_00001_.png") as saved:
        assert np.array_equal(np.asarray(saved), pixels), "8-bit values do not survive the way there"
        assert json.loads(saved.info["prompt"])["save"]["class_type"] == "SaveImage"
    loaded = harness.run(
        {
            "load": node("LoadImage", image="sub/x_00001_.png [output]"),
            "out": node("LegionExporter", input_1=["load", 0], input_2=["load", 1]),
        }
    ).outputs
    assert torch.equal(loaded["output_1"], value)  # type: ignore[arg-type]
    assert torch.equal(loaded["output_2"], torch.zeros(1, 64, 64))  # type: ignore[arg-type]


def test_saving_counts_on_from_the_files_that_are_there(harness: Harness, folders: tuple[Path, Path]) -> None:
    folders[1].mkdir()
    for name in ("x_00007_.png", "x_12_whatever.txt", "xy_00099_.png", "x_abc_.png"):
        (folders[1] / name).touch()
    for _ in range(2):
        call("SaveImage", images=image(2), filename_prefix="x")
    names = sorted(path.name for path in folders[1].glob("x_000*"))
    assert names == [f"x_{n:05}_.png" for n in (7, 13, 14, 15, 16)]


def test_saving_never_writes_over_a_file_that_another_just_made(
    harness: Harness, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders[1].mkdir()
    (folders[1] / "x_00001_.png").write_text("another's")
    monkeypatch.setattr("os.listdir", lambda _folder: [])
    saved = call("SaveImage", images=image(2), filename_prefix="x")["ui"]["images"]
    assert [entry["filename"] for entry in saved] == ["x_00002_.png", "x_00003_.png"]
    assert (folders[1] / "x_00001_.png").read_text() == "another's"


def test_a_prefix_may_hold_the_size_and_the_batch_number(harness: Harness) -> None:
    saved = call(
        "SaveImage", images=image(2, channels=1), filename_prefix="%width%x%height%_%batch_num%_%year%"
    )
    names = [entry["filename"] for entry in saved["ui"]["images"]]
    assert [name.split("_")[:2] for name in names] == [["20x12", "0"], ["20x12", "1"]]
    assert all("%" not in name for name in names)


@pytest.mark.parametrize(
    "prefix",
    ["../x", "a/../../x", "/tmp/x", pytest.param("link/x", marks=needs.symlinks), "a\0b", "sub/..", "", "."],
)
def test_a_prefix_that_leads_out_of_the_output_directory_is_refused(
    harness: Harness, folders: tuple[Path, Path], prefix: str
) -> None:
    folders[1].mkdir()
    if prefix == "link/x":
        (folders[1] / "link").symlink_to(folders[0])
    with pytest.raises(JobFailed) as caught:
        harness.run(
            {
                "1": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
                "2": node("SaveImage", images=["1", 0], filename_prefix=prefix),
            }
        )
    assert caught.value.exception_type == "ValueError"
    assert sorted(folders[0].parent.rglob("*.png")) == []


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "missing.png", "sub", "a\0b.png", "link.png"]
)
def test_an_image_outside_of_the_input_directory_is_not_found(
    harness: Harness, folders: tuple[Path, Path], name: str
) -> None:
    Image.new("RGB", (4, 4)).save(folders[0].parent / "secret.png")
    (folders[0] / "sub").mkdir()
    (folders[0] / "link.png").symlink_to(folders[0].parent / "secret.png")
    with pytest.raises(InvalidWorkflow, match="custom_validation_failed") as caught:
        harness.run({"1": node("LoadImage", image=name), "2": node("PreviewImage", images=["1", 0])})
    assert (caught.value.node_id, caught.value.input_name) == ("1", "image")


def test_a_file_that_changed_is_loaded_again(harness: Harness, folders: tuple[Path, Path]) -> None:
    prompt = {"1": node("LoadImage", image="x.png"), "2": node("LegionExporter", input_1=["1", 0])}
    executed: list[int] = []
    for colour in ("red", "red", "blue"):
        Image.new("RGB", (4, 4), colour).save(folders[0] / "x.png")
        outcome = harness.run(prompt)
        executed.append(outcome.executed)
    assert executed == [2, 1, 2]
    assert outcome.outputs["output_1"][0, 0, 0].tolist() == [0.0, 0.0, 1.0]  # type: ignore[index]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_the_mask(harness: Harness, folders: tuple[Path, Path], mode: str) -> None:
    picture = Image.new("RGBA", (4, 2), (255, 255, 255, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        picture = picture.convert("RGB").quantize(2)
        picture.info["transparency"] = picture.getpixel((1, 0))
    picture.convert(mode).save(folders[0] / "x.png")
    pixels, mask = call("LoadImage", image="x.png")
    assert pixels.shape == (1, 2, 4, 3)
    assert mask.tolist() == [[[0.0, 1.0, 0.0, 0.0], [0.0] * 4]]


def test_a_turned_photograph_is_turned_back(harness: Harness, folders: tuple[Path, Path]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (4, 2), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(folders[0] / "x.png", exif=exif)
    pixels, _ = call("LoadImage", image="x.png")
    assert pixels.shape == (1, 4, 2, 3)
    assert pixels[0, 0, 1].tolist() == [1.0] * 3


def test_the_frames_of_a_file_become_a_batch(harness: Harness, folders: tuple[Path, Path]) -> None:
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(folders[0] / "x.gif", save_all=True, append_images=frames[1:])
    pixels, mask = call("LoadImage", image="x.gif")
    assert pixels[:, 0, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert mask.shape[0] == 3


def test_sixteen_bit_grey_keeps_its_range(harness: Harness, folders: tuple[Path, Path]) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(folders[0] / "x.png")
    pixels, _ = call("LoadImage", image="x.png")
    close(pixels[0, 0, :, 2], torch.tensor([0.0, 32768 / 65535, 1.0]))


def test_the_list_of_images_is_what_lies_in_the_input_directory(
    harness: Harness, folders: tuple[Path, Path]
) -> None:
    for name in ("b.png", "a.JPG", "c.txt"):
        (folders[0] / name).touch()
    declared = NODE_CLASS_MAPPINGS["LoadImage"].INPUT_TYPES()  # type: ignore[attr-defined]
    assert declared["required"]["image"][0] == ["a.JPG", "b.png"]


def test_previews_go_to_the_job_and_to_no_file(harness: Harness, folders: tuple[Path, Path]) -> None:
    value = image()
    prompt = {"1": node("LegionImporter"), "2": node("PreviewImage", images=["1", 0])}
    outcome = harness.run(prompt, {"input_1": value})
    assert harness.events.previewed[0][0] == "2"
    assert harness.events.previewed[0][1] is value
    assert outcome.ui == {}
    assert not folders[1].exists()


def test_the_directories_come_from_the_engine_else_the_environment_else_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEGION_INPUT_DIR", str(tmp_path / "env-in"))
    monkeypatch.delenv("LEGION_OUTPUT_DIR", raising=False)
    with engine_with({}):
        assert directories.input_directory() == tmp_path / "env-in"
        assert directories.output_directory() == Path("output")
    with engine_with({}, input_directory=tmp_path / "given"):
        assert directories.input_directory() == tmp_path / "given"
