"""What is done to the captions of a batch: dropout, tags in another order, templates."""

from collections.abc import Sequence
from typing import Any

import torch

from latentdm.batch import CAPTION, describe
from latentdm.draws import Draws, check_probability
from latentdm.errors import UserError

PLACE = "{caption}"


class Captions:
    """Changes captions, each by its own sample's draws, on the host before the batch is sent to the device.

    In this order: of several captions of an image one is drawn, its tags are shuffled, it is put into a template, and
    at last it is dropped or not. Outside training the first caption and the first template are taken, and nothing is
    shuffled or dropped.

    Args:
        dropout: probability that a caption becomes empty, template and all: classifier-free guidance is trained by it.
        shuffle_tags: bring the parts between separators into another order.
        keep_tags: how many parts stay in front, in their order: the subject, or a trigger word.
        separator: what tags are parted by; blanks around a tag go, and one follows each separator.
        templates: texts with ``{caption}`` in them, of which each sample draws one.

    Raises:
        ValueError: a setting is out of range, or a template has no place for the caption; when called: what the batch
            holds are no strings.

    Example:
        >>> captions = Captions(shuffle_tags=True, templates=["a photo of {caption}"])
        >>> captions(["sks dog, grass, sun, sky"], Draws(seed=0, epoch=0, ids=[7]), training=False)
        ['a photo of sks dog, grass, sun, sky']
    """

    def __init__(
        self,
        dropout: float = 0.0,
        shuffle_tags: bool = False,
        keep_tags: int = 1,
        separator: str = ",",
        templates: Sequence[str] = (),
    ) -> None:
        self.dropout = check_probability("Captions", "dropout", dropout)
        if type(keep_tags) is not int or keep_tags < 0:
            raise UserError(f"Captions: keep_tags must be an integer of at least 0, got {keep_tags!r}")
        if not separator:
            raise UserError("Captions: separator must not be empty; tags are usually parted by ','")
        if isinstance(templates, str):
            raise UserError(f"Captions: templates must be a list of texts, got {templates!r}; for one: [{templates!r}]")
        for template in templates:
            if PLACE not in template:
                raise UserError(f"Captions: templates: {template!r} has no {PLACE} in it, where the caption goes")
        self.shuffle_tags = shuffle_tags
        self.keep_tags = keep_tags
        self.separator = separator
        self.templates = list(templates)

    def __call__(
        self, captions: Sequence[str | Sequence[str] | None], draws: Draws, training: bool = True
    ) -> list[str]:
        """The captions as the model is to see them.

        Args:
            captions: one a sample: a text, several of which one is drawn, or None for an empty one.
            draws: the random numbers of the samples.
            training: draw; otherwise take what comes first.
        """
        if isinstance(captions, str) or not isinstance(captions, Sequence):
            raise UserError(
                f"Captions: {CAPTION}: expected a list of strings, one an image, got {describe(captions)}; "
                f"name another key with keys={{{CAPTION}: …}}"
            )
        rows = draws.uniform("captions", 3).tolist()
        return [
            self._change(caption, row, draws.of([place]), training)
            for place, (caption, row) in enumerate(zip(captions, rows, strict=True))
        ]

    def _change(self, caption: str | Sequence[str] | None, row: list[float], draws: Draws, training: bool) -> str:
        several: list[Any] = list(caption) if isinstance(caption, list | tuple) else [caption or ""]
        if not all(isinstance(text, str) for text in several):
            raise UserError(f"Captions: {CAPTION}: expected strings, got {caption!r} for the sample {draws.ids[0]}")
        if training and row[0] < self.dropout:
            return ""
        text: str = several[int(row[1] * len(several)) if training else 0] if several else ""
        if self.shuffle_tags and training:
            text = self._shuffled(text, draws)
        if self.templates:
            text = self.templates[int(row[2] * len(self.templates)) if training else 0].replace(PLACE, text)
        return text

    def _shuffled(self, text: str, draws: Draws) -> str:
        tags = [tag.strip() for tag in text.split(self.separator)]
        kept, moved = tags[: self.keep_tags], tags[self.keep_tags :]
        if len(moved) > 1:
            order = torch.argsort(draws.uniform("tags", len(moved))[0]).tolist()
            moved = [moved[place] for place in order]
        return f"{self.separator} ".join(kept + moved)
