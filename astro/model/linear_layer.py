"""A linear layer of a block: its name in files, and where its weight lies in a parameter of the model.

Mostly the parameter is the weight. Some classes hold it transposed, and the weights of all experts of a layer are one
parameter [E, rows, columns] or [E, columns, rows], gate and up over each other or row by row in turn.
"""

import dataclasses

import torch

__all__ = ["LinearLayer"]


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """A linear layer inside a block.

    Attributes:
        name: of the layer in the model; for an expert's the name under which it is stored.
        key: of the checkpoint tensor that holds its weight, alone or with others.
        rows: output size.
        columns: input size.
        stem: checkpoint name under which its packed tensors are stored.
        parameter: name of the model's parameter that holds its weight.
        expert: index of the expert it belongs to; None outside experts.
        first: its first row in the parameter.
        step: from one of its rows to the next.
        transposed: whether the parameter holds columns before rows.
        bias: checkpoint tensor of all experts' biases that holds its bias, in the order of the parameter; None for
            none, and outside experts, where a bias is a tensor of its own.
    """

    name: str
    key: str
    rows: int
    columns: int
    stem: str
    parameter: str
    expert: int | None = None
    first: int = 0
    step: int = 1
    transposed: bool = False
    bias: str | None = None

    @classmethod
    def plain(cls, name: str, key: str, rows: int, columns: int, transposed: bool = False) -> "LinearLayer":
        """A layer whose weight is a parameter and a tensor of its own."""
        stem = key.removesuffix(".weight")
        return cls(name, key, rows, columns, stem, f"{name}.weight", transposed=transposed)

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Its weight [rows, columns] in the parameter, or in a tensor of the parameter's layout. No copy."""
        weight = parameter if self.expert is None else parameter[self.expert]
        return (weight.T if self.transposed else weight)[self._rows]

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its weight [rows, columns] in the checkpoint tensor `key`. No copy."""
        alone = self.expert is not None and tensor.ndim == 2
        return tensor if alone else self.view(tensor)

    def stored_bias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its bias [rows] in the checkpoint tensor `bias` [E, rows of all]. No copy."""
        return tensor[self.expert][self._rows]

    @property
    def is_fused(self) -> bool:
        """Whether its checkpoint tensor holds the weights of all experts."""
        return self.expert is not None and self.key != f"{self.stem}.weight"

    @property
    def _rows(self) -> slice:
        return slice(self.first, self.first + self.rows * self.step, self.step)
