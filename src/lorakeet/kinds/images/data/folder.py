"""Reads a folder of captioned pictures: each is rotated upright and hashed, or named with the reason it cannot be used.

Pictures in Parquet files, `datasets` folders and hub ids are unpacked into such a folder first.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakeet.data.locate import Location
from lorakeet.data.read import HUB, SAVED, is_hub_id, read_records
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import RowProblems, text_records
from lorakeet.disk import FULL, erase, read_regular, write_new, written_whole
from lorakeet.errors import DataError, EnvironmentProblem, PackageMissing, Problems, percent
from lorakeet.kinds.images.spec import ENDINGS, ImageSpec

IF_BUILT_IN = (".avif",)  # formats that Pillow may be built without
NOT_READ = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".psd", ".tga", ".svg", ".eps", ".dng", ".cr2", ".cr3", ".nef",
            ".arw", ".orf", ".rw2", ".raf")  # fmt: skip
CAPTION_COLUMNS = ("text", "caption", "prompt")
HASH_SIDE = 16
LIGHT_SIDE, COLOUR_SIDE = 64, 16
_ORIENTATION = 0x0112  # EXIF tag
_CLEARLY = 3  # grey levels of 255 that count as a difference
_PICTURES = DataSpec(longest_row=32_000_000)  # a row of at most 256 MB
_ENDS, _CLIPPED = (5, 250), 0.02  # levels that may be clipped, and the share of a cell's pixels that makes it clipped
_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp", b"II*\x00": ".tif",
          b"MM\x00*": ".tif"}  # fmt: skip
_OR_SETTING = ", or remove it to use images.caption"

Pixels = NDArray[np.uint8]  # (height, width, 3)


@dataclass(frozen=True)
class ImageRow:
    """One picture: `pixels_key` is the hash of its upright pixels, `key` of pixels and caption."""

    path: Path
    caption: str
    width: int
    height: int
    pixels_key: str
    difference_hash: int  # 256 bits; similar pictures differ in few of them
    source: str
    thumb: bytes = field(default=b"", repr=False)  # 5.5 KB by which copies are recognised (kinds/images/data/match)

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.pixels_key}\n{self.caption}".encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Album:
    """The usable pictures of a folder, and a sentence about every file that was changed or left out."""

    rows: tuple[ImageRow, ...]
    remarks: tuple[str, ...]


def read_album(folder: Path, spec: ImageSpec, *, limit: int | None = None, setting: str = "data.train") -> Album:
    """Reads the pictures below `folder` in the order of their paths, exact copies once; `setting` named the folder.

    A caption is in metadata.jsonl (file_name, and text, caption or prompt), else in NAME.txt beside NAME.png, else it is
    `spec.caption`. Broken files, unsupported formats, and pictures smaller than `spec.smallest` are left out with a remark.
    Raises DataError that names every picture without a caption and the unusable lines of metadata.jsonl, or if no picture is
    left.
    """
    require_folder(folder, setting)
    endings = _readable()
    found = _files(folder, (*endings, *NOT_READ))
    files = [path for path in found if path.suffix.lower() in endings]
    others = [path.relative_to(folder).as_posix() for path in found if path.suffix.lower() not in endings]
    skipped = [f"{_named(others, 'file')} of an unsupported format and left out; convert to JPEG or PNG."] if others else []
    if not files:
        raise DataError(f"{folder} has no picture ({', '.join(endings)}).{''.join(f' {line}' for line in skipped)}")
    captions = _listed_captions(folder)
    problems = Problems(f"The pictures in {folder} cannot be used", DataError)
    rows: dict[str, ImageRow] = {}
    remarks = skipped
    for path in files[:limit]:
        name = path.relative_to(folder).as_posix()
        row = _row(path, name, captions, spec, remarks, problems)
        if row is not None and (twin := rows.setdefault(row.pixels_key, row)) is not row:
            remarks.append(f"{name} is a copy of {twin.source}; it is used once.")
    problems.raise_if_any()
    if not rows:
        listed = "\n".join(f"  - {line}" for line in remarks)
        raise DataError(f"None of the {len(files)} pictures in {folder} can be used:\n{listed}")
    return Album(tuple(rows.values()), tuple(remarks))


def require_folder(folder: Path, setting: str) -> None:
    """Raises DataError unless `folder`, named by `setting`, is a folder."""
    if not folder.is_dir():
        raise DataError(f"{setting} {folder} is not a folder; kind: image expects a folder of pictures with captions.")


def read_named(folder: Path, names: Iterable[str], spec: ImageSpec) -> Iterator[ImageRow | None]:
    """Reads the named pictures below `folder` as `read_album` does; yields None for one that is gone or unusable.

    Problems of other pictures, and of their lines in metadata.jsonl, are ignored.
    """
    captions = _listed_captions(folder, strict=False)
    for name in names:
        path = folder / name
        try:
            yield _row(path, name, captions, spec, [], Problems(name, DataError)) if path.is_file() else None
        except DataError:  # a caption that is not UTF-8
            yield None


def names_in(folder: Path) -> list[str]:
    """Names of the pictures below `folder` in supported formats, in the order of `read_album`."""
    return [path.relative_to(folder).as_posix() for path in _files(folder, _readable())]


def _files(folder: Path, endings: Iterable[str]) -> list[Path]:
    """The files below `folder` with one of these suffixes, sorted."""
    wanted = set(endings)
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in wanted and path.is_file())


def open_pixels(path: Path) -> tuple[Pixels, list[str]]:
    """Returns the upright RGB pixels (height, width, 3) of a picture, and the changes made to it, in words.

    Applies the EXIF rotation, takes the first frame of an animation, converts CMYK, grey, palette and 16-bit pictures, and
    puts transparent ones on white. Raises OSError or ValueError if it cannot be read completely.
    """
    image_module, operations = _pillow()
    done: list[str] = []
    too_large = (image_module.DecompressionBombError, image_module.DecompressionBombWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", image_module.DecompressionBombWarning)
        try:
            with image_module.open(path) as image:
                if getattr(image, "is_animated", False):
                    done.append(f"has {image.n_frames} frames, of which the first is used")
                image.load()
                if image.getexif().get(_ORIENTATION, 1) != 1:
                    done.append("was rotated upright by its EXIF tag")
                upright = operations.exif_transpose(image)
                if upright.mode == "CMYK":
                    done.append("was converted from CMYK")
                return _rgb(upright, image_module, done), done
        except (*too_large, SyntaxError, EOFError) as error:  # what Pillow raises for broken files besides OSError
            raise ValueError(str(error)) from error


def scaled_to_cover(sides: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture of `sides` (height, width), scaled to cover `size`."""
    scale = max(size[0] / sides[0], size[1] / sides[1])
    return max(size[0], round(sides[0] * scale)), max(size[1], round(sides[1] * scale))


def crop_to_cover(pixels: Pixels, size: tuple[int, int], *, crop: int = 0, key: str = "") -> tuple[Pixels, tuple[int, int]]:
    """Scales `pixels` to cover `size` (height, width) and crops; also returns the crop's (top, left) in the scaled picture.

    Crop 0 is the middle; a hash of `key` and the number places further ones.
    """
    height, width = size
    image_module, _ = _pillow()
    scaled = scaled_to_cover((pixels.shape[0], pixels.shape[1]), size)
    image = image_module.fromarray(pixels).resize(scaled[::-1], image_module.Resampling.LANCZOS)
    spare = scaled[0] - height, scaled[1] - width
    if crop == 0:
        top, left = spare[0] // 2, spare[1] // 2
    else:
        digest = hashlib.sha256(f"crop {crop} {key}".encode()).digest()
        top, left = (int.from_bytes(digest[at : at + 8], "little") % (space + 1) for at, space in ((0, spare[0]), (8, spare[1])))
    return np.asarray(image)[top : top + height, left : left + width].copy(), (top, left)


def bucket_sizes(resolution: int, step: int) -> list[tuple[int, int]]:
    """Sizes (height, width) of examples: multiples of `step`, at most resolution² pixels, sides from half to twice `resolution`.

    For each height the greatest width that fits; includes the square if `step` divides `resolution`.
    """
    found = set()
    for height in range(step, 2 * resolution + 1, step):
        width = resolution * resolution // height // step * step
        if resolution <= 2 * height and resolution <= 2 * width <= 4 * resolution:
            found.add((height, width))
    return sorted(found)


def bucket_of(row: ImageRow, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size with the aspect ratio nearest to the picture's: least |log| of the ratio of the two."""
    aspect = row.height / row.width
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1] / aspect)), -size[0] * size[1], size))


def fit_remarks(rows: Sequence[ImageRow], sizes: list[tuple[int, int]]) -> list[str]:
    """Remarks on pictures that are enlarged more than twice, and on those cropped by more than half."""
    enlarged, cut_off = [], []
    for row in rows:
        height, width = bucket_of(row, sizes)
        scale = max(height / row.height, width / row.width)
        kept = height * width / (row.height * scale * row.width * scale)
        enlarged += [f"{row.source} {scale:.1f} times"] if scale > 2 else []
        cut_off += [f"{row.source} keeps {percent(kept, 0)}"] if kept < 0.5 else []
    found = []
    if enlarged:
        advice = "samples will be as blurred; lower images.resolution, or raise images.smallest"
        found.append(f"{_named(enlarged, 'picture')} enlarged more than twice: {advice}.")
    if cut_off:
        found.append(f"{_named(cut_off, 'picture')} cropped by more than half to fit; crop them yourself to the part to train.")
    return found


def _named(names: Sequence[str], what: str) -> str:
    """The count, the first three names and the verb."""
    more = ", …" if len(names) > 3 else ""
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more}) {'are' if len(names) > 1 else 'is'}"


def _readable() -> tuple[str, ...]:
    """The suffixes of the files that this installation of Pillow reads."""
    image_module, _ = _pillow()
    known = image_module.registered_extensions()
    return (*ENDINGS, *(ending for ending in IF_BUILT_IN if known.get(ending) in image_module.OPEN))


def _row(
    path: Path, name: str, captions: Mapping[str, str], spec: ImageSpec, remarks: list[str], problems: Problems
) -> ImageRow | None:
    try:
        pixels, done = open_pixels(path)
    except (OSError, ValueError) as error:
        remarks.append(f"{name} cannot be read ({error}); it is left out.")
        return None
    remarks += [f"{name} {what}." for what in done]
    height, width = pixels.shape[:2]
    if min(height, width) < spec.smallest:
        remarks.append(f"{name} has {width}×{height} pixels, a side below images.smallest {spec.smallest}; it is left out.")
        return None
    caption, beside = captions.get(name), path.with_suffix(".txt")
    blank = f"its line in metadata.jsonl is blank; write one there{_OR_SETTING}"
    if caption is None and beside.is_file():
        caption, blank = _text(beside), f"{beside.name} is blank; write a caption into it{_OR_SETTING}"
    if caption is not None and not caption.strip():
        problems.add(f"{name} has no caption: {blank}.")
        return None
    caption = spec.caption if caption is None else caption
    if not caption.strip():
        problems.add(f"{name} has no caption; write {path.stem}.txt beside it, a line in metadata.jsonl, or set images.caption.")
        return None
    digest = hashlib.sha256(f"{height} {width} ".encode() + pixels.tobytes()).hexdigest()
    return ImageRow(path, " ".join(caption.split()), width, height, digest, difference_hash_of(pixels), name, thumb_of(pixels))


def difference_hash_of(pixels: Pixels) -> int:
    """The difference hash of 256 bits: for 16×16 cells of the grey picture, 1 if the cell to the right is clearly brighter.

    "Clearly" keeps noise in an even background from setting bits.
    """
    image_module, _ = _pillow()
    small = image_module.fromarray(pixels).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), image_module.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1] + _CLEARLY).tobytes(), "big")


def thumb_of(pixels: Pixels) -> bytes:
    """The thumbnail of 5,632 bytes: 64×64 luminance, 16×16 each of Cb and Cr, and two bits for each of 64×64 cells.

    The bits are set if a channel is clipped at its bright end, and at its dark end.
    Scaled by a triangle filter two cells wide, so that finer detail does not depend on the position of the cells.
    """
    image_module, _ = _pillow()
    bilinear, box = image_module.Resampling.BILINEAR, image_module.Resampling.BOX
    small = image_module.fromarray(pixels).convert("YCbCr").resize((LIGHT_SIDE, LIGHT_SIDE), bilinear)
    light, *colours = small.split()
    planes = [light.tobytes(), *(plane.resize((COLOUR_SIDE, COLOUR_SIDE), box).tobytes() for plane in colours)]
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    least, most = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    for clipped in (most >= _ENDS[1], least <= _ENDS[0]):
        spots = image_module.fromarray(clipped.astype(np.uint8) * np.uint8(255))
        share = np.asarray(spots.resize((LIGHT_SIDE, LIGHT_SIDE), box))
        planes.append(np.packbits(share > _CLIPPED * 255).tobytes())
    return b"".join(planes)


def _rgb(image: Any, image_module: Any, done: list[str]) -> Pixels:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        wide = image.convert("RGBA")
        if np.asarray(wide)[..., 3].min() < 255:
            done.append("has transparent parts, which were put on white")
        image = image_module.alpha_composite(image_module.new("RGBA", wide.size, "white"), wide)
    elif image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, np.float64)
        scaled = values / (257.0 if image.mode != "F" else max(values.max() / 255.0, 1e-9))
        image = image_module.fromarray(np.clip(scaled, 0, 255).round().astype(np.uint8))
        done.append("has more than 8 bits a channel, which were scaled to 8")
    return np.asarray(image.convert("RGB"), np.uint8)


def _listed_captions(folder: Path, *, strict: bool = True) -> dict[str, str]:
    """Captions by path from metadata.jsonl. If `strict`, raises DataError that names the unusable lines."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        return {}
    problems = RowProblems(f"{file} cannot be used")
    found: dict[str, str] = {}
    for source, record in text_records(Location(file), problems):
        name = record.get("file_name")
        caption = next((text for column in CAPTION_COLUMNS if isinstance(text := record.get(column), str)), None)
        if not isinstance(name, str) or caption is None:
            columns = " or ".join(CAPTION_COLUMNS)
            problems.add(source, f"it has {', '.join(record) or 'nothing'}; expected file_name and {columns}.")
        elif not (folder / name).is_file():
            problems.add(source, f"it names {name}, which does not exist in {folder}.")
        elif Path(name).suffix.lower() not in _readable():
            problems.add(source, f"it names {name}, of an unsupported format; convert it to JPEG or PNG.")
        else:
            found[Path(name).as_posix()] = caption
    if strict:
        problems.raise_if_any()
    return found


def _text(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise PackageMissing(f"Pictures need Pillow, which is not installed ({error})", "lorakeet[images]") from error
    return Image, ImageOps


def png_of(pixels: Pixels, *, largest: int | None = None) -> bytes:
    """The picture as PNG, scaled down so that no side exceeds `largest`."""
    image_module, _ = _pillow()
    image = image_module.fromarray(np.ascontiguousarray(pixels))
    if largest is not None and max(image.size) > largest:
        image.thumbnail((largest, largest), image_module.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def is_table(name: str) -> bool:
    """True if `name` is a table with pictures, false for a folder of picture files."""
    base, mark, _ = name.partition("#")
    folder = Path(base).expanduser()
    if folder.is_dir():
        return bool(mark) or any((folder / file).exists() for file in SAVED)
    return name.lower().endswith(".parquet") or name.startswith(HUB) or is_hub_id(name)


def unpack_pictures(name: str, into: Path, *, limit: int | None = None) -> Path:
    """Writes the pictures of the table `name`, byte for byte, and their captions in metadata.jsonl to a folder below `into`.

    The picture is in the first column that has one (datasets' image feature, or plain bytes), the caption in text, caption or
    prompt. The folder's name is a hash of its content. DataError names rows without a picture; EnvironmentProblem: a full disk.
    """
    unpacked = into / f"unpacking-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    try:
        erase(unpacked)
        with written_whole(unpacked) as made:
            digest = _unpack(name, made, limit)
        folder = into / digest
        if folder.exists():
            erase(unpacked)
        else:
            unpacked.rename(folder)
    except OSError as error:
        if error.errno not in (*FULL, errno.EACCES, errno.EROFS):
            raise
        raise EnvironmentProblem(
            f"The pictures of {name} could not be unpacked into {into}: {error.strerror or error}. Free some space, or set "
            "LORAKEET_CACHE to a folder that can be written."
        ) from error
    return folder


def _unpack(name: str, into: Path, limit: int | None) -> str:
    """Writes the pictures and captions of a table to the new folder `into`; a hash of their content."""
    into.mkdir()
    found, lines = hashlib.sha256(), []
    for number, (content, caption) in enumerate(_pictures(name, limit), start=1):
        ending = next((ending for magic, ending in _MAGIC.items() if content.startswith(magic)), ".png")
        file = f"{number:06}{ending}"
        write_new(into / file, content)
        line = json.dumps({"file_name": file, **({} if caption is None else {"text": caption})}, ensure_ascii=False)
        lines += [] if caption is None else [line]
        found.update(hashlib.sha256(content).digest() + line.encode("utf-8", "surrogatepass"))
    write_new(into / "metadata.jsonl", "\n".join(lines).encode("utf-8"))
    return found.hexdigest()[:32]


def _pictures(name: str, limit: int | None) -> Iterator[tuple[bytes, str | None]]:
    """Yields the bytes and the caption of each row; None for no caption."""
    problems = RowProblems(f"{name} cannot be used as it is")
    column: str | None = None
    for record in islice(read_records(name, problems, _PICTURES), limit):
        if column is None:
            column = next((key for key, value in record.values.items() if _bytes_of(value) is not None), None)
            if column is None:
                raise DataError(
                    f"{record.source} has no picture in {', '.join(record.values)}; expected a column with the bytes of picture "
                    "files, such as datasets' Image feature."
                )
        content = _bytes_of(record.values.get(column))
        if content is None:
            problems.add(record.source, f"no picture in the column {column}.")
            continue
        caption = next((value for key in CAPTION_COLUMNS if isinstance(value := record.values.get(key), str)), None)
        yield content, caption
    problems.raise_if_any()
    if column is None:
        raise DataError(f"{name} has no rows; expected rows with a picture and a caption.")


def _bytes_of(value: Any) -> bytes | None:
    """The bytes of a picture file: plain, in datasets' {bytes, path}, or as PNG of a picture that datasets has opened."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes) and value:
        return value
    if hasattr(value, "save") and hasattr(value, "getexif"):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG", exif=value.getexif())
        return buffer.getvalue()
    return None
