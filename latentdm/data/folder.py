"""A folder of images, with a mask beside each or without masks.

Shapes: ``c h w``; ``H W`` is an image as it lies in its file.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from latentdm.data.base import PixelDataModule, PixelDataset, Sample, check_at_least
from latentdm.data.files import ImageFile, find_images, split_files
from latentdm.data.images import RESAMPLE, image_to_tensor, read_image, read_mask, resize_mask
from latentdm.randomness import sample_generator

MASKS = ("auto", "require", "ignore")


class FolderImages(PixelDataset):
    """Square crops of image files.

    Args:
        files: the images.
        size: side of the square in pixels: the short side of each image is resized to it, the long side cropped.
        random_crop: crop anywhere, drawn for each sample and epoch; otherwise in the centre.
        flip: mirror half of the samples.
        alpha: keep transparency as a fourth channel.
        seed: crops and mirroring follow from it.
        owner: the class that an error names.
    """

    def __init__(
        self, files: Sequence[ImageFile], size: int, random_crop: bool, flip: bool, alpha: bool, seed: int, owner: str
    ) -> None:
        self.files = files
        self.size = size
        self.random_crop = random_crop
        self.flip = flip
        self.alpha = alpha
        self.seed = seed
        self.owner = owner

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def sample(self, place: int, epoch: int) -> Sample:
        """An image, ``pixels`` uint8 ``3 size size`` (4 with alpha), and its ``mask`` in the same geometry.

        Raises:
            ValueError: the file cannot be read.
        """
        file = self.files[place]
        image = read_image(file.path, self.owner)
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        # Alpha is taken off first: Pillow resizes RGBA premultiplied, which blackens what transparency hides.
        layers = [image_to_tensor(image.convert("RGB").resize((width, height), RESAMPLE))]
        if self.alpha:
            opaque = torch.full((1, image.height, image.width), 255, dtype=torch.uint8)
            alpha = image_to_tensor(image.getchannel("A")) if image.mode == "RGBA" else opaque
            layers.append(resize_mask(alpha, height, width))
        if file.mask is not None:
            mask = resize_mask(read_mask(file.mask, self.owner), image.height, image.width)
            layers.append(resize_mask(mask, height, width))
        # One tensor of all layers, so that no step can move the mask against the image.
        stack = self._crop(torch.cat(layers), file.index, epoch)
        sample: Sample = {"pixels": stack, "index": file.index, "name": file.name}
        if file.mask is not None:
            sample["pixels"], mask = stack[:-1], stack[-1:]
            # A crop that only meets the faintest edge of a soft mask would read as a mask of zeros and ones.
            sample["mask"] = mask.masked_fill(mask == 1, 0)
        return sample

    def _crop(self, stack: Tensor, index: int, epoch: int) -> Tensor:
        rooms = [side - self.size for side in stack.shape[-2:]]
        top, left = (room // 2 for room in rooms)
        if self.random_crop:
            generator = sample_generator(self.seed, epoch, index, "crop")
            top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in rooms)
        stack = stack[:, top : top + self.size, left : left + self.size]
        if self.flip and torch.rand((), generator=sample_generator(self.seed, epoch, index, "flip")) < 0.5:
            stack = stack.flip(-1)
        return stack.contiguous()


class ImageFolderData(PixelDataModule):
    """The images of a folder and of the folders inside it, as squares of one size.

    The short side of each image is resized to ``size`` (Lanczos) and the long side cropped: at a place drawn for each
    sample and epoch in training, in the centre otherwise. EXIF orientation is applied; gray, palette, CMYK and 16-bit
    images become 8-bit RGB. Testing takes the validation images, predicting all images, each in order.

    The mask of ``a/b.jpg`` is ``a/b-mask.png`` or ``masks/a/b.png`` (any image ending); white means repaint. All images
    have a mask or none has. A mask may have another size than its image. It is resized to it and then along with it,
    both times bilinearly without antialias, as the encoders do; gray levels stay, because rounding comes later.

    ``index`` is an image's place among all images of ``root``, sorted by name; those of ``val_root`` follow.

    Args:
        root: the folder.
        size: side of the square images in pixels.
        batch_size: images a batch, on each device.
        val_share: share of the images that validate, in 0…1; 0: no validation. A hash of its name decides for each
            image, so that it stays on its side when images are added. Without effect where ``val_root`` is given.
        val_root: a folder of validation images; all of ``root`` then trains, apart from ``val_root`` inside it.
        masks: ``"auto"`` takes the masks where there are some, ``"require"`` insists on them, ``"ignore"`` leaves them.
        alpha: keep transparency as a fourth channel of ``pixels`` (255 = opaque), for a mask source to read. It is
            resized like a mask.
        flip: mirror half of the training images, drawn for each sample and epoch.
        num_workers: processes that read images.
        seed: the order and the crops follow from it.

    Raises:
        ValueError: a setting is out of range or a folder is missing; in ``setup``: no images, or masks that do not
            match them; while reading: a broken file.

    Example:
        ``ImageFolderData("photos", size=512, batch_size=8)`` gives batches of ``pixels`` uint8 ``8 3 512 512``,
        ``index``, ``name`` and, with masks beside the images, ``mask`` uint8 ``8 1 512 512``.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 512,
        batch_size: int = 16,
        val_share: float = 0.1,
        val_root: str | Path | None = None,
        masks: str = "auto",
        alpha: bool = False,
        flip: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_at_least("ImageFolderData", "size", size, 1)
        if not isinstance(val_share, int | float) or not 0 <= val_share < 1:
            raise ValueError(f"ImageFolderData: val_share must be at least 0 and below 1, got {val_share!r}")
        if masks not in MASKS:
            raise ValueError(f"ImageFolderData: masks must be one of {', '.join(MASKS)}, got {masks!r}")
        self.root = _folder("root", root)
        self.size = size
        self.val_share = val_share
        self.val_root = None if val_root is None else _folder("val_root", val_root)
        self.masks = masks
        self.alpha = alpha
        self.flip = flip

    def setup(self, stage: str | None = None) -> None:
        """List the files and set the datasets, whatever the stage.

        Raises:
            ValueError: no images, or masks that do not match them; it names the file.
        """
        files = find_images(self.root, "ImageFolderData", self.masks, skip=self.val_root)
        if self.val_root is None:
            train, val = split_files(files, self.val_share)
        else:
            train, val = files, find_images(self.val_root, "ImageFolderData", self.masks)
            val = [replace(file, index=len(files) + file.index) for file in val]
            files = train + val
        self.train_set = self._dataset(train, training=True)
        self.val_set = self.test_set = self._dataset(val, training=False) if val else None
        self.predict_set = self._dataset(files, training=False)

    def _dataset(self, files: list[ImageFile], training: bool) -> FolderImages:
        flip = self.flip and training
        return FolderImages(files, self.size, training, flip, self.alpha, self.seed, "ImageFolderData")


def _folder(setting: str, value: str | Path) -> Path:
    path = Path(value).expanduser()
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise ValueError(
            f"ImageFolderData: {setting}={str(value)!r} {what}; give a folder of images (searched from {Path.cwd()})"
        )
    return path
