"""Which pictures are images, and to which image each of the others belongs, by their names alone."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from latentdm.data.decode import EXTENSIONS
from latentdm.data.names import (
    IMAGE_FOLDERS,
    IMAGE_MARKS,
    LIKE,
    MARKS,
    Guess,
    ending_of,
    folded,
    guesses,
    is_doubtful,
    stem_of,
)


class Names:
    """Names of files, to be found as people write them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._unfolded: list[str] = []
        self._folded: dict[str, str | None] = {}
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """One more name."""
        if name not in self._names:
            self._names.add(name)
            self._unfolded.append(name)

    def find(self, name: str) -> str | None:
        """The file of that name; but for case and Unicode form where it is the only one."""
        if name in self._names:
            return name
        while self._unfolded:  # most often nobody asks for it
            key = folded(known := self._unfolded.pop())
            self._folded[key] = None if key in self._folded else known
        return self._folded.get(folded(name))


class Stems(Names):
    """Images by their paths without endings.

    Args:
        names: of the images.
        parents: paths of folders that hold a folder of masks, to look for images beside it.
    """

    def __init__(self, names: Iterable[str], parents: Collection[str] = ()) -> None:
        super().__init__(map(stem_of, names))
        self._beside: dict[str, dict[str, dict[str, str]]] = {}  # parent → folder in it → path inside → stem
        for stem in self._names if parents else ():
            *folders, last = stem.split("/")
            for place, folder in enumerate([*folders, ""]):
                parent = "/".join([*folders[:place], ""]) if place else ""
                if parent in parents:
                    inside = folded("/".join([*folders[place + 1 :], last]))
                    self._beside.setdefault(parent, {}).setdefault(folder, {})[inside] = stem

    def of(self, guess: Guess) -> str | None:
        """The image that a picture belongs to, if the guess is right.

        Of the folders beside its own that may hold it, it is the one of images there is, or the one that is called so.
        """
        for stem in _names(guess.stem):
            if (found := self.find(stem)) is not None:
                return found
        if guess.apart is None:
            return None
        parent, inside = guess.apart
        folders = self._beside.get(parent, {})
        images = sorted(folder for folder in folders if folded(folder) in IMAGE_FOLDERS) or sorted(folders)
        if guess.kind == LIKE:  # any of them will do
            images = sorted(folders)
        elif len(images) != 1:
            return None
        possible = (folders[folder].get(folded(name)) for name in _names(inside) for folder in images)
        return next(filter(None, possible), None)


@dataclass
class Matches:
    """What pictures are.

    Attributes:
        images: their names, sorted.
        stems: the same, to be found.
        pairs: kind, stem of the image and name of each picture that belongs to one.
        orphans: kind and name of those that are no images, and belong to none.
        doubtful: images that are called like a mask.
    """

    images: list[str]
    stems: Stems
    pairs: list[tuple[str, str, str]] = field(default_factory=list)
    orphans: list[tuple[str, str]] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)


def match(names: Iterable[str], certain: Collection[str] = ()) -> Matches:
    """Tell images from pictures that belong to them.

    Args:
        names: of the pictures.
        certain: those that are images whatever they are called.
    """
    candidates: dict[str, list[Guess]] = {}
    images: list[str] = []
    for name in names:
        if name not in certain and (guessed := list(guesses(name))):
            candidates[name] = guessed
        else:
            images.append(name)
    parents = {guess.apart[0] for guessed in candidates.values() for guess in guessed if guess.apart}
    matches = Matches(images, Stems(images, parents))
    # Shorter ones first: a picture that turns out to be an image may have a mask of its own.
    for name in sorted(candidates, key=lambda name: (len(name), name)):
        guessed = candidates[name]
        pair = next(((guess.kind, stem) for guess in guessed if (stem := matches.stems.of(guess)) is not None), None)
        if pair is not None:
            matches.pairs.append((*pair, name))
        elif (sure := next((guess.kind for guess in guessed if guess.certain), None)) is not None:
            matches.orphans.append((sure, name))
        else:
            images.append(name)
            matches.stems.add(stem_of(name))
            if any(guess.kind in MARKS for guess in guessed) or is_doubtful(name):
                matches.doubtful.append(name)
    images.sort()
    matches.pairs.sort(key=lambda pair: pair[2])
    matches.orphans.sort(key=lambda orphan: orphan[1])
    return matches


def _names(stem: str) -> Iterator[str]:
    """What the image may be called exactly: with its ending, with a mark of its own, or with a separator at its end."""
    yield stem
    if ending_of(stem) in EXTENSIONS:
        yield stem_of(stem)
    for separator in "_-":
        yield from (f"{stem}{separator}{mark}" for mark in IMAGE_MARKS)
        yield f"{stem}{separator}"
