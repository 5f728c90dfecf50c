"""Outputs of the vision tower, computed once for each image and shared by methods that leave the tower alone.

What a tower computes for an image can depend in its last bits on the images beside it in the batch: matrix products of
other sizes add up in another order. So under sharing each image goes through the tower alone, whether it is kept
afterwards or not. Its features then depend on the image, and on nothing that was asked before or beside it. Where none
are kept, an image that stands several times in a batch goes through the tower as often.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

Entry = Mapping[str, Tensor]
DISK = 4
"""Bytes on disk for each byte in memory."""


class FeatureStore:
    """Tensors by key: in memory up to ``limit`` bytes; what was not used for longest goes to disk.

    Parameters
    ----------
    limit
        Bytes in memory, 0 to store nothing. On disk there may be ``DISK`` times as much; what comes then is dropped.
    folder
        Where files go, in a folder of this process's own that :meth:`close` removes. None: nothing goes to disk.
    identity
        Everything but the image that decides about its features: checkpoint, dtype, device, versions.
    keep
        Leave what was computed in ``folder``, under ``identity``, and start from what an earlier run left there.
    say
        Called with one line where a file is damaged or cannot be written; such features are computed again.

    ``computed`` and ``reused`` count images: those that went through the tower, and those whose features were there
    before the batch that asked for them. Files are safetensors named by key and SHA-256, which is checked when they are
    read.
    """

    def __init__(
        self,
        limit: int,
        folder: Path | None = None,
        *,
        identity: str = "",
        keep: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.limit, self.identity, self.keep, self.say = limit, identity, keep, say
        self.computed = self.reused = self.used = self.on_disk = 0
        self._root = folder if limit else None
        self._folder: Path | None = None
        self._memory: OrderedDict[str, Entry] = OrderedDict()
        self._files: dict[str, Path] = {}
        if keep and self._root is not None:
            for file in (self._root / _sha(identity.encode())[:16]).glob("*.safetensors"):
                self._files[file.stem.partition("-")[0]] = file
                self.on_disk += file.stat().st_size

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory, and remove the files unless they are to be kept."""
        if self.keep:
            for key, entry in self._memory.items():
                self._spill(key, entry)
        elif self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._memory.clear()
        self._files.clear()
        self._folder, self.used, self.on_disk = None, 0, 0

    def key(self, *parts: str | bytes) -> str:
        """Name of what ``parts``, with the identity, decide."""
        digest = hashlib.sha256(self.identity.encode())
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()[:32]

    def get(self, key: str) -> Entry | None:
        """What is stored under ``key``, on the host; None if nothing is."""
        entry = self._memory.get(key)
        if entry is not None:
            self._memory.move_to_end(key)
            return entry
        entry = self._read(key)
        if entry is not None:
            self.put(key, entry)
        return entry

    def put(self, key: str, entry: Entry) -> None:
        """Store ``entry``; tensors of a device are copied to the host."""
        if key in self._memory or not self.limit:
            return
        self._memory[key] = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.items()}
        self.used += _bytes(self._memory[key])
        while self.used > self.limit:
            oldest, left = self._memory.popitem(last=False)
            self.used -= _bytes(left)
            self._spill(oldest, left)

    # ---- disk -------------------------------------------------------------------------------------------------

    def _spill(self, key: str, entry: Entry) -> None:
        if self._root is None or key in self._files or self.on_disk + _bytes(entry) > DISK * self.limit:
            return
        data = safetensors.torch.save(dict(entry))
        try:
            folder = self._own_folder(self._root)
            file = folder / f"{key}-{_sha(data)}.safetensors"
            part = file.with_suffix(f".{secrets.token_hex(6)}.part")
            part.write_bytes(data)
            part.replace(file)
        except OSError as error:
            self.say(f"image features stay in memory, cannot write to {self._root}: {error.strerror or error}")
            self._root = None
            return
        self._files[key] = file
        self.on_disk += len(data)

    def _read(self, key: str) -> Entry | None:
        file = self._files.get(key)
        if file is None:
            return None
        data = b""
        with suppress(OSError):
            data = file.read_bytes()
        with suppress(SafetensorError):
            if _sha(data) == file.stem.partition("-")[2]:
                return safetensors.torch.load(data)
        self.say(f"damaged file of image features, computing them again: {file}")
        del self._files[key]
        self.on_disk -= len(data)
        file.unlink(missing_ok=True)
        return None

    def _own_folder(self, root: Path) -> Path:
        if self._folder is None and self.keep:
            self._folder = root / _sha(self.identity.encode())[:16]
            self._folder.mkdir(parents=True, exist_ok=True)
        elif self._folder is None:
            root.mkdir(parents=True, exist_ok=True)
            _clear(root)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{socket.gethostname()}-{os.getpid()}-", dir=root))
        return self._folder


class SharedTower:
    """While active, stands for the vision ``tower``: what ``store`` has of an image is not computed again.

    ``seen()`` returns what else is read of the tower's latest run, on one image, and ``recall`` is handed the same for
    all images of a call, (N, …). Both are by name of part; ``parts`` names them.
    """

    def __init__(
        self,
        tower: nn.Module,
        store: FeatureStore,
        parts: tuple[str, ...],
        seen: Callable[[], Mapping[str, Entry]],
        recall: Callable[[Mapping[str, Entry]], None],
    ) -> None:
        self.tower, self.store, self.parts, self.seen, self.recall = tower, store, parts, seen, recall
        self._instance_forward: Any = None

    def __enter__(self) -> SharedTower:
        self._instance_forward = vars(self.tower).get("forward")
        self._forward = self.tower.forward
        self.tower.forward = self._run
        return self

    def __exit__(self, *error: Any) -> None:
        del self.tower.forward
        if self._instance_forward is not None:
            self.tower.forward = self._instance_forward

    def _run(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or pixel_values.ndim != 4:  # patches of all images in one sequence
            return self._forward(pixel_values, *args, **kwargs)
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}  # one entry an image
        options = {name: value for name, value in kwargs.items() if name not in tensors}
        about = repr(sorted(options.items()))
        fresh: dict[str, dict[str, Entry]] = {}
        images = []
        for number, pixels in enumerate(pixel_values.split(1)):
            own = {name: value[number : number + 1] for name, value in sorted(tensors.items())}
            given = [part for tensor in (pixels, *own.values()) for part in (_form(tensor), _raw(tensor))]
            name = self.store.key(about, *given)
            image = fresh.get(name)
            if image is None and (image := self._stored(name)) is not None:
                self.store.reused += 1
            elif image is None:
                image = self._compute(name, pixels, options | own)
                if self.store.limit:
                    fresh[name] = image
            images.append(image)
        together = {
            part: {
                key: torch.cat([image[part][key].to(pixel_values.device) for image in images])
                for key in images[0][part]
            }
            for part in ("output", *self.parts)
        }
        self.recall(together)
        return _output(together["output"])

    def _stored(self, name: str) -> dict[str, Entry] | None:
        image = {}
        for part in ("output", *self.parts):
            entry = self.store.get(self.store.key(name, part))
            if entry is None:
                return None
            image[part] = entry
        return image

    def _compute(self, name: str, pixels: Tensor, kwargs: dict[str, Any]) -> dict[str, Entry]:
        output = self._forward(pixels, **kwargs)
        self.store.computed += 1
        image = {"output": _tensors(output), **self.seen()}
        for part, entry in image.items():
            self.store.put(self.store.key(name, part), entry)
        return image


def _tensors(output: Any) -> Entry:
    """The hidden states that were asked for, by their number; the last one where none was, or it was among them."""
    states = output.hidden_states or (None,)
    chosen = {str(i): state for i, state in enumerate(states) if state is not None}
    if str(len(states) - 1) in chosen or not chosen:
        chosen["last"] = output.last_hidden_state
    return chosen | {"count": torch.tensor([len(states)])}


def _output(entry: Entry) -> BaseModelOutputWithPooling:
    states: Any = tuple(entry.get(str(i)) for i in range(int(entry["count"][0])))
    return BaseModelOutputWithPooling(last_hidden_state=entry.get("last"), hidden_states=states)


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype}{tuple(tensor.shape)}"


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _bytes(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _clear(root: Path) -> None:
    """Remove what processes of this machine left behind that ended without cleaning up."""
    for folder in root.glob(f"{socket.gethostname()}-*-*"):
        pid = folder.name.split("-")[-2]
        with suppress(ValueError, PermissionError):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
