"""Values of ComfyUI's types for sound, video, three dimensions, drawing and widgets."""

from __future__ import annotations

import importlib
import io
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.comfy.value_making import BEYOND, CoreNode, Given, Row, find, made, prepared, python, widget
else:
    from value_making import BEYOND, CoreNode, Given, Row, find, made, prepared, python, widget

__all__ = ["samples"]


def samples() -> list[Row]:
    return [*_sound_and_video(), *_meshes(), *_files_3d(), *_viewers(), *_drawing(), *_paths()]


def image(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 64, 64, 3)


def _inputs() -> Path:
    return Path(find("folder_paths:get_input_directory")())


def _sound_file() -> str:
    path = _inputs() / "stereo.wav"
    if not path.exists():
        with wave.open(str(path), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(44100)
            file.writeframes(bytes(range(256)) * 345)
    return path.name


def _video(sound: bool = True) -> CoreNode:
    more = {"audio": CoreNode("EmptyAudio", duration=0.1)} if sound else {}
    return CoreNode("CreateVideo", images=Given(image(4)), fps=24.0, **more)


def _video_file() -> str:
    path = _inputs() / "short.mp4"
    if not path.exists():
        components = find("comfy_api.latest._util:VideoComponents", "comfy_api.util:VideoComponents")(
            images=image(4), frame_rate=importlib.import_module("fractions").Fraction(24)
        )
        find(
            "comfy_api.latest._input_impl.video_types:VideoFromComponents",
            "comfy_api.input_impl:VideoFromComponents",
        )(components).save_to(str(path))
    return path.name


def _sound_and_video() -> list[Row]:
    from_file = find(
        "comfy_api.latest._input_impl.video_types:VideoFromFile", "comfy_api.input_impl:VideoFromFile"
    )
    silent = CoreNode("GetVideoComponents", video=_video(sound=False))
    return [
        made("AUDIO", "silence", "EmptyAudio", duration=0.1, sample_rate=44100, channels=2),
        made("AUDIO", "of a file, stereo", "LoadAudio", audio=_sound_file),
        made("AUDIO", "one channel, a view", "SplitAudioChannels", 1,
             audio=CoreNode("LoadAudio", audio=_sound_file)),
        made("AUDIO", "None, of a video without sound", "GetVideoComponents", 1, video=_video(sound=False))
        .having(lambda value: value is None),
        widget("AUDIO_RECORD", "a recording's name", "RecordAudio", "audio/1.webm [temp]"),
        made("VIDEO", "in memory, with sound", "CreateVideo", images=Given(image(4)), fps=24.0,
             audio=CoreNode("EmptyAudio", duration=0.1)),
        made("VIDEO", "in memory, without", "CreateVideo", images=Given(image(4)), fps=23.976),
        made("VIDEO", "by file", "LoadVideo", file=_video_file),
        made("VIDEO", "a part of a file", "Video Slice", video=CoreNode("LoadVideo", file=_video_file),
             start_time=0.0, duration=0.1),
        python("VIDEO", "a file's bytes", lambda: from_file(io.BytesIO(b"\0mp4" * 999)), BEYOND),
        made("FLOAT", "a video's frames per second", "GetVideoComponents", 2, video=_video()),
        made("COMBO", "a video's colour space", "GetVideoComponents", 4, video=silent.inputs["video"]),
    ]  # fmt: skip


class _VoxelDecoder:
    """In the place of a VAE of Hunyuan3D, of which there is no small one."""

    def decode(self, samples: torch.Tensor, vae_options: dict[str, Any]) -> torch.Tensor:
        return torch.rand(1, 8, 8, 8)


def _meshes() -> list[Row]:
    voxel = {"samples": CoreNode("EmptyLatentHunyuan3Dv2"), "vae": Given(_VoxelDecoder())}
    mesh = CoreNode("VoxelToMeshBasic", voxel=CoreNode("VAEDecodeHunyuan3D", **voxel), threshold=0.6)
    return [
        made("VOXEL", "8 x 8 x 8", "VAEDecodeHunyuan3D", **voxel),
        made("MESH", "of a voxel", "VoxelToMeshBasic", voxel=CoreNode("VAEDecodeHunyuan3D", **voxel)),
        made("MESH", "of a voxel, as a surface net", "VoxelToMesh", algorithm="surface net",
             voxel=CoreNode("VAEDecodeHunyuan3D", **voxel)),
        made("MESH", "with normals", "MeshSmoothNormals", mesh=mesh)
        .having(lambda value: value.normals is not None),
        made("MESH", "of two", "MergeMeshes", meshes__mesh0=mesh, meshes__mesh1=mesh),
        made("SPLAT", "of a file", "File3DToSplat",
             model_3d=CoreNode("SplatToFile3D", splat=Given(_splat), format="ply")),
        made("SPLAT", "moved", "TransformSplat", splat=Given(_splat), rotate_x=20.0),
    ]  # fmt: skip


def _splat() -> Any:
    parts = (torch.rand(1, 3, n) for n in (3, 3, 4, 1))
    return find("comfy_api.latest._util.geometry_types:SPLAT")(*parts, torch.rand(1, 3, 1, 3))


def _file(kind: str) -> Callable[[], Any]:
    return lambda: find("comfy_api.latest._util.geometry_types:File3D")(io.BytesIO(b"solid x"), kind)


def _model_file(name: str) -> Callable[[], str]:
    def write() -> str:
        path = _inputs() / "3d" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"solid x")
        return f"3d/{name}"

    return write


def _triangles() -> Any:
    mesh = find("comfy_api.latest._util.geometry_types:MESH")
    return mesh(torch.rand(1, 4, 3), torch.tensor([[[0, 1, 2], [0, 2, 3]]]))


def _files_3d() -> list[Row]:
    nameless = ("fbx", "gltf", "ksplat", "obj", "ply", "splat", "spz", "stl", "usdz")
    return [
        made("FILE_3D", "by file", "Load3DAdvanced", model_file=_model_file("b.glb"), viewport_state={}),
        made("FILE_3D_GLB", "in memory", "MeshToFile3D", mesh=Given(_triangles)),
        *(
            made("FILE_3D_SPLAT_ANY", f"in memory, {kind}", "SplatToFile3D", splat=Given(_splat), format=kind)
            for kind in ("ply", "ksplat", "spz")
        ),
        made("FILE_3D_POINT_CLOUD_ANY", "in memory", "PreviewPointCloud", model_3d=Given(_file("ply")),
             viewport_state={}),
        *(python(f"FILE_3D_{kind.upper()}", "in memory", _file(kind)) for kind in nameless),
    ]  # fmt: skip


CAMERA = {"position": {"x": 1.0, "y": 2.0, "z": 3.0}, "target": {"x": 0, "y": 0, "z": 0}, "zoom": 1,
          "cameraType": "perspective"}  # fmt: skip
MODELS = [{"position": {"x": 0.0, "y": 0.5, "z": 0.0}, "scale": {"x": 1, "y": 1, "z": 1}}]
VIEW = {"image": "view.png", "mask": "view.png", "normal": "view.png", "lineart": "view.png", "recording": "",
        "camera_info": CAMERA, "model_3d_info": MODELS}  # fmt: skip


def _viewed(name: str, slot: int, key: str, kind: str) -> Callable[[], CoreNode]:
    """A node of the 3D viewer, for which the frontend has uploaded its pictures."""

    def prepare() -> CoreNode:
        picture = importlib.import_module("PIL.Image").new("RGBA", (8, 8), (10, 20, 30, 200))
        picture.save(_inputs() / "view.png")
        outputs = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[name].RETURN_TYPES
        known = [str(getattr(item, "value", item)) for item in outputs]
        return CoreNode(
            name, known.index(kind) if kind in known else slot, model_file=_model_file("c.glb"), **{key: VIEW}
        )

    return prepare


def _viewers() -> list[Row]:
    return [
        prepared("LOAD3D_CAMERA", "a viewer's", "Load3D", _viewed("Load3D", 4, "image", "LOAD3D_CAMERA")),
        made("LOAD3D_CAMERA", "in orbit", "CreateCameraInfo", mode="orbit", mode__yaw=35.0, mode__pitch=30.0,
             mode__distance=4.0),
        prepared("LOAD3D_MODEL_INFO", "transforms", "Load3D",
                 _viewed("Load3D", 7, "image", "LOAD3D_MODEL_INFO")),
        prepared("VIDEO", "None, of a viewer without recording", "Load3D",
                 _viewed("Load3D", 5, "image", "VIDEO")).having(lambda value: value is None),
        prepared("IMAGE", "a viewer's", "Load3D", _viewed("Load3D", 0, "image", "IMAGE")),
        widget("LOAD_3D", "its files and camera", "Load3D", VIEW),
        python("LOAD_3D_ANIMATION", "its files", {"image": "a.png", "recording": "c.mp4"}),
        widget("WEBCAM", "a picture's name", "WebcamCapture", "webcam/1.png [temp]"),
        widget("IMAGECOMPARE", "names", "ImageCompare", {"a_images": [], "b_images": []}),
    ]  # fmt: skip


def _svg() -> Any:
    kind = find("comfy_api.latest._util.image_types:SVG", "comfy_extras.nodes_images:SVG")
    return kind([io.BytesIO(b'<svg xmlns="http://www.w3.org/2000/svg"></svg>') for _ in range(2)])


def _drawing() -> list[Row]:
    box = {"x": 8, "y": 16, "width": 32, "height": 24}
    regions = [{**box, "metadata": {"type": "text", "text": "A", "desc": "b", "palette": ["#336699"]}}]
    boxes = {"width": 128, "height": 128, "editor_state": regions}
    points = {"points": [[0.0, 0.0], [0.5, 0.2], [1.0, 1.0]], "interpolation": "monotone_cubic"}
    return [
        made("SVG", "saved", "SaveSVGNode", svg=Given(_svg)),
        python("SVG", "two pages", _svg),
        made("LAYERS", "two pictures", "AddLayer", image=Given(image(1)), name="b", opacity=0.5,
             layers=CoreNode("AddLayer", image=Given(image(1)), mask=CoreNode("SolidMask", width=64))),
        widget("COMPOSITOR", "its state", "ImageCompositor", {"canvas": {"w": 8, "h": 8}, "layers": [],
               "order": [1]}),
        made("CURVE", "monotone", "CurveEditor", curve=points),
        made("CURVE", "linear", "CurveEditor", curve={**points, "interpolation": "linear"}),
        made("HISTOGRAM", "bins", "ImageHistogram", image=Given(image(1))),
        python("RANGE", "levels", lambda: find("comfy_api.latest._input.range_types:RangeInput")(0.1, 0.9,
               0.5)),
        made("COLOR", "text", "ColorToRGBInt", 1, color="#336699"),
        widget("COLORS", "several", "BuildJsonPromptIdeogram", ["#336699", "#000000"]),
        made("BOUNDING_BOX", "of a widget", "PrimitiveBoundingBox", **box),
        made("BOUNDING_BOX", "drawn", "CreateBoundingBoxes", 1, **boxes),
        widget("BOUNDING_BOXES", "drawn", "CreateBoundingBoxes", regions),
        made("ARRAY", "elements of a prompt", "CreateBoundingBoxes", 2, **boxes),
        made("DICT", "a prompt in JSON", "BuildJsonPromptIdeogram", high_level_description="a", style="none",
             element=CoreNode("CreateBoundingBoxes", 2, **boxes), color_palette=["#336699"]),
    ]  # fmt: skip


def _paths() -> list[Row]:
    track = json.dumps([[{"x": 1.5 * n, "y": 2.0 * n} for n in range(5)] for _ in range(2)])
    zoom = {"camera_pose": "Zoom In", "width": 64, "height": 64, "length": 5}
    return [
        made("WAN_CAMERA_EMBEDDING", "zoom", "WanCameraEmbedding", **zoom),
        made("TRACKS", "path and visibility", "WanMoveTracksFromCoords", track_coords=track),
        made("TRACKS", "generated", "GenerateTracks", num_frames=9, num_tracks=3),
        made("TRACKS", "of two", "WanMoveConcatTrack",
             tracks_1=CoreNode("WanMoveTracksFromCoords", track_coords=track),
             tracks_2=CoreNode("GenerateTracks", num_frames=5, num_tracks=3)),
    ]  # fmt: skip
