"""What is done to the captions of a batch: dropout, tags in another order, templates."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from latentdm.batch import CAPTION
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.stages import Stage
from latentdm.tensors import describe
from latentdm.validation import Check

PLACEHOLDER = "{caption}"


class Captions(Stage):
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
        UserError: a setting is out of range, or a template without ``{caption}``; when called: what the batch holds
            are no strings.

    Example:
        >>> captions = Captions(shuffle_tags=True, templates=["a photo of {caption}"])
        >>> draws = Draws(seed=0, epoch=0, ids=[7], training=False)
        >>> captions({"caption": ["sks dog, grass, sun, sky"]}, draws)
        {'caption': ['a photo of sks dog, grass, sun, sky']}
    """

    reads = writes = (CAPTION,)
    on_host = True

    def __init__(
        self,
        dropout: float = 0.0,
        shuffle_tags: bool = False,
        keep_tags: int = 1,
        separator: str = ",",
        templates: Sequence[str] = (),
    ) -> None:
        check = Check("Captions")
        self.dropout = check.probability("dropout", dropout)
        self.keep_tags = check.integer("keep_tags", keep_tags, 0)
        if not separator:
            raise UserError("Captions: separator must not be empty; tags are usually parted by ','")
        if isinstance(templates, str):
            raise check.fail("templates", "a list of texts", templates, f"for one: [{templates!r}]")
        for template in templates:
            if PLACEHOLDER not in template:
                raise UserError(f"Captions: templates: {template!r} has no {PLACEHOLDER} in it, where the caption goes")
        self.shuffle_tags = shuffle_tags
        self.separator = separator
        self.templates = list(templates)

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """The captions as the model is to see them.

        Args:
            batch: ``caption``, one a sample: a text, several of which one is drawn, or None for an empty one.
            draws: the random numbers of the samples; outside training what comes first is taken.

        Returns:
            ``caption``, a list of ``b`` texts.

        Raises:
            UserError: ``caption`` is no list, not one a sample, or holds something else than texts.
        """
        captions = batch[CAPTION]
        if isinstance(captions, str) or not isinstance(captions, Sequence) or len(captions) != len(draws.ids):
            held = f"{len(captions)} for {len(draws.ids)} images" if isinstance(captions, list | tuple) else None
            raise UserError(
                f"Captions: {CAPTION}: expected a list of strings, one an image, got {held or describe(captions)}; "
                f"name another key with keys={{{CAPTION}: …}}"
            )
        numbers = draws.uniform("captions", 3).tolist()
        changed = [
            self._change(caption, row, draws.of([number]))
            for number, (caption, row) in enumerate(zip(captions, numbers, strict=True))
        ]
        return {CAPTION: changed}

    def possible(self, caption: str | Sequence[str] | None) -> list[str]:
        """All texts that may come of a caption; of shuffled tags their own order alone."""
        several: list[Any] = list(caption) if isinstance(caption, list | tuple) else [caption or ""]
        texts = [
            template.replace(PLACEHOLDER, text) for template in self.templates or [PLACEHOLDER] for text in several
        ]
        return [*texts, *([""] if self.dropout else [])]

    def _change(self, caption: str | Sequence[str] | None, row: Sequence[float], draws: Draws) -> str:
        several: list[Any] = list(caption) if isinstance(caption, list | tuple) else [caption or ""]
        if not all(isinstance(text, str) for text in several):
            raise UserError(f"Captions: {CAPTION}: expected strings, got {caption!r} for the sample {draws.ids[0]}")
        dropped, *chosen = row if draws.training else (1.0, 0.0, 0.0)
        if dropped < self.dropout:
            return ""
        text: str = several[int(chosen[0] * len(several))] if several else ""
        if self.shuffle_tags and draws.training:
            text = self._shuffle(text, draws)
        if self.templates:
            text = self.templates[int(chosen[1] * len(self.templates))].replace(PLACEHOLDER, text)
        return text

    def _shuffle(self, text: str, draws: Draws) -> str:
        tags = [tag.strip() for tag in text.split(self.separator)]
        kept, moved = tags[: self.keep_tags], tags[self.keep_tags :]
        if len(moved) > 1:
            order = torch.argsort(draws.uniform("tags", len(moved))[0]).tolist()
            moved = [moved[number] for number in order]
        return f"{self.separator} ".join(kept + moved)
