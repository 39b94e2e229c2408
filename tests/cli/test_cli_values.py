from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from legion_shm.cli_outputs import plan_output, write_output
from legion_shm.cli_values import describe, json_form, read_input
from tests import needs


def save_picture(path: Path, pixels: Any, mode: str = "RGB", **options: Any) -> Path:
    Image.fromarray(np.asarray(pixels, dtype=np.uint8), mode).save(path, **options)
    return path


def write(value: object, path: Path) -> list[Path]:
    return write_output(value, plan_output(str(path)))


def left_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def refusal(text: str) -> str:
    with pytest.raises(click.UsageError) as caught:
        read_input(text)
    return caught.value.message


# --- inputs that are text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("3", 3),
        ("-2e3", -2000.0),
        ("true", True),
        ("null", None),
        ("[1, 2.5]", [1, 2.5]),
        ('{"a": {"b": [true]}}', {"a": {"b": [True]}}),
        ('"3"', "3"),
        ("a cat, sitting", "a cat, sitting"),
        ("", ""),
        ("str:0.5", "0.5"),
        ("str:photo.png", "photo.png"),
        ("str:", ""),
        ("json:[1]", [1]),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("version 1.5", "version 1.5"),
        ("/some/where", "/some/where"),
        ("a photo saved as\nx.png", "a photo saved as\nx.png"),
    ],
)
def test_text_is_json_where_it_parses_and_itself_otherwise(text: str, value: object) -> None:
    result = read_input(text)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("text", ["json:", "json:{", "json:NaN", "json:" + "[" * 100_000])
def test_broken_json_that_was_asked_for_is_refused(text: str) -> None:
    assert "not valid JSON" in refusal(text)


@given(st.text())
def test_any_text_reaches_the_job_unchanged_behind_str(text: str) -> None:
    assert read_input(f"str:{text}") == text


@pytest.mark.parametrize("name", ["photo.png", "a/b.JPG", "x.npy", "weights.safetensors", "data.json"])
def test_a_missing_file_is_refused_with_the_way_to_mean_the_text(name: str) -> None:
    message = refusal(name)
    assert "there is no file" in message
    assert f"str:{name}" in message


def test_a_missing_forced_file_is_refused(tmp_path: Path) -> None:
    assert "there is no file" in refusal(f"@{tmp_path / 'photo.png'}")


def test_a_folder_named_like_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").mkdir()
    assert "is not a file" in refusal(str(tmp_path / "photo.png"))


def test_a_forced_file_of_an_unknown_extension_is_refused_and_names_the_known(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").touch()
    message = refusal(f"@{tmp_path / 'a.xyz'}")
    assert "'.xyz'" in message
    assert ".safetensors" in message


# --- inputs that are files ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "tif", "PNG"])
def test_an_image_arrives_as_exact_float_pixels(tmp_path: Path, suffix: str) -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3) * 4
    value: Any = read_input(str(save_picture(tmp_path / f"a.{suffix}", pixels)))
    assert value.shape == (1, 4, 5, 3)
    assert value.dtype == torch.float32
    assert torch.equal(value[0] * 255, torch.from_numpy(pixels).float())


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_a_lossy_image_arrives_close_to_what_was_saved(tmp_path: Path, suffix: str) -> None:
    value: Any = read_input(str(save_picture(tmp_path / f"a.{suffix}", np.full((8, 16, 3), 128))))
    assert value.shape == (1, 8, 16, 3)
    assert (value - 128 / 255).abs().max() < 0.03


def test_an_image_is_turned_upright_as_its_exif_data_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[1, 0] = 255  # bottom left, which becomes top left
    value: Any = read_input(str(save_picture(tmp_path / "a.png", pixels, exif=exif)))
    assert value.shape == (1, 3, 2, 3)
    assert value[0, 0, 0, 0] == 1.0
    assert value.sum() == 3.0


def test_alpha_is_dropped_and_the_colours_behind_it_are_kept(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "a.png", [[[255, 0, 0, 0]]], "RGBA")
    assert torch.equal(torch.as_tensor(read_input(str(path))), torch.tensor([[[[1.0, 0.0, 0.0]]]]))


def test_grey_images_arrive_with_three_channels_and_sixteen_bits_keep_their_depth(tmp_path: Path) -> None:
    grey = save_picture(tmp_path / "grey.png", [[51]], "L")
    assert torch.equal(torch.as_tensor(read_input(str(grey))), torch.full((1, 1, 1, 3), 0.2))
    deep = tmp_path / "deep.png"
    Image.fromarray(np.array([[257]], dtype=np.uint16)).save(deep)
    value: Any = read_input(str(deep))
    assert value.shape == (1, 1, 1, 3)
    assert value[0, 0, 0].tolist() == pytest.approx([257 / 65535] * 3)


def test_an_image_of_several_pages_arrives_as_a_batch(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (3, 2), (shade, 0, 0)) for shade in (0, 255)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    value: Any = read_input(str(tmp_path / "a.tiff"))
    assert value.shape == (2, 2, 3, 3)
    assert value[:, 0, 0, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, np.bool_, np.complex64, ">f4"])
def test_npy_arrives_as_a_tensor_where_torch_has_the_dtype(tmp_path: Path, dtype: Any) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    value: Any = read_input(str(tmp_path / "a.npy"))
    assert isinstance(value, torch.Tensor)
    assert value.numpy().dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(value.numpy(), array)


@pytest.mark.parametrize("array", [np.array(["a", "bc"]), np.zeros(2, dtype=[("x", "<f4"), ("y", "<i2")])])
def test_npy_of_a_dtype_that_torch_lacks_arrives_as_a_numpy_array(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "a.npy", array)
    value: Any = read_input(str(tmp_path / "a.npy"))
    assert isinstance(value, np.ndarray)
    assert value.dtype == array.dtype
    assert np.array_equal(value, array)


def test_npy_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([object()]), allow_pickle=True)
    assert "it is none, or holds Python objects" in refusal(str(tmp_path / "a.npy"))
    (tmp_path / "b.npy").write_text("no array", encoding="utf-8")
    assert "it is none, or holds Python objects" in refusal(str(tmp_path / "b.npy"))


def test_safetensors_arrives_as_a_dict_of_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.arange(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    value: Any = read_input(str(tmp_path / "a.safetensors"))
    assert type(value) is dict
    assert value["a"].dtype == torch.bfloat16
    assert all(torch.equal(value[name], tensor) for name, tensor in tensors.items())


def test_json_and_text_files_arrive_as_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1]}', encoding="utf-8")
    (tmp_path / "a.txt").write_text("0.5\nä", encoding="utf-8")
    assert read_input(str(tmp_path / "a.json")) == {"a": [1]}
    assert read_input(f"@{tmp_path / 'a.txt'}") == "0.5\nä"


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.safetensors", "a.json", "a.webp", "a.tif"])
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no such thing", b"\xff" * 64])
def test_a_broken_file_is_refused_by_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"cannot read {tmp_path / name}" in refusal(str(tmp_path / name))


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_an_image_written_and_read_again_is_the_same_in_eight_bits(tmp_path: Path, suffix: str) -> None:
    image = torch.rand(1, 5, 7, 3)
    (path,) = write(image, tmp_path / f"a.{suffix}")
    again: Any = read_input(str(path))
    assert again.shape == image.shape
    assert (again - image).abs().max() <= 0.5 / 255 + 1e-6
    assert write(again, tmp_path / f"b.{suffix}") == [tmp_path / f"b.{suffix}"]
    assert torch.equal(torch.as_tensor(read_input(str(tmp_path / f"b.{suffix}"))), again)


@pytest.mark.parametrize(
    ("value", "mode", "pixel"),
    [
        (torch.full((1, 2, 3), 0.2), "L", 51),
        (torch.full((2, 3), 0.2), "L", 51),
        (torch.full((1, 2, 3, 1), 0.2), "L", 51),
        (torch.full((1, 2, 3, 4), 0.2), "RGBA", (51, 51, 51, 51)),
        (torch.full((1, 2, 3, 3), 0.2, dtype=torch.bfloat16), "RGB", (51, 51, 51)),
        (torch.full((1, 2, 3, 3), 0.2, dtype=torch.float64), "RGB", (51, 51, 51)),
        (torch.full((1, 2, 3, 3), 7, dtype=torch.uint8), "RGB", (7, 7, 7)),
        (torch.ones(1, 2, 3, dtype=torch.bool), "L", 255),
        (torch.tensor([-1.0, 2.0, float("nan")]).expand(1, 2, 3, 3), "RGB", (0, 255, 0)),
        (np.full((1, 2, 3, 3), 0.2), "RGB", (51, 51, 51)),
        ([torch.full((1, 2, 3, 3), 0.2)], "RGB", (51, 51, 51)),
    ],
)
def test_images_masks_and_planes_are_written_with_their_channels(
    tmp_path: Path, value: object, mode: str, pixel: object
) -> None:
    (path,) = write(value, tmp_path / "a.png")
    with Image.open(path) as picture:
        assert (picture.mode, picture.size) == (mode, (3, 2))
        assert picture.getpixel((0, 0)) == pixel


@pytest.mark.parametrize("suffix", ["jpg", "bmp"])
def test_alpha_is_left_out_of_formats_that_have_none(tmp_path: Path, suffix: str) -> None:
    (path,) = write(torch.ones(1, 8, 8, 4), tmp_path / f"a.{suffix}")
    with Image.open(path) as picture:
        assert picture.mode == "RGB"


def test_a_batch_is_written_as_numbered_files(tmp_path: Path) -> None:
    masks = torch.tensor([0.0, 0.2, 1.0]).reshape(3, 1, 1)
    paths = write(masks, tmp_path / "out.png")
    assert [path.name for path in paths] == ["out_00001.png", "out_00002.png", "out_00003.png"]
    assert left_in(tmp_path) == [path.name for path in paths]
    values = [Image.open(path).getpixel((0, 0)) for path in paths]
    assert values == [0, 51, 255]


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2),
        torch.ones(1, 2, 2, 5),
        torch.ones(1, 1, 2, 2, 3),
        torch.ones(0, 2, 2, 3),
        torch.ones(1, 0, 2, 3),
        torch.ones(1, 2, 2, 3, dtype=torch.int64),
        torch.ones(1, 2, 2, 3, dtype=torch.complex64),
        {"samples": torch.ones(1, 4, 8, 8)},
        "text",
        None,
        [],
    ],
)
def test_what_is_no_image_is_not_written_as_one(tmp_path: Path, value: object) -> None:
    with pytest.raises(click.ClickException, match=r"a\.png: .*(image|pixels)"):
        write(value, tmp_path / "a.png")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "value", [torch.rand(2, 3), torch.ones((), dtype=torch.int8), np.arange(3), 2.5, [1, 2]]
)
def test_npy_holds_tensors_arrays_and_numbers(tmp_path: Path, value: Any) -> None:
    (path,) = write(value, tmp_path / "a.npy")
    expected = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    loaded = np.load(path)
    assert loaded.dtype == expected.dtype
    assert np.array_equal(loaded, expected)


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.bfloat16), {"a": 1}, [object()], None])
def test_npy_refuses_what_it_cannot_hold_without_loss(tmp_path: Path, value: object) -> None:
    with pytest.raises(click.ClickException, match="safetensors"):
        write(value, tmp_path / "a.npy")
    assert left_in(tmp_path) == []


def test_safetensors_holds_a_tensor_as_value_and_dicts_by_name(tmp_path: Path) -> None:
    shared = torch.rand(4, 4)
    write(shared.t(), tmp_path / "one.safetensors")
    assert torch.equal(load_file(tmp_path / "one.safetensors")["value"], shared.t())
    write({"a": shared, "b": shared, "c": np.arange(2)}, tmp_path / "many.safetensors")
    many = load_file(tmp_path / "many.safetensors")
    assert torch.equal(many["a"], shared)
    assert torch.equal(many["b"], shared)
    assert many["c"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "value", [{"a": torch.ones(1), "b": 3}, {1: torch.ones(1)}, "text", 3, [torch.ones(1)]]
)
def test_safetensors_refuses_what_is_no_tensor(tmp_path: Path, value: object) -> None:
    with pytest.raises(click.ClickException, match="a tensor or a dict of tensors"):
        write(value, tmp_path / "a.safetensors")
    assert left_in(tmp_path) == []


def test_json_holds_values_and_small_tensors(tmp_path: Path) -> None:
    value = {"a": torch.tensor([[1, 2]]), 3: (None, float("inf")), "t": "ä", "f": torch.tensor(float("nan"))}
    write(value, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [[1, 2]], "3": [None, None], "t": "ä", "f": None}


@pytest.mark.parametrize(
    "value", [b"bytes", object(), torch.ones(1, dtype=torch.complex64), {"a": {"b": b""}}]
)
def test_json_refuses_what_it_has_no_form_for(tmp_path: Path, value: object) -> None:
    with pytest.raises(click.ClickException, match="no form in JSON"):
        write(value, tmp_path / "a.json")
    assert left_in(tmp_path) == []


def test_json_refuses_a_tensor_that_nobody_could_read() -> None:
    with pytest.raises(click.ClickException, match="too large"):
        json_form(torch.zeros(1).expand(1001, 1000))


@pytest.mark.parametrize(
    ("value", "text"), [("as\nit is", "as\nit is"), (3, "3\n"), (True, "True\n"), ([1], "[\n  1\n]\n")]
)
def test_text_files_hold_text_as_it_is_and_else_json(tmp_path: Path, value: object, text: str) -> None:
    write(value, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == text.encode()


def test_standard_output_gets_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_output({"a": [1, "ä"]}, plan_output("-")) == []
    assert capsys.readouterr().out == '{"a": [1, "ä"]}\n'


# --- how files come into being --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".npy", ".safetensors", ".json", ".txt"])
def test_a_file_replaces_the_one_before_and_has_the_usual_permissions(tmp_path: Path, suffix: str) -> None:
    value: object = "text" if suffix in (".json", ".txt") else torch.ones(1, 2, 2)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"before")
    write(value, path)
    assert path.read_bytes() != b"before"
    assert left_in(tmp_path) == [path.name]
    reference = tmp_path / "reference"
    reference.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)


def test_a_failure_in_the_middle_leaves_the_file_before_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def fail(self: Any, file: Any, **_: Any) -> None:
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(click.ClickException, match="No space left"):
        write(torch.ones(1, 2, 2), path)
    assert left_in(tmp_path) == ["a.png"]
    assert path.read_bytes() == b"before"


@needs.symlinks
def test_a_link_stays_a_link_and_its_target_gets_the_value(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").symlink_to(tmp_path / "folder" / "b.txt")
    write("value", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "folder" / "b.txt").read_text(encoding="utf-8") == "value"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/a.png", "there is no folder"),
        ("a.xyz", "not known"),
        ("a", "not known"),
        ("folder.png", "is not a file"),
    ],
)
def test_a_destination_that_cannot_work_is_refused_beforehand(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(click.UsageError, match=message):
        plan_output(str(tmp_path / name))


# --- descriptions ---------------------------------------------------------------------------------


def test_a_description_tells_type_dtype_shape_and_bytes() -> None:
    assert describe(torch.zeros(2, 3, dtype=torch.bfloat16)) == {
        "type": "tensor", "dtype": "bfloat16", "shape": [2, 3], "bytes": 12,
    }  # fmt: skip
    assert describe(np.zeros(2, dtype=np.int16)) == {
        "type": "array",
        "dtype": "int16",
        "shape": [2],
        "bytes": 4,
    }
    assert describe({"samples": torch.zeros(1)})["items"]["samples"]["shape"] == [1]
    assert describe((1, None))["items"] == [{"type": "int", "value": 1}, {"type": "NoneType", "value": None}]


def test_a_description_of_something_large_stays_short() -> None:
    assert len(json.dumps(describe(["x" * 100_000] * 100_000))) < 100_000
    assert describe("x" * 100_000)["length"] == 100_000
