"""A base model's weights on disk, one tensor at a time, an adapter added where there is one."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lora_cli import lora
from lora_cli.base_folder import require_whole, weight_files
from lora_cli.errors import AdapterError
from lora_cli.loading import name_in
from lora_cli.lora_linear import is_conv1d
from lora_cli.magnitude import row_norms
from lora_cli.quantised import Kind, round_trip
from lora_cli.tensor_file import TensorInfo, read_all_infos, read_rows, read_tensor
from lora_cli.update import Update


class Weights:
    """A base model's tensors by their names in its files; `adapted` gives the layer's path of those that change.

    `quantised` gives that of those which are not taken as they are stored, but as quantisation leaves them; `tuned`
    are taken in the place of the base's.
    """

    def __init__(
        self,
        folder: Path,
        skeleton: nn.Module,
        update: Update | None = None,
        quantization: Kind | None = None,
        tuned: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        """Read the headers of a model's files, and find the tensor of every layer that is changed.

        Raises ModelError where a file is not whole; AdapterError where a changed layer has no tensor, or one of another
        shape.
        """
        require_whole(folder)
        self.infos: Mapping[str, TensorInfo] = {**read_all_infos(weight_files(folder)), **(tuned or {})}
        self.update, self.quantization = update, quantization
        self.adapted: dict[str, str] = {}
        self._factors: dict[str, Tensor] = {}
        self._whole: tuple[str, Tensor] | None = None  # the last update that is not made row by row
        self._prefix = getattr(skeleton, "base_model_prefix", "")
        self._left: tuple[str, Tensor] | None = None  # the last tensor that was quantised
        linear = lora.linear_modules(skeleton)
        self._transposed = {path for path, layer in linear.items() if is_conv1d(layer)}
        paths = lora.find_targets(skeleton, "all-linear") if quantization else []
        self.quantised = {name: path for path in paths if (name := self.name_of(f"{path}.weight"))}
        problems = []
        for path in update.paths if update else ():
            name = self.name_of(f"{path}.weight")
            if name is None:
                problems.append(f"{path}: is adapted, and the base's files have no {path}.weight.")
                continue
            self.adapted[name] = path
            expected, found = update.shape(path) if update else (), self.infos[name].shape
            if path in self._transposed:
                expected = expected[::-1]
            if found != expected:
                problems.append(f"{path}: the adapter's is {expected}, and {name} in the base's files is {found}.")
        if problems:
            raise AdapterError("The adapter does not fit this base model's files.", *problems)

    def name_of(self, parameter: str) -> str | None:
        """Return the name in the files of a model's parameter; None where they have none of that name."""
        return name_in(self.infos, parameter, self._prefix)

    def change(self, name: str, before: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """Return what is added to rows of an adapted tensor, in its own layout ([in, out] for Conv1D), float32.

        `before` are those rows as they are in the base.
        """
        assert self.update is not None, "only adapted tensors change"
        path = self.adapted[name]
        if self.update.method == "linear":
            down, up = self.update.factors(path)
            product = down.T[begin:end] @ up.T if path in self._transposed else up[begin:end] @ down
            if (factor := self._factor(name)) is None:
                return product
            factor = factor if path in self._transposed else factor[begin:end, None]
            return (factor - 1) * before + factor * product
        if self._whole is None or self._whole[0] != path:
            self._whole = path, self.update.matrix(path)
        matrix = self._whole[1]
        return (matrix.T if path in self._transposed else matrix)[begin:end]

    def output(self, path: str, x: Tensor, output: Tensor) -> Tensor:
        """Return what an adapted layer adds to its base's output [..., out] for an input [..., in]."""
        assert self.update is not None, "only adapted layers change"
        added = self.update.output(path, x)
        if (factor := self._factor(str(self.name_of(f"{path}.weight")))) is None:
            return added
        bias = self.name_of(f"{path}.bias")
        return (factor - 1) * (output if bias is None else output - self.rows(bias).float()) + factor * added

    def _factor(self, name: str) -> Tensor | None:
        """Return what a DoRA adapter multiplies the outputs [out] of W + scale * B A by; None of other adapters."""
        assert self.update is not None, "only adapted tensors change"
        path, adapter = self.adapted[name], self.update.adapters[0]
        if path not in adapter.magnitudes:
            return None
        if path not in self._factors:
            weight, (down, up) = self.rows(name), self.update.factors(path)
            norms = row_norms(weight.T if path in self._transposed else weight, down, up, 1.0)
            self._factors[path] = adapter.magnitudes[path] / norms
        return self._factors[path]

    def rows(self, name: str, begin: int = 0, end: int | None = None, room: bytearray | None = None) -> Tensor:
        """Return rows of a tensor of the base, all of a scalar; read into `room`, where that is given."""
        info = self.infos[name]
        if self.quantization is None or name not in self.quantised:
            return read_rows(info, begin, (info.shape[0] if info.shape else 1) if end is None else end, room)
        if self._left is None or self._left[0] != name:
            self._left = None  # one at a time
            weight, transposed = read_tensor(info), self.quantised[name] in self._transposed
            left = round_trip(self.quantization, weight.T if transposed else weight)
            self._left = name, left.T if transposed else left
        return self._left[1][begin:end]

    def read(self, name: str) -> Tensor:
        """Read one tensor: that of the base, or what adapters make of it, in float32, where it is adapted."""
        tensor = self.rows(name)
        return tensor.float() + self.change(name, tensor.float()) if name in self.adapted else tensor
